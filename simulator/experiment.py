"""The experiment: model, cluster, parallel plan and training, as a file or as dataclasses.

The names follow Megatron-LM where it has them. Everything that can be derived may be left out:
the data-parallel size from the number of accelerators, the number of micro-batches from the global
batch. `load_experiment` reads YAML, reports every error of the file at once, each with its line,
what was expected and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from simulator.errors import InputError, InputErrors, gathered, nearest, raise_all
from simulator.units import no_bool

_STRICT = ConfigDict(extra="forbid")
T = TypeVar("T")

Sharding = Literal["none", "zero1", "zero2", "zero3"]
Recompute = Literal["none", "selective", "full"]
PrecisionName = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4", "int8"]
OptimizerName = Literal["adam", "adamw", "sgd", "momentum", "adafactor"]
ContextKind = Literal["ring", "allgather", "ulysses"]

#: Largest factor on a duration or a size; beyond anything real, below what overflows.
_MOST = 1e6
#: Numbers; `true` is none.
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Share = Annotated[Float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Fault:
    """A perturbation of the cluster: a slow accelerator, or a degraded or failed link."""

    __pydantic_config__ = _STRICT
    gpu: Int | None = None
    """Index of the slow accelerator."""
    slowdown: Annotated[Float, Field(ge=1, le=_MOST)] = 1.0
    """Factor >= 1 on everything that accelerator computes."""
    link: tuple[str, str] | None = None
    """The two end nodes of a link of the cluster's graph: `[node0/gpu3, node0/nvswitch]`,
    `[node0/nic0, leaf0]`, an accelerator's way to its host or its memory,
    `[node0/gpu3, node0/hbm3]`."""
    bandwidth_factor: Share = 1.0
    """Remaining share of the link's bandwidth, 0 < factor <= 1."""
    failed: bool = False
    """The link is down: traffic is re-routed where the topology has another way."""


@dataclass(frozen=True)
class Cluster:
    """Which machine: a topology of `topologies/` (or a file, or a mapping) and its size."""

    __pydantic_config__ = _STRICT
    topology: str | dict[str, Any]
    """Name of a topology, path of a topology file, or a topology mapping."""
    nodes: PositiveInt | None = None
    """Number of nodes (hosts; for TPUs: slices)."""
    accelerators: PositiveInt | None = None
    """Number of accelerators, in place of `nodes`. With both, the same number of every node is
    used: `nodes: 2, accelerators: 12` is 6 of each, the rest of the node idle; a number that does
    not spread evenly or does not fit is an error. TPUs: of slices that are built."""
    network: str | Float | None = None
    """Scale-out line rate per accelerator that replaces the topology's, e.g. `400 Gb/s`."""
    fabric_efficiency: Share | None = None
    """Achieved share of the scale-out line rate that replaces the topology's (0..1]."""
    variability: Annotated[Float, Field(ge=0, le=10)] | None = None
    """Slowdown of the whole per doubling of the number of hosts that synchronise, because the
    slowest sets the pace; 0: ideal machines; a measured default when left out."""
    faults: tuple[Fault, ...] = ()
    """Slow accelerators, degraded and failed links."""
    placement: tuple[Int, ...] | None = None
    """Accelerator index of every rank; identity when left out."""


@dataclass(frozen=True)
class Overlap:
    """Which communication may run beside compute; unset follows the framework profile."""

    __pydantic_config__ = _STRICT
    grad_reduce: bool | None = None
    """Reduction of gradients over data-parallel ranks, bucket by bucket beside the backward."""
    param_gather: bool | None = None
    """Gathering of sharded parameters (ZeRO) beside the forward."""
    p2p: bool | None = None
    """Sends and receives between pipeline stages."""
    tensor: bool | None = None
    """Tensor-parallel collectives, chunked beside the matrix product they feed."""
    expert: bool | None = None
    """All-to-all of the experts beside another micro-batch's compute, where the schedule pairs a
    forward with a backward. Without a pipeline, 1F1B then keeps one forward ahead
    (`schedule_options: {forwards_ahead: 1}`) and the activations of two micro-batches."""


@dataclass(frozen=True)
class Parallel:
    """The parallel plan; names as in Megatron-LM."""

    __pydantic_config__ = _STRICT
    data: PositiveInt | None = None
    """Data-parallel replicas; derived from the cluster when left out."""
    tensor: PositiveInt = 1
    """Ranks that split every layer's heads and feed-forward width (Megatron-LM's TP)."""
    pipeline: PositiveInt = 1
    """Pipeline ranks (PP)."""
    context: PositiveInt = 1
    """Ranks that split the sequence (CP)."""
    expert: PositiveInt = 1
    """Ranks that split the experts of an MoE layer (EP); they are taken from data and context."""
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert; 1 for MoE models when left out."""
    virtual_stages: PositiveInt = 1
    """Model chunks per pipeline rank (interleaving)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    sharding: Sharding = "none"
    """What the data-parallel ranks share out: `zero1` the optimizer's state, `zero2` gradients as
    well, `zero3` parameters as well (FSDP)."""
    shard_group: PositiveInt | None = None
    """Ranks that share one copy of the sharded state (hybrid sharding); all when left out."""
    schedule: str | None = None
    """Name of a pipeline schedule or path of an action file; 1f1b (interleaved with virtual
    stages) when left out."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Options of the schedule: below, or `simulator list schedules`."""
    stage_layers: tuple[Int, ...] | None = None
    """Transformer layers of each global stage, when not as even as can be."""
    pipeline_layout: str | None = None
    """What each global stage holds, in Megatron-Core's notation: `Et*3|(tt|)*29,m|L` (`E`
    embedding, `t` transformer layer, `m` multi-token prediction, `L` output layer and loss)."""
    account_for_embedding: bool | None = None
    """Count the embedding as a layer of the pipeline split; unset: where that makes it divide."""
    account_for_loss: bool | None = None
    """The same for the output layer and the loss. Multi-token prediction counts it as one layer and
    each depth as two, unless one of these is given."""
    context_kind: ContextKind = "ring"
    """How attention sees the whole sequence: exchange keys and values in a ring, gather them, or
    exchange heads (DeepSpeed-Ulysses)."""
    vocabulary_parallel: bool = False
    """Spread the rows of the token table and of the output projection, and the loss, over all
    pipeline stages (vocabulary parallelism, arXiv 2411.05288); without a pipeline no change."""
    overlap: Overlap = field(default_factory=Overlap)
    """Which communication may run beside compute."""


@dataclass(frozen=True)
class Training:
    """What is trained per step."""

    __pydantic_config__ = _STRICT
    micro_batch_size: PositiveInt = 1
    """Sequences that one data-parallel replica passes through the model at once."""
    global_batch_size: PositiveInt | None = None
    """Sequences per step; micro_batch_size x data when left out."""
    sequence_length: PositiveInt | None = None
    """Tokens per sequence; the model's own when left out."""
    precision: PrecisionName = "bf16"
    """Arithmetic of the matrix products; master weights are fp32 below tf32."""
    optimizer: OptimizerName = "adam"
    """Decides optimizer memory and the time of the update."""
    recompute: Recompute = "none"
    """Activations to compute again in the backward instead of keeping them."""
    recompute_modules: tuple[str, ...] | None = None
    """Modules recomputed with `selective`: core_attn, layernorm, activation, moe_act, mla_up_proj,
    attention, mlp, moe, shared_experts, elementwise (norms and activation functions),
    alternate_gemm (every second matrix product). Left out: those of the framework profile, else
    core_attn where attention is not fused."""
    recompute_layers: NonNegativeInt | None = None
    """With `full`: how many layers per stage are recomputed; all when left out."""
    gradient_clipping: bool = True
    """Clip by the global norm, which takes one all-reduce over all ranks."""
    activation_offload: bool = False
    """Stored activations of transformer layers are copied to host memory after their forward and
    back before their backward, beside the computation; a layer waits for copies that are late."""
    activation_offload_layers: PositiveInt | None = None
    """With `activation_offload`: how many layers per stage, the first ones; all when left out."""
    expert_imbalance: Annotated[Float, Field(ge=1, le=_MOST)] = 1.0
    """Tokens of the most loaded expert rank over the mean (1: balanced routing)."""
    expert_capacity_factor: Annotated[Float, Field(gt=0, le=_MOST)] | None = None
    """Tokens per expert are padded or dropped to this multiple of the mean; None: dropless."""
    inference: bool = False
    """Forward only (evaluation, prefill)."""


@dataclass(frozen=True)
class Jitter:
    """Random factor >= 0 on every compute operation's duration; mean 1."""

    __pydantic_config__ = _STRICT
    distribution: Literal["lognormal", "normal", "uniform", "gamma"] = "lognormal"
    """Shape of the random factor."""
    scale: Annotated[Float, Field(ge=0, le=1000)] = 0.02
    """Relative standard deviation."""
    seed: Int = 0
    """The same seed gives the same step."""
    per: Literal["rank", "class"] = "rank"
    """`rank`: every rank draws its own (nothing folds); `class`: indistinguishable ranks share."""


@dataclass(frozen=True)
class Job:
    """One of several jobs on a shared cluster."""

    __pydantic_config__ = _STRICT
    name: str
    """What the job is called in results."""
    model: str | dict[str, Any]
    """As the experiment's `model`."""
    placement: tuple[Int, ...]
    """Accelerator index of each of the job's ranks."""
    parallel: Parallel = field(default_factory=Parallel)
    """The job's own plan."""
    training: Training = field(default_factory=Training)
    """The job's own batch, precision, …"""
    framework: str | dict[str, Any] | None = None
    """The job's own framework profile."""


@dataclass(frozen=True)
class Experiment:
    """One simulated training step."""

    __pydantic_config__ = _STRICT
    model: str | dict[str, Any]
    """Name in the catalogue, path of a Hugging Face config.json, or a mapping of dimensions."""
    cluster: Cluster
    """Which machine, and how much of it."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the model is spread over the machine."""
    training: Training = field(default_factory=Training)
    """Batch, precision, optimizer, recomputation."""
    framework: str | dict[str, Any] | None = None
    """Framework profile; `megatron-core` when left out. A mapping changes single behaviours:
    `{base: megatron-core, cuda_graphs: true}`."""
    name: str = ""
    """Title of tables and reports."""
    fold: bool = True
    """False simulates every rank (slow; the same result)."""
    jitter: Jitter | None = None
    """Random durations; none when left out."""
    jobs: tuple[Job, ...] = ()
    """Further jobs on the same cluster, sharing its links: one step of each, begun together; what
    runs longer than the others has the links to itself at the end."""

    @property
    def job_name(self) -> str:
        """What the experiment's own job is called beside its further `jobs`."""
        return self.name or "main"

    def replace(self, **changes: Any) -> Experiment:
        """A copy with dotted keys changed: `experiment.replace(**{"parallel.tensor": 4})`."""
        return with_values(self, changes)


_ADAPTER: TypeAdapter[Experiment] = TypeAdapter(Experiment)


#: Line (from 1) of every key path of a file.
Lines = Mapping[tuple[str | int, ...], int]

# ---------------------------------------------------------------------------------- reading


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> Experiment:
    """Read an experiment file.

    Parameters
    ----------
    path:
        YAML file.
    overrides:
        `key=value` texts as given to `--set`, values in YAML syntax, keys dotted.
    values:
        The same, already parsed.

    Raises
    ------
    InputError
        All errors of the file at once, each with file, line, key and what was expected.
    """
    mapping, lines = read_yaml(path)
    if not isinstance(mapping, dict):
        raise InputError("expected a mapping with `model` and `cluster`", place=str(path))
    changes: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"expected key=value, got {text!r}", place="--set")
        try:
            changes[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"not a YAML value: {value!r}", place=f"--set {key}") from None
    changes.update(values or {})
    for key, value in changes.items():
        _set(mapping, key, value)
    known = _with_overrides(lines, [*overrides, *(values or ())])
    errors: list[InputError] = []
    with gathered(errors):
        experiment = parse_experiment(mapping, place=str(path), lines=known)
    if errors:
        errors += [_located(error, str(path), known) for error in _unknown_names(mapping)]
    raise_all(errors)
    return _resolve_paths(experiment, Path(path).parent)


def parse_experiment(
    mapping: Mapping[str, Any],
    *,
    place: str | None = None,
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> Experiment:
    """Validate a mapping (as YAML gives it); raises `InputError` with every error at once."""
    return validated(_ADAPTER, mapping, Experiment, place=place, lines=lines)


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """A validated copy of `experiment` with dotted keys replaced; raises `InputError`."""
    mapping = to_mapping(experiment)
    for key, value in values.items():
        _set(mapping, key, value)
    return parse_experiment(mapping, place=experiment.name or None)


def to_mapping(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain dicts and lists, defaults left out; `parse_experiment` inverts it."""
    return _plain(experiment)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {}
        for item in dataclasses.fields(value):
            inner = getattr(value, item.name)
            if item.default is not dataclasses.MISSING and inner == item.default:
                continue
            if item.default_factory is not dataclasses.MISSING and inner == item.default_factory():
                continue
            result[item.name] = _plain(inner)
        return result
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _set(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    inner: Any = mapping
    for part in path:
        if not isinstance(inner, dict):
            raise InputError(f"{dotted!r} goes through a value that is no mapping", place="--set")
        inner = inner.setdefault(part, {})
        if inner is None:
            raise InputError(f"{dotted!r} goes through an empty value", place="--set")
    if not isinstance(inner, dict):
        raise InputError(f"{dotted!r} goes through a value that is no mapping", place="--set")
    inner[last] = value


def _unknown_names(mapping: Mapping[str, Any]) -> list[InputError]:
    """Names that are in no catalogue, of a file that no experiment can be made of."""
    from simulator.catalog.frameworks import framework
    from simulator.model.library import model
    from simulator.schedules import describe
    from simulator.topology import topology_description

    catalogues: dict[str, Callable[[str], object]] = {
        "model": model,
        "framework": framework,
        "cluster.topology": topology_description,
        "parallel.schedule": describe,
    }
    errors: list[InputError] = []
    for key, find in catalogues.items():
        name: Any = mapping
        for part in key.split("."):
            name = name.get(part) if isinstance(name, Mapping) else None
        if isinstance(name, str) and not _looks_like_file(name):
            try:
                find(name)
            except InputError as error:
                errors.append(InputError(error.problem, place=key))
    return errors


def _looks_like_file(text: str) -> bool:
    graphs = (".graphml", ".gml", ".gexf")
    return text.endswith((".json", ".yaml", ".yml", ".csv", ".xml", *graphs))


def _resolve_paths(experiment: Experiment, base: Path) -> Experiment:
    """Relative paths of files named in an experiment file are relative to that file."""

    def resolved(text: str) -> str:
        if _looks_like_file(text) and not Path(text).is_absolute() and (base / text).exists():
            return str(base / text)
        return text

    model, topology, schedule = (
        experiment.model,
        experiment.cluster.topology,
        experiment.parallel.schedule,
    )
    if isinstance(model, str):
        model = resolved(model)
    if isinstance(topology, str):
        topology = resolved(topology)
    else:
        files = {key: resolved(str(topology[key])) for key in ("accelerator", "extends")
                 if isinstance(topology.get(key), str)}  # fmt: skip
        topology = {**topology, **files}
    if schedule is not None:
        schedule = resolved(schedule)
    return dataclasses.replace(
        experiment,
        model=model,
        cluster=dataclasses.replace(experiment.cluster, topology=topology),
        parallel=dataclasses.replace(experiment.parallel, schedule=schedule),
        jobs=tuple(
            dataclasses.replace(job, model=resolved(job.model))
            if isinstance(job.model, str)
            else job
            for job in experiment.jobs
        ),
    )


@contextlib.contextmanager
def errors_of_file(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Errors that name a key of the experiment raised inside get the file and line of that key.

    For what is found after `load_experiment`, when the experiment is resolved: names that are in
    no catalogue, sizes that contradict each other. A key that `overrides` (`--set`) changes is no
    line of the file. Errors of other files, and kinds of `InputError` of their own, stay.
    """
    try:
        yield
    except InputErrors as error:
        lines = _with_overrides(read_yaml(path)[1], overrides)
        raise_all([_located(inner, str(path), lines) for inner in error.errors])
    except InputError as error:
        if type(error) is not InputError:
            raise
        lines = _with_overrides(read_yaml(path)[1], overrides)
        raise _located(error, str(path), lines) from None


#: In place of the line of a key that the command line changes.
_NO_LINE = 0


def _with_overrides(lines: Lines, overrides: Iterable[str]) -> Lines:
    """`lines` without those of keys that `overrides` changes."""
    changed = [tuple(text.partition("=")[0].strip().split(".")) for text in overrides]
    kept = {
        key: line
        for key, line in lines.items()
        if not any(key[: len(start)] == start for start in changed)
    }
    return {**kept, **dict.fromkeys(changed, _NO_LINE)}


def _where(place: str | None, key: tuple[str | int, ...], lines: Lines) -> str | None:
    """`FILE:LINE: dotted.key`, as far as they are known."""
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    dotted = ".".join(str(part) for part in key)
    if line == _NO_LINE:
        dotted = f"--set {dotted}"
    return ": ".join(part for part in (f"{place}:{line}" if place and line else place, dotted)
                     if part) or None  # fmt: skip


def _located(error: InputError, path: str, lines: Lines) -> InputError:
    """`error` with the file, and the line of the key that its place names."""
    place = error.place or ""
    words = re.findall(r"[^.:\[\]\s]+", place)
    if not words or words[0] not in (item.name for item in dataclasses.fields(Experiment)):
        # Without a key, or of another file, which the place names.
        return error if path in place or _FILE.search(place) else error.at(path)
    key = tuple(int(word) if word.isdigit() else word for word in words)
    return InputError(error.problem, place=_where(path, key, lines))


#: A place that starts with a file of its own.
_FILE = re.compile(r"^[^:]*\.\w+(:|$)")


# ------------------------------------------------------------------------------- validation


def read_yaml(path: str | Path) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """A YAML file's value, and the line (from 1) of every key path in it.

    Raises
    ------
    InputError
        If the file cannot be read, is no YAML, repeats a key or is nested absurdly deep.
    """
    place = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", place=place) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", place=place) from None
    if too_deep(text):
        raise InputError("nested too deep", place=place)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _has_alias_cycle_or_bomb(node):
            raise InputError("YAML aliases expand to too much", place=place)
        value = yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}:{mark.line + 1}" if mark else place
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"not valid YAML: {problem}", place=where) from None
    except (RecursionError, ValueError, OverflowError, TypeError) as error:
        raise InputError(f"not valid YAML: {error}", place=place) from None
    lines: dict[tuple[str | int, ...], int] = {}
    if node is not None:
        _collect_lines(node, (), lines, place)
    return value, lines


def too_deep(text: str, limit: int = 200) -> bool:
    """Whether brackets nest so deep that PyYAML, whose time grows faster than the depth, hangs."""
    depth = deepest = 0
    for character in re.findall(r"[\[{\]}]", text):
        depth = max(0, depth + (1 if character in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest > limit


def _has_alias_cycle_or_bomb(node: yaml.Node, limit: int = 200_000) -> bool:
    count = 0
    stack: list[tuple[yaml.Node, int]] = [(node, 0)]
    while stack:
        current, depth = stack.pop()
        count += 1
        if count > limit or depth > 100:
            return True
        if isinstance(current, yaml.MappingNode):
            for key, value in current.value:
                stack.append((key, depth + 1))
                stack.append((value, depth + 1))
        elif isinstance(current, yaml.SequenceNode):
            stack.extend((value, depth + 1) for value in current.value)
    return False


def _collect_lines(
    node: yaml.Node,
    path: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    place: str,
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise InputError(
                    f"key {name!r} appears twice", place=f"{place}:{key.start_mark.line + 1}"
                )
            seen.add(name)
            lines[(*path, name)] = key.start_mark.line + 1
            _collect_lines(value, (*path, name), lines, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), lines, place)


def validated(
    adapter: TypeAdapter[T],
    mapping: Any,
    root: type,
    *,
    place: str | None = None,
    lines: Lines | None = None,
) -> T:
    """`mapping` as the dataclass `root`; every error at once as `InputError`s."""
    try:
        return adapter.validate_python(mapping)
    except ValidationError as error:
        problems = [
            _input_error(item, root, place, lines or {}) for item in error.errors(include_url=False)
        ]
        unique = list({str(problem): problem for problem in problems}.values())
        raise_all(unique)
        raise AssertionError("unreachable") from None
    except RecursionError:
        raise InputError("nested too deep", place=place) from None


#: What pydantic says, in the words of someone who writes YAML.
_PLAIN_WORDS = (
    ("a valid tuple", "a list"),
    ("a valid dictionary", "a mapping"),
    ("a valid string", "text"),
    ("expected greater", "expected a number greater"),
    ("expected less", "expected a number less"),
)


#: What others call a sharding.
_SYNONYMS = {
    "ddp": "; DDP shards nothing: none",
    "fsdp": "; FSDP is zero3",
    "fsdp1": "; FSDP is zero3",
    "fsdp2": "; FSDP is zero3",
    "full_shard": "; FULL_SHARD is zero3",
    "shard_grad_op": "; SHARD_GRAD_OP is zero2",
    "hsdp": "; HSDP is zero3 with parallel.shard_group, the ranks that share one copy",
    "hybrid_shard": "; HYBRID_SHARD is zero3 with parallel.shard_group",
}


def _example(location: tuple[str | int, ...]) -> int:
    """A whole number as the key at `location` may have it."""
    return 4096 if location[-1:] == ("sequence_length",) else 8


def _all_keys() -> list[str]:
    """Dotted keys of the sections of an experiment, lists of mappings left out."""
    sections = {"cluster": Cluster, "parallel": Parallel, "parallel.overlap": Overlap,
                "training": Training, "jitter": Jitter}  # fmt: skip
    return [item.name for item in dataclasses.fields(Experiment)] + [
        f"{prefix}.{item.name}"
        for prefix, cls in sections.items()
        for item in dataclasses.fields(cls)
    ]


def _input_error(item: Any, root: type, place: str | None, lines: Lines) -> InputError:
    location = tuple(part for part in item["loc"] if not _is_type_tag(part))
    where = _where(place, location, lines)
    kind, value = item["type"], item.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        unknown = str(item["loc"][-1])  # may look like a type tag: a key called `str`
        known = _keys_at(root, location[:-1] if location[-1:] == item["loc"][-1:] else location)
        elsewhere = [key for key in _all_keys() if key.rpartition(".")[2] == unknown]
        guess = min(elsewhere, key=lambda k: k.count("."), default=nearest(unknown, known))
        hint = f"; did you mean {guess!r}?" if guess else ""
        problem = f"unknown key{hint} (known: {', '.join(known)})"
    elif kind == "missing" or kind == "missing_argument":
        problem = "missing; it must be given"
    elif kind == "literal_error":
        expected = item["ctx"]["expected"]
        choices = [choice.strip("' ") for choice in expected.replace(" or ", ",").split(",")]
        guess = nearest(str(value), choices)
        hint = f"; did you mean {guess!r}?" if guess else ""
        problem = f"expected {expected}, got {_short(value)}{hint}"
        problem += _SYNONYMS.get(str(value).casefold(), "") if location[-1] == "sharding" else ""
    elif kind in ("int_type", "int_parsing", "int_from_float", "int_parsing_size"):
        problem = f"expected a whole number, such as {_example(location)}, got {_short(value)}"
    elif kind in ("bool_type", "bool_parsing"):
        problem = f"expected true or false, got {_short(value)}"
    elif kind in ("float_type", "float_parsing"):
        problem = f"expected a number, got {_short(value)}"
    elif kind in ("dataclass_type", "dataclass_exact_type"):
        problem = f"expected a mapping, got {_short(value)}"
    else:
        message = item["msg"].replace("Input should be", "expected").replace("Value error, ", "")
        for technical, plain in _PLAIN_WORDS:
            message = message.replace(technical, plain)
        problem = f"{message[0].lower()}{message[1:]}, got {_short(value)}"
    return InputError(problem, place=where)


def _is_type_tag(part: str | int) -> bool:
    """pydantic names the tried branch of a union in the location: `str`, `dict[str,any]`, ..."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", "constrained-int") or "[" in part
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(root: type, path: tuple[str | int, ...]) -> list[str]:
    current: Any = root
    for part in path:
        if isinstance(part, int):
            continue
        hints = {item.name: item.type for item in dataclasses.fields(current)}
        name = str(hints.get(part, ""))
        current = next(
            (
                candidate
                for candidate in (Cluster, Parallel, Training, Overlap, Fault, Jitter, Job)
                if candidate.__name__ in name.replace("|", " ").replace("[", " ")
                .replace(",", " ").replace("]", " ").split()
            ),
            current,
        )  # fmt: skip
    return [item.name for item in dataclasses.fields(current)]
