"""The parallel plans of a model on a cluster: which there are, and which are valid.

A `Choice` is one plan: sizes of every parallel dimension, sharding, micro-batch, recomputation and
schedule. `PlanSpace` lists the values of each; `choices` enumerates their valid combinations and
counts why the others are not valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from simulator.errors import InputError, nearest, unknown_name
from simulator.experiment import Experiment
from simulator.model.spec import ModelSpec
from simulator.plan.memory import SHARDINGS
from simulator.schedules.registry import describe

#: Tensor parallelism beyond this has never paid: the largest NVLink domain is 72 accelerators.
MAX_TENSOR = 64
#: Context parallelism leaves at least this many tokens of a sequence per rank by default.
MIN_TOKENS = 1024
#: Micro-batches that are tried by default.
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full")
#: Families whose layers tensor and context parallelism do not constrain.
UNSHARDED = ("mlp", "traced")
SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-h1")


@dataclass(frozen=True, order=True)
class Choice:
    """One parallel plan for a given number of accelerators."""

    tensor: int
    context: int
    pipeline: int
    data: int
    virtual_stages: int
    expert: int
    expert_tensor: int
    micro_batch_size: int
    recompute: str
    sharding: str
    schedule: str
    sequence_parallel: bool

    def values(self) -> dict[str, Any]:
        """Dotted keys of the experiment."""
        return {
            "parallel.tensor": self.tensor,
            "parallel.context": self.context,
            "parallel.pipeline": self.pipeline,
            "parallel.data": self.data,
            "parallel.virtual_stages": self.virtual_stages,
            "parallel.expert": self.expert,
            "parallel.expert_tensor": self.expert_tensor,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.sharding": self.sharding,
            "parallel.schedule": self.schedule,
            "training.micro_batch_size": self.micro_batch_size,
            "training.recompute": self.recompute,
        }

    def experiment(self, base: Experiment) -> Experiment:
        """`base` under this plan."""
        parallel = dataclasses.replace(
            base.parallel,
            tensor=self.tensor,
            context=self.context,
            pipeline=self.pipeline,
            data=self.data,
            virtual_stages=self.virtual_stages,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            sequence_parallel=self.sequence_parallel,
            sharding=self.sharding,  # type: ignore[arg-type]
            schedule=self.schedule,
            stage_layers=None,
            pipeline_layout=None,
        )
        training = dataclasses.replace(
            base.training,
            micro_batch_size=self.micro_batch_size,
            recompute=self.recompute,  # type: ignore[arg-type]
        )
        return dataclasses.replace(base, parallel=parallel, training=training, jitter=None)

    def label(self) -> str:
        """The plan in a few words: sizes above 1, and what is not the default."""
        sizes = [
            f"{name}{size}"
            for name, size in (
                ("dp", self.data),
                ("cp", self.context),
                ("tp", self.tensor),
                ("pp", self.pipeline),
                ("vpp", self.virtual_stages),
                ("ep", self.expert),
                ("etp", self.expert_tensor),
            )
            if size > 1 or name in ("dp", "tp", "pp")
        ]
        return " ".join([*sizes, f"mb{self.micro_batch_size}", self.sharding, self.recompute])


@dataclass(frozen=True)
class PlanSpace:
    """Values of every dimension that are tried; `None` chooses those that suit the model."""

    tensor: tuple[int, ...] | None = None
    context: tuple[int, ...] | None = None
    pipeline: tuple[int, ...] | None = None
    virtual_stages: tuple[int, ...] | None = None
    expert: tuple[int, ...] | None = None
    expert_tensor: tuple[int, ...] | None = None
    micro_batch_size: tuple[int, ...] | None = None
    sharding: tuple[str, ...] = SHARDINGS
    recompute: tuple[str, ...] = RECOMPUTE
    schedule: tuple[str, ...] = SCHEDULES
    sequence_parallel: tuple[bool, ...] | None = None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, place: str = "space") -> PlanSpace:
        """Read lists (or single values) by name; raises `InputError`."""
        known = {item.name: item for item in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        items: list[Any]
        if not isinstance(mapping, Mapping):
            raise InputError("expected a mapping of dimensions to lists", place=place)
        for name, value in mapping.items():
            name = str(name).rpartition(".")[2]
            if name not in known:
                guess = nearest(name, known)
                hint = f"; did you mean {guess!r}?" if guess else ""
                raise InputError(
                    f"unknown dimension {name!r}{hint} (known: {', '.join(known)})", place=place
                )
            items = list(value) if isinstance(value, list | tuple) else [value]
            if not items:
                raise InputError("expected at least one value", place=f"{place}.{name}")
            wanted: type = int
            if name in ("sharding", "recompute", "schedule"):
                wanted = str
            elif name == "sequence_parallel":
                wanted = bool
            for item in items:
                right = isinstance(item, wanted) and isinstance(item, bool) == (wanted is bool)
                if not right or (wanted is int and int(item) < 1):
                    raise InputError(
                        f"expected {'positive integers' if wanted is int else wanted.__name__}, "
                        f"got {item!r}",
                        place=f"{place}.{name}",
                    )
                if name == "sharding" and item not in SHARDINGS:
                    raise unknown_name("sharding", item, SHARDINGS, place=f"{place}.{name}")
                if name == "recompute" and item not in RECOMPUTE:
                    raise unknown_name("recompute", item, RECOMPUTE, place=f"{place}.{name}")
                if name == "schedule":
                    describe(item)
            values[name] = tuple(dict.fromkeys(items))
        return cls(**values)


@dataclass
class Enumeration:
    """The valid choices, and how many others there were by reason."""

    choices: list[Choice] = field(default_factory=list)
    invalid: Counter[str] = field(default_factory=Counter)


def enumerate_choices(
    base: Experiment, model: ModelSpec, accelerators: int, space: PlanSpace
) -> Enumeration:
    """All combinations of the space that are valid for the model on `accelerators`.

    Raises
    ------
    InputError
        If the global batch is not given.
    """
    batch = base.training.global_batch_size
    if batch is None:
        raise InputError(
            "missing; plans are compared at the same global batch",
            place="training.global_batch_size",
        )
    sequence = base.training.sequence_length or model.max_seq
    found = Enumeration()
    invalid = found.invalid
    divisors = _divisors(accelerators)
    tensors = space.tensor or tuple(d for d in divisors if d <= MAX_TENSOR)
    for tensor in tensors:
        problem = _tensor_problem(model, tensor)
        if accelerators % tensor:
            problem = "tensor does not divide the accelerators"
        if problem:
            invalid[problem] += 1
            continue
        contexts = space.context or tuple(_powers(max(1, sequence // MIN_TOKENS)))
        for context in contexts:
            if accelerators % (tensor * context):
                invalid["tensor x context does not divide the accelerators"] += 1
                continue
            if context > 1 and (model.family in UNSHARDED or sequence % context):
                invalid["context does not divide the sequence"] += 1
                continue
            for sequence_parallel in _sequence_parallel(space, tensor, sequence, context, model):
                pipelines = space.pipeline or tuple(d for d in divisors if d <= model.layers + 2)
                for pipeline in pipelines:
                    if accelerators % (tensor * context * pipeline):
                        invalid["tensor x context x pipeline does not divide the accelerators"] += 1
                        continue
                    data = accelerators // (tensor * context * pipeline)
                    sizes = (tensor, context, pipeline, data)
                    _with_sizes(found, space, base, model, sizes, sequence_parallel, batch)
    return found


def _with_sizes(
    found: Enumeration,
    space: PlanSpace,
    base: Experiment,
    model: ModelSpec,
    sizes: tuple[int, int, int, int],
    sequence_parallel: bool,
    batch: int,
) -> None:
    tensor, context, pipeline, data = sizes
    invalid = found.invalid
    for expert, expert_tensor in _experts(space, base, model):
        if (tensor * context * data) % (expert * expert_tensor):
            invalid["expert x expert_tensor does not divide tensor x context x data"] += 1
            continue
        for micro_batch in space.micro_batch_size or MICRO_BATCHES:
            if batch % (micro_batch * data):
                invalid["micro_batch_size x data does not divide the global batch"] += 1
                continue
            microbatches = batch // (micro_batch * data)
            for schedule, virtual in _schedules(space, model, pipeline):
                problem = _schedule_problem(schedule, pipeline, virtual, microbatches, model)
                if problem:
                    invalid[problem] += 1
                    continue
                for sharding in space.sharding:
                    if sharding != "none" and data * context == 1:
                        invalid["nothing to shard over: data x context is 1"] += 1
                        continue
                    for recompute in space.recompute:
                        found.choices.append(
                            Choice(
                                tensor,
                                context,
                                pipeline,
                                data,
                                virtual,
                                expert,
                                expert_tensor,
                                micro_batch,
                                recompute,
                                sharding,
                                schedule,
                                sequence_parallel,
                            )
                        )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _powers(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2


def _tensor_problem(model: ModelSpec, tensor: int) -> str | None:
    if model.family in UNSHARDED or tensor == 1:
        return None
    if model.heads % tensor:
        return "tensor does not divide the attention heads"
    if model.ffn and model.ffn % tensor:
        return "tensor does not divide ffn"
    if model.kv_heads % tensor and tensor % model.kv_heads:
        return "tensor and kv_heads do not divide each other"
    return None


def _sequence_parallel(
    space: PlanSpace, tensor: int, sequence: int, context: int, model: ModelSpec
) -> tuple[bool, ...]:
    possible = tensor > 1 and (sequence // context) % tensor == 0 and model.family not in UNSHARDED
    if space.sequence_parallel is None:
        return (possible,)
    return tuple(dict.fromkeys(wanted and possible for wanted in space.sequence_parallel))


def _experts(space: PlanSpace, base: Experiment, model: ModelSpec) -> Iterator[tuple[int, int]]:
    if not model.moe:
        yield 1, 1
        return
    experts = space.expert or tuple(d for d in _divisors(model.n_experts) if d <= 128)
    tensors = space.expert_tensor or (base.parallel.expert_tensor or 1,)
    for expert in experts:
        for expert_tensor in tensors:
            if model.n_experts % expert == 0 and model.expert_ffn % expert_tensor == 0:
                yield expert, expert_tensor


def _schedules(space: PlanSpace, model: ModelSpec, pipeline: int) -> Iterator[tuple[str, int]]:
    """Schedules with the chunks per rank that they allow."""
    if pipeline == 1:
        yield "1f1b", 1
        return
    for name in space.schedule:
        chunks = describe(name).chunks
        if chunks == "1":
            yield name, 1
        elif chunks == "2":
            yield name, 2
        else:
            for virtual in _virtual(space, model, pipeline):
                if virtual > 1 and not (chunks == "even" and virtual % 2):
                    yield name, virtual


def _virtual(space: PlanSpace, model: ModelSpec, pipeline: int) -> tuple[int, ...]:
    """Chunks per rank that cut the model into equal stages, embedding and loss counted or not."""
    if space.virtual_stages is not None:
        return space.virtual_stages
    return tuple(
        virtual
        for virtual in range(2, (model.layers + 2) // pipeline + 1)
        if any((model.layers + extra) % (pipeline * virtual) == 0 for extra in (0, 1, 2))
    )


def _schedule_problem(
    name: str, pipeline: int, virtual: int, microbatches: int, model: ModelSpec
) -> str | None:
    stages = pipeline * virtual
    if model.layers + 2 < stages or (model.layers < stages and (model.layers + 2) % stages):
        return "fewer layers than stages"
    if pipeline == 1:
        return None
    if name == "interleaved-1f1b":
        if microbatches < pipeline:
            return "interleaving needs at least as many micro-batches as pipeline ranks"
        if microbatches % max(1, microbatches // (microbatches // pipeline)) and (
            microbatches % pipeline
        ):
            return "interleaving needs a multiple of the pipeline ranks as micro-batches"
    kind = describe(name)
    if kind.name in ("dualpipe", "dualpipe-v") and microbatches < 2 * pipeline:
        return "DualPipe needs twice as many micro-batches as pipeline ranks"
    if kind.name in ("dualpipe", "chimera") and (pipeline % 2 or microbatches % 2):
        return f"{kind.name} needs even pipeline ranks and micro-batches"
    return None
