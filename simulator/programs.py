"""Programs: from a plan to what every rank executes, in order, and what it waits for.

One `RankProgram` per pipeline coordinate and accelerator type: the schedule's actions become
entries of the compute stream, transfers between stages entries of the pipeline streams, gradient
and parameter traffic entries of the data stream. Ranks that differ only in their tensor, context
or data coordinate share a program; where they communicate is decided by the groups.

What a framework does (overlap, prefetch, buckets, fusion) comes from its `FrameworkProfile` and
the experiment's `overlap`; how long anything takes from `simulator.costs`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulator.catalog.accelerators import Accelerator
from simulator.catalog.frameworks import FrameworkProfile
from simulator.collector import paused_collector
from simulator.costs.attention_kernels import attention_slowdown
from simulator.costs.host_copies import FROM_HOST, HOST_GROUP, TO_HOST
from simulator.costs.kernels import kernel_cost
from simulator.experiment import Experiment
from simulator.model.activations import activation_bytes
from simulator.model.context import LOW_PRECISIONS, LayerContext
from simulator.model.layers import (
    HOST_READ,
    LayerParameters,
    graph_module,
    is_expert_operation,
    layer_operations,
    layer_parameters,
)
from simulator.model.operations import (
    BYTES_PER_ELEMENT,
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    HostCopy,
    MemoryBound,
    Operation,
    Phase,
)
from simulator.model.optimizer import optimizer_operations
from simulator.model.spec import LayerId, ModelSpec, layer_tensors
from simulator.model.vocabulary import vocabulary_operations, vocabulary_parameters
from simulator.plan.mesh import Mesh
from simulator.plan.offload import WINDOW, offloaded_layers, turns_at_once
from simulator.plan.sharding import sharded_around_passes, step_sharding
from simulator.schedules.actions import Action, flatten
from simulator.schedules.schedule import Schedule
from simulator.schedules.vocabulary import VocabularyKind, VocabularyPlacement
from simulator.workload import Entry, RankProgram, Segment, Task, Workload

#: Streams of every rank, in the order in which they are created. Sends of activations and of
#: gradients are separate streams, as NCCL's grouped sends to different neighbours are.
COMPUTE, COPY, DATA, EXPERT = "compute", "copy", "data", "expert"
SEND_FORWARD, SEND_BACKWARD = "pipeline", "pipeline.backward"
#: Offloaded activations: an accelerator has copy engines for each direction.
OFFLOAD, RELOAD = "copy.offload", "copy.reload"
#: Traffic of vocabulary parallelism: of the output layer's input, of its reductions, and of the
#: embedding, which do not wait for each other.
VOCABULARY = {
    VocabularyKind.HIDDEN: "vocabulary",
    VocabularyKind.STATISTICS: "vocabulary.loss",
    VocabularyKind.HIDDEN_GRADIENT: "vocabulary.loss",
    VocabularyKind.EMBEDDED: "vocabulary.embedding",
    VocabularyKind.EMBEDDED_GRADIENT: "vocabulary.embedding",
}


@dataclass(frozen=True)
class Behaviour:
    """The overlap decisions of one run: the experiment's, else the framework's."""

    grad_reduce: bool
    param_gather: bool
    p2p: bool
    tensor: bool
    expert: bool


@dataclass(frozen=True)
class Plan:
    """An experiment resolved: every size known and consistent."""

    experiment: Experiment
    model: ModelSpec
    profile: FrameworkProfile
    behaviour: Behaviour
    mesh: Mesh
    context: LayerContext
    schedule: Schedule
    stage_layers: tuple[tuple[LayerId, ...], ...]
    """Layers of every global stage of the schedule."""
    accelerators: tuple[Accelerator, ...]
    accelerator_of: np.ndarray
    """Index into `accelerators` per rank."""
    placement: np.ndarray
    slowdown: np.ndarray
    collective_seconds: Callable[[Collective], float] = field(repr=False)
    """Seconds of one collective of a representative group when nothing else runs."""
    vocabulary: VocabularyPlacement | None = None
    """Where the passes of vocabulary parallelism are; None without."""

    @property
    def microbatches(self) -> int:
        return self.schedule.microbatches

    @property
    def sharding(self) -> str:
        """How the step acts, see `step_sharding`."""
        return step_sharding(self.experiment.parallel.sharding, self.profile, self.mesh.pipeline)

    def context_of(self, layer: LayerId) -> LayerContext:
        """The layer's context: full recomputation may be limited to the first blocks of a stage
        (Megatron-LM --recompute-method block)."""
        limit = self.experiment.training.recompute_layers
        if limit is None or self.context.recompute != "full":
            return self.context
        blocks = next(
            [other for other in layers if isinstance(other, int)]
            for layers in self.stage_layers
            if layer in layers
        )
        if layer in blocks[:limit]:
            return self.context
        return dataclasses.replace(self.context, recompute="none")


@paused_collector()
def build_workload(plan: Plan) -> Workload:
    """The programs of all ranks of `plan`.

    Ranks with the same pipeline coordinate and accelerator type share a program.
    """
    mesh = plan.mesh
    stage_of_rank = mesh.coordinates("pipeline")
    events = [_Events() for _ in range(mesh.pipeline)]
    types = len(plan.accelerators)
    variant = stage_of_rank * types + np.asarray(plan.accelerator_of)
    occurs = np.bincount(variant, minlength=mesh.pipeline * types) > 0
    program_of = (np.cumsum(occurs) - 1)[variant]
    builders = [
        _RankBuilder(plan, plan.accelerators[number % types], number // types, events)
        for number in np.flatnonzero(occurs).tolist()
    ]
    for builder in builders:
        builder.build()
    programs = tuple(
        RankProgram(
            name=f"pipeline rank {builder.coordinate} on {builder.accelerator.name}",
            streams={name: tuple(entries) for name, entries in builder.streams.items()},
            events=len(events[builder.coordinate]),
        )
        for builder in builders
    )
    groups = {name: mesh.group_labels(name) for name in _group_names(programs)}
    labels = {dim: mesh.coordinates(dim) for dim in ("tensor", "context", "data", "pipeline")}
    return Workload(
        programs=programs,
        program_of=program_of,
        placement=plan.placement,
        groups=groups,
        pipeline_peer=mesh.pipeline_peer(),
        slowdown=plan.slowdown,
        labels=labels,
    )


def _group_names(programs: Sequence[RankProgram]) -> list[str]:
    names: dict[str, None] = {}
    seen: set[int] = set()
    for program in programs:
        for entries in program.streams.values():
            for entry in entries:
                if id(entry.segment) in seen:
                    continue
                seen.add(id(entry.segment))
                for task in entry.segment.tasks:
                    if task.collective is not None and entry.peer < 0:
                        names.setdefault(task.collective.group)
    return list(names)


class _Events:
    """Numbers of the events of the ranks with one pipeline coordinate."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __getitem__(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)


class TaskFactory:
    """Turns operations into tasks on one accelerator type."""

    def __init__(
        self,
        accelerator: Accelerator,
        profile: FrameworkProfile,
        collective_seconds: Callable[[Collective], float],
        tensor_ranks: int,
    ) -> None:
        self.accelerator = accelerator
        self.profile = profile
        self.collective_seconds = collective_seconds
        self.tensor_ranks = tensor_ranks

    def tasks(
        self,
        operations: Iterable[Operation],
        layer: int,
        *,
        transfers: int = 0,
        exchanges_beside: bool = False,
    ) -> tuple[Task, ...]:
        """Tasks of operations that run back to back.

        A collective with `overlap` is merged into the kernel of that name (before or after it);
        host launch time that the kernels are too short to hide is spread over them, that of
        `transfers` between stages, which run on other streams, included. With `exchanges_beside`
        expert exchanges are on another stream too: their launches are all that is left of them.
        """
        operations = list(operations)
        hosts = {op.name: i for i, op in enumerate(operations) if not isinstance(op, Collective)}
        hidden: dict[int, list[Collective]] = {}
        tasks: list[Task] = []
        for op in operations:
            if isinstance(op, Collective) and op.overlap in hosts:
                hidden.setdefault(hosts[op.overlap], []).append(op)
        for index, op in enumerate(operations):
            if isinstance(op, Collective) and op.overlap in hosts:
                continue
            task = self.task(op, layer)
            for collective in hidden.get(index, ()):
                task = self._hide(task, collective)
            if exchanges_beside and _is_exchange(task):
                task = Task(task.name, "host", layer, task.phase)
            tasks.append(task)
        timed = self._with_host_time(tasks, operations, transfers)
        return tuple(task for task in timed if task.kind != "host" or task.latency > 0.0)

    def task(self, op: Operation, layer: int) -> Task:
        """One operation alone."""
        if isinstance(op, Collective):
            return Task(op.name, op.kind, layer, str(op.phase), bytes=op.bytes, collective=op)
        pace = 1.0
        if isinstance(op, Gemm | GroupedGemm | Attention):
            pace = 1.0 / self.accelerator.constants["step_derate"]
            if isinstance(op, Attention):
                pace *= attention_slowdown(self.profile.attention_kernel, self.accelerator.family)
        cost = kernel_cost(op, self.accelerator, self.profile, pace=pace)
        return Task(
            name=op.name,
            kind=op.kind,
            layer=layer,
            phase=str(op.phase),
            latency=cost.latency,
            compute=cost.compute,
            hbm_bytes=cost.hbm_bytes * self.accelerator.memory_bandwidth / cost.hbm_bandwidth,
            flops=cost.flops,
            bytes=cost.hbm_bytes,
        )

    def unhidden(self, op: Operation, layer: int) -> Task:
        """One operation whose launches nothing hides: the device waits for the host."""
        task = self.task(op, layer)
        host = getattr(op, "kernels", 1) * self.profile.host_time_per_kernel
        return _waiting(task, max(0.0, host - task.latency))

    def linked_copy(self, op: HostCopy, layer: int) -> Task:
        """A host copy that shares the links to the host with others, see `costs.host_copies`.

        Input batches are too small to matter to others: `task` gives them the link alone.
        """
        direction = FROM_HOST if op.to_device else TO_HOST
        copy = Collective(op.name, direction, HOST_GROUP, op.bytes, op.phase)
        return Task(op.name, op.kind, layer, str(op.phase), bytes=op.bytes, collective=copy)

    def _hide(self, task: Task, collective: Collective) -> Task:
        """A kernel that is cut into chunks, each chunk's communication under the next's compute.

        Of the shorter of the two, one chunk of `tensor_ranks` cannot hide (fill and drain of the
        pipeline; Jangda et al., CoCoNet, ASPLOS 2022, figure 3).
        """
        seconds = self.collective_seconds(collective)
        if task.collective is not None:  # already hides one: the second one is exposed
            return dataclasses.replace(task, latency=task.latency + seconds)
        exposed = min(self._alone(task), seconds) / max(2, self.tensor_ranks)
        return dataclasses.replace(task, latency=task.latency + exposed, collective=collective)

    def _alone(self, task: Task) -> float:
        """Seconds of a task's kernel when nothing else runs."""
        return task.latency + max(task.compute, task.hbm_bytes / self.accelerator.memory_bandwidth)

    def _with_host_time(
        self, tasks: Sequence[Task], operations: Sequence[Operation], transfers: int
    ) -> tuple[Task, ...]:
        """Stretch kernels that are shorter than the host needs to launch them.

        The host runs ahead of the device, so that only the sum over the layer counts: the gap
        `launches * host time - device time`, if positive, is spread evenly over the launches.
        Where the host reads a result (`HOST_READ`) it has launched nothing beyond: what follows
        waits for the longest gap of any of its beginnings.
        """
        per_kernel = 0.0 if self.profile.cuda_graphs else self.profile.host_time_per_kernel
        if per_kernel <= 0.0 or not tasks or self.accelerator.kind == "tpu":
            return tuple(tasks)
        host = {op.name: self._host_seconds(op) for op in operations}
        read = next((i for i, t in enumerate(tasks) if t.name.endswith(HOST_READ)), len(tasks))
        before, after = tasks[:read], tasks[read:]
        calls = self.profile.host_time_per_operation
        also = transfers * (calls + per_kernel) if calls else 0.0
        stretched = self._stretch(before, host, also + sum(self._host_and_device(before, host)))
        gap, last = 0.0, 0
        lead = 0.0
        for index, task in enumerate(after):
            # a kernel starts when it is launched and the device has done those before it
            own, device = self._host_and_device((task,), host)
            lead += own
            if lead > gap:
                gap, last = lead, index + 1
            lead += device
        return (*stretched, *self._stretch(after[:last], host, gap), *after[last:])

    def _host_seconds(self, op: Operation) -> float:
        """Seconds that the host needs to launch an operation."""
        kernels = float(getattr(op, "kernels", 1))
        if not kernels or graph_module(op.name) in self.profile.graphed_modules.split():
            return 0.0
        own, each = self.profile.host_time_per_operation, self.profile.host_time_per_kernel
        if own and is_expert_operation(op.name):
            own = max(own, self.profile.host_time_per_expert_operation)
        if op.kind == "cast":
            own = 0.0  # within the call of the module whose product follows
        elif isinstance(op, Gemm) and op.precision in LOW_PRECISIONS:
            own *= self.profile.host_time_low_precision
        if isinstance(op, GroupedGemm) or op.kind == "cast":
            each = min(each, self.profile.host_time_per_grouped_kernel)
        return own + kernels * each

    def _host_and_device(
        self, tasks: Sequence[Task], host: Mapping[str, float]
    ) -> tuple[float, float]:
        """(seconds to launch the tasks, minus the seconds that the device takes for them)."""
        each = self.profile.host_time_per_kernel
        device = sum(self._alone(t) for t in tasks)
        device += sum(
            self.collective_seconds(t.collective)
            for t in tasks
            if t.collective is not None and not t.compute
        )
        return sum(host.get(t.name, each) for t in tasks), -device

    def _stretch(
        self, tasks: Sequence[Task], host: Mapping[str, float], gap: float
    ) -> tuple[Task, ...]:
        """Tasks with `gap` seconds of waiting for the host spread over them."""
        each = self.profile.host_time_per_kernel
        total = sum(host.get(t.name, each) for t in tasks)
        if gap <= 0.0 or total <= 0.0:
            return tuple(tasks)
        return tuple(_waiting(t, gap * host.get(t.name, each) / total) for t in tasks)


def _waiting(task: Task, seconds: float) -> Task:
    """The task behind `seconds` more of waiting for the host."""
    return dataclasses.replace(
        task, latency=task.latency + seconds, host_wait=task.host_wait + seconds
    )


@dataclass(frozen=True)
class _Unit:
    """Layers whose parameters are gathered, or whose gradients are reduced, together."""

    name: str
    layers: tuple[LayerId, ...]
    dense: float
    expert: float
    pieces: tuple[float, ...] = (1.0,)
    """Shares of the dense parameters that are sent in collectives of their own."""


def _parts(unit: _Unit) -> Iterator[tuple[str, float, str]]:
    """(name, elements, replicas' group) of what a unit's parameters are sent as."""
    for index, share in enumerate(unit.pieces):
        name = "dense" if len(unit.pieces) == 1 else f"dense.{index}"
        yield name, unit.dense * share, "data_context"
    yield "expert", unit.expert, "expert_data"


class _RankBuilder:
    """Builds the program of the ranks with one pipeline coordinate and accelerator type."""

    def __init__(
        self, plan: Plan, accelerator: Accelerator, coordinate: int, events: Sequence[_Events]
    ) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.coordinate = coordinate
        self.all_events = events
        self.events = events[coordinate]
        self.profile = plan.profile
        self.factory = TaskFactory(
            accelerator, plan.profile, plan.collective_seconds, plan.mesh.tensor
        )
        self.streams: dict[str, list[Entry]] = {
            str(name): []
            for name in (
                COMPUTE, COPY, DATA, EXPERT, SEND_FORWARD, SEND_BACKWARD, OFFLOAD, RELOAD,
                *VOCABULARY.values(),
            )
        }  # fmt: skip
        self.pending: list[int] = []
        """Events that the next compute entry has to wait for."""
        self._segments: dict[Hashable, Segment] = {}
        self._tasks: dict[Hashable, tuple[Task, ...]] = {}
        self._units: dict[int, list[_Unit]] = {}
        self._last_unit: int | None = None
        self._exchanging: list[int] = []
        """Exchanges of the pair before, which the next one waits for."""
        self.training = not plan.experiment.training.inference
        self.offloads = self.training and plan.experiment.training.activation_offload
        self._splits = any(a.kind == "W" for a in flatten(plan.schedule.actions[coordinate]))
        self._leaving: list[int] = []
        """Events: activations of a layer have left, in the order of the forwards; -1: those of a
        layer that keeps them."""
        self._returning: list[int] = []
        """Events: activations fetched back have been used up, in the order of the backwards."""
        self.gathers_per_pass = self.training and sharded_around_passes(
            plan.sharding, plan.profile, plan.mesh.pipeline
        )
        self.stages = [
            stage for stage, rank in enumerate(plan.schedule.stage_to_rank) if rank == coordinate
        ]
        self.actions = tuple(flatten(plan.schedule.actions[coordinate]))
        self._turns_at_once = turns_at_once(self.actions) if self.offloads else frozenset()
        self._own_sources: set[tuple[VocabularyKind, int]] = set()
        """Broadcasts whose source is this rank."""
        self._looked_up = False
        if plan.vocabulary is not None:
            self._vocabulary = vocabulary_operations(plan.model, plan.context)
            for action in filter(self._feeds_vocabulary, self.actions):
                forward = action.kind == "F"
                sent = VocabularyKind.HIDDEN if forward else VocabularyKind.EMBEDDED_GRADIENT
                self._own_sources.add((sent, int(action.microbatch or 0)))
        self._position: dict[tuple[str, int], list[int]] = {}
        for action in self.actions:
            kind = "B" if action.kind == "I" else action.kind
            self._position.setdefault((kind, action.stage), []).append(int(action.microbatch or 0))

    # ---------------------------------------------------------------- segments

    def layer_segment(
        self, kind: str, layer: LayerId, *, exchanges_beside: bool = False
    ) -> Segment:
        """Segment of one layer's F, B, I or W, with or without its expert exchanges."""
        key = ("layer", kind, layer, exchanges_beside)
        if key not in self._segments:
            number = layer_number(layer)
            tasks = self._layer_tasks(kind, layer, exchanges_beside)
            name = f"{kind} layer {layer}" + (" without exchanges" if exchanges_beside else "")
            self._segments[key] = Segment(name, tuple(task.at_layer(number) for task in tasks))
        return self._segments[key]

    def _layer_tasks(self, kind: str, layer: LayerId, exchanges_beside: bool) -> tuple[Task, ...]:
        """Tasks of a layer; layers that do the same work share them."""
        context = self.plan.context_of(layer)
        block: Hashable = self.plan.model.block(layer) if isinstance(layer, int) else layer
        transfers = self._transfers(kind, layer)
        key = (kind, block, context.recompute, transfers, exchanges_beside)
        if key not in self._tasks:
            operations = layer_operations(self.plan.model, layer, context)
            chosen = {
                "F": operations.forward,
                "B": operations.backward,
                "I": operations.input_gradient,
                "W": operations.weight_gradient,
            }[kind]
            self._tasks[key] = self.factory.tasks(
                chosen, -1, transfers=transfers, exchanges_beside=exchanges_beside
            )
        return self._tasks[key]

    def _transfers(self, kind: str, layer: LayerId) -> int:
        """Receives and sends that the host launches with this layer's pass, the first of its stage.

        Inner stages stand for all: the ends of the chain, which do one of the two, wait for them.
        """
        if kind == "W" or self.plan.mesh.pipeline == 1:
            return 0
        return 2 * any(self.layers_of(kind, stage)[:1] == (layer,) for stage in self.stages)

    def stage_segment(self, kind: str, stage: int, *, exchanges_beside: bool = False) -> Segment:
        """Segment of a whole stage's F, B, I or W, with or without its expert exchanges."""
        key = ("stage", kind, stage, exchanges_beside)
        if key not in self._segments:
            tasks = [
                task
                for layer in self.layers_of(kind, stage)
                for task in self.layer_segment(kind, layer, exchanges_beside=exchanges_beside).tasks
            ]
            name = f"{kind} stage {stage}" + (" without exchanges" if exchanges_beside else "")
            self._segments[key] = Segment(name, tuple(tasks))
        return self._segments[key]

    def _exchanges(self, kind: str, stage: int) -> Segment:
        """The expert exchanges of a stage's F or B, one after another."""
        key = ("exchanges", kind, stage)
        if key not in self._segments:
            tasks = [
                self.factory.task(task.collective, task.layer)
                for task in self.stage_segment(kind, stage).tasks
                if task.collective is not None and _is_exchange(task)
            ]
            self._segments[key] = Segment(f"{kind} stage {stage} exchanges", tuple(tasks))
        return self._segments[key]

    def layers_of(self, kind: str, stage: int) -> tuple[LayerId, ...]:
        layers = self.plan.stage_layers[stage]
        return layers if kind == "F" else tuple(reversed(layers))

    def single(self, name: str, *operations: Operation, layer: int = -1) -> Segment:
        key = ("single", name, operations)
        if key not in self._segments:
            tasks = tuple(
                self.factory.unhidden(op, layer)
                if isinstance(op, MemoryBound)
                else self.factory.task(op, layer)
                for op in operations
            )
            self._segments[key] = Segment(name, tasks)
        return self._segments[key]

    # ----------------------------------------------------------------- entries

    def add(
        self,
        stream: str,
        segment: Segment,
        *,
        stage: int = -1,
        microbatch: int = -1,
        waits: Iterable[int] = (),
        signals: Iterable[int] = (),
        peer: int = -1,
        signals_peer: Iterable[int] = (),
    ) -> None:
        waiting = list(waits)
        if stream == COMPUTE and self.pending:
            waiting += self.pending
            self.pending = []
        self.streams[stream].append(
            Entry(
                segment,
                stage,
                microbatch,
                tuple(waiting),
                tuple(signals),
                peer,
                tuple(signals_peer),
            )
        )

    # -------------------------------------------------------------------- build

    def build(self) -> None:
        if self.profile.step_host_time > 0.0:
            nothing = Task("host", "host", -1, str(Phase.FORWARD))
            waiting = _waiting(nothing, self.profile.step_host_time)
            self.add(COMPUTE, Segment("host", (waiting,)))
        if self.training:
            self._gather_at_start()
        index = 0
        while index < len(self.actions):
            self._vocabulary_passes(index)
            if self._pairs(index):
                self._pair(self.actions[index], self.actions[index + 1])
                index += 2
            else:
                self._action(self.actions[index])
                index += 1
        self._vocabulary_passes(len(self.actions))
        self._vocabulary_traffic()
        if self.training:
            self._finish_gradients()
            self._optimizer()
        if not self.training:
            self.pending = []
        self.streams = {name: entries for name, entries in self.streams.items() if entries}

    def _action(self, action: Action) -> None:
        kind, stage, microbatch = action.kind, action.stage, int(action.microbatch or 0)
        if kind not in ("F", "B", "I", "W"):
            return
        waits = self._inputs(action)
        done = self.events[("done", kind, stage, microbatch)]
        sends = self._sends(action)
        signals = [done] if sends else []
        if self._feeds_vocabulary(action):
            signals.append(self.events[("vocabulary source", kind == "F", microbatch)])
        self._compute(kind, stage, microbatch, waits, signals)
        if sends:
            self._send(kind, stage, microbatch, done)

    def _inputs(self, action: Action) -> list[int]:
        """Events that an action has to wait for."""
        kind, stage, microbatch = action.kind, action.stage, int(action.microbatch or 0)
        waits: list[int] = []
        source = self._source(kind, stage)
        if source is not None and self.plan.schedule.stage_to_rank[source] != self.coordinate:
            waits.append(self.events[("arrived", kind in "BI", stage, microbatch)])
        if self.plan.vocabulary is None:
            if kind == "F" and "embedding" in self.plan.stage_layers[stage]:
                waits.append(self._input_copy(microbatch))
        else:
            schedule = self.plan.schedule
            if kind == "F" and schedule.is_first(stage):
                waits.append(self.events[(VocabularyKind.EMBEDDED, microbatch)])
            if kind in ("B", "I") and schedule.is_last(stage):
                waits.append(self.events[(VocabularyKind.HIDDEN_GRADIENT, microbatch)])
        return waits

    # -------------------------------------------------------------- vocabulary parallelism

    def _feeds_vocabulary(self, action: Action) -> bool:
        """Is its result what all ranks' vocabulary passes work on?"""
        if self.plan.vocabulary is None:
            return False
        schedule = self.plan.schedule
        forward = action.kind == "F" and schedule.is_last(action.stage)
        return forward or (action.kind in ("B", "I") and schedule.is_first(action.stage))

    def _vocabulary_passes(self, index: int) -> None:
        """The passes that stand before an action, see `simulator.schedules.vocabulary`."""
        if self.plan.vocabulary is None:
            return
        kinds = VocabularyKind
        needs = {
            kinds.SCORES: kinds.HIDDEN,
            kinds.GRADIENTS: kinds.STATISTICS,
            kinds.LOOKUP_GRADIENT: kinds.EMBEDDED_GRADIENT,
        }
        for kind, microbatch in self.plan.vocabulary.before[self.coordinate].get(index, ()):
            waits = []
            if kind in needs and (needs[kind], microbatch) not in self._own_sources:
                waits = [self.events[(needs[kind], microbatch)]]
            if kind is kinds.LOOKUP:
                waits.append(self._input_copy(microbatch))
                if not self._looked_up and self._gathers_ahead:
                    waits.append(self.events[("gathered", "vocabulary")])
                self._looked_up = True
            key = ("vocabulary", kind)
            if key not in self._segments:
                tasks = self.factory.tasks(getattr(self._vocabulary, kind), -1)
                self._segments[key] = Segment(f"vocabulary {kind}", tasks)
            self.add(
                COMPUTE,
                self._segments[key],
                microbatch=microbatch,
                waits=waits,
                signals=[self.events[(kind, microbatch)]],
            )

    def _vocabulary_traffic(self) -> None:
        """Communication around the vocabulary passes, in the order of all ranks."""
        if self.plan.vocabulary is None:
            return
        kinds = VocabularyKind
        after = {
            kinds.EMBEDDED: kinds.LOOKUP,
            kinds.STATISTICS: kinds.SCORES,
            kinds.HIDDEN_GRADIENT: kinds.GRADIENTS,
        }
        for kind, microbatch in self.plan.vocabulary.communication:
            waits = []
            if kind in after:
                waits = [self.events[(after[kind], microbatch)]]
            elif (kind, microbatch) in self._own_sources:
                forward = kind is kinds.HIDDEN
                waits = [self.events[("vocabulary source", forward, microbatch)]]
            found = getattr(self._vocabulary, kind)
            operations = found if isinstance(found, tuple) else (found,)
            self.add(
                VOCABULARY[kind],
                self.single(f"vocabulary {kind}", *operations),
                microbatch=microbatch,
                waits=waits,
                signals=[self.events[(kind, microbatch)]],
            )

    @property
    def _vocabulary_unit(self) -> _Unit | None:
        """The rank's rows of the table and the projection, reduced and gathered together."""
        if self.plan.vocabulary is None:
            return None
        size = vocabulary_parameters(self.plan.model, self.plan.context).dense
        return _Unit("vocabulary", (), size, 0.0)

    def _sends(self, action: Action) -> bool:
        """Does another rank need what the action makes?"""
        target = self._target(action.kind, action.stage)
        return target is not None and self.plan.schedule.stage_to_rank[target] != self.coordinate

    def _source(self, kind: str, stage: int) -> int | None:
        """The stage whose output this action needs, None if it needs none of another stage."""
        length = self.plan.schedule.chain_len
        if kind == "F":
            return stage - 1 if stage % length else None
        if kind in ("B", "I"):
            return stage + 1 if (stage + 1) % length else None
        return None

    def _target(self, kind: str, stage: int) -> int | None:
        length = self.plan.schedule.chain_len
        if kind == "F":
            return stage + 1 if (stage + 1) % length else None
        if kind in ("B", "I"):
            return stage - 1 if stage % length else None
        return None

    def _input_copy(self, microbatch: int) -> int:
        """Token ids and labels of one micro-batch, copied from the host ahead of time."""
        context = self.plan.context
        size = 2 * 8.0 * context.micro_batch * context.seq / context.context
        event = self.events[("input", microbatch)]
        copy = self.single("input", HostCopy("input", size))
        self.add(COPY, copy, microbatch=microbatch, signals=[event])
        return event

    def _send(self, kind: str, stage: int, microbatch: int, *done: int) -> None:
        forward = kind == "F"
        target = self._target(kind, stage)
        assert target is not None
        peer = self.plan.schedule.stage_to_rank[target]
        op = Collective(
            "send.forward" if forward else "send.backward",
            "send_recv",
            "pipeline",
            self._boundary_bytes(),
            Phase.FORWARD if forward else Phase.INPUT_GRADIENT,
        )
        signals = []
        if not self.plan.behaviour.p2p:
            sent = self.events[("sent", kind, stage, microbatch)]
            signals.append(sent)
            self.pending.append(sent)
        arrived = self.all_events[peer][("arrived", not forward, target, microbatch)]
        self.add(
            SEND_FORWARD if forward else SEND_BACKWARD,
            self.single(op.name, op),
            stage=stage,
            microbatch=microbatch,
            waits=done,
            signals=signals,
            peer=peer,
            signals_peer=[arrived],
        )

    def _boundary_bytes(self) -> float:
        """Bytes of the activation that crosses a stage boundary, per rank: s b h / (t if SP)."""
        context = self.plan.context
        element = 4.0 if context.precision in ("fp32", "tf32") else 2.0
        size = element * context.micro_batch * context.seq * self.plan.model.hidden
        shards = context.context
        if context.sequence_parallel or self.profile.scatter_gather_p2p:
            shards *= context.tensor
        return size / shards

    # ------------------------------------------------------------------ compute

    def _compute(
        self, kind: str, stage: int, microbatch: int, waits: list[int], signals: list[int]
    ) -> None:
        """The compute entries of one action: one, or one per unit where traffic goes with it."""
        gather_first = (
            kind == "F" and self._gathers_ahead and self._is_first("F", stage, microbatch)
        )
        reduce_last = (
            kind in ("B", "W")
            and self._reduces_behind
            and self._is_last_gradient(kind, stage, microbatch)
        )
        if self.gathers_per_pass:
            self._sharded_pass(kind, stage, microbatch, waits, signals)
        elif gather_first or reduce_last:
            self._pass_by_units(kind, stage, microbatch, waits, signals, gather_first, reduce_last)
        elif self.offloads:
            layers = self.layers_of(kind, stage)
            self._add_layers(kind, stage, microbatch, layers, waits, signals)
        else:
            self.add(
                COMPUTE,
                self.stage_segment(kind, stage),
                stage=stage,
                microbatch=microbatch,
                waits=waits,
                signals=signals,
            )

    def _add_layers(
        self,
        kind: str,
        stage: int,
        microbatch: int,
        layers: tuple[LayerId, ...],
        waits: Sequence[int],
        signals: Sequence[int],
        segment_of: Callable[[str, LayerId], Segment] | None = None,
    ) -> None:
        """Compute entries of some of a stage's layers: one, or one per layer with offloading."""
        if not self.offloads:
            self.add(
                COMPUTE,
                self._layers_segment(kind, layers),
                stage=stage,
                microbatch=microbatch,
                waits=waits,
                signals=signals,
            )
            return
        segment_of = segment_of or self.layer_segment
        at_once = (stage, microbatch) in self._turns_at_once
        limit = self.plan.experiment.training.activation_offload_layers
        own = self.plan.stage_layers[stage]
        buffered = offloaded_layers(own, at_once=False, limit=limit)
        away = offloaded_layers(own, at_once=at_once, limit=limit)
        # layers that keep their activations leave room before they run, and again after
        room = WINDOW + sum(isinstance(layer, int) for layer in own) - len(buffered)
        for index, layer in enumerate(layers):
            own_waits = list(waits) if index == 0 else []
            own_signals = list(signals) if index == len(layers) - 1 else []
            size = self._stored_bytes(layer) if layer in away else 0.0
            left = self.events[("left", stage, microbatch, layer)] if size > 0.0 else -1
            # what a split backward keeps is needed until its second half, which frees no room
            frees = kind == "B" and not self._splits and isinstance(layer, int)
            used = size > 0.0 or (frees and layer not in buffered)
            ran = self.events[("ran", kind, stage, microbatch, layer)] if used else -1
            if used:
                own_signals.append(ran)
            if kind == "F" and isinstance(layer, int):
                if len(self._leaving) >= room and self._leaving[-room] >= 0:
                    own_waits.append(self._leaving[-room])
                self._leaving.append(left)
            elif kind != "F" and used:
                if size > 0.0:
                    lag = WINDOW if self._splits else room
                    copy = HostCopy("activations.reload", size, phase=_BACKWARD_PHASE[kind])
                    own_waits.append(self._fetch(copy, kind, stage, microbatch, layer, left, lag))
                self._returning.append(ran)
            self.add(
                COMPUTE,
                segment_of(kind, layer),
                stage=stage,
                microbatch=microbatch,
                waits=own_waits,
                signals=own_signals,
            )
            if size > 0.0 and kind == "F":
                copy = HostCopy("activations.offload", size, to_device=False)
                self.add(
                    OFFLOAD,
                    self._copy_segment(copy, layer),
                    stage=stage,
                    microbatch=microbatch,
                    waits=[ran],
                    signals=[left],
                )

    def _fetch(
        self,
        copy: HostCopy,
        kind: str,
        stage: int,
        microbatch: int,
        layer: LayerId,
        left: int,
        room: int,
    ) -> int:
        """Copy a layer's activations back once they have left and the layer `room` before it in
        the backwards is done; the event."""
        back = self.events[("back", kind, stage, microbatch, layer)]
        waits = [left]
        if len(self._returning) >= room:
            waits.append(self._returning[-room])
        self.add(
            RELOAD,
            self._copy_segment(copy, layer),
            stage=stage,
            microbatch=microbatch,
            waits=waits,
            signals=[back],
        )
        return back

    def _stored_bytes(self, layer: LayerId) -> float:
        return activation_bytes(self.plan.model, layer, self.plan.context_of(layer))

    def _copy_segment(self, copy: HostCopy, layer: LayerId) -> Segment:
        key = ("copy", copy, layer)
        if key not in self._segments:
            task = self.factory.linked_copy(copy, layer_number(layer))
            self._segments[key] = Segment(f"{copy.name} layer {layer}", (task,))
        return self._segments[key]

    # ------------------------------------------------ expert traffic under another micro-batch

    def _pairs(self, index: int) -> bool:
        """May this forward and the backward after it run as one pair, each hiding the other's
        expert all-to-alls (Megatron-LM --overlap-moe-expert-parallel-comm, DualPipe)?"""
        if not self.plan.behaviour.expert or self.plan.mesh.expert == 1 or self.gathers_per_pass:
            return False
        if index + 1 >= len(self.actions):
            return False
        first, second = self.actions[index], self.actions[index + 1]
        if first.kind != "F" or second.kind != "B":
            return False
        placed = self.plan.vocabulary
        if placed is not None and index + 1 in placed.before[self.coordinate]:
            return False
        forward, backward = int(first.microbatch or 0), int(second.microbatch or 0)
        own = first.stage == second.stage and forward == backward
        plain = not (self._gathers_ahead and self._is_first("F", first.stage, forward)) and not (
            self._reduces_behind and self._is_last_gradient("B", second.stage, backward)
        )
        return plain and not own

    def _pair(self, forward: Action, backward: Action) -> None:
        """Forward and backward back to back, each one's exchanges beside the other's compute.

        The forward does not wait for the backward's input, which may depend on it. An exchange may
        last as long as the pair; the next pair waits for it.
        """
        for action in (forward, backward):
            kind, stage, microbatch = action.kind, action.stage, int(action.microbatch or 0)
            begun, exchanged, done = (
                self.events[(name, kind, stage, microbatch)]
                for name in ("begun", "exchanged", "done")
            )
            waits = self._inputs(action)
            ends = [done]
            if self._feeds_vocabulary(action):
                ends.append(self.events[("vocabulary source", kind == "F", microbatch)])
            if action is forward:
                waits += self._exchanging
                self._exchanging = []
            self._exchanging.append(exchanged)
            self.add(
                COMPUTE,
                Segment("begin", ()),
                stage=stage,
                microbatch=microbatch,
                waits=waits,
                signals=[begun],
            )
            self.add(
                EXPERT,
                self._exchanges(kind, stage),
                stage=stage,
                microbatch=microbatch,
                waits=[begun],
                signals=[exchanged],
            )
            if self.offloads:
                layers = self.layers_of(kind, stage)
                own = functools.partial(self.layer_segment, exchanges_beside=True)
                self._add_layers(kind, stage, microbatch, layers, [], ends, own)
            else:
                self.add(
                    COMPUTE,
                    self.stage_segment(kind, stage, exchanges_beside=True),
                    stage=stage,
                    microbatch=microbatch,
                    signals=ends,
                )
            if self._sends(action):
                self._send(kind, stage, microbatch, done, exchanged)

    def _is_first(self, kind: str, stage: int, microbatch: int) -> bool:
        return self._position[(kind, stage)][0] == microbatch

    def _is_last_gradient(self, kind: str, stage: int, microbatch: int) -> bool:
        """Is this the action after which the stage's gradients are complete?"""
        splits = ("W", stage) in self._position
        return (kind == "W" or not splits) and self._position[("W" if splits else "B", stage)][
            -1
        ] == microbatch

    @property
    def _replicas(self) -> int:
        return self.plan.mesh.size("data_context")

    @property
    def _gathers_ahead(self) -> bool:
        return (
            self.training
            and self.plan.behaviour.param_gather
            and self.plan.sharding in ("zero1", "zero2")
            and not self.gathers_per_pass
            and self._replicas > 1
        )

    @property
    def _reduces_behind(self) -> bool:
        return (
            self.training
            and self.plan.behaviour.grad_reduce
            and not self.gathers_per_pass
            and (self._replicas > 1 or self.plan.mesh.size("expert_data") > 1)
        )

    def _pass_by_units(
        self,
        kind: str,
        stage: int,
        microbatch: int,
        waits: list[int],
        signals: list[int],
        gather_first: bool,
        reduce_last: bool,
    ) -> None:
        units = self.units(stage)
        if kind != "F":
            units = units[::-1]
        for index, unit in enumerate(units):
            unit_waits = list(waits) if index == 0 else []
            unit_signals = list(signals) if index == len(units) - 1 else []
            if gather_first:
                unit_waits.append(self.events[("gathered", stage, unit.name)])
            if reduce_last:
                ready = self.events[("gradient", stage, unit.name)]
                unit_signals.append(ready)
            layers = unit.layers if kind == "F" else tuple(reversed(unit.layers))
            self._add_layers(kind, stage, microbatch, layers, unit_waits, unit_signals)
            if reduce_last:
                self._reduce(stage, unit, waits=[ready])

    def _layers_segment(self, kind: str, layers: tuple[LayerId, ...]) -> Segment:
        if len(layers) == 1:
            return self.layer_segment(kind, layers[0])
        key = ("layers", kind, layers)
        if key not in self._segments:
            tasks = [task for layer in layers for task in self.layer_segment(kind, layer).tasks]
            self._segments[key] = Segment(f"{kind} layers {layers[0]}..{layers[-1]}", tuple(tasks))
        return self._segments[key]

    # ------------------------------------------------- units, gradients, parameters

    def parameters(self, layer: LayerId) -> LayerParameters:
        return layer_parameters(self.plan.model, layer, self.plan.context)

    def units(self, stage: int) -> list[_Unit]:
        """The stage's layers in buckets, in forward order.

        Per-pass gathers (FSDP) wrap one layer each; the embedding, the final norm and the head
        belong to the root unit. Megatron fills buckets of at least
        max(40e6, 1e6 * data size) elements (`--ddp-bucket-size` default).
        """
        if stage in self._units:
            return self._units[stage]
        layers = self.plan.stage_layers[stage]
        target = (
            0.0
            if self.gathers_per_pass or self.plan.sharding != self.plan.experiment.parallel.sharding
            else max(self.profile.bucket_elements, self.profile.bucket_elements_per_rank
                     * self._replicas)
        )  # fmt: skip
        units: list[_Unit] = []
        current: list[LayerId] = []
        dense = expert = 0.0
        # buckets fill from the last layer, whose gradients are ready first
        for layer in reversed(layers):
            parameters = self.parameters(layer)
            current.append(layer)
            dense += parameters.dense
            expert += parameters.expert
            if dense + expert >= target:
                units.append(self._unit(len(units), current, dense, expert))
                current, dense, expert = [], 0.0, 0.0
        if current:
            units.append(self._unit(len(units), current, dense, expert))
        self._units[stage] = units[::-1]
        return self._units[stage]

    def _unit(self, number: int, layers: list[LayerId], dense: float, expert: float) -> _Unit:
        pieces: tuple[float, ...] = (1.0,)
        if self.gathers_per_pass and self.profile.fsdp_unit == "weight":
            sizes: dict[tuple[LayerId, str], float] = {}
            for layer in layers:
                for tensor in layer_tensors(self.plan.model, layer):
                    if not tensor.matrix or tensor.sharding == "expert":
                        continue
                    name = tensor.name
                    if self.profile.fused_projections and name == "attention.kv.weight":
                        name = "attention.q.weight"
                    key = (layer, name)
                    sizes[key] = sizes.get(key, 0.0) + float(tensor.elements)
            if sizes:
                total = sum(sizes.values())
                pieces = tuple(size / total for size in sizes.values())
        return _Unit(str(number), tuple(reversed(layers)), dense, expert, pieces)

    def _gradient_ops(self, name: str, unit: _Unit) -> list[Operation]:
        """Collectives that reduce the gradients of a unit over its replicas."""
        sharding = self.plan.sharding
        wire = self.profile.grad_reduce_bytes
        if self.plan.context.precision in ("fp32", "tf32"):
            wire = 4.0
        ops: list[Operation] = []
        for part, elements, group in _parts(unit):
            size = elements * wire
            if size <= 0.0:
                continue
            phase = Phase.WEIGHT_GRADIENT
            hybrid = (
                group == "data_context"
                and self.plan.mesh.size("replicate") > 1
                and sharding != "none"
            )
            if hybrid:
                shard = self.plan.mesh.size("shard")
                if shard > 1:
                    ops.append(
                        Collective(f"{name}.{part}.shard", "reduce_scatter", "shard", size, phase)
                    )
                ops.append(
                    Collective(
                        f"{name}.{part}.replicate", "all_reduce", "replicate", size / shard, phase
                    )
                )
            elif self.plan.mesh.size(group) > 1:
                op = "all_reduce" if sharding == "none" else "reduce_scatter"
                ops += self._list_copies(f"{name}.{part}", group, size, phase)
                ops.append(Collective(f"{name}.{part}", op, group, size, phase))
        return ops

    def _list_copies(self, name: str, group: str, size: float, phase: Phase) -> list[Operation]:
        """Between one tensor per rank and the flat buffer of a collective, a kernel each."""
        if not self.gathers_per_pass or self.profile.fsdp_copies != "lists":
            return []
        ranks = self.plan.mesh.size(group)
        return [MemoryBound(f"{name}.copies", "copy", size, size, kernels=ranks, phase=phase)]

    def _gather_ops(self, name: str, unit: _Unit, phase: Phase) -> list[Operation]:
        """Collectives that gather the sharded parameters of a unit."""
        wire = self.profile.param_gather_bytes
        if self.plan.context.precision in ("fp32", "tf32"):
            wire = 4.0
        elif self.profile.fp8_param_gather and BYTES_PER_ELEMENT[self.plan.context.precision] < 2:
            wire = 1.0
        ops: list[Operation] = []
        for part, elements, group in _parts(unit):
            if group == "data_context" and self.plan.mesh.size("replicate") > 1:
                group = "shard"
            count = self.plan.mesh.size(group)
            if elements <= 0.0 or count == 1:
                continue
            size = elements * wire
            if self.profile.param_sync == "broadcast":
                # every rank sends the tensors that it has updated
                own = Collective(f"{name}.{part}", "broadcast", group, size / count, phase)
                ops += [own] * count
            else:
                ops.append(Collective(f"{name}.{part}", "all_gather", group, size, phase))
                ops += self._list_copies(f"{name}.{part}", group, size, phase)
        return ops

    def _reduce(
        self,
        stage: int,
        unit: _Unit,
        waits: list[int],
        microbatch: int = -1,
        signals: Sequence[int] = (),
    ) -> None:
        ops = self._gradient_ops(f"grad_reduce.{stage}.{unit.name}", unit)
        if ops or signals:
            self.add(
                DATA,
                self.single(f"grad reduce stage {stage} unit {unit.name}", *ops),
                stage=stage,
                microbatch=microbatch,
                waits=waits,
                signals=signals,
            )

    def _gather_at_start(self) -> None:
        """Distributed optimizer, overlapped: this step's parameters arrive while it begins."""
        if not self._gathers_ahead:
            return
        if self._vocabulary_unit is not None:
            ops = self._gather_ops("param_gather.vocabulary", self._vocabulary_unit, Phase.FORWARD)
            self.add(
                DATA,
                self.single("param gather vocabulary", *ops),
                signals=[self.events[("gathered", "vocabulary")]],
            )
        for stage in self.stages:
            for unit in self.units(stage):
                ops = self._gather_ops(f"param_gather.{stage}.{unit.name}", unit, Phase.FORWARD)
                gathered = self.events[("gathered", stage, unit.name)]
                self.add(
                    DATA,
                    self.single(f"param gather stage {stage} unit {unit.name}", *ops),
                    stage=stage,
                    signals=[gathered],
                )

    # ------------------------------------------------------------ fully sharded passes

    def _sharded_pass(
        self, kind: str, stage: int, microbatch: int, waits: list[int], signals: list[int]
    ) -> None:
        """A pass that gathers each unit's parameters just before it and frees them after.

        `fsdp_prefetch` units are gathered ahead: the gather of unit i may start when unit
        i - 1 - prefetch has been computed (at once without `fsdp_limit_all_gathers`). Gathers and
        reductions share one stream, in the order in which PyTorch FSDP issues them. The root unit
        (embedding, head) is gathered once per pass pair.
        """
        backward = kind != "F"
        gathers = not backward or self.profile.fsdp_regather_backward
        if self.plan.sharding == "zero2":
            gathers = not backward
        if kind == "W":
            gathers = False
        reduces = kind in ("B", "W")
        units = self.units(stage)
        if backward:
            units = units[::-1]
        data = self.streams[DATA]
        ahead = self.profile.fsdp_prefetch if self.plan.behaviour.param_gather else -1
        limited = ahead < 0 or self.profile.fsdp_limit_all_gathers
        done = [
            self.events[("unit", kind, stage, microbatch, index)] for index in range(len(units))
        ]
        gathered = [
            self.events[("unit gathered", kind, stage, microbatch, index)]
            for index in range(len(units))
        ]

        def gather(index: int) -> None:
            unit = units[index]
            ops = self._gather_ops(
                f"param_gather.{kind}.{stage}.{unit.name}",
                unit,
                Phase.INPUT_GRADIENT if backward else Phase.FORWARD,
            )
            if kind == "B" and self._released_after_recompute(unit):
                ops *= 2
            limit = index - 1 - ahead if ahead >= 0 else index - 1
            self.add(
                DATA,
                self.single(f"param gather {kind} stage {stage} unit {unit.name}", *ops),
                stage=stage,
                microbatch=microbatch,
                waits=[done[limit]] if limited and limit >= 0 else [],
                signals=[gathered[index]],
            )

        def reduce(index: int) -> None:
            signals = []
            if not self.plan.behaviour.grad_reduce:
                signals = [self.events[("unit reduced", kind, stage, microbatch, index)]]
                self.pending += signals
            self._reduce(
                stage, units[index], waits=[done[index]], microbatch=microbatch, signals=signals
            )

        # a gather that nothing in this pass limits may start no earlier than the pass before it
        pass_start = len(data)
        for index, unit in enumerate(units):
            if gathers:
                if index == 0:
                    for early in range(min(1 + max(ahead, 0), len(units))):
                        gather(early)
                elif ahead < 0:
                    gather(index)
                elif index + ahead < len(units):
                    gather(index + ahead)
            if reduces and index > 0:
                reduce(index - 1)
            layers = unit.layers if not backward else tuple(reversed(unit.layers))
            self._add_layers(
                kind,
                stage,
                microbatch,
                layers,
                waits=(waits if index == 0 else []) + ([gathered[index]] if gathers else []),
                signals=[done[index], *(signals if index == len(units) - 1 else [])],
            )
        if reduces:
            reduce(len(units) - 1)
        if gathers and self._last_unit is not None:
            # parameters of this pass's first units are not prefetched across passes
            first = data[pass_start]
            data[pass_start] = dataclasses.replace(first, waits=(*first.waits, self._last_unit))
        self._last_unit = done[-1]

    def _released_after_recompute(self, unit: _Unit) -> bool:
        """Are parameters gathered for a layer's recomputation freed before its backward?"""
        recomputed = any(
            isinstance(layer, int) and self.plan.context_of(layer).recompute == "full"
            for layer in unit.layers
        )
        return recomputed and unit.dense > self.profile.fsdp_keep_elements

    # ------------------------------------------------------------------ end of the step

    def _finish_gradients(self) -> None:
        """Gradient traffic that was not overlapped, and what has to wait for all of it."""
        last = self.events["backward done"]
        self.add(COMPUTE, Segment("backward done", ()), signals=[last])
        if self._vocabulary_unit is not None:
            ops = self._gradient_ops("grad_reduce.vocabulary", self._vocabulary_unit)
            if ops:
                self.add(DATA, self.single("grad reduce vocabulary", *ops), waits=[last])
        if not self.gathers_per_pass and not self._reduces_behind:
            for stage in reversed(self.stages):
                for unit in reversed(self.units(stage)):
                    self._reduce(stage, unit, waits=[last])
        self._embedding_gradients(last)
        reduced = self.events["gradients reduced"]
        self.add(DATA, Segment("gradients reduced", ()), waits=[last], signals=[reduced])
        self.pending.append(reduced)

    def _embedding_gradients(self, last: int) -> None:
        """First and last stage add their gradients of the tied embedding (SC21, section 2.2)."""
        mesh, model = self.plan.mesh, self.plan.model
        if not model.tied_embeddings or mesh.pipeline == 1 or model.vocab == 0:
            return
        if self.plan.vocabulary is not None:
            return  # table and projection are the same rows on every rank
        holders = {
            self.plan.schedule.stage_to_rank[stage]
            for stage, layers in enumerate(self.plan.stage_layers)
            if "embedding" in layers or "head" in layers
        }
        if holders != {0, mesh.pipeline - 1} or self.coordinate not in holders:
            return
        size = model.vocab * model.hidden / mesh.tensor * self.profile.main_grad_bytes
        op = Collective(
            "embedding_grad_reduce", "all_reduce", "embedding", size, Phase.WEIGHT_GRADIENT
        )
        self.add(DATA, self.single("embedding gradients", op), waits=[last])

    def _optimizer(self) -> None:
        plan, profile = self.plan, self.profile
        training, sharding = plan.experiment.training, plan.sharding
        dense = expert = 0.0
        for stage in self.stages:
            for layer in plan.stage_layers[stage]:
                parameters = self.parameters(layer)
                dense += parameters.dense
                expert += parameters.expert
        if self._vocabulary_unit is not None:
            dense += self._vocabulary_unit.dense
        if sharding != "none":
            dense /= plan.mesh.shard
            expert /= plan.mesh.expert_data
        operations = optimizer_operations(
            dense + expert,
            training.optimizer,
            plan.context.precision,
            profile,
            clip=training.gradient_clipping,
        )
        if plan.mesh.ranks == 1:
            operations = tuple(op for op in operations if not isinstance(op, Collective))
        updated = self.events["updated"]
        self.add(
            COMPUTE,
            Segment("optimizer", self.factory.tasks(operations, -1)),
            signals=[updated],
        )
        if sharding in ("zero1", "zero2") and not self.gathers_per_pass and not self._gathers_ahead:
            if self._vocabulary_unit is not None:
                ops = self._gather_ops(
                    "param_gather.vocabulary", self._vocabulary_unit, Phase.OPTIMIZER
                )
                if ops:
                    segment = self.single("param gather vocabulary", *ops)
                    self.add(DATA, segment, waits=[updated])
            for stage in self.stages:
                units = self.units(stage)
                if self.profile.param_sync == "broadcast":
                    layers = tuple(layer for unit in units for layer in unit.layers)
                    dense, expert = (sum(getattr(u, k) for u in units) for k in ("dense", "expert"))
                    units = [_Unit("all", layers, dense, expert)]
                for unit in units:
                    ops = self._gather_ops(
                        f"param_gather.{stage}.{unit.name}", unit, Phase.OPTIMIZER
                    )
                    if ops:
                        self.add(
                            DATA,
                            self.single(f"param gather stage {stage} unit {unit.name}", *ops),
                            stage=stage,
                            waits=[updated],
                        )


_BACKWARD_PHASE = {
    "B": Phase.INPUT_GRADIENT,
    "I": Phase.INPUT_GRADIENT,
    "W": Phase.WEIGHT_GRADIENT,
}


def _is_exchange(task: Task) -> bool:
    """Is it an expert all-to-all that nothing is merged with?"""
    collective = task.collective
    return (
        collective is not None
        and collective.group == "expert"
        and collective.op == "all_to_all"
        and task.compute == 0.0
    )


def layer_number(layer: LayerId) -> int:
    """The `layer` column of the timeline: the block's index, -1 for embedding and head."""
    return layer if isinstance(layer, int) else -1
