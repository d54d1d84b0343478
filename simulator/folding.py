"""Folding: which ranks, activities and links are indistinguishable, and the network they make.

An *activity family* is what ranks do together under one name: the collectives over the groups of
one name, or the transfers to one pipeline coordinate. An *activity* is one group (or one sender
and receiver) of a family. Activities load links; a *variant* of a family is one operation and
size (`all_reduce` of 4 MiB), and says with how much work.

`fold` partitions ranks, activities and links by colour refinement to the coarsest *equitable*
partition: two ranks stay in one class only if they run the same program at the same speed and
take part in activities of the same classes; two activities only if their members and the links
they load (with the same work) are of the same classes; two links only if they have the same
capacity and are loaded by activities of the same classes with the same work. Started from equal
states, members of a class then see the same events at the same times: of every share that
max-min fairness gives on the whole system, the share on the quotient (with the work of all
activities of a class added up on one link of a class) is the same number. See docs/engine.md.

Colours are 64-bit hashes while they are refined; that the result is equitable is then checked with
the numbers themselves (`_verify`), so that a collision of hashes cannot go unnoticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from simulator.errors import InputError, SimulatorError
from simulator.workload import Entry, Workload

#: Loads up to this much over capacity count as fitting: far above rounding, far below 1e-9 of a
#: duration once divided among activities.
TOLERANCE = 1e-10

#: Part of a step (of the busiest rank's kernels alone) below which the time that an operation and
#: size spends on links, all its occurrences together, cannot matter to others. It is what keeps
#: the uneven tree of a 4-byte all-reduce of all ranks from telling ranks apart.
NEGLIGIBLE = 1e-7


class Traffic(Protocol):
    """What one collective does to the network, for G groups at once.

    `latency` [G] seconds; `group`, `link`, `work` [nnz]: group `group[i]` moves `work[i]` bytes
    (byte-equivalents) over the directed link `link[i]`; `hbm_bytes` (scalar or [G]) bytes of HBM
    traffic on each member; `sm_fraction` share of a member's SMs that the kernel occupies.
    """

    @property
    def latency(self) -> np.ndarray: ...
    @property
    def group(self) -> np.ndarray: ...
    @property
    def link(self) -> np.ndarray: ...
    @property
    def work(self) -> np.ndarray: ...
    @property
    def hbm_bytes(self) -> Any: ...
    @property
    def sm_fraction(self) -> Any: ...


class TrafficModel(Protocol):
    """Gives the traffic of operation `op` of `nbytes` for groups `ranks` [G, n] of accelerators."""

    def __call__(self, cluster: Any, op: str, ranks: np.ndarray, nbytes: float) -> Traffic: ...


@dataclass(frozen=True, eq=False)
class Family:
    """All groups of one name (`peer` < 0), or all transfers to pipeline coordinate `peer`.

    Activities are numbered from `first`; `activity_of[rank]` is the rank's activity (-1: none;
    for transfers, that of which it is the sender).
    """

    name: str
    peer: int
    first: int
    count: int
    activity_of: np.ndarray


@dataclass(frozen=True, eq=False)
class Variant:
    """One operation and size of a family. Arrays over edges: activity, link, work [bytes]."""

    family: int
    op: str
    nbytes: float
    activity: np.ndarray
    link: np.ndarray
    work: np.ndarray
    used: np.ndarray
    """Activities that have this variant, ascending; the next three are indexed like it."""
    latency: np.ndarray
    hbm_bytes: np.ndarray
    sm_fraction: np.ndarray
    shared: bool = True
    """False: all its time on links together is below `NEGLIGIBLE` of the step, and what it takes
    of links from others is left out (it takes its own time all the same)."""


@dataclass(frozen=True, eq=False)
class System:
    """Ranks, activities and links of a workload on a cluster, before folding."""

    workload: Workload
    cluster: Any
    families: tuple[Family, ...]
    variants: tuple[Variant, ...]
    variant_index: Mapping[Key, int]
    """(group name, peer, op, bytes) -> index of the variant."""
    member_activity: np.ndarray
    member_rank: np.ndarray
    member_role: np.ndarray
    """Edges between activities and ranks; roles: 2 * family, + 1 for a receiver."""
    link_capacity: np.ndarray
    hbm_bandwidth: np.ndarray
    """byte/s per rank, slowdown not applied."""
    streams: Mapping[tuple[str, int], Mapping[str, None]]
    """(group name, peer) -> names of the streams that use the family."""

    @property
    def activities(self) -> int:
        return sum(family.count for family in self.families)


@dataclass(frozen=True, eq=False)
class Share:
    """Demand of one activity class and variant in the quotient.

    `seconds` is the time the links alone need when all activities of the class run together and
    nothing else does, `alone` that of one of them; `links` the (link class, work on one of its
    links / capacity [s]) pairs of links that can run short; `bottleneck_bytes` the work of one
    activity on its slowest link.
    """

    latency: float
    seconds: float
    alone: float
    bottleneck_bytes: float
    links: tuple[tuple[int, float], ...]
    hbm_bytes: float
    sm_fraction: float


@dataclass(frozen=True, eq=False)
class Quotient:
    """Classes of an equitable partition, and the demands between them."""

    system: System
    class_of: np.ndarray
    """[ranks] class of each rank; classes are numbered by their first rank."""
    representatives: np.ndarray
    counts: np.ndarray
    activity_class: np.ndarray
    activity_members: tuple[tuple[int, ...], ...]
    """Per activity class: the rank classes that take part, ascending (sender first, receiver
    second for a transfer)."""
    class_activity: np.ndarray
    """[families, classes] -> activity class or -1."""
    shares: Mapping[tuple[int, int], Share]
    """(activity class, variant) -> demand."""
    link_class: np.ndarray
    """[links] -> link class, or -1 for links that cannot run short (or carry nothing)."""
    link_representatives: np.ndarray
    rounds: int
    """Rounds of refinement until the fixpoint."""

    @property
    def classes(self) -> int:
        return len(self.representatives)

    def members(self, rank_class: int) -> np.ndarray:
        """Ranks of a class, ascending."""
        return np.flatnonzero(self.class_of == rank_class)


# ------------------------------------------------------------------ resolving the activities


Key = tuple[str, int, str, float]


@dataclass(frozen=True, eq=False)
class _Uses:
    """What the programs communicate."""

    programs: Mapping[Key, Mapping[int, int]]
    """(group, peer, op, bytes) -> program -> how often it occurs there."""
    streams: Mapping[tuple[str, int], Mapping[str, None]]
    """(group, peer) -> names of streams that use it."""
    busiest: tuple[float, float, float]
    """Largest sums over one stream of latency [s], SM seconds and HBM bytes."""


def _uses(workload: Workload) -> _Uses:
    programs: dict[Key, dict[int, int]] = {}
    streams: dict[tuple[str, int], dict[str, None]] = {}
    sums: dict[int, np.ndarray] = {}
    busiest = np.zeros(3)
    for index, program in enumerate(workload.programs):
        for stream, entries in program.streams.items():
            counts: dict[tuple[int, int], int] = {}
            first: dict[tuple[int, int], Entry] = {}
            for entry in entries:
                seen = (id(entry.segment), entry.peer)
                counts[seen] = counts.get(seen, 0) + 1
                first.setdefault(seen, entry)
            total = np.zeros(3)
            for seen, count in counts.items():
                entry = first[seen]
                tasks = entry.segment.tasks
                if id(entry.segment) not in sums:
                    columns = [(t.latency, t.compute, t.hbm_bytes) for t in tasks]
                    sums[id(entry.segment)] = np.array(columns, dtype=float).reshape(-1, 3).sum(0)
                total = total + count * sums[id(entry.segment)]
                for task in tasks:
                    c = task.collective
                    if c is not None:
                        group = "" if entry.peer >= 0 else c.group
                        key = (group, entry.peer, c.op, float(c.bytes))
                        of_key = programs.setdefault(key, {})
                        of_key[index] = of_key.get(index, 0) + count
                        streams.setdefault((group, entry.peer), {})[stream] = None
            busiest = np.maximum(busiest, total)
    return _Uses(programs, streams, (float(busiest[0]), float(busiest[1]), float(busiest[2])))


def hbm_bandwidth(workload: Workload, cluster: Any) -> np.ndarray:
    """Datasheet HBM bandwidth [byte/s] per rank."""
    per_accelerator = getattr(cluster, "memory_bandwidth", None)
    if per_accelerator is None:
        per_type = np.array([kind.memory_bandwidth for kind in cluster.accelerator_types])
        per_accelerator = per_type[cluster.accelerator_type_of]
    return np.asarray(per_accelerator, dtype=float)[workload.placement]


def resolve(workload: Workload, cluster: Any, traffic: TrafficModel) -> System:
    """Ask `traffic` for everything the programs communicate.

    Raises
    ------
    InputError
        If a program uses a group that the workload does not define, or a pipeline peer that
        does not exist.
    """
    used_by = _uses(workload)
    uses = used_by.programs
    bandwidth = hbm_bandwidth(workload, cluster)
    capacity = np.asarray(cluster.link_capacity, dtype=float)
    # at least so long is the step: the busiest stream's kernels, on the fastest accelerator
    fastest = float(bandwidth.max(initial=1.0))
    shortest = max(used_by.busiest[0], used_by.busiest[1], used_by.busiest[2] / fastest)
    program_of = np.asarray(workload.program_of)
    placement = np.asarray(workload.placement)
    families: list[Family] = []
    family_index: dict[tuple[str, int], int] = {}
    family_members: list[tuple[np.ndarray, np.ndarray]] = []
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    first = 0
    for name, peer, _, _ in uses:
        if (name, peer) in family_index:
            continue
        programs = sorted({p for key, ps in uses.items() if key[:2] == (name, peer) for p in ps})
        using = _runs(program_of, programs)
        if peer < 0:
            if name not in workload.groups:
                raise InputError(f"collectives use group {name!r}, which the workload lacks")
            labels = np.asarray(workload.groups[name])
            order = np.argsort(labels, kind="stable")
            order = order[labels[order] >= 0]
            if order.size:
                starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
                sizes = np.diff(np.r_[starts, order.size])
                keep = np.add.reduceat(using[order].astype(np.int64), starts) > 0
                keep &= (sizes > 1) | (name == "host")  # copies to the host need no second rank
            else:
                starts = sizes = np.zeros(0, dtype=np.int64)
                keep = np.zeros(0, dtype=bool)
            kept = np.repeat(keep, sizes)
            members = order[kept]
            sizes = sizes[keep]
            roles = np.zeros(members.size, dtype=np.int64)
        else:
            senders = np.flatnonzero(using)
            peers = np.asarray(workload.pipeline_peer)
            if peer >= len(peers):
                raise InputError(f"transfer to pipeline coordinate {peer}, which does not exist")
            receivers = peers[peer][senders]
            if np.any(receivers < 0) or np.any(receivers == senders):
                raise InputError(f"transfer to pipeline coordinate {peer} from a rank without one")
            members = np.stack([senders, receivers], axis=1).reshape(-1)
            sizes = np.full(senders.size, 2, dtype=np.int64)
            roles = np.tile(np.array([0, 1]), senders.size)
        family = len(families)
        activity = first + np.repeat(np.arange(sizes.size), sizes)
        activity_of = np.full(workload.ranks, -1, dtype=np.int64)
        mine = roles == 0
        activity_of[members[mine]] = activity[mine]
        families.append(Family(name, peer, first, int(sizes.size), activity_of))
        family_index[name, peer] = family
        family_members.append((members, sizes))
        edges.append((activity, members, 2 * family + roles))
        first += int(sizes.size)

    variants: list[Variant] = []
    variant_index: dict[Key, int] = {}
    for key, programs_of_key in uses.items():
        name, peer, op, nbytes = key
        index = family_index[name, peer]
        family_ = families[index]
        members, sizes = family_members[index]
        starts = np.cumsum(np.r_[0, sizes])[:-1]
        using = _runs(program_of, list(programs_of_key))
        if peer < 0 and sizes.size:
            active = np.add.reduceat(using[members].astype(np.int64), starts) > 0
        else:
            active = using[members[starts]] if sizes.size else np.zeros(0, dtype=bool)
        latency = np.zeros(sizes.size)
        hbm = np.zeros(sizes.size)
        sm = np.zeros(sizes.size)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for size in np.unique(sizes[active]):
            chosen = np.flatnonzero(active & (sizes == size))
            ranks = members[starts[chosen][:, None] + np.arange(size)]
            result = traffic(cluster, op, placement[ranks], nbytes)
            latency[chosen] = result.latency
            hbm[chosen] = result.hbm_bytes
            sm[chosen] = result.sm_fraction
            group = np.asarray(result.group)
            part = (
                family_.first + (group if chosen.size == sizes.size else chosen[group]),
                np.asarray(result.link, dtype=np.int64),
                np.asarray(result.work, dtype=float),
            )
            positive = part[2] > 0.0
            if not positive.all():
                part = (part[0][positive], part[1][positive], part[2][positive])
            parts.append(part)
        used = np.flatnonzero(active)
        empty_int = np.zeros(0, dtype=np.int64)
        if len(parts) == 1:
            activity, link, work = parts[0]
        else:
            nothing = (empty_int, empty_int, np.zeros(0))
            activity, link, work = (
                np.concatenate(column) for column in zip(nothing, *parts, strict=True)
            )
        variant_index[key] = len(variants)
        shared = False
        for some in (slice(0, 1000), slice(1000, None)):
            on_links = float((work[some] / capacity[link[some]]).max(initial=0.0))
            shared = on_links * max(programs_of_key.values()) > NEGLIGIBLE * shortest
            if shared:  # most do already by their first links
                break
        variants.append(
            Variant(
                index, op, nbytes, activity, link, work,
                family_.first + used, latency[used], hbm[used], sm[used], shared,
            )
        )  # fmt: skip
    empty = np.zeros(0, dtype=np.int64)
    return System(
        workload=workload,
        cluster=cluster,
        families=tuple(families),
        variants=tuple(variants),
        variant_index=variant_index,
        member_activity=np.concatenate([e[0] for e in edges]) if edges else empty,
        member_rank=np.concatenate([e[1] for e in edges]) if edges else empty,
        member_role=np.concatenate([e[2] for e in edges]) if edges else empty,
        link_capacity=capacity,
        hbm_bandwidth=bandwidth,
        streams=used_by.streams,
    )


def _runs(program_of: np.ndarray, programs: Sequence[int]) -> np.ndarray:
    """Which ranks run one of `programs`: bool [ranks]."""
    chosen = np.zeros(int(program_of.max(initial=-1)) + 1, dtype=bool)
    chosen[list(programs)] = True
    return np.asarray(chosen[program_of])


# -------------------------------------------------------------------------- the partition


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that looks random (SplitMix64; Steele et al., OOPSLA 2014)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _float_key(values: np.ndarray) -> np.ndarray:
    """Integers that are equal for floats equal to about 12 digits."""
    mantissa, exponent = np.frexp(np.asarray(values, dtype=float))
    rounded = np.rint(mantissa * 2.0**40).astype(np.int64)
    # 0.4999... and 0.5 of the next exponent are neighbours: write both the same way
    top = np.abs(rounded) == 2**40
    rounded[top] //= 2
    return (rounded * 4096 + exponent + top).astype(np.uint64)


def _fold_in(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _mix(key * np.uint64(0x2545F4914F6CDD1D) + np.asarray(value).astype(np.uint64))


def _matrix(
    rows: np.ndarray, columns: np.ndarray, data: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_matrix:
    return sparse.csr_matrix((data, (rows, columns)), shape=shape)


@dataclass(frozen=True, eq=False)
class _Timing:
    """How long each activity of a variant's family needs its links alone; 0 where it has none."""

    seconds: np.ndarray
    """Per edge of the variant; empty for one whose work is a multiple of another's."""
    alone: np.ndarray
    """[activities of the family]: on the slowest link [s]."""
    flow: np.ndarray
    """[activities of the family]: work on the slowest link [bytes]."""


def _timings(system: System, origin: Mapping[int, int]) -> list[_Timing]:
    timings: list[_Timing] = []
    for index, variant in enumerate(system.variants):
        family = system.families[variant.family]
        other = origin.get(index, index)
        if other < index and variant.work.size:
            ratio = variant.work[0] / system.variants[other].work[0]
            known = timings[other]
            timings.append(_Timing(np.zeros(0), known.alone * ratio, known.flow * ratio))
            continue
        seconds = variant.work / system.link_capacity[variant.link]
        local = variant.activity - family.first
        alone, flow = np.zeros(family.count), np.zeros(family.count)
        np.maximum.at(alone, local, seconds)
        slowest = seconds >= alone[local] * (1.0 - 1e-9)
        np.maximum.at(flow, local[slowest], variant.work[slowest])
        timings.append(_Timing(seconds, alone, flow))
    return timings


def _patterns(system: System) -> list[list[int]]:
    """Shared variants, together where the same activities load the same links."""
    patterns: list[list[int]] = []
    for index, variant in enumerate(system.variants):
        if not variant.shared:
            continue
        for pattern in patterns:
            other = system.variants[pattern[0]]
            if (
                other.family == variant.family
                and other.work.size == variant.work.size
                and np.array_equal(other.used, variant.used)
                and (other.link is variant.link or np.array_equal(other.link, variant.link))
                and np.array_equal(other.activity, variant.activity)
            ):
                pattern.append(index)
                break
        else:
            patterns.append([index])
    return patterns


def _scarce_links(
    system: System,
    patterns: Sequence[Sequence[int]],
    origin: Mapping[int, int],
    timings: Sequence[_Timing],
) -> np.ndarray:
    """Which links can run short at all: bool [links].

    A rank runs one task per stream at a time, so a link is safe if what its activities could ask
    of it together, each at the full speed that it would have alone, fits in its capacity. Such a
    link is never a bottleneck, whatever happens, and need not tell activities apart.
    """
    capacity = system.link_capacity
    demand = np.zeros(len(capacity))
    for index, family in enumerate(system.families):
        mine = [p for p in patterns if system.variants[p[0]].family == index]
        mine = [p for p in mine if system.variants[p[0]].work.size]
        if not mine:
            continue
        concurrency = len(system.streams[family.name, family.peer])
        uses = np.zeros(family.count, dtype=np.int64)
        for pattern in mine:
            uses[system.variants[pattern[0]].used - family.first] += 1
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for pattern in mine:
            variant = system.variants[pattern[0]]
            local = variant.activity - family.first
            peak = np.zeros(local.size)
            for number in pattern:
                if origin[number] == number:  # multiples ask for the same
                    timing = timings[number]
                    np.maximum(peak, timing.seconds / timing.alone[local], out=peak)
            if concurrency > 1:
                peak *= concurrency
            several = uses[local] > 1
            if not several.any():
                np.add.at(demand, variant.link, peak)
                continue
            # of several patterns of one activity the greater counts, on each link
            np.add.at(demand, variant.link[~several], peak[~several])
            keys.append(local[several] * np.int64(len(capacity)) + variant.link[several])
            values.append(peak[several])
        if keys:
            unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
            greatest = np.zeros(unique.size)
            np.maximum.at(greatest, inverse.reshape(-1), np.concatenate(values))
            np.add.at(demand, unique % len(capacity), greatest)
    return demand > 1.0 + TOLERANCE


def _origins(system: System, patterns: Sequence[Sequence[int]]) -> dict[int, int]:
    """Of every shared variant the first one that its work is a multiple of (or itself)."""
    origin: dict[int, int] = {}
    for pattern in patterns:
        for number in pattern:
            work = system.variants[number].work
            origin[number] = number
            for other in pattern[: pattern.index(number)]:
                if origin[other] != other:
                    continue
                ratio = work / system.variants[other].work
                if not ratio.size or np.ptp(ratio) <= 1e-12 * ratio[0]:
                    origin[number] = other
                    break
    return origin


@dataclass(frozen=True, eq=False)
class _Loads:
    """Who loads which of some links in one variant; entries by activity, then link, each once.

    Kept per variant because passes over arrays that fit in a cache cost a fraction.
    """

    variant: int
    activities: slice
    """All activities of the family."""
    row: np.ndarray
    """Activity, counted from the family's first."""
    link: np.ndarray
    work: np.ndarray

    def pieces(self, limit: int = 1 << 16) -> Iterator[_Loads]:
        """Whole activities, of about `limit` entries together."""
        size = self.row.size
        if size <= 2 * limit:
            yield self
            return
        cuts = np.searchsorted(self.row, self.row[limit : size - limit : limit])
        for start, stop in itertools.pairwise([0, *np.unique(cuts).tolist(), size]):
            part = slice(start, stop)
            yield _Loads(
                self.variant, self.activities, self.row[part], self.link[part], self.work[part]
            )


@dataclass(frozen=True, eq=False)
class _Incidence:
    """Work of the distinct variants on links, one row per variant and activity."""

    variants: tuple[int, ...]
    rows: tuple[slice, ...]
    """Rows of each variant: all activities of its family."""
    activities: tuple[slice, ...]
    work: sparse.csr_matrix
    """[rows, links], canonical."""


def _loads(system: System, distinct: Sequence[int], wanted: np.ndarray) -> list[_Loads]:
    """Loads of the links that are `wanted` [links]."""
    loads = []
    for number in distinct:
        variant = system.variants[number]
        family = system.families[variant.family]
        kept = np.flatnonzero(wanted[variant.link])
        row = variant.activity[kept] - family.first
        link, work = variant.link[kept], variant.work[kept]
        step = np.diff(row)
        if not np.all((step > 0) | ((step == 0) & (np.diff(link) > 0))):
            matrix = _matrix(row, link, work, (family.count, len(wanted)))
            matrix.sum_duplicates()
            row = np.repeat(np.arange(family.count), np.diff(matrix.indptr))
            link, work = matrix.indices.astype(np.int64), matrix.data
        activities = slice(family.first, family.first + family.count)
        loads.append(_Loads(number, activities, row, link, work))
    return loads


def _incidence(loads: Sequence[_Loads], column: np.ndarray, columns: int) -> _Incidence:
    """One matrix of the links with `column` >= 0 [links], which they then have."""
    rows: list[slice] = []
    first = 0
    sizes = [np.zeros(1, dtype=np.int64)]
    indices = [np.zeros(0, dtype=np.int32)]
    work = [np.zeros(0)]
    for load in loads:
        place = column[load.link]
        kept = np.flatnonzero(place >= 0)
        count = load.activities.stop - load.activities.start
        sizes.append(np.bincount(load.row[kept], minlength=count))
        indices.append(place[kept].astype(np.int32))
        work.append(load.work[kept])
        rows.append(slice(first, first + count))
        first += count
    pointer = np.cumsum(np.concatenate(sizes))
    matrix = _compressed(np.concatenate(work), np.concatenate(indices), pointer, (first, columns))
    return _Incidence(
        tuple(load.variant for load in loads),
        tuple(rows),
        tuple(load.activities for load in loads),
        matrix,
    )


def _compressed(
    data: np.ndarray, indices: np.ndarray, pointer: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_matrix:
    """A CSR matrix of arrays that are in order already."""
    matrix = sparse.csr_matrix(
        (data, indices.astype(np.int32, copy=False), pointer.astype(np.int32)), shape=shape
    )
    matrix.has_canonical_format = True
    return matrix


def _neighbours(system: System) -> tuple[np.ndarray, np.ndarray]:
    """Links (before, after) that follow each other on sampled routes, each pair once."""
    count = len(system.link_capacity)
    empty = np.zeros(0, dtype=np.int64)
    cluster = system.cluster
    routes = getattr(cluster, "routes", None)
    if routes is None or not system.member_rank.size:
        return empty, empty
    source, target = _sample_pairs(system)
    apart = source != target
    source, target = source[apart], target[apart]
    pieces = getattr(getattr(cluster, "router", None), "parts", None)
    parts = [] if pieces is None else pieces(source, target)
    pairs: list[np.ndarray] = []
    if parts and all(np.all(part[0][1:] > part[0][:-1]) for part in parts):
        # pieces come in the order of travel, and each has a pair once
        last = np.full(source.size, -1, dtype=np.int64)
        for pair, link, _ in parts:
            previous = last[pair]
            onward = previous >= 0
            pairs.append(previous[onward] * np.int64(count) + link[onward])
            last[pair] = link
    else:
        found = routes(source, target)
        follows = np.flatnonzero(found.pair[1:] == found.pair[:-1])
        pairs.append(found.link[follows] * np.int64(count) + found.link[follows + 1])
    before, after = np.divmod(_distinct_sorted(np.concatenate(pairs)), np.int64(count))
    return before, after


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    offset = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - offset, count)


def _implied_links(
    system: System, distinct: Sequence[int], scarce: np.ndarray
) -> tuple[np.ndarray, list[_Loads]]:
    """Scarce links that are no bottleneck before the links next to them on every route: [links].

    What leaves a switch has entered it. Let every activity's work on link m be at most `rho` times
    its work on the links N that feed m. If rho * (capacity of N together) fits in the capacity of
    m, then m's constraint is a combination of those of N: leaving it out changes neither the
    feasible speeds nor the max-min fair ones. The same holds for the links that m feeds. So an
    uplink that is not oversubscribed need not tell the ranks of its leaf from others. Links are
    only left out for smaller ones (by capacity, then number), so that no two imply each other.
    Routes merely suggest N; that the inequality holds is checked on the work itself.

    The second value is who loads the scarce links (and those beside them).
    """
    capacity = system.link_capacity
    count = len(capacity)
    implied = np.zeros(count, dtype=bool)
    before, after = _neighbours(system) if distinct and scarce.any() else (None, None)
    if before is None or after is None or not before.size:
        return implied, _loads(system, distinct, scarce)
    questions = []
    wanted = scarce.copy()
    for near, far in ((before, after), (after, before)):
        # `near` stands for N, `far` for m
        smaller = (capacity[near] < capacity[far]) | (
            (capacity[near] == capacity[far]) & (near < far)
        )
        good = np.zeros(count, dtype=bool)
        good[far] = True
        good[far[~smaller]] = False
        good &= scarce
        kept = good[far]
        near, far = near[kept], far[kept]
        wanted[near] = True
        questions.append((near, far, good))
    loads = _loads(system, distinct, wanted)
    for near, far, good in questions:
        asked = good & ~implied
        kept = asked[far]
        implied |= _follow_from(loads, capacity, near[kept], far[kept], asked)
    return implied, loads


def _follow_from(
    loads: Sequence[_Loads],
    capacity: np.ndarray,
    near: np.ndarray,
    far: np.ndarray,
    asked: np.ndarray,
) -> np.ndarray:
    """Links of `asked` whose constraint follows from those of their `near` ones: bool [links].

    `near`, `far`: pairs of links, those of one `far` together being N of `_implied_links`.
    """
    count = len(capacity)
    room = capacity * (1.0 + 1e-12)
    total = np.bincount(far, weights=capacity[near], minlength=count)
    follows = asked.copy()
    pieces = [piece for load in loads for piece in load.pieces()]
    unlike = asked & (total > room)
    if unlike.any():
        # cheap: N carries at most all that the activity has on such links
        is_near = np.zeros(count, dtype=bool)
        is_near[near] = True
        for load in pieces:
            own = np.flatnonzero(unlike[load.link])
            if not own.size:
                continue
            link, row = load.link[own], load.row[own]
            begin = load.row[0]
            most = np.bincount(load.row - begin, weights=load.work * is_near[load.link])
            hopeless = load.work[own] * total[link] > most[row - begin] * room[link] * (1.0 + 1e-9)
            follows[link[hopeless]] = False
        kept = follows[far]
        near, far = near[kept], far[kept]
    order = np.argsort(near, kind="stable")
    near, far = near[order], far[order]
    fan = np.bincount(near, minlength=count)
    start = np.cumsum(fan) - fan
    feeds = fan > 0
    several = bool(fan.max(initial=0) > 1)
    only = np.full(count, -1, dtype=np.int32)
    only[near] = far
    rho = np.zeros(count)
    for load in pieces:
        own = np.flatnonzero(follows[load.link])
        if not own.size:
            continue
        # the work beside each entry, looked up by (activity, link)
        link = load.link[own]
        keys = load.row[own] * np.int64(count) + link
        feeding = np.flatnonzero(feeds[load.link])
        feeder = load.link[feeding]
        if several:
            fans = fan[feeder]
            ahead = far[_ranges(start[feeder], fans)]
            feeding = np.repeat(feeding, fans)
        else:
            ahead = only[feeder]
        looked = load.row[feeding] * np.int64(count) + ahead
        if np.array_equal(keys, looked):  # one feeder each, in the same order
            beside = load.work[feeding]
        else:
            at = np.searchsorted(keys, looked)
            at[at == keys.size] = 0
            match = keys[at] == looked
            beside = np.bincount(at[match], weights=load.work[feeding[match]], minlength=keys.size)
        # where an activity loads m and nothing beside it, nothing follows for m
        alone = beside == 0.0
        if alone.any():
            follows[link[alone]] = False
            beside[alone] = 1.0
        np.maximum.at(rho, link, load.work[own] / beside)
    return follows & (rho * total <= room)


def _sample_pairs(system: System) -> tuple[np.ndarray, np.ndarray]:
    """Accelerators (source, target) that communicate over the network, for routes to look at.

    One pair per source and one per target is enough to see which links feed which; those between
    the remotest (leaf, then node, by the cluster's numbering) are the most telling.
    """
    source = np.asarray(system.workload.placement)[system.member_rank]
    target = np.roll(source, -1)
    last = np.flatnonzero(np.diff(system.member_activity, append=-1) != 0)
    target[last] = source[np.r_[0, last[:-1] + 1]]  # rings close
    onward = (system.member_role & 1) == 0
    source, target = source[onward], target[onward]
    distance = np.zeros(source.size, dtype=np.int8)
    for name in ("node_of", "leaf_of"):
        where = getattr(system.cluster, name, None)
        if where is not None:
            distance += np.asarray(where)[source] != np.asarray(where)[target]
    count = int(np.asarray(system.workload.placement).max(initial=0)) + 1
    index = np.zeros(0, dtype=np.int64)
    for end in (source, target):
        best = np.full(count, -1, dtype=np.int64)
        furthest = np.full(count, -1, dtype=np.int8)
        for level in (0, 1, 2):  # the remotest are written last
            at = np.flatnonzero(distance == level)
            best[end[at]] = at
            furthest[end[at]] = level
        # a pair chosen for its source may serve its target as well
        served = end[index[distance[index] == furthest[end[index]]]]
        best[served] = -1
        index = np.concatenate([index, best[best >= 0]])
    pairs = _distinct_sorted(source[index] * np.int64(count) + target[index])
    return tuple(np.divmod(pairs, np.int64(count)))  # type: ignore[return-value]


def _distinct_sorted(values: np.ndarray) -> np.ndarray:
    """`np.unique` by sorting, which is the faster way for many integers."""
    ordered = np.sort(values)
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]] if ordered.size else ordered


def _first_occurrence(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers in order of first occurrence, index of the first member of each class)."""
    _, first, inverse = np.unique(colours, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(order.size)
    return number[inverse.reshape(-1)], first[order]


def fold(system: System, *, keys: np.ndarray | None = None, discrete: bool = False) -> Quotient:
    """The coarsest equitable partition of `system`, and its quotient.

    Parameters
    ----------
    keys:
        Integers per rank that must be equal within a class (what jitter depends on).
    discrete:
        Keep every rank, activity and link apart.

    Raises
    ------
    SimulatorError
        If the partition found is not equitable (a bug).
    """
    workload = system.workload
    ranks, activities = workload.ranks, system.activities
    patterns = _patterns(system)
    origin = _origins(system, patterns)
    distinct = sorted(number for number, first in origin.items() if number == first)
    timings = _timings(system, origin)
    scarce = _scarce_links(system, patterns, origin, timings)
    implied, loads = _implied_links(system, distinct, scarce)
    scarce &= ~implied
    touched = np.flatnonzero(scarce)
    column = np.full(len(scarce), -1, dtype=np.int64)
    column[touched] = np.arange(touched.size)
    rounds = 0
    members = _members(system)
    incidence = _incidence(loads, column, touched.size)
    if discrete:
        rank_colour = np.arange(ranks)
        activity_colour = np.arange(activities)
        link_colour = np.arange(touched.size)
    else:
        with np.errstate(over="ignore"):
            rank_colour, activity_colour, link_colour, rounds = _refine(
                system, keys, touched, members, incidence, timings
            )
    class_of, representatives = _first_occurrence(rank_colour)
    activity_class, activity_first = _first_occurrence(activity_colour)
    link_number, link_first = _first_occurrence(link_colour)
    if not discrete:
        _verify(system, class_of, representatives, activity_class, activity_first, link_number,
                link_first, members, incidence)  # fmt: skip
    link_class = np.full(len(scarce), -1, dtype=np.int64)
    link_class[touched] = link_number
    class_activity = np.full((len(system.families), representatives.size), -1, dtype=np.int64)
    for index, family in enumerate(system.families):
        activity = family.activity_of[representatives]
        class_activity[index] = np.where(
            activity >= 0, activity_class[np.maximum(activity, 0)] if activities else -1, -1
        )
    return Quotient(
        system=system,
        class_of=class_of,
        representatives=representatives,
        counts=np.bincount(class_of, minlength=representatives.size),
        activity_class=activity_class,
        activity_members=_members_of(system, class_of, activity_first, activity_class),
        class_activity=class_activity,
        shares=_shares(system, activity_class, activity_first, link_class, touched[link_first]),
        link_class=link_class,
        link_representatives=touched[link_first],
        rounds=rounds,
    )


def _members(system: System) -> sparse.csr_matrix:
    """[activities, ranks]: role + 1 of each member; activities are in order."""
    shape = (system.activities, system.workload.ranks)
    sizes = np.bincount(system.member_activity, minlength=shape[0])
    pointer = np.concatenate([[0], np.cumsum(sizes)])
    return sparse.csr_matrix(
        (system.member_role + 1.0, system.member_rank.astype(np.int32), pointer.astype(np.int32)),
        shape=shape,
    )


def _relabelled(matrix: sparse.csr_matrix, data: np.ndarray) -> sparse.csr_matrix:
    """The same entries with other values."""
    return sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def _refine(
    system: System,
    keys: np.ndarray | None,
    touched: np.ndarray,
    members: sparse.csr_matrix,
    incidence: _Incidence,
    timings: Sequence[_Timing],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    workload = system.workload
    rank = _mix(np.asarray(workload.program_of).astype(np.uint64))
    rank = _fold_in(rank, _float_key(system.hbm_bandwidth))
    rank = _fold_in(rank, _float_key(np.asarray(workload.slowdown)))
    if keys is not None:
        rank = _fold_in(rank, np.asarray(keys))
    activity = np.zeros(system.activities, dtype=np.uint64)
    for family in system.families:
        activity[family.first : family.first + family.count] = family.first + 1
    activity = _mix(activity)
    for index, (variant, timing) in enumerate(zip(system.variants, timings, strict=True)):
        own = activity[variant.used] + np.uint64(index + 1)
        local = variant.used - system.families[variant.family].first
        # how long the links need alone depends on all links, also on those that never run short
        for value in (
            variant.latency, variant.hbm_bytes, variant.sm_fraction,
            timing.alone[local], timing.flow[local],
        ):  # fmt: skip
            own = _fold_in(own, _float_key(value))
        activity[variant.used] = own
    labels = np.empty(incidence.work.nnz, dtype=np.uint64)
    pointer = incidence.work.indptr
    for index, rows in zip(incidence.variants, incidence.rows, strict=True):
        part = slice(pointer[rows.start], pointer[rows.stop])
        work = incidence.work.data[part]
        if work.size and np.all(work == work[0]):
            work = work[:1]
        labels[part] = _fold_in(_float_key(work), np.full(work.size, index))
    to_link = _relabelled(incidence.work, labels | np.uint64(1))
    to_rank = _relabelled(members, _mix(system.member_role.astype(np.uint64)) | np.uint64(1))
    from_rank, from_link = to_rank.T, to_link.T
    link = _mix(_float_key(system.link_capacity[touched]))
    row = np.empty(to_link.shape[0], dtype=np.uint64)
    count = -1
    rounds = 0
    while True:
        rounds += 1
        by_row = to_link @ _mix(link)
        loads = np.zeros(activity.size, dtype=np.uint64)
        for rows, block in zip(incidence.rows, incidence.activities, strict=True):
            loads[block] += by_row[rows]
        # the old colour is part of the new one: classes only ever split
        activity = _fold_in(_fold_in(activity, to_rank @ _mix(rank)), loads)
        mixed = _mix(activity)
        for rows, block in zip(incidence.rows, incidence.activities, strict=True):
            row[rows] = mixed[block]
        rank = _fold_in(rank, from_rank @ mixed)
        link = _fold_in(link, from_link @ row)
        now = sum(_distinct_sorted(colour).size for colour in (rank, activity, link))
        if now == count:
            return rank, activity, link, rounds
        count = now


def _verify(
    system: System,
    class_of: np.ndarray,
    representatives: np.ndarray,
    activity_class: np.ndarray,
    activity_first: np.ndarray,
    link_number: np.ndarray,
    link_first: np.ndarray,
    members: sparse.csr_matrix,
    incidence: _Incidence,
) -> None:
    """Check with the real numbers that the partition is equitable."""

    def indicator(colour: np.ndarray, classes: int) -> sparse.csr_matrix:
        ones = np.ones(colour.size)
        return _compressed(ones, colour, np.arange(colour.size + 1), (colour.size, classes))

    def constant(sums: sparse.csr_matrix, colour: np.ndarray, first: np.ndarray) -> bool:
        """Rows of `sums` equal that of the first member of their class."""
        if not colour.size:
            return True
        sums.sort_indices()
        start, size = sums.indptr[:-1].astype(np.int64), np.diff(sums.indptr).astype(np.int64)
        model = first[colour]
        if not np.array_equal(size, size[model]):
            return False
        other = _ranges(start[model], size)
        largest = np.abs(sums.data).max(initial=0.0)
        return bool(
            np.array_equal(sums.indices, sums.indices[other])
            and np.all(np.abs(sums.data - sums.data[other]) <= 1e-10 * largest)
        )

    to_ranks = indicator(class_of, representatives.size)
    to_activities = indicator(activity_class, activity_first.size)
    fine = True
    for name in (np.asarray(system.workload.program_of), np.asarray(system.workload.slowdown)):
        fine &= bool(np.all(name == name[representatives[class_of]]))
    fine &= constant(members @ to_ranks, activity_class, activity_first)
    fine &= constant(members.T.tocsr() @ to_activities, class_of, representatives)
    # a row's class: its variant and its activity's class
    work, classes = incidence.work, activity_first.size
    row_class = np.empty(work.shape[0], dtype=np.int64)
    row_first = np.zeros(max(1, len(incidence.variants)) * classes, dtype=np.int64)
    for index, (rows, block) in enumerate(zip(incidence.rows, incidence.activities, strict=True)):
        row_class[rows] = activity_class[block] + index * classes
        mine = activity_first[(activity_first >= block.start) & (activity_first < block.stop)]
        row_first[activity_class[mine] + index * classes] = mine + (rows.start - block.start)
    to_links = indicator(link_number, link_first.size)
    fine &= constant(work @ to_links, row_class, row_first)
    fine &= constant(work.T.tocsr() @ indicator(row_class, row_first.size), link_number, link_first)
    if not fine:
        raise SimulatorError("folding: the partition is not equitable; please report this")


def _members_of(
    system: System, class_of: np.ndarray, activity_first: np.ndarray, activity_class: np.ndarray
) -> tuple[tuple[int, ...], ...]:
    is_first = np.zeros(system.activities, dtype=bool)
    is_first[activity_first] = True
    chosen = np.flatnonzero(is_first[system.member_activity])
    activity = activity_class[system.member_activity[chosen]]
    # the receiver of a transfer comes after its sender, whatever their classes
    receives = system.member_role[chosen] & 1
    ranks = max(1, int(class_of.max(initial=0)) + 1)
    key = (activity * np.int64(2) + receives) * ranks + class_of[system.member_rank[chosen]]
    members: list[dict[int, None]] = [{} for _ in range(activity_first.size)]
    for value in _distinct_sorted(key).tolist():
        rest, rank_class = divmod(value, ranks)
        members[rest // 2][rank_class] = None
    return tuple(tuple(m) for m in members)


def _shares(
    system: System,
    activity_class: np.ndarray,
    activity_first: np.ndarray,
    link_class: np.ndarray,
    link_representatives: np.ndarray,
) -> dict[tuple[int, int], Share]:
    shares: dict[tuple[int, int], Share] = {}
    capacity = system.link_capacity
    is_representative = np.zeros(len(capacity), dtype=bool)
    is_representative[link_representatives] = True
    first_of = np.zeros(system.activities, dtype=bool)
    first_of[activity_first] = True
    for index, variant in enumerate(system.variants):
        # all activities of a class on one link of each class
        kept = is_representative[variant.link] & variant.shared
        load: dict[int, dict[int, float]] = {}
        key = activity_class[variant.activity[kept]] * np.int64(max(1, link_representatives.size))
        key = key + link_class[variant.link[kept]]
        unique, inverse = np.unique(key, return_inverse=True)
        sums = np.bincount(inverse.reshape(-1), weights=variant.work[kept], minlength=unique.size)
        for k, total in zip(unique.tolist(), sums.tolist(), strict=True):
            a, link = divmod(k, max(1, link_representatives.size))
            load.setdefault(a, {})[link] = total / capacity[link_representatives[link]]
        # the representative alone
        mine = np.flatnonzero(first_of[variant.activity])
        owner = activity_class[variant.activity[mine]]
        seconds = variant.work[mine] / capacity[variant.link[mine]]
        own_seconds = np.zeros(activity_first.size)
        np.maximum.at(own_seconds, owner, seconds)
        slowest = seconds >= own_seconds[owner] * (1.0 - 1e-9)
        bottleneck = np.zeros(activity_first.size)
        np.maximum.at(bottleneck, owner[slowest], variant.work[mine[slowest]])
        for position in np.flatnonzero(first_of[variant.used]):
            a = int(activity_class[variant.used[position]])
            own = float(own_seconds[a])
            links = load.get(a, {})
            shares[a, index] = Share(
                latency=float(variant.latency[position]),
                seconds=max([own, *links.values()]),
                alone=own,
                bottleneck_bytes=float(bottleneck[a]),
                links=tuple(sorted(links.items())),
                hbm_bytes=float(variant.hbm_bytes[position]),
                sm_fraction=float(variant.sm_fraction[position]),
            )
    return shares
