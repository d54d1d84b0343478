"""Recorded execution: per rank the operations of its streams, what they waited for, and groups.

What profilers and execution traces are read into. `Trace.frame` gives the columns of a simulated
timeline, `Trace.workload` the programs that replay it on another cluster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from simulator.catalog.accelerators import Accelerator
from simulator.errors import InputError, raise_all
from simulator.model.operations import Collective
from simulator.workload import Entry, RankProgram, Segment, Task, Workload

#: Columns of a timeline, in order.
COLUMNS = (
    "rank", "stage", "stream", "operation", "kind", "phase", "layer", "microbatch", "start", "end",
    "flops", "bytes", "waited_for",
)  # fmt: skip

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
#: Gaps below this are clock resolution, not waiting (profilers count in nanoseconds), seconds.
_RESOLUTION = 1e-9
#: Largest world that a trace may claim.
MAX_RANKS = 1 << 20


@dataclass(frozen=True, slots=True)
class TraceOperation:
    """One operation of one rank; times in seconds on the rank's own clock."""

    name: str
    stream: str
    kind: str
    start: float
    end: float
    phase: str = ""
    stage: int = -1
    layer: int = -1
    microbatch: int = -1
    flops: float = 0.0
    bytes: float = 0.0
    """Bytes moved; of a collective in nccl-tests' convention (see `Collective`)."""
    waits: tuple[int, ...] = ()
    """Positions (in the rank's list) of earlier operations that had to end first, beyond those of
    the same stream."""
    collective: str = ""
    """`all_reduce`, ...; `send` or `recv`; empty for everything that is no communication."""
    group: str = ""
    peer: int = -1
    """Rank that a `send` goes to or a `recv` comes from."""
    match: str = ""
    """Members' collectives of a group belong together in order of issue, per `match`."""
    overhead: float = 0.0
    """Of a communication's duration, the seconds that are the rank's own (launching it)."""

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """Operations of some or all ranks of a job.

    Raises
    ------
    InputError
        At construction, if a rank, group member or wait does not exist, or an operation ends
        before it starts.
    """

    operations: Mapping[int, tuple[TraceOperation, ...]]
    """By rank, in the order of their start."""
    groups: Mapping[str, tuple[int, ...]]
    """Members of every communicator, by name."""
    world_size: int
    name: str = ""

    def __post_init__(self) -> None:
        errors: list[InputError] = []
        if not 1 <= self.world_size <= MAX_RANKS:
            raise InputError(f"a world of {self.world_size} ranks", place=self.name or None)
        for rank, operations in self.operations.items():
            if not 0 <= rank < self.world_size:
                errors.append(InputError(f"rank {rank} is not in 0..{self.world_size - 1}"))
            for position, op in enumerate(operations):
                if not (math.isfinite(op.start) and math.isfinite(op.end) and op.end >= op.start):
                    errors.append(InputError(f"operation {op.name!r} ends before it starts"))
                if any(not 0 <= other < position for other in op.waits):
                    errors.append(InputError(f"operation {op.name!r} waits for none before it"))
            if len(errors) > 8:
                break
        for name, members in self.groups.items():
            if len(set(members)) != len(members) or not members:
                errors.append(InputError(f"group {name!r} is empty or names a rank twice"))
            elif min(members) < 0 or max(members) >= self.world_size:
                errors.append(
                    InputError(f"group {name!r} has ranks outside 0..{self.world_size - 1}")
                )
        raise_all([e.at(f"{self.name}: rank data") if self.name else e for e in errors[:8]])

    @property
    def duration(self) -> float:
        """Seconds from the first start to the last end of the slowest rank."""
        return max(
            (
                max(op.end for op in ops) - min(op.start for op in ops)
                for ops in self.operations.values()
                if ops
            ),
            default=0.0,
        )

    def frame(self) -> pd.DataFrame:
        """The trace in a timeline's columns (`COLUMNS`), times from each rank's first start.

        `waited_for` is stream and name of the operation (of another stream) that ended last of
        those that an operation had to wait for; empty where there is none.
        """
        rows: dict[str, list[object]] = {column: [] for column in COLUMNS}
        for rank in sorted(self.operations):
            operations = self.operations[rank]
            zero = min((op.start for op in operations), default=0.0)
            for op in operations:
                last = max(op.waits, key=lambda i: (operations[i].end, i), default=None)
                rows["rank"].append(rank)
                rows["stage"].append(op.stage)
                rows["stream"].append(op.stream)
                rows["operation"].append(op.name)
                rows["kind"].append(op.kind)
                rows["phase"].append(op.phase)
                rows["layer"].append(op.layer)
                rows["microbatch"].append(op.microbatch)
                rows["start"].append(op.start - zero)
                rows["end"].append(op.end - zero)
                rows["flops"].append(op.flops)
                rows["bytes"].append(op.bytes)
                cause = None if last is None else operations[last]
                rows["waited_for"].append(f"{cause.stream}: {cause.name}" if cause else "")
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        whole = ("rank", "stage", "layer", "microbatch")
        real = ("start", "end", "flops", "bytes")
        text = ("stream", "operation", "kind", "phase", "waited_for")
        return frame.astype(
            dict.fromkeys(whole, "int64")
            | dict.fromkeys(real, "float64")
            | dict.fromkeys(text, "category")
        )

    def spread(self, world_size: int | None = None) -> Trace:
        """A whole job from the trace of one of its ranks: every rank does the same.

        A group of ranks a, a+s, ..., a+(n-1)s stands for the partition of the world into such
        groups (s consecutive groups in every s*n ranks), as rank meshes form them.

        Raises
        ------
        InputError
            If several ranks are traced but not all, if a group is no arithmetic progression, or if
            the rank sends to or receives from a single other one.
        """
        size = world_size or self.world_size
        if self.is_whole and size == self.world_size:
            return self
        operations, labels = self._representative(size)
        groups: dict[str, tuple[int, ...]] = {}
        for name, label in labels.items():
            for number in range(int(label.max()) + 1):
                members = np.flatnonzero(label == number)
                groups[f"{name}/{number}"] = tuple(int(rank) for rank in members)
        shared: dict[tuple[str, ...], tuple[TraceOperation, ...]] = {}
        result: dict[int, tuple[TraceOperation, ...]] = {}
        for rank in range(size):
            names = tuple(f"{name}/{label[rank]}" for name, label in labels.items())
            if names not in shared:
                mapping = dict(zip(labels, names, strict=True))
                shared[names] = tuple(
                    dataclasses.replace(op, group=mapping[op.group]) if op.group in mapping else op
                    for op in operations
                )
            result[rank] = shared[names]
        return Trace(result, groups, size, self.name)

    @property
    def is_whole(self) -> bool:
        """True if every rank of the job is traced."""
        return len(self.operations) == self.world_size

    def _representative(
        self, size: int
    ) -> tuple[tuple[TraceOperation, ...], dict[str, np.ndarray]]:
        """The one traced rank's operations, and the label of every rank per group it uses."""
        place = self.name or None
        if len(self.operations) != 1:
            raise InputError(
                f"has traces of {len(self.operations)} of {self.world_size} ranks; expected all, "
                "or one that stands for all",
                place=place,
            )
        if not 1 <= size <= MAX_RANKS:
            raise InputError(f"expected 1 to {MAX_RANKS} ranks, got {size}", place=place)
        ((_, operations),) = self.operations.items()
        if any(op.collective in ("send", "recv") for op in operations):
            raise InputError(
                "one rank with point-to-point transfers cannot stand for all ranks; "
                "give the traces of all ranks",
                place=place,
            )
        used = dict.fromkeys(op.group for op in operations if op.collective)
        labels: dict[str, np.ndarray] = {}
        for name in used:
            if name in self.groups:
                members = sorted(self.groups[name])
                labels[name] = _partition(name, members, size, self.world_size)
        return operations, labels

    def workload(
        self,
        *,
        world_size: int | None = None,
        communication: Literal["simulated", "measured"] = "simulated",
        keep_gaps: bool = True,
        accelerator: Accelerator | None = None,
    ) -> Workload:
        """The programs that replay the trace.

        Compute lasts what was measured. Where an operation started later than its stream and what
        it waited for allow, the difference is kept as host time in front of it.

        Parameters
        ----------
        world_size:
            Number of ranks that the trace of one rank stands for (see `spread`); the job's own
            when left out.
        communication:
            `simulated`: collectives and transfers take what the cluster gives them; `measured`:
            as long as in the trace.
        keep_gaps:
            False leaves the host time out.
        accelerator:
            Where an operation has FLOPs or bytes but no duration (Chakra traces of a model), it
            takes the roofline time of this accelerator in bf16.

        Raises
        ------
        InputError
            If not all ranks are traced (see `spread`), a collective has no size or no known group,
            or sends and receives do not match.
        """
        size = world_size or self.world_size
        if self.is_whole and size == self.world_size:
            return _Builder(self, communication, keep_gaps, accelerator).build()
        _, labels = self._representative(size)
        return _Builder(self, communication, keep_gaps, accelerator, labels).build_alike(size)


def _partition(name: str, members: Sequence[int], size: int, world_size: int) -> np.ndarray:
    """Label of every rank: groups like `members` in a world of `size` ranks."""
    ranks = np.arange(size)
    if len(members) == world_size:
        return np.zeros(size, dtype=np.int64)
    n = len(members)
    stride = members[1] - members[0] if n > 1 else 1
    if list(members) != [members[0] + i * stride for i in range(n)]:
        raise InputError(
            f"group {name!r} ({', '.join(map(str, members[:8]))}, ...) is no arithmetic "
            "progression: the other ranks' groups do not follow; give the traces of all ranks"
        )
    block = stride * n
    if size % block or members[0] % block >= stride:
        raise InputError(
            f"groups like {name!r} ({n} ranks with stride {stride}) do not divide {size} ranks"
        )
    return ranks // block * stride + ranks % stride


class _Builder:
    def __init__(
        self,
        trace: Trace,
        communication: str,
        keep_gaps: bool,
        accelerator: Accelerator | None,
        labels: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.trace = trace
        self.simulated = communication == "simulated"
        self.keep_gaps = keep_gaps
        self.accelerator = accelerator
        if labels is None:
            self.families, self.labels = _families(trace)
        else:
            self.families, self.labels = {name: name for name in labels}, dict(labels)
        self.segments: dict[tuple[Task, ...], Segment] = {}
        self.destinations: dict[int, list[int]] = {rank: [] for rank in trace.operations}

    def fail(self, rank: int, problem: str) -> InputError:
        place = f"{self.trace.name}: rank {rank}" if self.trace.name else f"rank {rank}"
        return InputError(problem, place=place)

    def build_alike(self, ranks: int) -> Workload:
        """The workload of `ranks` ranks that all do what the traced one does."""
        ((rank, operations),) = self.trace.operations.items()
        return Workload(
            programs=(self._program(rank, operations, {}),),
            program_of=np.zeros(ranks, dtype=np.int64),
            placement=np.arange(ranks, dtype=np.int64),
            groups=self.labels,
            pipeline_peer=np.arange(ranks, dtype=np.int64)[None, :],
            slowdown=np.ones(ranks),
        )

    def build(self) -> Workload:
        trace, ranks = self.trace, self.trace.world_size
        arrivals = self._match()
        cache: dict[tuple[int, tuple[object, ...]], RankProgram] = {}
        programs: dict[tuple[object, ...], int] = {}
        built: list[RankProgram] = []
        program_of = np.zeros(ranks, dtype=np.int64)
        for rank in range(ranks):
            operations = trace.operations[rank]
            mine = arrivals.get(rank, {})
            # Ranks that share the very same operations and send nothing share a program.
            names = tuple(sorted({self.families.get(op.group, "") for op in operations}))
            quick = (id(operations), names)
            program = cache.get(quick) if not mine else None
            if program is None:
                program = self._program(rank, operations, arrivals)
                if not mine and not any(op.collective == "send" for op in operations):
                    cache[quick] = program
            key: tuple[object, ...] = (
                program.events,
                tuple(
                    (name, tuple((id(e.segment), e.waits, e.signals, e.peer, e.signals_peer)
                                 for e in entries))
                    for name, entries in program.streams.items()
                ),
            )  # fmt: skip
            if key not in programs:
                programs[key] = len(built)
                built.append(program)
            program_of[rank] = programs[key]
        peers = max(1, max((len(d) for d in self.destinations.values()), default=1))
        pipeline_peer = np.tile(np.arange(ranks, dtype=np.int64), (peers, 1))
        for rank, destinations in self.destinations.items():
            for position, destination in enumerate(destinations):
                pipeline_peer[position, rank] = destination
        return Workload(
            programs=tuple(built),
            program_of=program_of,
            placement=np.arange(ranks, dtype=np.int64),
            groups=self.labels,
            pipeline_peer=pipeline_peer,
            slowdown=np.ones(ranks),
        )

    def _match(self) -> dict[int, dict[int, int]]:
        """Sends and receives in pairs: rank -> position of a send -> position of its receive.

        The k-th send from a to b is the k-th receive of b from a, as in NCCL.
        """
        receives: dict[tuple[int, int], list[int]] = {}
        for rank, operations in self.trace.operations.items():
            for position, op in enumerate(operations):
                if op.collective == "recv":
                    receives.setdefault((op.peer, rank), []).append(position)
        pairs: dict[int, dict[int, int]] = {}
        sent: dict[tuple[int, int], int] = {}
        for rank, operations in self.trace.operations.items():
            for position, op in enumerate(operations):
                if op.collective != "send":
                    continue
                if not 0 <= op.peer < self.trace.world_size or op.peer == rank:
                    raise self.fail(rank, f"{op.name!r} sends to an unknown rank")
                key = (rank, op.peer)
                number = sent.get(key, 0)
                sent[key] = number + 1
                if number < len(receives.get(key, ())):
                    pairs.setdefault(rank, {})[position] = receives[key][number]
        for (source, rank), positions in receives.items():
            if sent.get((source, rank), 0) < len(positions) and self.simulated:
                raise self.fail(
                    rank,
                    f"receives {len(positions)} times from rank {source}, which sends "
                    f"{sent.get((source, rank), 0)} times",
                )
        return pairs

    def _program(
        self,
        rank: int,
        operations: tuple[TraceOperation, ...],
        pairs: Mapping[int, Mapping[int, int]],
    ) -> RankProgram:
        # Event i of a rank is the end of operation i, event count + i the arrival at a receive i.
        count = len(operations)
        position_in_stream: dict[str, list[int]] = {}
        for position, op in enumerate(operations):
            position_in_stream.setdefault(op.stream, []).append(position)
        signalled = {other for op in operations for other in op.waits}
        zero = min((op.start for op in operations), default=0.0)
        streams: dict[str, tuple[Entry, ...]] = {}
        for stream, positions in position_in_stream.items():
            entries: list[Entry] = []
            previous = zero
            for position in positions:
                op = operations[position]
                ready = max([previous] + [operations[i].end for i in op.waits])
                gap = op.start - ready if self.keep_gaps else 0.0
                waits = tuple(sorted(i for i in op.waits if operations[i].stream != stream))
                signals = (position,) if position in signalled else ()
                if op.collective == "recv" and self.simulated:
                    # When a receive was posted is unknown: it ends when the data are there.
                    waits, gap = (*waits, count + position), 0.0
                tasks: list[Task] = []
                if gap > _RESOLUTION:
                    tasks.append(Task("host", "host", -1, "", latency=gap, host_wait=gap))
                sends = op.collective == "send" and self.simulated
                if sends and (tasks or waits):
                    entries.append(self._entry(tasks or [_NOTHING], op, waits=waits))
                    tasks, waits = [], ()
                tasks.append(self._task(rank, op))
                if sends:
                    slot = self._slot(rank, op.peer)
                    receive = pairs.get(rank, {}).get(position)
                    far = len(self.trace.operations[op.peer])
                    entries.append(
                        self._entry(
                            tasks, op, signals=signals, peer=slot,
                            signals_peer=() if receive is None else (far + receive,),
                        )
                    )  # fmt: skip
                else:
                    entries.append(self._entry(tasks, op, waits=waits, signals=signals))
                previous = op.end
            streams[stream] = tuple(entries)
        return RankProgram(f"trace of rank {rank}", streams, 2 * count)

    def _entry(
        self,
        tasks: Sequence[Task],
        op: TraceOperation,
        *,
        waits: tuple[int, ...] = (),
        signals: tuple[int, ...] = (),
        peer: int = -1,
        signals_peer: tuple[int, ...] = (),
    ) -> Entry:
        key = tuple(tasks)
        segment = self.segments.setdefault(key, Segment(tasks[-1].name, key))
        return Entry(segment, op.stage, op.microbatch, waits, signals, peer, signals_peer)

    def _slot(self, rank: int, destination: int) -> int:
        known = self.destinations[rank]
        if destination not in known:
            known.append(destination)
        return known.index(destination)

    def _task(self, rank: int, op: TraceOperation) -> Task:
        if not op.collective or not self.simulated:
            return self._measured(op)
        if op.collective == "recv":
            return Task(op.name, op.kind, op.layer, op.phase, latency=op.overhead)
        if op.bytes <= 0.0:
            raise self.fail(rank, f"{op.name!r} has no message size, so it cannot be simulated")
        if op.collective == "send":
            collective = Collective(op.name, "send_recv", "pipeline", op.bytes)
        else:
            family = self.families.get(op.group)
            if family is None or rank not in self.trace.groups[op.group]:
                raise self.fail(
                    rank, f"{op.name!r} runs in group {op.group!r}, of which it is no known member"
                )
            collective = Collective(op.match or op.collective, op.collective, family, op.bytes)
        return Task(
            op.name,
            op.kind,
            op.layer,
            op.phase,
            latency=op.overhead,
            bytes=op.bytes,
            collective=collective,
        )

    def _measured(self, op: TraceOperation) -> Task:
        compute = hbm_bytes = 0.0
        if op.duration <= 0.0 and self.accelerator is not None and not op.collective:
            compute, hbm_bytes = op.flops / self.accelerator.peak("bf16"), op.bytes
        return Task(
            op.name,
            op.kind,
            op.layer,
            op.phase,
            latency=op.duration,
            compute=compute,
            hbm_bytes=hbm_bytes,
            flops=op.flops,
            bytes=op.bytes,
        )


_NOTHING = Task("wait", "host", -1, "")


def _families(trace: Trace) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Communicators that do not overlap and are called alike share one label array.

    Returns the family of every communicator, and per family the label of every rank.
    """
    families: dict[str, str] = {}
    labels: dict[str, np.ndarray] = {}
    by_stem: dict[tuple[str, int], list[str]] = {}
    used = {op.group for ops in trace.operations.values() for op in ops if op.collective}
    for name in trace.groups:
        if name not in used:
            continue
        members = np.asarray(trace.groups[name], dtype=np.int64)
        stem = (name.rsplit("/", 1)[0], len(members))
        family = next(
            (known for known in by_stem.get(stem, []) if (labels[known][members] < 0).all()), None
        )
        if family is None:
            number = len(by_stem.get(stem, []))
            family = f"{stem[0]}:{stem[1]}" + (f":{number}" if number else "")
            by_stem.setdefault(stem, []).append(family)
            labels[family] = np.full(trace.world_size, -1, dtype=np.int64)
        labels[family][members] = labels[family].max() + 1
        families[name] = family
    return families, labels
