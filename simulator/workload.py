"""The workload: what every rank executes, in order, on which stream, and what it waits for.

Built by `simulator.programs` from a plan, folded by `simulator.folding`, executed by
`simulator.engine`. Ranks that run the same program share one `RankProgram`; which resources an
operation loads is decided by the rank's place in the cluster, not here.

Semantics
---------
* A *stream* executes its entries in order, one task at a time (as a CUDA stream does).
* An *entry* starts when the previous entry of its stream has ended and every event in `waits` has
  fired. Its tasks then run back to back. At its end it fires `signals` (events of the same rank)
  and, if it is a transfer, `signals_peer` on the receiving rank.
* An *event* is a small integer, local to a rank (each rank has its own copy); it fires once.
* A *compute task* loads the rank's SMs and HBM. A *collective task* starts when all members of its
  group have reached it (matched by group, collective name and how many times each member has
  issued that name) and ends for all of them at the same time.
* A *transfer* (`Entry.peer` is set) is a point-to-point send to the rank that has the same mesh
  coordinates except the pipeline coordinate `peer`. Its single task is a `send_recv` collective;
  it starts when the sender reaches it and ends when the bytes have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from simulator.model.operations import Collective

STREAMS = ("compute", "tensor", "data", "pipeline", "copy")


@dataclass(frozen=True, slots=True)
class Task:
    """One operation of the timeline.

    Alone it lasts `latency + max(compute, hbm_bytes / HBM bandwidth)` (datasheet bandwidth:
    kernels that reach less carry proportionally more `hbm_bytes`; `bytes` is what they really
    move). A collective task adds the traffic of `collective` over its group's links; a task with
    both (a GEMM that hides its own collective) lasts the longer of the two.
    """

    name: str
    kind: str
    layer: int
    """Layer index in the model; -1 outside layers."""
    phase: str
    latency: float = 0.0
    compute: float = 0.0
    """Seconds of the whole accelerator's SMs."""
    hbm_bytes: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None
    host_wait: float = 0.0
    """Of `latency`, the seconds in which the device waits for the host to launch something."""

    def at_layer(self, layer: int) -> Task:
        """The same operation of another layer; several times as fast as `dataclasses.replace`."""
        return Task(
            self.name, self.kind, layer, self.phase, self.latency, self.compute, self.hbm_bytes,
            self.flops, self.bytes, self.collective, self.host_wait,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tasks that run back to back on one stream; shared by all entries that repeat it."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One occurrence of a segment in a stream."""

    segment: Segment
    stage: int = -1
    """Global pipeline stage (chunk) index; -1 where none."""
    microbatch: int = -1
    waits: tuple[int, ...] = ()
    signals: tuple[int, ...] = ()
    peer: int = -1
    """Pipeline coordinate of the receiver of a transfer; -1: not a transfer."""
    signals_peer: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RankProgram:
    """What one rank does: its streams by name, in a fixed order."""

    name: str
    streams: Mapping[str, tuple[Entry, ...]]
    events: int
    """Number of local events, numbered 0..events-1."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Programs, and which rank runs which, where, with whom.

    Arrays are indexed by rank (0..ranks-1). `groups[name][rank]` is the label of the rank's group
    of that name (equal labels = same group; -1 = in none). `pipeline_peer[stage][rank]` is the
    rank with the same coordinates but pipeline coordinate `stage`. `slowdown` >= 1 stretches
    everything the rank computes.
    """

    programs: tuple[RankProgram, ...]
    program_of: np.ndarray
    placement: np.ndarray
    """Index of the cluster's accelerator that hosts the rank."""
    groups: Mapping[str, np.ndarray]
    pipeline_peer: np.ndarray
    """int array [pipeline size, ranks]."""
    slowdown: np.ndarray
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further per-rank columns for the timeline: mesh coordinates, job."""

    @property
    def ranks(self) -> int:
        return len(self.program_of)


def merge(workloads: Mapping[str, Workload]) -> Workload:
    """Several jobs as one workload, so that they share the cluster's links.

    Ranks are numbered job after job; the label `job` is the job's index. Groups keep their names,
    with labels of their own per job.
    """
    jobs = list(workloads.values())
    names = list(dict.fromkeys(name for job in jobs for name in job.groups))
    label_names = list(dict.fromkeys(name for job in jobs for name in job.labels))
    stages = max(len(job.pipeline_peer) for job in jobs)
    groups: dict[str, list[np.ndarray]] = {name: [] for name in names}
    labels: dict[str, list[np.ndarray]] = {name: [] for name in [*label_names, "job"]}
    peers, program_of = [], []
    first_rank = first_program = 0
    for index, job in enumerate(jobs):
        for name in names:
            own = job.groups.get(name)
            groups[name].append(
                np.full(job.ranks, -1, dtype=np.int64)
                if own is None
                else np.where(own >= 0, own + first_rank, -1)
            )
        for name in label_names:
            labels[name].append(job.labels.get(name, np.full(job.ranks, -1)))
        labels["job"].append(np.full(job.ranks, index))
        padded = np.full((stages, job.ranks), -1, dtype=np.int64)
        padded[: len(job.pipeline_peer)] = np.where(
            job.pipeline_peer >= 0, job.pipeline_peer + first_rank, -1
        )
        peers.append(padded)
        program_of.append(job.program_of + first_program)
        first_rank += job.ranks
        first_program += len(job.programs)
    return Workload(
        programs=tuple(program for job in jobs for program in job.programs),
        program_of=np.concatenate(program_of),
        placement=np.concatenate([job.placement for job in jobs]),
        groups={name: np.concatenate(parts) for name, parts in groups.items()},
        pipeline_peer=np.concatenate(peers, axis=1),
        slowdown=np.concatenate([job.slowdown for job in jobs]),
        labels={name: np.concatenate(parts) for name, parts in labels.items()},
    )
