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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from simulator.errors import InputError, SimulatorError
from simulator.topology.loads import LinkLoads
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
    traffic on each member; `sm_fraction` share of a member's SMs that the kernel occupies. An
    attribute `loads` (`LinkLoads`) stands for `group`, `link` and `work` where there is one.
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
    """One operation and size of a family."""

    family: int
    op: str
    nbytes: float
    loads: LinkLoads
    """Work [bytes] on links; the groups are numbers of activities."""
    used: np.ndarray
    """Activities that have this variant, ascending; the next five are indexed like it."""
    latency: np.ndarray
    hbm_bytes: np.ndarray
    sm_fraction: np.ndarray
    seconds: np.ndarray
    """On the slowest link when nothing else runs."""
    bottleneck: np.ndarray
    """Work there [bytes]."""
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
    roles: list[np.ndarray] = []
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
            members = order[kept].astype(np.int32)
            sizes = sizes[keep]
            role = np.full(members.size, 2 * len(families), dtype=np.int32)
        else:
            senders = np.flatnonzero(using)
            peers = np.asarray(workload.pipeline_peer)
            if peer >= len(peers):
                raise InputError(f"transfer to pipeline coordinate {peer}, which does not exist")
            receivers = peers[peer][senders]
            if np.any(receivers < 0) or np.any(receivers == senders):
                raise InputError(f"transfer to pipeline coordinate {peer} from a rank without one")
            members = np.empty(2 * senders.size, dtype=np.int32)
            members[::2], members[1::2] = senders, receivers
            sizes = np.full(senders.size, 2, dtype=np.int64)
            role = np.full(members.size, 2 * len(families), dtype=np.int32)
            role[1::2] += 1
        activity_of = np.full(workload.ranks, -1, dtype=np.int32)
        step = 1 if peer < 0 else 2
        activity_of[members[::step]] = np.repeat(
            np.arange(first, first + sizes.size), sizes // step
        )
        family_index[name, peer] = len(families)
        families.append(Family(name, peer, first, int(sizes.size), activity_of))
        family_members.append((members, sizes))
        roles.append(role)
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
        latency, hbm, sm, seconds, bottleneck = np.zeros((5, sizes.size))
        parts: list[LinkLoads] = []
        for size in np.unique(sizes[active]):
            chosen = np.flatnonzero(active & (sizes == size))
            ranks = members[starts[chosen][:, None] + np.arange(size)]
            result = traffic(cluster, op, placement[ranks], nbytes)
            latency[chosen] = result.latency
            hbm[chosen] = result.hbm_bytes
            sm[chosen] = result.sm_fraction
            loads = getattr(result, "loads", None)
            if loads is None:
                loads = LinkLoads.of(chosen.size, result.group, result.link, result.work)
            loaded = chosen[loads.group]
            seconds[loaded], bottleneck[loaded] = loads.alone(capacity)
            parts.append(loads.numbered(family_.first + chosen))
        used = np.flatnonzero(active)
        longest = float(seconds.max(initial=0.0)) * max(programs_of_key.values())
        variant_index[key] = len(variants)
        variants.append(
            Variant(
                index, op, nbytes, LinkLoads.joined(parts), family_.first + used,
                latency[used], hbm[used], sm[used], seconds[used], bottleneck[used],
                longest > NEGLIGIBLE * shortest,
            )
        )  # fmt: skip
    empty = np.zeros(0, dtype=np.int32)
    sizes = np.concatenate([sizes for _, sizes in family_members] or [empty])
    return System(
        workload=workload,
        cluster=cluster,
        families=tuple(families),
        variants=tuple(variants),
        variant_index=variant_index,
        member_activity=np.repeat(np.arange(first, dtype=np.int32), sizes),
        member_rank=np.concatenate([members for members, _ in family_members] or [empty]),
        member_role=np.concatenate(roles or [empty]),
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


def _uniform(values: np.ndarray) -> np.ndarray:
    """One value where all are equal, for what then broadcasts."""
    return values[:1] if values.size and np.all(values == values[0]) else values


def _patterns(system: System) -> list[list[int]]:
    """Shared variants, together where the same activities load the same links."""
    patterns: list[list[int]] = []
    for index, variant in enumerate(system.variants):
        if not variant.shared:
            continue
        for pattern in patterns:
            other = system.variants[pattern[0]]
            if other.family == variant.family and other.loads.alike(variant.loads):
                pattern.append(index)
                break
        else:
            patterns.append([index])
    return patterns


def _origins(system: System, patterns: Sequence[Sequence[int]]) -> dict[int, int]:
    """Of every shared variant the first one that its work is a multiple of (or itself)."""
    origin: dict[int, int] = {}
    for pattern in patterns:
        for number in pattern:
            work = system.variants[number].loads.work
            origin[number] = number
            for other in pattern[: pattern.index(number)]:
                if origin[other] != other:
                    continue
                ratio = work / system.variants[other].loads.work
                if not ratio.size or np.ptp(ratio) <= 1e-12 * ratio[0]:
                    origin[number] = other
                    break
    return origin


def _scarce_links(
    system: System, patterns: Sequence[Sequence[int]], origin: Mapping[int, int]
) -> np.ndarray:
    """Which links can run short at all: bool [links].

    A rank runs one task per stream at a time, so a link is safe if what its activities could ask
    of it together, each at the full speed that it would have alone, fits in its capacity. Such a
    link is never a bottleneck, whatever happens, and need not tell activities apart.
    """
    capacity = system.link_capacity
    count = np.int64(len(capacity))
    demand = np.zeros(len(capacity))
    for index, family in enumerate(system.families):
        mine = [p for p in patterns if system.variants[p[0]].family == index]
        mine = [p for p in mine if system.variants[p[0]].loads.work.size]
        concurrency = len(system.streams[family.name, family.peer])
        uses = np.zeros(family.count, dtype=np.int64)
        for pattern in mine:
            uses[system.variants[pattern[0]].used - family.first] += 1
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for pattern in mine:
            # multiples ask for the same
            distinct = [system.variants[n] for n in pattern if origin[n] == n]
            loads = distinct[0].loads
            local = loads.group - family.first
            seconds = np.ones((len(distinct), family.count))
            for own, variant in zip(seconds, distinct, strict=True):
                own[variant.used - family.first] = variant.seconds
            for rows, entries, links in loads.pieces():
                rate = capacity[links]
                at = local[rows]
                peak = distinct[0].loads.work[entries] / (rate * seconds[0, at])
                for variant, own in zip(distinct[1:], seconds[1:], strict=True):
                    np.maximum(peak, variant.loads.work[entries] / (rate * own[at]), out=peak)
                peak *= concurrency
                several = uses[at] > 1
                if not several.any():
                    np.add.at(demand, links.ravel(), peak.ravel())
                    continue
                # of several patterns of one activity the greater counts, on each link
                np.add.at(demand, links[:, ~several].ravel(), peak[:, ~several].ravel())
                keys.append((at[several] * count + links[:, several]).ravel())
                values.append(peak[:, several].ravel())
        if keys:
            unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
            greatest = np.zeros(unique.size)
            np.maximum.at(greatest, inverse.reshape(-1), np.concatenate(values))
            np.add.at(demand, unique % count, greatest)
    return demand > 1.0 + TOLERANCE


@dataclass(frozen=True, eq=False)
class _Incidence:
    """Work of the distinct variants on some links, one row per variant and activity."""

    variants: tuple[int, ...]
    rows: tuple[slice, ...]
    """Rows of each variant: all activities of its family."""
    activities: tuple[slice, ...]
    entry: np.ndarray
    """Per stored number of `work`, the entry of the variant's loads that it is."""
    work: sparse.csr_matrix
    """[rows, links], canonical."""


def _incidence(system: System, distinct: Sequence[int], touched: np.ndarray) -> _Incidence:
    """Who loads the links `touched`, in that order the columns."""
    column = np.full(len(system.link_capacity), -1, dtype=np.int32)
    column[touched] = np.arange(touched.size)
    slices: list[slice] = []
    activities: list[slice] = []
    sizes = [np.zeros(1, dtype=np.int64)]
    indices = [np.zeros(0, dtype=np.int32)]
    entry = [np.zeros(0, dtype=np.int32)]
    work = [np.zeros(0)]
    first = 0
    for number in distinct:
        variant = system.variants[number]
        family = system.families[variant.family]
        size = np.zeros(family.count, dtype=np.int64)
        parts = []
        numbers = np.arange(variant.loads.work.size, dtype=np.int32)
        for rows, entries, links in variant.loads.pieces():
            place = column[links].T
            kept = place >= 0
            local = variant.loads.group[rows] - family.first
            size[local] = np.count_nonzero(kept, axis=1)
            which = np.broadcast_to(numbers[entries].T, kept.shape)
            parts.append((local, place[kept], which[kept]))
        if parts:
            local, place, which = (np.concatenate(column_) for column_ in zip(*parts, strict=True))
            if not np.all(np.diff(local) > 0):
                order = np.argsort(np.repeat(local, size[local]), kind="stable")
                place, which = place[order], which[order]
            indices.append(place)
            entry.append(which)
            work.append(variant.loads.work[which])
        sizes.append(size)
        slices.append(slice(first, first + family.count))
        activities.append(slice(family.first, family.first + family.count))
        first += family.count
    matrix = _compressed(
        np.concatenate(work), np.concatenate(indices), np.cumsum(np.concatenate(sizes)),
        (first, touched.size),
    )  # fmt: skip
    return _Incidence(
        tuple(distinct), tuple(slices), tuple(activities), np.concatenate(entry), matrix
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
    """Links (before, after) that follow each other on routes, each pair once, in this order.

    What the cluster's router states, or else what sampled routes show.
    """
    count = len(system.link_capacity)
    empty = np.zeros(0, dtype=np.int64)
    cluster = system.cluster
    trunk = getattr(getattr(cluster, "router", None), "trunk_of", None)
    if trunk is not None:
        before = np.flatnonzero(trunk >= 0)
        return before, trunk[before]
    routes = getattr(cluster, "routes", None)
    if routes is None or not system.member_rank.size:
        return empty, empty
    source, target = _sample_pairs(system)
    apart = source != target
    found = routes(source[apart], target[apart])
    follows = np.flatnonzero(found.pair[1:] == found.pair[:-1])
    pairs = _distinct_sorted(found.link[follows] * np.int64(count) + found.link[follows + 1])
    before, after = np.divmod(pairs, np.int64(count))
    return before, after


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    offset = np.cumsum(count, dtype=count.dtype) - count
    ranges = np.repeat(start - offset, count)
    ranges += np.arange(ranges.size, dtype=ranges.dtype)
    return ranges


def _implied_links(system: System, distinct: Sequence[int], scarce: np.ndarray) -> np.ndarray:
    """Scarce links that are no bottleneck before the links next to them on every route: [links].

    What leaves a switch has entered it. Let every activity's work on link m be at most `rho` times
    its work on the links N that feed m. If rho * (capacity of N together) fits in the capacity of
    m, then m's constraint is a combination of those of N: leaving it out changes neither the
    feasible speeds nor the max-min fair ones. The same holds for the links that m feeds. So an
    uplink that is not oversubscribed need not tell the ranks of its leaf from others. Links are
    only left out for smaller ones (by capacity, then number), so that no two imply each other.
    Routes merely suggest N; that the inequality holds is checked on the work itself.
    """
    capacity = system.link_capacity
    count = len(capacity)
    implied = np.zeros(count, dtype=bool)
    if not distinct or not scarce.any():
        return implied
    before, after = _neighbours(system)
    # (whether N comes before m, which links m are asked for, rho of each, which are in some N)
    questions: list[tuple[bool, np.ndarray, np.ndarray, np.ndarray]] = []
    one, other = capacity[before], capacity[after]
    less = (one < other) | ((one == other) & (before < after))
    for far, smaller, forward in ((after, less, True), (before, ~less, False)):
        # `far` stands for m
        asked = np.zeros(count, dtype=bool)
        asked[far] = scarce[far]
        asked[far[~smaller]] = False
        if asked.any():
            questions.append((forward, asked, np.zeros(count), np.zeros(count, dtype=bool)))
    onward = np.full(count, -1, dtype=np.int32)
    onward[before] = after
    simple = bool(np.all(before[1:] > before[:-1]))
    for number in distinct if questions else ():
        loads = system.variants[number].loads
        for _, entries, links in loads.pieces():
            work = loads.work[entries]
            row = np.zeros(1, dtype=np.int64)
            if not (simple and work.size < links.size):
                # one column of all; of rows that are alike, the first one says what follows what
                row = np.repeat(np.arange(links.shape[1]), len(links))
                work = np.broadcast_to(work, links.shape).T
                links = links.T.reshape(-1, 1)
            work = work.ravel()
            feeding, fed = _following(row, links[:, 0], before, after, count)
            for forward, asked, rho, used in questions:
                here = np.logical_or.reduce(asked[links], axis=1)
                if not here.any():
                    continue
                near, far = (feeding, fed) if forward else (fed, feeding)
                # where an activity loads m and nothing beside it, nothing follows for m
                beside = np.bincount(far, weights=work[near], minlength=work.size)
                least = np.full(work.size, np.inf)
                np.divide(work, beside, out=least, where=beside > 0.0)
                link = links[here]
                np.maximum.at(rho, link.ravel(), np.repeat(least[here], link.shape[1]))
                near, far = near[here[far]], far[here[far]]
                beside_, link = links[near], links[far]
                used[beside_] = True
                if links.shape[1] > 1:
                    one, other = (beside_, link) if forward else (link, beside_)
                    rho[link[onward[one] != other]] = np.inf
    for forward, asked, rho, used in questions:
        near, far = (before, after) if forward else (after, before)
        kept = used[near]
        total = np.bincount(far[kept], weights=capacity[near[kept]], minlength=count)
        with np.errstate(invalid="ignore"):
            implied |= asked & (rho * total <= capacity * (1.0 + 1e-12))
    return implied


def _following(
    row: np.ndarray, link: np.ndarray, before: np.ndarray, after: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of entries (row, link), ascending, where one link of a row follows another of it.

    `before` (ascending) and `after` are the pairs of links of which the second follows the first.
    """
    key = row * np.int64(count) + link
    start = np.searchsorted(before, link)
    fan = np.searchsorted(before, link, side="right") - start
    ahead = np.repeat(np.arange(link.size), fan)
    wanted = key[ahead] + after[_ranges(start, fan)] - link[ahead]
    found = np.searchsorted(key, wanted)
    found[found == key.size] = 0
    match = key[found] == wanted
    return ahead[match], found[match]


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
    distinct = _distinct_sorted(colours)
    index = np.searchsorted(distinct, colours)
    first = np.empty(distinct.size, dtype=np.int64)
    first[index[::-1]] = np.arange(colours.size)[::-1]
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(order.size)
    return number[index], first[order]


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
    scarce = _scarce_links(system, patterns, origin)
    touched = np.flatnonzero(scarce & ~_implied_links(system, distinct, scarce))
    rounds = 0
    members = _members(system)
    incidence = _incidence(system, distinct, touched)
    if discrete:
        rank_colour = np.arange(ranks)
        activity_colour = np.arange(activities)
        link_colour = np.arange(touched.size)
    else:
        with np.errstate(over="ignore"):
            rank_colour, activity_colour, link_colour, rounds = _refine(
                system, keys, touched, members, incidence
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
        shares=_shares(
            system,
            activity_class,
            activity_first,
            link_number,
            link_first,
            system.link_capacity[touched[link_first]],
            incidence,
            origin,
        ),
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
        (system.member_role + 1, system.member_rank.astype(np.int32), pointer.astype(np.int32)),
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    workload = system.workload
    rank = _mix(np.asarray(workload.program_of).astype(np.uint64))
    for value in (system.hbm_bandwidth, np.asarray(workload.slowdown)):
        rank = _fold_in(rank, _float_key(_uniform(value)))
    if keys is not None:
        rank = _fold_in(rank, np.asarray(keys))
    activity = np.zeros(system.activities, dtype=np.uint64)
    for family in system.families:
        activity[family.first : family.first + family.count] = family.first + 1
    activity = _mix(activity)
    for index, variant in enumerate(system.variants):
        own = _uniform(activity[variant.used]) + np.uint64(index + 1)
        # how long the links need alone depends on all links, also on those that never run short
        for value in (
            variant.latency, variant.hbm_bytes, variant.sm_fraction,
            variant.seconds, variant.bottleneck,
        ):  # fmt: skip
            own = _fold_in(own, _float_key(_uniform(value)))
        activity[variant.used] = own
    labels = np.empty(incidence.work.nnz, dtype=np.uint64)
    pointer = incidence.work.indptr
    for index, rows in zip(incidence.variants, incidence.rows, strict=True):
        part = slice(pointer[rows.start], pointer[rows.stop])
        work = system.variants[index].loads.work
        labels[part] = _fold_in(_float_key(work), np.full(work.size, index))[incidence.entry[part]]
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


def _alike(matrix: sparse.csr_matrix, label: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Which rows have the numbers of the row `model`, one by one, under the same labels."""
    start, size = matrix.indptr[:-1], np.diff(matrix.indptr)
    same = size == size[model]
    if not same.all():
        return same
    other = _ranges(start[model], size)
    data = matrix.data[other]
    near = matrix.data == data
    if not near.all():
        near = np.abs(matrix.data - data) <= 1e-10 * np.abs(data).max(initial=0.0)
    return near & (label == label[other])


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

    def constant(
        matrix: sparse.csr_matrix, of_column: np.ndarray, columns: int,
        colour: np.ndarray, first: np.ndarray,
    ) -> bool:  # fmt: skip
        """Whether rows add up, per class of columns, to what the first row of their class does."""
        if not colour.size:
            return True
        model = first[colour]
        if _alike(matrix, of_column[matrix.indices], model).all():
            return True
        sums = matrix @ indicator(of_column, columns)
        sums.sort_indices()
        return bool(_alike(sums, sums.indices, model).all())

    fine = True
    for name in (np.asarray(system.workload.program_of), np.asarray(system.workload.slowdown)):
        fine &= bool(np.all(name == name[representatives[class_of]]))
    ranks, classes, links = representatives.size, activity_first.size, link_first.size
    fine &= constant(members, class_of, ranks, activity_class, activity_first)
    fine &= constant(members.T.tocsr(), activity_class, classes, class_of, representatives)
    # a row's class: its variant and its activity's class
    work = incidence.work
    row_class = np.empty(work.shape[0], dtype=np.int64)
    row_first = np.zeros(max(1, len(incidence.variants)) * classes, dtype=np.int64)
    for index, (rows, block) in enumerate(zip(incidence.rows, incidence.activities, strict=True)):
        row_class[rows] = activity_class[block] + index * classes
        mine = activity_first[(activity_first >= block.start) & (activity_first < block.stop)]
        row_first[activity_class[mine] + index * classes] = mine + (rows.start - block.start)
    fine &= constant(work, link_number, links, row_class, row_first)
    fine &= constant(work.T.tocsr(), row_class, row_first.size, link_number, link_first)
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
    link_number: np.ndarray,
    link_first: np.ndarray,
    capacity: np.ndarray,
    incidence: _Incidence,
    origin: Mapping[int, int],
) -> dict[tuple[int, int], Share]:
    """Demands of all activity classes.

    `link_number` [columns of the incidence]: classes of links; `link_first`, `capacity` [classes]:
    the first of each and what it can carry.
    """
    shares: dict[tuple[int, int], Share] = {}
    links = max(1, link_first.size)
    is_first = np.zeros(link_number.size, dtype=bool)
    is_first[link_first] = True
    # what all activities load of one link of each class: (variant's) entries, and (class, link)
    on_first: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    pointer, column = incidence.work.indptr, incidence.work.indices
    for number, rows, block in zip(
        incidence.variants, incidence.rows, incidence.activities, strict=True
    ):
        start = pointer[rows.start]
        at = start + np.flatnonzero(is_first[column[start : pointer[rows.stop]]])
        row = np.searchsorted(pointer[rows.start : rows.stop + 1], at, side="right") - 1
        key = activity_class[block.start + row] * np.int64(links) + link_number[column[at]]
        on_first[number] = incidence.entry[at], key
    first_of = np.zeros(system.activities, dtype=bool)
    first_of[activity_first] = True
    for index, variant in enumerate(system.variants):
        # all activities of a class on one link of each class
        load: dict[int, dict[int, float]] = {}
        if index in origin:
            entry, key = on_first[origin[index]]
            unique, inverse = np.unique(key, return_inverse=True)
            sums = np.bincount(
                inverse.reshape(-1), weights=variant.loads.work[entry], minlength=unique.size
            )
            for k, total in zip(unique.tolist(), sums.tolist(), strict=True):
                a, link = divmod(k, links)
                load.setdefault(a, {})[link] = total / capacity[link]
        # the representative alone
        for position in np.flatnonzero(first_of[variant.used]):
            a = int(activity_class[variant.used[position]])
            own = float(variant.seconds[position])
            mine = load.get(a, {})
            shares[a, index] = Share(
                latency=float(variant.latency[position]),
                seconds=max([own, *mine.values()]),
                alone=own,
                bottleneck_bytes=float(variant.bottleneck[position]),
                links=tuple(sorted(mine.items())),
                hbm_bytes=float(variant.hbm_bytes[position]),
                sm_fraction=float(variant.sm_fraction[position]),
            )
    return shares
