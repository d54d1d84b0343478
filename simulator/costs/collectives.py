"""Collectives: which links a collective loads, by how much, and its latency.

A collective is one activity with a work vector over the directed links that its algorithm's routes
cross, so that alone it lasts `latency + max over links (work / capacity)`. Several groups are
costed at once; groups of like shape get the same algorithm and protocol, the fastest predicted.

The links loaded by one byte depend only on the algorithm and the members, never on the size; they
are kept per cluster, so that other sizes of the same groups cost a multiplication.

Sizes follow nccl-tests: all_reduce = buffer of one rank; all_gather = total output; reduce_scatter
= total input; all_to_all = total per rank; broadcast = buffer; send_recv = bytes per sender.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from simulator.costs.collectives_constants import (
    LIMITS,
    P2P_CHANNELS,
    FabricConstants,
    LinkConstants,
    OperationConstants,
    Protocol,
    fabric_constants,
    link_constants,
)
from simulator.errors import InputError, unknown_name
from simulator.topology.cluster import (
    IS_NETWORK,
    IS_SCALE_UP,
    KIND_INDEX,
    Cluster,
    FloatArray,
    IntArray,
)
from simulator.topology.loads import LinkLoads

OPERATIONS: tuple[str, ...] = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv",
)  # fmt: skip
_ALIASES = {
    "alltoall": "all_to_all", "allreduce": "all_reduce", "allgather": "all_gather",
    "reducescatter": "reduce_scatter", "sendrecv": "send_recv", "reduce": "broadcast",
}  # fmt: skip
PROTOCOLS: tuple[str, ...] = ("Simple", "LL128", "LL")
#: Share of the physical 2 NIC of bus bandwidth that SHARP reaches (measured 1.40 NIC).
_SHARP_SHARE = 0.70

#: Largest message, bytes: an exabyte; beyond it integers overflow.
_MOST_BYTES = 1e18
#: Communicators of more domains get one point-to-point channel per peer (measured: 2 x at 2-4
#: nodes, 1 x at 10).
_P2P_TWO_CHANNEL_DOMAINS = 4
#: Inside a domain a point-to-point message takes another channel for every so many bytes: NCCL's
#: parts are at most 32 steps of 512 KiB (`maxPartSize`); measured rates double at 64 MB, 128 MB, …
_P2P_PART_BYTES = 2.0**24


def operation_name(op: str) -> str:
    """The canonical name of an operation (`all-reduce`, `alltoall`, ... are understood)."""
    folded = op.casefold().replace("-", "_").replace(" ", "_")
    folded = _ALIASES.get(folded, folded)
    if folded not in OPERATIONS:
        raise unknown_name("collective", op, OPERATIONS)
    return folded


def bus_factor(op: str, n: int) -> float:
    """busbw / algbw of nccl-tests (doc/PERFORMANCE.md): 2(n-1)/n for all_reduce, ..."""
    if op == "all_reduce":
        return 2.0 * (n - 1) / n
    if op in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n
    return 1.0


@dataclass(frozen=True, eq=False)
class CollectiveTraffic:
    """What G groups of one collective demand.

    Alone, group g lasts `latency[g] + max(work / link_capacity)` over its entries.
    """

    latency: FloatArray
    """Seconds, [G]."""
    loads: LinkLoads
    """Byte-equivalents on directed links: payload over protocol and fabric efficiency."""
    hbm_bytes: float
    """Bytes to and from HBM on each member."""
    sm_fraction: float
    """Share of each member's SMs that the communication kernel occupies."""
    algorithm: str
    """Of the first group."""
    protocol: str
    algorithms: tuple[str, ...] = ()
    """Algorithm of every group where they differ, else empty."""

    @cached_property
    def entries(self) -> tuple[IntArray, IntArray, FloatArray]:
        """`loads` of all groups written out: (group, link, byte-equivalents)."""
        return self.loads.entries()

    @property
    def group(self) -> IntArray:
        return self.entries[0]

    @property
    def link(self) -> IntArray:
        return self.entries[1]

    @property
    def work(self) -> FloatArray:
        return self.entries[2]

    def duration(self, cluster: Cluster) -> FloatArray:
        """Seconds of each group [G] when nothing else runs."""
        seconds = self.latency.copy()
        seconds[self.loads.group] += self.loads.alone(cluster.link_capacity)[0]
        return seconds


# --------------------------------------------------------------------------- group shapes


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of one shape: members [G, n] sorted by domain, then by index."""

    members: IntArray
    domains: int
    """Scale-up domains that each group spans."""
    per_domain: int
    """Members in each domain; 0 where the domains hold different numbers."""
    counts: IntArray
    """Members in each domain of the first group."""

    @property
    def n(self) -> int:
        return self.members.shape[1]


@dataclass(frozen=True, eq=False)
class _Load:
    """Bytes on links per unit of volume, entries sorted by group then link, plus path latency."""

    group: IntArray
    link: IntArray
    bytes: FloatArray
    is_network: np.ndarray
    is_scale_up: np.ndarray


_Flow = tuple[IntArray, IntArray, IntArray, FloatArray]
"""(group, source, target, bytes) of point-to-point flows."""
_Direct = tuple[IntArray, IntArray, FloatArray]
"""(group, link, bytes) where the load is known without routing pair by pair."""
_Part = _Flow | _Direct


class _Memory:
    """Loads of one cluster by algorithm and members; least recently used go first.

    `budget` bounds the entries kept, about 26 bytes each.
    """

    def __init__(self, budget: int = 6_000_000) -> None:
        self.budget = budget
        self.kept = 0
        self.table: OrderedDict[tuple[str, bytes], _Load] = OrderedDict()

    def get(self, key: tuple[str, bytes], make: Callable[[], _Load]) -> _Load:
        found = self.table.get(key)
        if found is None:
            found = self.table[key] = make()
            self.kept += len(found.link)
            while self.kept > self.budget and len(self.table) > 1:
                self.kept -= len(self.table.popitem(last=False)[1].link)
        else:
            self.table.move_to_end(key)
        return found


_MEMORY: weakref.WeakKeyDictionary[Cluster, _Memory] = weakref.WeakKeyDictionary()


def _summed(
    cluster: Cluster, parts: list[_Part], groups: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """(group, link, bytes) of the routed flows, by group and link."""
    group_parts, link_parts, byte_parts = [], [], []
    flows = [part for part in parts if len(part) == 4]
    if flows:
        group = np.concatenate([np.broadcast_to(f[0], f[1].shape) for f in flows])
        source = np.concatenate([f[1] for f in flows])
        target = np.concatenate([f[2] for f in flows])
        amount = np.concatenate([np.broadcast_to(f[3], f[1].shape) for f in flows])
        pieces = getattr(cluster.router, "parts", None)
        if pieces is not None:
            # Sums need no order along the path, which saves a sort.
            for pair, links, share in pieces(source, target):
                group_parts.append(group[pair])
                link_parts.append(links)
                byte_parts.append(amount[pair] * share)
        else:
            routes = cluster.routes(source, target)
            group_parts.append(group[routes.pair])
            link_parts.append(routes.link)
            byte_parts.append(amount[routes.pair] * routes.share)
    for part in parts:
        if len(part) == 3:
            group_parts.append(part[0])
            link_parts.append(part[1])
            byte_parts.append(part[2])
    # A sparse matrix of groups x links sums duplicates in linear time.
    where = (np.concatenate(group_parts), np.concatenate(link_parts))
    matrix = csr_matrix((np.concatenate(byte_parts), where), shape=(groups, cluster.links))
    matrix.sum_duplicates()
    number = np.repeat(np.arange(groups), np.diff(matrix.indptr))
    return number, matrix.indices.astype(np.int64), matrix.data


#: Flows or links of one large group that are treated at a time: such arrays stay in the cache.
_FLOWS = 1 << 14


def _collected(cluster: Cluster, parts: list[_Part], groups: int) -> _Load:
    """Routes the flows, and sums what falls on the same link of the same group."""
    flows = [part for part in parts if len(part) == 4]
    pieces = getattr(cluster.router, "parts", None)
    number: IntArray
    if groups == 1 and pieces and 8 * sum(len(flow[1]) for flow in flows) > cluster.links:
        # One large group: into an array over the links, without sorting.
        total = np.zeros(cluster.links)
        for flow in flows:
            amount = np.broadcast_to(flow[3], flow[1].shape)
            for begin in range(0, len(amount), _FLOWS):
                some = slice(begin, begin + _FLOWS)
                for pair, links, share in pieces(flow[1][some], flow[2][some]):
                    np.add.at(total, links, amount[some][pair] * share)
        for part in parts:
            if len(part) == 3:
                np.add.at(total, part[1], part[2])
        link = np.flatnonzero(total)
        number, summed = np.zeros(len(link), dtype=np.int64), total[link]
    else:
        number, link, summed = _summed(cluster, parts, groups)
    kinds = cluster.link_kind[link]
    inside = IS_SCALE_UP[kinds]
    if cluster.scale_up.kind == "pcie":
        inside = inside | (kinds == KIND_INDEX["PCIe"])
    return _Load(number, link, summed, IS_NETWORK[kinds], inside)


# --------------------------------------------------------------------------- patterns of traffic
#
# Each pattern returns the flows of `groups` for one byte of volume; what the volume is (bytes
# times 2(n-1)/n for an all-reduce on a ring, ...) is the algorithm's business.


def _ring_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Rings over the members, one byte leaving every member.

    In a domain neighbours follow each other. Across domains NCCL keeps rings on their rails: the
    ring of channel c leaves a domain by the NIC of its c-th member and enters the next by that of
    the same member there, so that each of g members carries 1/g of what crosses, and in-domain
    hops carry (g-1)/g.
    """
    m, G = groups.members, len(groups.members)
    ids = np.arange(G)
    g, N = groups.per_domain, groups.domains
    if g == 0:
        # Unequal domains: one ring over everyone, by domain.
        after = np.roll(m, -1, axis=1)
        return [(np.repeat(ids, groups.n), m.ravel(), after.ravel(), np.ones(m.size))]
    flows: list[_Part] = []
    by_domain = m.reshape(G, N, g)
    if g > 1:
        inside = 1.0 if N == 1 else (g - 1) / g
        flows.extend(_neighbour_flows(cluster, by_domain, inside))
    if N > 1:
        ahead = np.roll(by_domain, -1, axis=1)
        which = np.repeat(ids, N * g)
        flows.append((which, by_domain.ravel(), ahead.ravel(), np.full(m.size, 1.0 / g)))
    return flows


def _neighbour_flows(cluster: Cluster, by_domain: IntArray, amount: float) -> list[_Part]:
    """In-domain hops of rings, `amount` bytes leaving each member [G, N, g]."""
    G, N, g = by_domain.shape
    kind = cluster.scale_up.kind
    if kind in ("mesh", "graph") and g > 2:
        spread = _mesh_flows(cluster, by_domain, amount)
        if spread is not None:
            return spread
    after = np.roll(by_domain, -1, axis=2)
    which = np.repeat(np.arange(G), N * g)
    return [(which, by_domain.ravel(), after.ravel(), np.full(by_domain.size, amount))]


def _mesh_flows(cluster: Cluster, by_domain: IntArray, amount: float) -> list[_Part] | None:
    """Rings over all direct links of a mesh: NCCL finds several rings until the links are used.

    Each member's bytes spread over its direct neighbours in proportion to the links' rates. None
    where some member has no direct neighbour among the members.
    """
    G, N, g = by_domain.shape
    first = by_domain[0, 0]
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(g), np.arange(g), indexing="ij"))
    keep = a != b
    a, b = a[keep], b[keep]
    routes = cluster.routes(first[a], first[b])
    hops = np.diff(routes.indptr)
    direct = hops == 1
    rate = np.zeros(len(a))
    rate[direct] = cluster.link_capacity[routes.link[routes.indptr[:-1][direct]]]
    total = np.bincount(a, weights=rate, minlength=g)
    if (total <= 0).any() or not IS_SCALE_UP[cluster.link_kind[routes.link]].any():
        return None
    share = rate[direct] / total[a[direct]]
    source = by_domain[:, :, a[direct]].reshape(-1)
    target = by_domain[:, :, b[direct]].reshape(-1)
    which = np.repeat(np.arange(G), N * int(direct.sum()))
    return [(which, source, target, np.tile(amount * share, G * N))]


def _tree_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Double binary tree over domains, chain inside a domain; volume: the buffer of one rank.

    Each tree carries half. Per tree a domain sends its reduced half to its parent and gets the
    result back. The members of a domain share the network traffic; inside, the chain carries the
    reduction one way and the broadcast the other (NCCL 2.4's double binary trees).
    """
    m, G = groups.members, len(groups.members)
    g = groups.per_domain or 1
    N = groups.domains if groups.per_domain else groups.n
    by_domain = m.reshape(G, N, g)
    ids = np.arange(G)
    flows: list[_Part] = []
    if g > 1:
        # The chain spreads over channels with different heads, so that all hops carry alike.
        each = np.array((g - 1) / g)
        after = np.roll(by_domain, -1, axis=2)
        which = np.repeat(ids, N * g)
        flows.append((which, by_domain.ravel(), after.ravel(), each))
        flows.append((which, after.ravel(), by_domain.ravel(), each))
    if N > 1:
        for parent in (binary_tree(N), binary_tree(N, mirrored=True)):
            child = np.flatnonzero(parent >= 0)
            low, high = by_domain[:, child, :], by_domain[:, parent[child], :]
            which = np.repeat(ids, low[0].size)
            half = np.array(0.5 / g)
            flows.append((which, low.ravel(), high.ravel(), half))
            flows.append((which, high.ravel(), low.ravel(), half))
    return flows


def binary_tree(n: int, *, mirrored: bool = False) -> IntArray:
    """Parent of each of n ranks in NCCL's binary tree (-1: root); mirrored: that of the second.

    NCCL's btree: the parent of r is r with its lowest set bit moved up by one (r ^ bit | 2 bit),
    or r - bit where that lies beyond n; rank 0 is the root, with one child. In the second tree the
    leaves become inner nodes: ranks mirrored for even n, shifted by one for odd n.
    """
    rank = np.arange(n, dtype=np.int64)
    bit = rank & -rank
    up = (rank ^ bit) | (bit << 1)
    parent = np.where(up < n, up, rank ^ bit)
    parent[:1] = -1
    if not mirrored:
        return parent
    even = n % 2 == 0
    above = parent[n - 1 - rank if even else (rank - 1) % n]
    return np.where(above < 0, -1, n - 1 - above if even else (above + 1) % n)


def _all_pairs(cluster: Cluster, groups: _Groups, amount: float) -> list[_Part]:
    """Every member sends `amount` bytes to every other."""
    m, G, n = groups.members, len(groups.members), groups.n
    counted = getattr(cluster.router, "all_pairs", None)
    if counted is not None and (found := counted(m)) is not None:
        return [(found[0], found[1], found[2] * amount)]
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    keep = a != b
    a, b = a[keep], b[keep]
    return [
        (
            np.repeat(np.arange(G), len(a)),
            m[:, a].ravel(),
            m[:, b].ravel(),
            np.full(G * len(a), amount),
        )
    ]


def _all_pairs_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Every member sends 1/n byte to every other."""
    return _all_pairs(cluster, groups, 1.0 / groups.n)


def _shift_flows(cluster: Cluster, groups: _Groups, ranks: IntArray) -> list[_Part]:
    """send_recv: the first member to the second; more than two: each to the next, as nccl-tests."""
    G, n = ranks.shape
    if n == 2:
        return [(np.arange(G), ranks[:, 0], ranks[:, 1], np.ones(G))]
    after = np.roll(ranks, -1, axis=1)
    return [(np.repeat(np.arange(G), n), ranks.ravel(), after.ravel(), np.ones(ranks.size))]


def _nvls_load(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """NVLink SHARP: every member sends its buffer up once and gets the result down once.

    Reads through the switch (multimem.ld_reduce) move each buffer up and a reduced 1/g down;
    the multicast moves a reduced 1/g up and the whole down: b (1 + 1/g) each way. Expressed as
    flows to the neighbour, which load one link up and one down.
    """
    G = len(groups.members)
    g, N = groups.per_domain, groups.domains
    by_domain = groups.members.reshape(G, N, g)
    after = np.roll(by_domain, -1, axis=2)
    which = np.repeat(np.arange(G), N * g)
    return [(which, by_domain.ravel(), after.ravel(), np.full(by_domain.size, 1.0 + 1.0 / g))]


def _torus_flows(cluster: Cluster, groups: _Groups) -> list[_Part] | None:
    """All-gather along the axes of a torus, both ways round, for one byte of total output.

    The members must form a box (every combination of some coordinates per axis). Data is split
    over the k axes in use, each part going along the axes in another order, so that all links work
    at once: an axis that closes carries (n-1)/n / (2k) per direction; an open one carries chunks
    from one end to the other, (p+1)/L of the axis' part over its p-th hop.
    None where the members are no box.
    """
    m, G = groups.members, len(groups.members)
    shape, wrap = cluster.scale_up.shape, cluster.scale_up.wrap
    n = groups.n
    position = m - (m // cluster.scale_up.size) * cluster.scale_up.size
    coordinate = np.stack(np.unravel_index(position[0], shape))
    lengths = [len(np.unique(c)) for c in coordinate]
    if int(np.prod(lengths)) != n:
        return None
    axes = [axis for axis, length in enumerate(lengths) if length > 1]
    # Position of each member in the box, C order; members are sorted by index, which is C order.
    box = m.reshape(G, *[lengths[axis] for axis in axes]) if axes else m
    flows: list[_Part] = []
    weight: FloatArray
    for number, axis in enumerate(axes):
        length, full = lengths[axis], shape[axis]
        values = np.unique(coordinate[axis])
        gap = int(values[1] - values[0])
        regular = bool((np.diff(values) == gap).all())
        closes = wrap[axis] and full > 2 and regular and full - int(values[-1] - values[0]) == gap
        part = (n - 1) / n / len(axes)
        along = np.moveaxis(box, 1 + number, -1).reshape(-1, length)
        which = np.repeat(np.arange(G), len(along) // G)
        for sign in (1, -1):
            after = np.roll(along, -sign, axis=1)
            if closes and length > 2:
                weight = np.full(length, part / 2)
            else:
                hop = np.arange(length) if sign == 1 else np.arange(length)[::-1]
                # Over the p-th hop go p + 1 of the axis' L chunks; nothing over the closing one.
                weight = np.where(hop < length - 1, (hop + 1) / (length - 1) * part, 0.0)
            keep = np.flatnonzero(weight > 0)
            flows.append(
                (
                    np.repeat(which, len(keep)),
                    along[:, keep].ravel(),
                    after[:, keep].ravel(),
                    np.tile(weight[keep], len(along)),
                )
            )
    return flows


def _across_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Rings over domains for each of the g members, one byte leaving every domain."""
    G, g, N = len(groups.members), groups.per_domain, groups.domains
    by_domain = groups.members.reshape(G, N, g)
    ahead = np.roll(by_domain, -1, axis=1)
    which = np.repeat(np.arange(G), N * g)
    return [(which, by_domain.ravel(), ahead.ravel(), np.full(by_domain.size, 1.0 / g))]


def _inside(groups: _Groups) -> _Groups:
    """The parts of the groups inside each domain, as groups of their own."""
    G, g, N = len(groups.members), groups.per_domain, groups.domains
    return _Groups(groups.members.reshape(G * N, g), 1, g, np.array([g]))


def _regrouped(parts: Sequence[_Part], per_group: int) -> list[_Part]:
    """Parts of sub-groups as parts of the groups that they belong to."""
    return [(part[0] // per_group, *part[1:]) for part in parts]


def _pat_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Parallel aggregated trees (NCCL 2.23): in step k each rank sends 2**k chunks 2**k ahead.

    Volume: total output; one rank per domain.
    """
    m, G, n = groups.members, len(groups.members), groups.n
    flows: list[_Part] = []
    step, left = 1, n - 1
    while left > 0:
        chunks = min(step, left)
        ahead = np.roll(m, -step, axis=1)
        flows.append(
            (np.repeat(np.arange(G), n), m.ravel(), ahead.ravel(), np.full(m.size, chunks / n))
        )
        left -= chunks
        step *= 2
    return flows


def _direct_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """All-to-all as NCCL does it, one byte of buffer per rank: 1/n to every rank.

    Where NICs have rails, PXN (NCCL 2.12) first hands a message to the local accelerator on the
    target's rail, so that nothing crosses a spine that need not.
    """
    G, g, N = len(groups.members), groups.per_domain, groups.domains
    if g == 0 or N == 1 or g == 1 or cluster.scale_out.kind != "rail":
        return _all_pairs_flows(cluster, groups)
    by_domain = groups.members.reshape(G, N, g)
    rails = cluster.nic_of[by_domain[0]] - cluster.nic_of[by_domain[0]].min(axis=1)[:, None]
    if not (rails == rails[0]).all():
        return _all_pairs_flows(cluster, groups)
    return _rails_flows(cluster, groups)


_PATTERNS: dict[str, Callable[[Cluster, _Groups], list[_Part] | None]] = {
    "ring": _ring_flows,
    "tree": _tree_flows,
    "nvls": _nvls_load,
    "across": _across_flows,
    "torus": _torus_flows,
    "pat": _pat_flows,
    "direct": _direct_flows,
    "pairs": _all_pairs_flows,
}


def _digest(members: IntArray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(members).data, digest_size=16).digest()


def _load(cluster: Cluster, groups: _Groups, pattern: str) -> _Load | None:
    """The load of one byte of volume of `pattern`, remembered."""
    memory = _MEMORY.setdefault(cluster, _Memory())
    key = (f"{pattern}/{groups.domains}/{groups.members.shape}", _digest(groups.members))

    def make() -> _Load:
        flows = _PATTERNS[pattern](cluster, groups)
        if flows is None:
            empty = np.zeros(0, dtype=np.int64)
            return _Load(empty, empty, np.zeros(0), empty.astype(bool), empty.astype(bool))
        return _collected(cluster, flows, len(groups.members))

    load = memory.get(key, make)
    return None if not len(load.link) and pattern == "torus" else load


# --------------------------------------------------------------------------- algorithms


@dataclass(frozen=True)
class _Candidate:
    """One algorithm with one protocol: terms of work, and its latency."""

    algorithm: str
    protocol: str
    latency: float
    terms: tuple[tuple[str, float], ...]
    """(pattern, volume in bytes)."""
    share_up: float
    share_net: float
    channels: float = 0.0
    hbm_bytes: float = 0.0


@dataclass(frozen=True)
class _Call:
    """What an algorithm is asked for."""

    cluster: Cluster
    op: str
    groups: _Groups
    nbytes: float
    in_place: bool
    link: LinkConstants
    fabric: FabricConstants

    @property
    def n(self) -> int:
        return self.groups.n

    @property
    def net_steps(self) -> int:
        """Steps of a ring that cross domains (one way round)."""
        return self.groups.domains - 1 if self.groups.domains > 1 else 0


Algorithm = Callable[[_Call], list[_Candidate]]
_ALGORITHMS: dict[str, tuple[Algorithm, frozenset[str]]] = {}


def register(name: str, *ops: str) -> Callable[[Algorithm], Algorithm]:
    """Make a function the algorithm `name` of `ops`; it returns [] where it can't run."""

    def decorate(function: Algorithm) -> Algorithm:
        _ALGORITHMS[name] = (function, frozenset(ops))
        return function

    return decorate


def _constants(call: _Call, pattern: str) -> OperationConstants:
    found = call.link.patterns.get(pattern) or call.link.patterns.get("ring")
    if found is None:
        raise InputError(f"no constants for {pattern} over {call.link.name}")
    return found


def _rate(call: _Call) -> float:
    """byte/s per direction of the links that join a member to the others of its domain."""
    up = call.cluster.scale_up
    rate = up.bandwidth or float("inf")
    if up.kind == "mesh" and up.size > 1:
        members = int(call.groups.counts.max())
        rate *= max(1, members - 1) / (up.size - 1)
    return rate


def _limited(link: float, blocks: float) -> float:
    """Share of a link's rate where both the link and the thread blocks limit it; `blocks` that is
    no positive number stands for no limit."""
    if not 0.0 < blocks < float("inf"):
        return link
    return float((link**-LIMITS + blocks**-LIMITS) ** (-1.0 / LIMITS))


def _network(call: _Call, protocol: str) -> tuple[float, float, float]:
    """(seconds per network step, share of the NIC, seconds per sqrt(byte)) of a protocol."""
    fabric = call.fabric
    if protocol == "LL":
        return fabric.hop_ll, fabric.share_ll, 0.0
    if protocol == "LL128":
        return fabric.hop_ll128, fabric.share_ll128, 0.0
    return fabric.hop_simple, 1.0, fabric.ramp


def _written_share(
    call: _Call, constants: OperationConstants, protocol: Protocol, wire: float
) -> float:
    """Share of the link's rate that a ring reaches whose thread blocks write `wire` bytes to the
    neighbour and the member's own part to its result.

    A reduction writes the result also in place; an all-gather in place has it there already.
    """
    share = protocol.share
    if protocol.name != "Simple" or call.op == "broadcast":
        return share
    local = 0.0 if call.in_place and call.op == "all_gather" else call.nbytes / call.n
    # What thread blocks write goes with all links of the accelerator, used here or not.
    cluster = call.cluster
    device = cluster.accelerator_types[int(cluster.accelerator_type_of[call.groups.members[0, 0]])]
    links = max(device.scale_up_bandwidth, cluster.scale_up.bandwidth) or float("inf")
    return _limited(share, constants.write * links / _rate(call) * wire / (wire + local))


@register("ring", "all_reduce", "all_gather", "reduce_scatter", "broadcast")
def _ring(call: _Call) -> list[_Candidate]:
    """Rings: 2(n-1) steps for all_reduce, n-1 for the others."""
    n, groups = call.n, call.groups
    rounds = 2 if call.op == "all_reduce" else 1
    volume = call.nbytes * (1.0 if call.op == "broadcast" else rounds * (n - 1) / n)
    net_steps = rounds * call.net_steps
    steps = rounds * (n - 1) - net_steps
    constants = _constants(call, "ring")
    # HBM: each byte that passes is written on arrival and read to be sent on; reducing reads the
    # local operand as well.
    passes = {"all_reduce": 2.5, "all_gather": 2.0, "reduce_scatter": 3.0, "broadcast": 2.0}
    candidates = []
    for protocol in constants.protocols:
        hop, share_net, ramp_net = _network(call, protocol.name)
        if net_steps and not share_net:
            continue
        # The ramp belongs to the slower of the two kinds of links.
        inner_hop = protocol.hop
        share_up = _written_share(call, constants, protocol, volume)
        if net_steps:
            start = protocol.start + call.fabric.start
            ramp = ramp_net * np.sqrt(volume)
            if protocol.name == "Simple":
                inner_hop = call.fabric.inner_hop
                g = groups.per_domain
                if g > 1:
                    # The limit is the thread blocks', whose hops include those to the NICs.
                    share_up = min(share_up, call.link.ring_across * (g - 1) / g)
        else:
            start, ramp = protocol.start, protocol.ramp * np.sqrt(volume)
        candidates.append(
            _Candidate(
                "ring",
                protocol.name,
                start + steps * inner_hop + net_steps * hop + float(ramp),
                (("ring", volume),),
                share_up,
                share_net or 1.0,
                call.fabric.channels if net_steps else call.link.channels,
                passes[call.op] * volume,
            )
        )
    return candidates


@register("tree", "all_reduce")
def _tree(call: _Call) -> list[_Candidate]:
    """Double binary tree over domains, chains inside them."""
    groups = call.groups
    depth = 2 * np.ceil(np.log2(groups.domains))
    start = call.fabric.start if groups.domains > 1 else 0.0
    g = groups.per_domain or 1
    tree_share = call.fabric.tree_share
    if groups.domains == 2:
        tree_share *= call.fabric.tree_pair
    constants = _constants(call, "ring")
    candidates = []
    for protocol in constants.protocols:
        hop, share_net, ramp_net = _network(call, protocol.name)
        if groups.domains > 1 and not share_net:
            continue
        latency = (
            protocol.start
            + start
            + 2 * (g - 1) * protocol.hop
            + depth * hop
            + float((ramp_net if groups.domains > 1 else protocol.ramp) * np.sqrt(call.nbytes))
        )
        candidates.append(
            _Candidate(
                "tree", protocol.name, float(latency), (("tree", call.nbytes),),
                protocol.share, (share_net or 1.0) * tree_share, call.fabric.channels,
                5.0 * call.nbytes,
            )
        )  # fmt: skip
    return candidates


@register("nvls", "all_reduce")
def _nvls(call: _Call) -> list[_Candidate]:
    """NVLink SHARP inside one domain."""
    groups = call.groups
    up = call.cluster.scale_up
    if not up.in_network_reduction or groups.domains > 1 or groups.n < 3:
        return []
    return _nvls_candidates(call, "nvls", (), 0.0, 1.0, 0.0, 1.0)


def _nvls_candidates(
    call: _Call, name: str, terms: tuple[tuple[str, float], ...], latency: float,
    share_net: float, ramp_net: float, scale: float,
) -> list[_Candidate]:  # fmt: skip
    constants = call.link.patterns.get("nvls")
    if constants is None:
        return []
    b = call.nbytes
    hosts = call.cluster.host_of[call.groups.members[0, : call.groups.per_domain]]
    if (hosts != hosts[0]).any():
        scale *= call.link.nvls_hosts
    return [
        _Candidate(
            name, protocol.name,
            protocol.start + latency + float((protocol.ramp + ramp_net) * np.sqrt(b)),
            (("nvls", b), *terms), protocol.share * scale, share_net,
            call.link.nvls_channels, 2.0 * b * (1.0 + 1.0 / call.groups.per_domain),
        )
        for protocol in constants.protocols
    ]  # fmt: skip


@register("nvlstree", "all_reduce")
def _nvlstree(call: _Call) -> list[_Candidate]:
    """NVLink SHARP inside domains, a double binary tree across them."""
    groups = call.groups
    up = call.cluster.scale_up
    if not up.in_network_reduction or groups.domains < 2 or groups.per_domain < 3:
        return []
    depth = 2 * float(np.ceil(np.log2(groups.domains)))
    latency = call.fabric.start + depth * call.fabric.hop_nvls
    share = 1.0 if groups.domains == 2 else call.fabric.nvlstree_share
    return _nvls_candidates(
        call, "nvlstree", (("tree_across", call.nbytes),), latency, share, call.fabric.ramp,
        call.link.nvls_across,
    )  # fmt: skip


def _tree_across_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """The network part of the tree alone."""
    return [
        part for part in _tree_flows(cluster, groups)
        if len(part) == 4 and cluster.node_of[part[1][0]] != cluster.node_of[part[2][0]]
    ]  # fmt: skip


_PATTERNS["tree_across"] = _tree_across_flows


@register("collnet", "all_reduce")
def _collnet(call: _Call) -> list[_Candidate]:
    """SHARP: the network's switches reduce; a domain sends and receives its buffer once.

    Measured: 1.40 NIC rates of bus bandwidth, flat in the number of domains.
    """
    groups = call.groups
    if (
        not call.cluster.scale_out.in_network_reduction
        or groups.domains < 2
        or not groups.per_domain
    ):
        return []
    b, g = call.nbytes, groups.per_domain
    nvls = call.link.patterns.get("nvls")
    terms: list[tuple[str, float]] = [("across", b)]
    if nvls is not None and call.cluster.scale_up.in_network_reduction and g > 2:
        simple = nvls.protocols[0]
        terms.append(("nvls", b))
    else:
        simple = _constants(call, "ring").protocols[0]
        if g > 1:
            terms.append(("inside", 2.0 * (g - 1) / g * b))
    latency = (
        simple.start + call.fabric.start + 2 * (g - 1) * simple.hop + 2 * call.fabric.hop_simple
        + float(call.fabric.ramp * np.sqrt(b))
    )  # fmt: skip
    return [
        _Candidate(
            "collnet", "Simple", latency, tuple(terms), simple.share, _SHARP_SHARE,
            call.fabric.channels, 5.0 * b,
        )
    ]  # fmt: skip


def _inside_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """Rings inside each domain, one byte leaving every member."""
    G, g, N = len(groups.members), groups.per_domain, groups.domains
    return _neighbour_flows(cluster, groups.members.reshape(G, N, g), 1.0)


_PATTERNS["inside"] = _inside_flows


@register("hierarchical", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
def _hierarchical(call: _Call) -> list[_Candidate]:
    """Two levels: inside the domain, then across with 1/g of the data per member, pipelined.

    For all_to_all: to the peer of the same rail on the target's domain, which hands on inside
    (node-limited routing, DeepEP).
    """
    groups = call.groups
    g, N, b = groups.per_domain, groups.domains, call.nbytes
    if N < 2 or g < 2:
        return []
    if call.op == "all_to_all":
        constants = _constants(call, "all_to_all")
        simple = constants.protocols[0]
        latency = (
            simple.start + simple.hop * (g - 1) + call.fabric.start
            + call.fabric.peer_hop * (N - 1) + float(call.fabric.ramp * np.sqrt(b))
        )  # fmt: skip
        return [
            _Candidate(
                "hierarchical", "Simple", latency, (("rails", b),), simple.share,
                call.fabric.p2p_share, call.fabric.channels, 4.0 * b,
            )
        ]  # fmt: skip
    rounds = 2 if call.op == "all_reduce" else 1
    pattern = "torus" if call.cluster.scale_up.kind == "torus" else "inside"
    constants = _constants(call, "torus" if pattern == "torus" else "ring")
    inner = b * rounds * (g - 1) / g
    outer = b * rounds * (N - 1) / N
    simple = constants.protocols[0]
    latency = (
        simple.start + call.fabric.start + rounds * (g - 1) * simple.hop
        + rounds * (N - 1) * call.fabric.hop_simple
        + float(call.fabric.ramp * np.sqrt(outer / g))
    )  # fmt: skip
    if pattern == "torus":
        # The pattern's volume is the total output of an all-gather inside each slice.
        inside_term = ("torus_inside", b * rounds)
    else:
        inside_term = ("inside", inner)
    return [
        _Candidate(
            "hierarchical", "Simple", latency, (inside_term, ("across", outer)),
            simple.share, 1.0, call.fabric.channels, 2.5 * (inner + outer / g),
        )
    ]  # fmt: skip


def _torus_inside_flows(cluster: Cluster, groups: _Groups) -> list[_Part] | None:
    """All-gathers inside each slice."""
    flows = _torus_flows(cluster, _inside(groups))
    return None if flows is None else _regrouped(flows, groups.domains)


def _rails_flows(cluster: Cluster, groups: _Groups) -> list[_Part]:
    """All-to-all along rails, one byte of buffer per rank: what goes to another domain crosses the
    network between members of equal position, the rest of the way is inside the domain."""
    G, g, N, n = len(groups.members), groups.per_domain, groups.domains, groups.n
    rails_of = np.moveaxis(groups.members.reshape(G, N, g), 1, 2).reshape(G * g, N)
    rail_groups = _Groups(rails_of, N, 1, np.ones(N, dtype=np.int64))
    return [
        *_regrouped(_all_pairs(cluster, rail_groups, g / n), g),
        *_regrouped(_all_pairs(cluster, _inside(groups), N / n), N),
    ]


_PATTERNS["torus_inside"] = _torus_inside_flows
_PATTERNS["rails"] = _rails_flows


@register("pat", "all_gather", "reduce_scatter")
def _pat(call: _Call) -> list[_Candidate]:
    """Parallel aggregated trees: log2(n) steps; one rank per domain (NCCL 2.23)."""
    groups = call.groups
    if groups.per_domain != 1 or groups.domains < 3:
        return []
    volume = call.nbytes
    simple = _constants(call, "ring").protocols[0]
    steps = float(np.ceil(np.log2(groups.n)))
    latency = (
        simple.start + call.fabric.start + steps * call.fabric.hop_simple
        + float(call.fabric.ramp * np.sqrt(volume * (groups.n - 1) / groups.n))
    )  # fmt: skip
    return [
        _Candidate(
            "pat", "Simple", latency, (("pat", volume),), simple.share, 1.0,
            call.fabric.channels, 3.0 * volume,
        )
    ]  # fmt: skip


@register("torus", "all_reduce", "all_gather", "reduce_scatter", "broadcast")
def _torus(call: _Call) -> list[_Candidate]:
    """Along the axes of a torus, both ways round: bytes / (2 x link) on a closed axis."""
    groups = call.groups
    if call.cluster.scale_up.kind != "torus" or groups.domains > 1:
        return []
    constants = _constants(call, "torus")
    simple = constants.protocols[0]
    rounds = 2 if call.op == "all_reduce" else 1
    # Hops: half the length of each closed axis; n - 1 at worst on an open line.
    hops = float(sum(max(1, length // 2) for length in call.cluster.scale_up.shape if length > 1))
    hops = min(hops, float(groups.n - 1))
    return [
        _Candidate(
            "torus", "Simple", simple.start + rounds * hops * simple.hop,
            (("torus", call.nbytes * rounds),), simple.share, 1.0, 0.0,
            2.5 * rounds * call.nbytes * (groups.n - 1) / groups.n,
        )
    ]  # fmt: skip


def _all_to_all_share(call: _Call, peers: int) -> float:
    """Share of the NIC: few peers mean few streams in flight, many domains congestion."""
    fabric = call.fabric
    share = fabric.all_to_all_share * (1.0 - fabric.peer_loss / max(1, peers))
    return float(share * (2.0 / max(2, call.groups.domains)) ** fabric.all_to_all_decline)


@register("direct", "all_to_all")
def _direct(call: _Call) -> list[_Candidate]:
    """Every rank to every rank at once."""
    groups = call.groups
    n = groups.n
    constants = _constants(call, "all_to_all")
    remote = n - (groups.per_domain or int(groups.counts.min())) if groups.domains > 1 else 0
    b = call.nbytes
    candidates = []
    for protocol in constants.protocols:
        if remote and protocol.name != "Simple":
            continue
        latency = protocol.start + protocol.hop * (n - 1 - remote)
        if remote:
            latency += call.fabric.start + call.fabric.peer_hop * remote
            latency += float(call.fabric.ramp * np.sqrt(b * remote / n))
        else:
            latency += float(protocol.ramp * np.sqrt(b))
        # The channels are divided among the members, the own part included: it takes as long as
        # each of the others where the channels are the limit.
        moved = (n - 1) / n
        if protocol.name == "Simple":
            share_up = _limited(
                protocol.share, moved * P2P_CHANNELS * constants.channel_rate / _rate(call)
            )
        else:
            share_up = protocol.share * moved
        candidates.append(
            _Candidate(
                "direct", protocol.name, latency, (("direct", b),), share_up,
                _all_to_all_share(call, remote),
                call.fabric.channels if remote else call.link.channels,
                2.0 * b * (n - 1) / n,
            )
        )  # fmt: skip
    return candidates


def _p2p_share(call: _Call) -> float:
    """Share of the NIC of a point-to-point stream.

    NCCL opens two channels per network peer and only one in communicators of many nodes; one
    channel's rate is bounded by its thread block and proxy, not by the NIC.
    """
    fabric = call.fabric
    out = call.cluster.scale_out
    if call.groups.domains <= _P2P_TWO_CHANNEL_DOMAINS or not out.bandwidth:
        return fabric.p2p_share
    share = min(fabric.p2p_share, fabric.p2p_channel_rate / (out.bandwidth * out.efficiency))
    members = call.groups.members[0]
    after = np.roll(members, -1)
    crosses = call.cluster.node_of[members] != call.cluster.node_of[after]
    leaf = call.cluster.leaf_of
    if (crosses & (leaf[members] != leaf[after])).any():
        # Single streams are hashed to single paths of the spine, where some meet.
        share *= fabric.p2p_cross_rail
    return share


@register("pairwise", "send_recv")
def _pairwise(call: _Call) -> list[_Candidate]:
    """Point to point."""
    constants = _constants(call, "send_recv" if "send_recv" in call.link.patterns else "ring")
    b = call.nbytes
    crosses = call.groups.domains > 1
    # NCCL divides the channels among the members, and takes more for long messages.
    channels = max(1.0, P2P_CHANNELS / (1 << (call.n - 1).bit_length()))
    if b > channels * _P2P_PART_BYTES:
        channels = min(P2P_CHANNELS, 2.0 ** np.ceil(np.log2(b / _P2P_PART_BYTES)))
    candidates = []
    for protocol in constants.protocols:
        share_up = protocol.share
        if protocol.name == "Simple" and not crosses:
            share_up = _limited(share_up, channels * constants.channel_rate / _rate(call))
        _, share, ramp = _network(call, protocol.name)
        if crosses:
            if protocol.name != "Simple":
                continue
            latency = call.fabric.p2p_start + float(ramp * np.sqrt(b))
            share = _p2p_share(call)
        else:
            latency = protocol.start + protocol.hop + float(protocol.ramp * np.sqrt(b))
        candidates.append(
            _Candidate(
                "pairwise", protocol.name, latency, (("shift", b),), share_up, share,
                call.fabric.p2p_channels if crosses else min(8.0, call.link.channels), 2.0 * b,
            )
        )  # fmt: skip
    return candidates


# --------------------------------------------------------------------------- the call


def _shapes(cluster: Cluster, ranks: IntArray) -> list[tuple[IntArray, _Groups]]:
    """Groups of like shape: (their numbers, the groups)."""
    G, n = ranks.shape
    domain = cluster.node_of[ranks]
    if (np.diff(ranks, axis=1) > 0).all() and (np.diff(domain, axis=1) >= 0).all():
        members = ranks
    else:
        domain, members = np.divmod(np.sort(domain * len(cluster) + ranks, axis=1), len(cluster))
    new_domain = np.diff(domain, axis=1, prepend=-1) != 0
    leaf = cluster.leaf_of[members]
    # Same shape: same runs of domains, same pattern of leaves, same accelerators.
    signature = np.concatenate(
        [new_domain, leaf == leaf[:, :1], cluster.accelerator_type_of[members]], axis=1
    ).astype(np.int8)
    if (signature == signature[0]).all():
        classes = [np.arange(G)]
    else:
        _, inverse = np.unique(signature, axis=0, return_inverse=True)
        inverse = inverse.ravel()
        classes = [np.flatnonzero(inverse == c) for c in range(int(inverse.max()) + 1)]
    result = []
    for numbers in classes:
        starts = np.flatnonzero(new_domain[numbers[0]])
        counts = np.diff(np.append(starts, n))
        uniform = int(counts[0]) if (counts == counts[0]).all() else 0
        result.append((numbers, _Groups(members[numbers], len(counts), uniform, counts)))
    return result


_Parts = tuple[IntArray, IntArray, FloatArray]
"""(group, link, byte-equivalents)."""


def _work(call: _Call, candidate: _Candidate, groups: _Groups) -> _Parts | None:
    """(group, link, byte-equivalents) of a candidate for `groups`; None where it can't run."""
    cluster = call.cluster
    pieces = []
    for pattern, volume in candidate.terms:
        load = _load(cluster, groups, pattern)
        if load is None:
            return None
        work = load.bytes * volume
        for begin in range(0, len(work), _FLOWS):
            some = slice(begin, begin + _FLOWS)
            factor = np.where(load.is_scale_up[some], 1.0 / candidate.share_up, 1.0)
            factor[load.is_network[some]] = 1.0 / candidate.share_net
            factor /= cluster.link_efficiency[load.link[some]]
            work[some] *= factor
        pieces.append((load.group, load.link, work))
    return _joined(pieces)


def _joined(parts: list[_Parts]) -> _Parts:
    """All entries, without a copy of a single part."""
    if len(parts) == 1:
        return parts[0]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def collective_traffic(
    cluster: Cluster,
    op: str,
    ranks: IntArray,
    nbytes: float,
    *,
    algorithm: str | None = None,
    protocol: str | None = None,
    in_place: bool = True,
) -> CollectiveTraffic:
    """Traffic of G groups that run one collective each.

    Parameters
    ----------
    op:
        One of `OPERATIONS`.
    ranks:
        int array [G, n] of accelerator indices, one group per row; a 1-d array is one group.
    nbytes:
        Size by the convention of nccl-tests.
    algorithm, protocol:
        A name of `ALGORITHMS` / `PROTOCOLS`; None: the fastest predicted, per shape of group.
    in_place:
        False: the result of an all-gather goes to another buffer than the input.

    Raises
    ------
    InputError
        For unknown names, an algorithm that cannot run here, members that cannot reach each other.
    """
    op = operation_name(op)
    ranks = np.atleast_2d(np.asarray(ranks, dtype=np.int64))
    G, n = ranks.shape
    if not 0 <= nbytes <= _MOST_BYTES:
        raise InputError(f"expected a size from 0 to {_MOST_BYTES:.0e} bytes, got {nbytes!r}")
    if len(ranks) and n and (ranks.min() < 0 or ranks.max() >= len(cluster)):
        raise InputError(
            f"accelerator indices must lie in 0..{len(cluster) - 1}, "
            f"got {int(ranks.min())}..{int(ranks.max())}"
        )
    if algorithm is not None:
        algorithm = algorithm_name(algorithm, op)
    if protocol is not None:
        chosen = next((p for p in PROTOCOLS if p.casefold() == protocol.casefold()), None)
        if chosen is None:
            raise unknown_name("protocol", protocol, PROTOCOLS)
        protocol = chosen
    if G == 0 or n < 2 or nbytes == 0:
        nothing = LinkLoads.joined([])
        return CollectiveTraffic(np.zeros(G), nothing, 0.0, 0.0, algorithm or "none", "Simple")
    congruence = getattr(cluster.router, "congruence", None)
    like = congruence(ranks) if congruence is not None and G > 1 else None
    if like is not None and len(like.first) < G:
        # one group of those that are alike stands for all
        few = collective_traffic(
            cluster, op, ranks[like.first], nbytes,
            algorithm=algorithm, protocol=protocol, in_place=in_place,
        )  # fmt: skip
        return replace(few, latency=few.latency[like.class_of], loads=few.loads.moved(like))
    latency = np.zeros(G)
    found: list[_Parts] = []
    chosen_of: dict[int, str] = {}
    first: _Candidate | None = None
    accelerator = cluster.accelerator_types[int(cluster.accelerator_type_of[ranks[0, 0]])]
    link = link_constants(
        cluster.scale_up.link, cluster.scale_up.bandwidth, accelerator.clock_hz or 0.0
    )
    for numbers, groups in _shapes(cluster, ranks):
        if op == "send_recv":
            # Order matters here: the first sends to the second.
            groups = _Groups(ranks[numbers], groups.domains, groups.per_domain, groups.counts)
        call = _Call(
            cluster, op, groups, float(nbytes), in_place,
            link, fabric_constants(cluster.scale_out.fabric),
        )  # fmt: skip
        best, parts = _fastest(call, algorithm, protocol)
        latency[numbers] = best.latency
        if len(groups.members) > 1:
            parts = _work(call, best, groups) or parts
        found.append(parts if len(numbers) == G else (numbers[parts[0]], *parts[1:]))
        chosen_of[int(numbers[0])] = best.algorithm
        if first is None or numbers[0] == 0:
            first = best
    assert first is not None
    names = tuple(sorted(set(chosen_of.values()))) if len(set(chosen_of.values())) > 1 else ()
    return CollectiveTraffic(
        latency,
        LinkLoads.of(G, *_joined(found)),
        first.hbm_bytes,
        min(1.0, first.channels / max(1, accelerator.core_count)),
        first.algorithm,
        first.protocol,
        names,
    )


#: Not NCCL's own choice: PAT came with 2.23 for one rank per node, SHARP needs its plugin.
_ONLY_WHEN_ASKED = ("hierarchical", "pat")


def _fastest(call: _Call, algorithm: str | None, protocol: str | None) -> tuple[_Candidate, _Parts]:
    """The candidate with the least time alone, judged on the first group of the shape, and
    that group's work."""
    one = _Groups(
        call.groups.members[:1], call.groups.domains, call.groups.per_domain, call.groups.counts
    )
    names = (
        [algorithm] if algorithm else [n for n, (_, ops) in _ALGORITHMS.items() if call.op in ops]
    )
    if algorithm is None:
        # Not of NCCL's repertoire: only where asked for, or where nothing else fits (slices).
        if call.cluster.scale_up.kind != "torus" or call.groups.domains == 1:
            names = [n for n in names if n not in _ONLY_WHEN_ASKED]
            if call.groups.domains == 1:
                names = [n for n in names if n != "tree"]
        elif call.op not in ("all_to_all", "send_recv"):
            names = ["hierarchical"] if call.groups.per_domain > 1 else ["ring"]
        if call.cluster.scale_up.kind == "torus" and call.groups.domains == 1:
            names = [n for n in names if n in ("torus", "direct", "pairwise")] + ["ring"] * (
                call.op not in ("all_to_all", "send_recv")
            )
    candidates = [c for name in names for c in _ALGORITHMS[name][0](call)]
    # Least latency first: what is slower by its latency alone needs no routes. Of equals the
    # earlier one is taken.
    order = sorted(range(len(candidates)), key=lambda i: candidates[i].latency)
    best: tuple[float, int] | None = None
    best_parts: _Parts | None = None
    for number in order:
        candidate = candidates[number]
        if protocol is not None and candidate.protocol != protocol:
            continue
        if best is not None and candidate.latency > best[0]:
            break
        parts = _work(call, candidate, one)
        if parts is None:
            continue
        _, link, work = parts
        if len(candidate.terms) > 1:
            at = np.argsort(link, kind="stable")
            link, work = link[at], work[at]
            starts = np.flatnonzero(np.diff(link, prepend=-1))
            work = np.add.reduceat(work, starts) if len(starts) else np.zeros(0)
            link = link[starts]
        seconds = candidate.latency + float(
            (work / call.cluster.link_capacity[link]).max(initial=0)
        )
        if best is None or (seconds, number) < best:
            best, best_parts = (seconds, number), parts
    if best is None or best_parts is None:
        what = f"algorithm {algorithm!r}" if algorithm else "any algorithm"
        with_protocol = f" with protocol {protocol}" if protocol else ""
        raise InputError(
            f"{what}{with_protocol} cannot run {call.op} over {call.groups.n} accelerators in "
            f"{call.groups.domains} domain(s) of {call.cluster.name}"
        )
    return candidates[best[1]], best_parts


def algorithm_name(name: str, op: str) -> str:
    """The canonical name of an algorithm for `op` (`NVLSTree`, `SHARP` are understood)."""
    folded = name.casefold().replace("-", "").replace("_", "").replace(" ", "")
    folded = {"sharp": "collnet", "collnetchain": "collnet", "collnetdirect": "collnet",
              "alltoall": "direct", "p2p": "pairwise"}.get(folded, folded)  # fmt: skip
    choices = [key for key, (_, ops) in _ALGORITHMS.items() if op in ops]
    if folded not in choices:
        raise unknown_name(f"algorithm for {op}", name, choices)
    return folded


def _shift_pattern(cluster: Cluster, groups: _Groups) -> list[_Part]:
    return _shift_flows(cluster, groups, groups.members)


_PATTERNS["shift"] = _shift_pattern

#: Algorithms by name and the operations that each serves.
ALGORITHMS: dict[str, frozenset[str]] = {name: ops for name, (_, ops) in _ALGORITHMS.items()}
