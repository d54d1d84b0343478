"""Regular clusters: scale-up domains (NVSwitch node or rack, GPU mesh, TPU torus) joined by NICs
and a leaf/spine(/core) network, rail-optimised or fat-tree, with oversubscription.

Everything is arithmetic on indices, so that routes of 131,072 pairs are a few numpy operations.

Links come in blocks, each a contiguous range of directed links:

    up, down        accelerator <-> NVSwitch                         [accelerators] each
    mesh            accelerator -> accelerator inside the domain     [domains x template links]
    to_nic, from_nic  accelerator <-> its NIC (PCIe)                 [accelerators] each
    to_host, from_host  accelerator <-> host memory (PCIe)           [accelerators] each
    nic_out, nic_in NIC <-> leaf                                     [NICs] each
    leaf_up, leaf_down  leaf <-> spines                              [leaves x lanes] each
    pod_up, pod_down    spines of a pod <-> core                     [pods x lanes] each

A trunk (all links of a leaf to the spines) is one link of the summed capacity: with ideal ECMP all
its members carry the same load, so that this is exact. With `ecmp="hash"` every member is a link
of its own (a lane), and a pair uses one of them, chosen by a hash of the pair.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from simulator.collector import paused_collector
from simulator.errors import InputError, raise_all
from simulator.topology.cluster import (
    IS_NETWORK,
    KIND_INDEX,
    Cluster,
    FloatArray,
    IntArray,
    Router,
    Routes,
    ScaleOut,
    ScaleUp,
    routes_from_parts,
)
from simulator.topology.graphs import (
    OverridingRouter,
    ShortestPathRouter,
    accelerator_index,
    memory_cannot_fail,
    no_such_link,
    path_links,
)
from simulator.topology.loads import Congruence, equal_rows

Part = tuple[np.ndarray, np.ndarray, "np.ndarray | float"]


@dataclass(frozen=True)
class DomainSpec:
    """A scale-up domain: what joins the accelerators of one node, rack or slice."""

    kind: str
    """`switch`, `mesh`, `torus`, `pcie` or `none`."""
    size: int
    link: str = "NVLink"
    """Technology with generation, e.g. `NVLink4`; key of the collectives' constants."""
    link_kind: str = "NVLink"
    """Member of `LINK_KINDS`."""
    bandwidth: float = 0.0
    """byte/s per direction: per accelerator (switch) or per link (mesh of unit weight, torus)."""
    latency: float = 0.3e-6
    switches: int = 1
    """Physical switch chips that the one `nvswitch` node stands for."""
    in_network_reduction: bool = False
    links: tuple[tuple[int, int, float], ...] = ()
    """Mesh: (i, j, byte/s per direction)."""
    shape: tuple[int, ...] = ()
    wrap: tuple[bool, ...] = ()


@dataclass(frozen=True)
class NetworkSpec:
    """The scale-out network."""

    kind: str
    """`rail`, `fat-tree` or `none`."""
    link_kind: str = "InfiniBand"
    fabric: str = "default"
    bandwidth: float = 0.0
    """Line rate of one NIC, byte/s per direction."""
    nics: int = 0
    """NICs per host."""
    latency: float = 0.5e-6
    """Per link of the network, with the switch behind it, seconds."""
    efficiency: float = 0.97
    hosts_per_leaf: int = 32
    oversubscription: float = 1.0
    spines: int = 0
    """Spine switches per pod; 0: as many as a leaf has uplinks."""
    hosts_per_pod: int = 0
    """0: one pod, without a core layer."""
    pod_oversubscription: float = 1.0
    ecmp: str = "ideal"
    in_network_reduction: bool = False


@dataclass(frozen=True)
class FabricSpec:
    """A regular cluster, checked; SI units."""

    name: str
    accelerators: int
    accelerator_type_names: tuple[str, ...]
    accelerator_type_of: IntArray | None
    accelerator_kind: str
    """`gpu` or `tpu`."""
    per_host: int
    """Accelerators per host (server, compute tray)."""
    domain: DomainSpec
    network: NetworkSpec
    host_link_kind: str = "PCIe"
    host_bandwidth: float = 32e9
    host_latency: float = 0.5e-6
    per_host_switch: int = 1
    """Accelerators that share one PCIe switch's link to the host; 1: no such switch."""
    memory_bandwidth: float = 0.0
    """HBM byte/s of the accelerator, for the graph's HBM edges; 0: unknown."""
    used_per_domain: int = 0
    """Accelerators used in each domain; 0: `domain.size`."""
    faults: tuple[Mapping[str, Any], ...] = ()
    routes: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = ()
    place: str = "cluster"
    sources: Mapping[str, str] = field(default_factory=dict)


class TemplateRouter:
    """Routes inside a domain by table: shortest-path ECMP on the domain's own small graph."""

    def __init__(self, size: int, links: Sequence[tuple[int, int]], failed: frozenset[int]) -> None:
        self.size = size
        keep = np.array([i for i in range(len(links)) if i not in failed], dtype=np.int64)
        tail = np.array([links[i][0] for i in keep], dtype=np.int64)
        head = np.array([links[i][1] for i in keep], dtype=np.int64)
        router = ShortestPathRouter(
            size, tail, head, np.ones(len(keep)), np.zeros(len(keep)), np.arange(size),
            [str(i) for i in range(size)],
        )  # fmt: skip
        a, b = (
            grid.ravel() for grid in np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
        )
        self.reachable = True
        try:
            table = router.routes(a, b)
        except InputError:
            self.reachable = False
            return
        self.link = keep[table.link]
        self.share = table.share
        self.start = table.indptr

    def parts(
        self, pair: IntArray, a: IntArray, b: IntArray
    ) -> tuple[IntArray, IntArray, FloatArray]:
        """(pair, template link, share) of the pairs of positions (a[i], b[i])."""
        code = a * self.size + b
        count = self.start[code + 1] - self.start[code]
        out = np.repeat(pair, count)
        within = np.arange(len(out)) - np.repeat(np.cumsum(count) - count, count)
        entry = np.repeat(self.start[code], count) + within
        return out, self.link[entry], self.share[entry]


#: Upper bound of accelerators: ten times the largest machine planned, small enough for memory.
MAX_ACCELERATORS = 1 << 22


def check_size(accelerators: int) -> None:
    """Raise `InputError` for a cluster that cannot be meant."""
    if accelerators > MAX_ACCELERATORS:
        raise InputError(f"{accelerators} accelerators; expected at most {MAX_ACCELERATORS}")


class Torus:
    """A slice of a torus: links and dimension-order routes.

    Position p has coordinates in C order (the last axis varies fastest). Link `2 * axis + 0` of a
    position goes up the axis (coordinate + 1), `2 * axis + 1` down. An axis of length 2 has one
    link per pair of neighbours. Routes go along the axes in order, each the shorter way round;
    where both ways are equally long, half the traffic goes each way.
    """

    def __init__(self, shape: tuple[int, ...], wrap: tuple[bool, ...]) -> None:
        self.shape, self.wrap = shape, wrap
        self.size = math.prod(shape)
        check_size(self.size)
        self.stride = np.array([int(np.prod(shape[i + 1 :])) for i in range(len(shape))])
        position = np.arange(self.size)
        self.coordinates = np.stack(np.unravel_index(position, shape))
        links: list[tuple[int, int]] = []
        self.number = np.full((self.size, 2 * len(shape)), -1, dtype=np.int64)
        for axis, length in enumerate(shape):
            closes = wrap[axis] and length > 2
            for sign in (0, 1):
                step = 1 if sign == 0 else -1
                here = self.coordinates[axis]
                there = here + step
                valid = (there >= 0) & (there < length) | closes
                target = position + (there % length - here) * self.stride[axis]
                for p in np.flatnonzero(valid).tolist():
                    self.number[p, 2 * axis + sign] = len(links)
                    links.append((p, int(target[p])))
        self.links = links
        #: 2 * position + direction of each link of a one-dimensional torus.
        self.keys = np.zeros(len(links), dtype=np.int64)
        if len(shape) == 1:
            for sign in (0, 1):
                valid = np.flatnonzero(self.number[:, sign] >= 0)
                self.keys[self.number[valid, sign]] = 2 * valid + sign

    def parts(self, pair: IntArray, a: IntArray, b: IntArray) -> list[Part]:
        """(pair, link of the slice, share) pieces of the dimension-order routes."""
        parts: list[Part] = []
        here = a.copy()
        for axis, length in enumerate(self.shape):
            if length == 1:
                continue
            stride = int(self.stride[axis])
            x = here // stride % length
            y = b // stride % length
            up = (y - x) % length
            down = (x - y) % length
            closes = self.wrap[axis] and length > 2
            if closes:
                share_up = np.where(up < down, 1.0, np.where(up == down, 0.5, 0.0))
            else:
                share_up = (y > x).astype(np.float64)
            moves = x != y
            for sign, distance, share in ((0, up, share_up), (1, down, 1.0 - share_up)):
                going = moves & (share > 0)
                index = np.flatnonzero(going)
                if not len(index):
                    continue
                count = distance[index]
                which = np.repeat(index, count)
                step = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
                at = (x[which] + (step if sign == 0 else -step)) % length
                position = here[which] + (at - x[which]) * stride
                parts.append((pair[which], self.number[position, 2 * axis + sign], share[which]))
            here = here + (y - x) * stride
        return parts


class _Blocks:
    """Hands out contiguous ranges of link numbers."""

    def __init__(self) -> None:
        self.total = 0
        self.capacity: list[np.ndarray] = []
        self.latency: list[np.ndarray] = []
        self.kind: list[np.ndarray] = []
        self.ranges: list[tuple[int, Callable[[int], tuple[str, str]]]] = []

    def add(
        self, count: int, capacity: Any, latency: float, kind: str,
        namer: Callable[[int], tuple[str, str]],
    ) -> int:  # fmt: skip
        start = self.total
        if count:
            self.capacity.append(np.broadcast_to(np.asarray(capacity, dtype=np.float64), count))
            self.latency.append(np.full(count, latency))
            self.kind.append(np.full(count, KIND_INDEX[kind], dtype=np.int8))
            self.ranges.append((start, namer))
            self.total += count
        return start

    def name(self, link: int) -> tuple[str, str]:
        start, namer = next(r for r in reversed(self.ranges) if r[0] <= link)
        return namer(link - start)


class FabricRouter:
    """Routes of a regular cluster; see the module's text for the links."""

    def __init__(self, build: _Build) -> None:
        self.b = build

    @property
    def trunk_of(self) -> IntArray:
        """See `_Build.trunk_of`."""
        return self.b.trunk_of

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Vectorised routes of accelerator pairs; raises InputError where there is none."""
        return routes_from_parts(len(source), self.parts(source, target), self.b.link_latency)

    def parts(self, source: IntArray, target: IntArray) -> list[Part]:
        """(pair, link, share) pieces of the routes, in the order of travel but not by pair."""
        b = self.b
        pair = np.arange(len(source))
        moves = source != target
        same = (b.node_of[source] == b.node_of[target]) & moves
        if b.isolated is not None:
            # An accelerator whose scale-up link has failed goes out by its NIC or its host.
            same &= ~(b.isolated[source] | b.isolated[target])
        parts: list[Part] = []
        self._inside(pair[same], source[same], target[same], parts)
        outside = moves & ~same
        if outside.any():
            self._outside(pair[outside], source[outside], target[outside], parts)
        return parts

    def congruence(self, members: IntArray) -> Congruence | None:
        """Which groups [G, n] of accelerators have like routes; None where flows are hashed.

        Routes are arithmetic on the numbers of accelerators, domains, NICs, leaves and pods: groups
        in which all of these keep their distances have routes that are the same but for a shift
        per block of links. Those with a member whose routes a fault changes are alike to none.
        """
        b = self.b
        if b.lanes > 1:
            return None
        # Groups with like distances that start at like places of the fabric's period are alike,
        # so that the numbers themselves are only compared for one of each such lot.
        head = members[:, 0]
        distance = members - head[:, None]
        lots = [distance, (head % b.period)[:, None]]
        if b.changed.any():
            alone = b.changed[members].any(axis=1)
            lots.append(np.where(alone, np.arange(1, len(members) + 1), 0)[:, None])
        if b.spec.accelerator_type_of is not None:
            lots.append(b.spec.accelerator_type_of[members])
        lot_of, lot = equal_rows(lots)
        some = members[lot]
        numbers: list[Callable[[IntArray], IntArray]] = [
            lambda m: m,
            lambda m: b.node_of[m],
        ]
        if b.spec.network.kind != "none":
            numbers += [
                lambda m: b.nic_of[m],
                lambda m: b.leaf_of_nic[b.nic_of[m]],
                lambda m: b.pod_of_leaf[b.leaf_of_nic[b.nic_of[m]]],
            ]
        same = [number(some) - number(some[:, :1]) for number in numbers]
        if b.template_links:
            same.append(b.position_of[some])
        same += [rest[lot] for rest in lots[2:]]
        class_of_lot, first_lot = equal_rows(same)
        class_of, first = class_of_lot[lot_of], lot[first_lot]
        # what is inside domains shifts by all links of one
        factors = [1, b.template_links, 1, 1, 1]
        origin = first[class_of]
        shift = np.empty((len(numbers), len(head)), dtype=np.int32)
        for by, number, factor in zip(shift, numbers, factors, strict=False):
            at = number(head)
            by[:] = (at - at[origin]) * factor
        return Congruence(class_of, first, shift, b.shifted_by)

    def all_pairs(self, members: IntArray) -> tuple[IntArray, IntArray, FloatArray] | None:
        """Load of a byte from every member of a group to every other, by counting.

        Parameters
        ----------
        members:
            int array [G, n] of accelerator indices.

        Returns
        -------
        (group, link, bytes), entries unordered; None where the loads have to be found pair by
        pair (faults that change routes, hashed paths, meshes).
        """
        b = self.b
        G, n = members.shape
        plain = (
            b.isolated is None and b.relay is None and not b.failed_spines and b.lanes == 1
            and b.spec.domain.kind in ("switch", "pcie", "torus") and not b.special_domains
        )  # fmt: skip
        if not plain:
            return None
        m = members.ravel()
        group = np.repeat(np.arange(G), n)
        domain = b.node_of[m]
        local = _same(group * b.domains + domain) - 1
        parts: list[tuple[IntArray, IntArray, FloatArray]] = []

        def add(where: np.ndarray, link: IntArray, amount: np.ndarray) -> None:
            parts.append((group[where], link[where], amount[where].astype(np.float64)))

        inside = local > 0
        if inside.any() and b.spec.domain.kind == "torus":
            if not (local == local[0]).all():
                return None
            boxes = self._torus_all_pairs(members.reshape(-1, int(local[0]) + 1))
            if boxes is None:
                return None
            row, link, amount = boxes
            parts.append((row // (n // (int(local[0]) + 1)), link, amount))
        elif inside.any():
            switch = b.spec.domain.kind == "switch"
            add(inside, (b.up if switch else b.to_host) + m, local)
            add(inside, (b.down if switch else b.from_host) + m, local)
        remote = n - 1 - local
        outside = remote > 0
        if outside.any():
            if b.spec.network.kind == "none":
                return None
            nic = b.nic_of[m]
            leaf = b.leaf_of_nic[nic]
            pod = b.pod_of_leaf[leaf]
            for link in (b.to_nic + m, b.from_nic + m, b.nic_out + nic, b.nic_in + nic):
                add(outside, link, remote)
            for unit, count, links in (
                (leaf, b.leaves, (b.leaf_up, b.leaf_down)),
                (pod, b.pods, (b.pod_up, b.pod_down)),
            ):
                if count < 2:
                    continue
                # Remote members behind another leaf (pod): all that are, less those of my domain.
                here = _same(group * count + unit)
                near = _same((group * b.domains + domain) * count + unit)
                away = n - here - (local + 1 - near)
                for first in links:
                    add(away > 0, first + unit, away)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _torus_all_pairs(self, members: IntArray) -> tuple[IntArray, IntArray, FloatArray] | None:
        """All pairs of each row [rows, g] of members of one slice, where they form equal boxes.

        In dimension order a pair moves along an axis with the earlier axes already at the target's
        coordinates and the later ones still at the source's. So each of the box's lines along an
        axis with L coordinates in use carries g / L times what all pairs of one line would.
        """
        b = self.b
        torus = b.torus
        assert torus is not None
        g = members.shape[1]
        position = np.sort(b.position_of[members], axis=1)
        domain = b.node_of[members]
        if not (domain == domain[:, :1]).all():
            return None
        coordinate = torus.coordinates[:, position]  # [axes, rows, g]
        used = [np.unique(coordinate[axis, 0]) for axis in range(len(torus.shape))]
        # Every row is the first one's box, moved.
        moved = coordinate - coordinate[:, :, :1]
        if int(np.prod([len(u) for u in used])) != g or not (moved == moved[:, :1]).all():
            return None
        base = b.mesh + domain[:, 0] * b.template_links
        parts: list[tuple[IntArray, IntArray, FloatArray]] = []
        for axis, values in enumerate(used):
            length = torus.shape[axis]
            if len(values) < 2:
                continue
            line = Torus((length,), (torus.wrap[axis],))
            start = coordinate[axis, :, 0]
            for shift in np.unique(start - start[0]).tolist():
                # Rows whose box starts at the same coordinate of this axis.
                mine = np.flatnonzero(start - start[0] == shift)
                at = values + shift
                x, y = (grid.ravel() for grid in np.meshgrid(at, at, indexing="ij"))
                load = np.zeros(2 * length)
                for _, hop, share in line.parts(np.arange(len(x)), x, y):
                    np.add.at(load, line.keys[hop], share)
                # The members at the first coordinate stand for the box's lines along the axis.
                first = coordinate[axis, mine[0]] == start[mine[0]]
                origin = position[mine][:, first] - start[mine[0]] * torus.stride[axis]
                for key in np.flatnonzero(load).tolist():
                    here, sign = divmod(key, 2)
                    number = torus.number[origin + here * torus.stride[axis], 2 * axis + sign]
                    link = base[mine][:, None] + number
                    parts.append(
                        (
                            np.repeat(mine, link.shape[1]),
                            link.ravel(),
                            np.full(link.size, load[key] * g / len(values)),
                        )
                    )
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _inside(
        self, pair: IntArray, source: IntArray, target: IntArray, parts: list[Part]
    ) -> None:
        b = self.b
        if not len(pair):
            return
        kind = b.spec.domain.kind
        if kind == "switch":
            parts.append((pair, b.up + source, 1.0))
            parts.append((pair, b.down + target, 1.0))
        elif kind == "pcie":
            parts.append((pair, b.to_host + source, 1.0))
            parts.append((pair, b.from_host + target, 1.0))
        elif kind in ("mesh", "torus"):
            domain = b.node_of[source]
            base = b.mesh + domain * b.template_links
            x, y = b.position_of[source], b.position_of[target]
            special = b.special_domains
            odd = np.isin(domain, np.array(sorted(special), dtype=np.int64)) if special else None
            regular = np.arange(len(pair)) if odd is None else np.flatnonzero(~odd)
            if kind == "mesh":
                assert b.template is not None
                out, link, share = b.template.parts(regular, x[regular], y[regular])
                parts.append((pair[out], base[out] + link, share))
            else:
                assert b.torus is not None
                for which, hop, part in b.torus.parts(regular, x[regular], y[regular]):
                    parts.append((pair[which], base[which] + hop, part))
            if odd is not None:
                for number in sorted(special):
                    mine = np.flatnonzero(domain == number)
                    if len(mine):
                        out, link, share = special[number].parts(mine, x[mine], y[mine])
                        parts.append((pair[out], base[out] + link, share))
        else:
            self._outside(pair, source, target, parts)

    def _outside(
        self, pair: IntArray, source: IntArray, target: IntArray, parts: list[Part]
    ) -> None:
        b = self.b
        net = b.spec.network
        if net.kind == "none":
            host = b.host_of[source] == b.host_of[target]
            if host.all() and b.spec.host_bandwidth:
                parts.append((pair, b.to_host + source, 1.0))
                parts.append((pair, b.from_host + target, 1.0))
                return
            bad = int(np.flatnonzero(~host)[0])
            raise InputError(
                f"there is no route from {b.names[int(source[bad])]!r} to "
                f"{b.names[int(target[bad])]!r}: the cluster has no network between its domains",
                place=b.spec.place,
            )
        exit_, entry = source, target
        if b.relay is not None:
            # An accelerator whose own NIC has failed borrows that of a peer in its domain.
            exit_, entry = b.relay[source], b.relay[target]
            for going, x, y in ((exit_ != source, source, exit_),):
                self._inside(pair[going], x[going], y[going], parts)
        nic_a, nic_b = b.nic_of[exit_], b.nic_of[entry]
        parts.append((pair, b.to_nic + exit_, 1.0))
        wired = nic_a != nic_b
        w_pair, w_a, w_b = pair[wired], nic_a[wired], nic_b[wired]
        parts.append((w_pair, b.nic_out + w_a, 1.0))
        leaf_a, leaf_b = b.leaf_of_nic[w_a], b.leaf_of_nic[w_b]
        far = leaf_a != leaf_b
        if far.any():
            f_pair, l_a, l_b = w_pair[far], leaf_a[far], leaf_b[far]
            lane = self._lane(w_a[far], w_b[far], l_a, l_b)
            weight: Any = b.trunk_weight(l_a, l_b)
            parts.append((f_pair, b.leaf_up + l_a * b.lanes + lane, weight))
            pod_a, pod_b = b.pod_of_leaf[l_a], b.pod_of_leaf[l_b]
            apart = pod_a != pod_b
            if apart.any():
                parts.append((f_pair[apart], b.pod_up + pod_a[apart] * b.lanes + lane[apart], 1.0))
                parts.append(
                    (f_pair[apart], b.pod_down + pod_b[apart] * b.lanes + lane[apart], 1.0)
                )
            parts.append((f_pair, b.leaf_down + l_b * b.lanes + lane, weight))
        parts.append((w_pair, b.nic_in + w_b, 1.0))
        parts.append((pair, b.from_nic + entry, 1.0))
        if b.relay is not None:
            going = entry != target
            self._inside(pair[going], entry[going], target[going], parts)

    def _lane(
        self, nic_a: IntArray, nic_b: IntArray, leaf_a: IntArray, leaf_b: IntArray
    ) -> IntArray:
        """Spine that a pair's flow hashes to (0 where trunks are one link)."""
        b = self.b
        if b.lanes == 1:
            return np.zeros(len(nic_a), dtype=np.int64)
        # SplitMix64's finaliser over the pair: deterministic, well mixed.
        with np.errstate(over="ignore"):
            z = nic_a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z += nic_b.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
        lane = (z % np.uint64(b.lanes)).astype(np.int64)
        if b.failed_lanes:
            # Few pairs meet a failed trunk link: they take the next spine that both leaves reach.
            for i in range(len(lane)):
                dead = b.failed_lanes.get(int(leaf_a[i]), frozenset()) | b.failed_lanes.get(
                    int(leaf_b[i]), frozenset()
                )
                while int(lane[i]) in dead:
                    lane[i] = (lane[i] + 1) % b.lanes
        return lane


class _Build:
    """Index arithmetic of one regular cluster: link blocks, names, faults, graph."""

    def __init__(self, spec: FabricSpec) -> None:
        self.spec = spec
        domain, net = spec.domain, spec.network
        total = spec.accelerators
        check_size(total)
        per_domain = spec.used_per_domain or domain.size
        self.per_domain = per_domain
        per_host = min(spec.per_host, per_domain)
        self.per_host = per_host
        index = np.arange(total)
        self.node_of = index // per_domain
        self.position_of = index % per_domain
        self.domains = int(self.node_of[-1]) + 1
        self.hosts_per_domain = -(-per_domain // per_host)
        self.host_of = self.node_of * self.hosts_per_domain + self.position_of // per_host
        self.hosts = int(self.host_of[-1]) + 1
        self.local_of = self.position_of % per_host
        self.torus = Torus(domain.shape, domain.wrap) if domain.kind == "torus" else None
        self.template: TemplateRouter | None = None
        self.special_domains: dict[int, TemplateRouter] = {}
        self.isolated: np.ndarray | None = None
        self.relay: IntArray | None = None
        self.failed_lanes: dict[int, frozenset[int]] = {}
        self.failed_spines: dict[int, frozenset[int]] = {}

        self._set_names()
        blocks = _Blocks()
        self.blocks = blocks
        names = self.names
        self.up = self.down = self.mesh = 0
        self.template_ends: list[tuple[int, int]] = []
        if domain.kind == "switch":
            self.up = blocks.add(
                total, domain.bandwidth, domain.latency, domain.link_kind,
                lambda i: (names[i], self.switch_name(int(self.node_of[i]))),
            )  # fmt: skip
            self.down = blocks.add(
                total, domain.bandwidth, domain.latency, domain.link_kind,
                lambda i: (self.switch_name(int(self.node_of[i])), names[i]),
            )  # fmt: skip
        elif domain.kind in ("mesh", "torus"):
            if self.torus is not None:
                self.template_ends = self.torus.links
                rates = np.full(len(self.template_ends), domain.bandwidth)
            else:
                self.template_ends = [end for i, j, _ in domain.links for end in ((i, j), (j, i))]
                rates = np.repeat([rate for _, _, rate in domain.links], 2).astype(np.float64)
                self.template = TemplateRouter(domain.size, self.template_ends, frozenset())
            self.mesh = blocks.add(
                self.domains * len(self.template_ends), np.tile(rates, self.domains),
                domain.latency, domain.link_kind, self._mesh_name,
            )  # fmt: skip
        self.template_links = len(self.template_ends)
        self.to_host = self.from_host = -1
        if spec.host_bandwidth:
            host = (spec.host_bandwidth, spec.host_latency, spec.host_link_kind)
            self.to_host = blocks.add(total, *host, lambda i: (names[i], self.host_side_name(i)))
            self.from_host = blocks.add(total, *host, lambda i: (self.host_side_name(i), names[i]))

        self.nic_of = np.full(total, -1, dtype=np.int64)
        self.leaf_of_nic = np.zeros(0, dtype=np.int64)
        self.pod_of_leaf = np.zeros(0, dtype=np.int64)
        self.lanes = self.spines = 1
        self.leaves = self.pods = self.nics = 0
        self.to_nic = self.from_nic = self.nic_out = self.nic_in = -1
        self.leaf_up = self.leaf_down = self.pod_up = self.pod_down = -1
        if net.kind != "none":
            self._network()
        per_switch = spec.per_host_switch
        self.host_switches = -(-per_host // per_switch)
        self.host_switch_of = self.host_of * self.host_switches + self.local_of // per_switch
        self.switch_up = self.switch_down = -1
        if spec.host_bandwidth and per_switch > 1:
            count = self.hosts * self.host_switches
            ends = self.host_switch_ends
            self.switch_up = blocks.add(count, *host, ends)
            self.switch_down = blocks.add(count, *host, lambda i: ends(i)[::-1])
        self.link_capacity = np.concatenate(blocks.capacity) if blocks.capacity else np.zeros(0)
        self.link_latency = np.concatenate(blocks.latency) if blocks.latency else np.zeros(0)
        self.link_kind = np.concatenate(blocks.kind) if blocks.kind else np.zeros(0, dtype=np.int8)
        self.slowdown = np.ones(total)
        self.memory_share = np.ones(total)
        self._faults()

    # ------------------------------------------------------------------ names

    def _set_names(self) -> None:
        kind = self.spec.accelerator_kind
        prefix = "slice" if self.spec.domain.kind == "torus" else "node"
        self.prefix = prefix
        local = [f"/{kind}{i}" for i in range(self.per_domain)]
        names: list[str] = []
        for d in range(self.domains):
            head = f"{prefix}{d}"
            names.extend([head + tail for tail in local])
        self.names = names[: self.spec.accelerators]

    def memory_name(self, accelerator: int) -> str:
        """Node of an accelerator's HBM."""
        return self.names[accelerator].replace(f"/{self.spec.accelerator_kind}", "/hbm")

    def switch_name(self, domain: int) -> str:
        return f"{self.prefix}{domain}/nvswitch"

    def host_name(self, host: int) -> str:
        domain, local = divmod(host, self.hosts_per_domain)
        return f"{self.prefix}{domain}/host" + (str(local) if self.hosts_per_domain > 1 else "")

    def host_side_name(self, accelerator: int) -> str:
        """What an accelerator's host link leads to: the host, or the PCIe switch before it."""
        if self.spec.per_host_switch > 1:
            return self.host_switch_ends(int(self.host_switch_of[accelerator]))[0]
        return self.host_name(int(self.host_of[accelerator]))

    def host_switch_ends(self, switch: int) -> tuple[str, str]:
        """Names of a PCIe switch and of its host."""
        host, local = divmod(switch, self.host_switches)
        domain, tray = divmod(host, self.hosts_per_domain)
        name = f"{self.prefix}{domain}/pcie{tray * self.host_switches + local}"
        return name, self.host_name(host)

    def nic_name(self, nic: int) -> str:
        host, local = divmod(nic, self.spec.network.nics)
        domain, tray = divmod(host, self.hosts_per_domain)
        return f"{self.prefix}{domain}/nic{tray * self.spec.network.nics + local}"

    def spine_name(self, pod: int, spine: int) -> str:
        return f"pod{pod}/spine{spine}" if self.pods > 1 else f"spine{spine}"

    def _mesh_name(self, i: int) -> tuple[str, str]:
        domain, link = divmod(i, self.template_links)
        a, b = self.template_ends[link]
        base = domain * self.per_domain
        return self.names[base + a], self.names[base + b]

    # ------------------------------------------------------------------ network

    def _network(self) -> None:
        spec, net, blocks, names = self.spec, self.spec.network, self.blocks, self.names
        total = spec.accelerators
        self.nics = self.hosts * net.nics
        # Accelerators share the host's NICs in order: 8 with 4 NICs, two each; with more NICs than
        # accelerators the file states the bundle of each as one NIC.
        self.nic_of = self.host_of * net.nics + self.local_of * net.nics // self.per_host
        nic = np.arange(self.nics)
        host, rail = nic // net.nics, nic % net.nics
        group = host // net.hosts_per_leaf
        if net.kind == "rail":
            self.leaf_of_nic = group * net.nics + rail
            down = net.hosts_per_leaf * net.bandwidth
        else:
            self.leaf_of_nic = group
            down = net.hosts_per_leaf * net.nics * net.bandwidth
        self.leaves = int(self.leaf_of_nic.max()) + 1
        per_group = net.nics if net.kind == "rail" else 1
        hosts_per_pod = net.hosts_per_pod or (net.hosts_per_leaf * (self.leaves + 1))
        groups_per_pod = max(1, hosts_per_pod // net.hosts_per_leaf)
        self.pod_of_leaf = np.arange(self.leaves) // per_group // groups_per_pod
        self.pods = int(self.pod_of_leaf.max()) + 1
        self.uplink = down / net.oversubscription
        self.spines = net.spines or max(1, min(64, round(self.uplink / net.bandwidth)))
        self.lanes = self.spines if net.ecmp == "hash" else 1
        # More than one path means more than one leaf.
        lanes = self.lanes
        pcie = (spec.host_bandwidth or net.bandwidth, spec.host_latency, spec.host_link_kind)
        # A bundle of NICs behind one accelerator has PCIe of its own for each.
        pcie = (max(pcie[0], net.bandwidth), pcie[1], pcie[2] if pcie[2] == "PCIe" else "PCIe")
        self.to_nic = blocks.add(
            total, *pcie, lambda i: (names[i], self.nic_name(int(self.nic_of[i])))
        )
        self.from_nic = blocks.add(
            total, *pcie, lambda i: (self.nic_name(int(self.nic_of[i])), names[i])
        )
        line = (net.bandwidth, net.latency, net.link_kind)
        self.nic_out = blocks.add(
            self.nics, *line, lambda i: (self.nic_name(i), f"leaf{int(self.leaf_of_nic[i])}")
        )
        self.nic_in = blocks.add(
            self.nics, *line, lambda i: (f"leaf{int(self.leaf_of_nic[i])}", self.nic_name(i))
        )
        trunk = (self.uplink / lanes, net.latency, net.link_kind)

        def spine_of(i: int) -> tuple[str, str]:
            leaf, lane = divmod(i, lanes)
            pod = int(self.pod_of_leaf[leaf])
            return f"leaf{leaf}", self.spine_name(pod, lane) if lanes > 1 else self._spines(pod)

        self.leaf_up = blocks.add(self.leaves * lanes, *trunk, spine_of)
        self.leaf_down = blocks.add(self.leaves * lanes, *trunk, lambda i: spine_of(i)[::-1])
        if self.pods > 1:
            rate = self.uplink * per_group * groups_per_pod / net.pod_oversubscription

            def core_of(i: int) -> tuple[str, str]:
                pod, lane = divmod(i, lanes)
                return (
                    (self.spine_name(pod, lane), f"core{lane}")
                    if lanes > 1
                    else (self._spines(pod), "core*")
                )

            core = (rate / lanes, net.latency, net.link_kind)
            self.pod_up = blocks.add(self.pods * lanes, *core, core_of)
            self.pod_down = blocks.add(self.pods * lanes, *core, lambda i: core_of(i)[::-1])
            self.core_rate = rate

    def _spines(self, pod: int) -> str:
        return self.spine_name(pod, 0)[:-1] + "*"

    def trunk_weight(self, leaf_a: IntArray, leaf_b: IntArray) -> np.ndarray | float:
        """Load of a byte on a trunk, relative to spreading over all spines.

        A failed leaf-spine link takes its spine out for every pair with that leaf: the same bytes
        on fewer members load each of them more.
        """
        if not self.failed_spines:
            return 1.0
        weight = np.ones(len(leaf_a))
        odd = np.isin(leaf_a, list(self.failed_spines)) | np.isin(leaf_b, list(self.failed_spines))
        none: frozenset[int] = frozenset()
        for i in np.flatnonzero(odd).tolist():
            lost = self.failed_spines.get(int(leaf_a[i]), none) | self.failed_spines.get(
                int(leaf_b[i]), none
            )
            weight[i] = self.spines / (self.spines - len(lost))
        return weight

    # ------------------------------------------------------------------ congruence

    def shifted_by(self, link: IntArray) -> NDArray[np.int8]:
        """What the numbers of links go with: 0 accelerators, 1 domains, 2 NICs, 3 leaves, 4 pods.

        The order of `FabricRouter.congruence`.
        """
        unit = {
            self.mesh: 1, self.nic_out: 2, self.nic_in: 2, self.leaf_up: 3, self.leaf_down: 3,
            self.pod_up: 4, self.pod_down: 4,
        }  # fmt: skip
        if not self.template_links:
            del unit[self.mesh]
        starts = [start for start, _ in self.blocks.ranges]
        units = np.array([unit.get(start, 0) for start in starts], dtype=np.int8)
        return units[np.searchsorted(starts, link, side="right") - 1]

    @cached_property
    def period(self) -> int:
        """Accelerators after which the fabric repeats: domains, and whole leaf groups or pods."""
        hosts = 1
        if self.leaves > 1:
            net = self.spec.network
            hosts = net.hosts_per_leaf
            if self.pods > 1:
                hosts *= max(1, net.hosts_per_pod // net.hosts_per_leaf)
        return self.per_domain * math.lcm(hosts, self.hosts_per_domain) // self.hosts_per_domain

    @cached_property
    def changed(self) -> NDArray[np.bool_]:
        """Accelerators with routes that are not those of a cluster without faults."""
        changed = np.isin(self.node_of, list(self.special_domains))
        if self.isolated is not None:
            changed |= self.isolated
        if self.relay is not None:
            changed |= self.relay != np.arange(len(self.relay))
        if self.failed_spines:
            changed |= np.isin(self.leaf_of_nic[self.nic_of], list(self.failed_spines))
        return changed

    @cached_property
    def trunk_of(self) -> IntArray:
        """Per link the one that its traffic goes on to, or has come from, if it goes further.

        The link of a NIC for an accelerator's link to that NIC, then the leaf's uplinks, then the
        pod's, and likewise inwards; -1 where there is no such link, or several.
        """
        trunk = np.full(self.blocks.total, -1, dtype=np.int64)
        if self.spec.network.kind == "none":
            return trunk
        for to_nic, nic, leaf, pod in (
            (self.to_nic, self.nic_out, self.leaf_up, self.pod_up),
            (self.from_nic, self.nic_in, self.leaf_down, self.pod_down),
        ):
            trunk[to_nic : to_nic + len(self.nic_of)] = nic + self.nic_of
            if self.lanes == 1:
                trunk[nic : nic + self.nics] = leaf + self.leaf_of_nic
                if self.pods > 1:
                    trunk[leaf : leaf + self.leaves] = pod + self.pod_of_leaf
        return trunk

    # ------------------------------------------------------------------ faults

    def find_links(self, a: str, b: str) -> list[int]:
        """Directed links between two named nodes, both ways; [] where there is none."""
        found = [self._find_link(x, y) for x, y in ((a, b), (b, a))]
        return [link for link in found if link is not None]

    @property
    def position(self) -> dict[str, int]:
        if not hasattr(self, "_position"):
            self._position = {name: i for i, name in enumerate(self.names)}
        return self._position

    def _find_link(self, a: str, b: str) -> int | None:
        position = self.position
        x, y = position.get(a), position.get(b)
        if x is not None and y is not None:
            if self.node_of[x] != self.node_of[y]:
                return None
            ends = (int(self.position_of[x]), int(self.position_of[y]))
            if ends not in self.template_ends:
                return None
            return (
                self.mesh
                + int(self.node_of[x]) * self.template_links
                + self.template_ends.index(ends)
            )
        candidates: list[int] = []
        if x is not None:
            candidates = [self.up + x, self.to_host + x, self.to_nic + x]
        elif y is not None:
            candidates = [self.down + y, self.from_host + y, self.from_nic + y]
        else:
            nic = _trailing(a, "nic"), _trailing(b, "nic")
            pcie = _trailing(a, "pcie"), _trailing(b, "pcie")
            if self.switch_up >= 0 and (pcie[0] is not None or pcie[1] is not None):
                for i in range(self.hosts * self.host_switches):
                    if self.host_switch_ends(i)[0] in (a, b):
                        candidates = [self.switch_up + i, self.switch_down + i]
                        break
            elif nic[0] is not None or nic[1] is not None:
                for i in range(self.nics):
                    if self.nic_name(i) in (a, b):
                        candidates = [self.nic_out + i, self.nic_in + i]
                        break
            elif self.lanes > 1 and self.leaves:
                leaf = _trailing(a, "leaf"), _trailing(b, "leaf")
                which, other = (leaf[0], b) if leaf[0] is not None else (leaf[1], a)
                spine = _trailing(other.rsplit("/", 1)[-1], "spine")
                if (
                    which is not None
                    and spine is not None
                    and which < self.leaves
                    and spine < self.lanes
                ):
                    offset = which * self.lanes + spine
                    candidates = [self.leaf_up + offset, self.leaf_down + offset]
        for link in candidates:
            if 0 <= link < self.blocks.total and self.blocks.name(link) == (a, b):
                return link
        return None

    def _faults(self) -> None:
        errors: list[InputError] = []
        failed: list[int] = []
        for number, fault in enumerate(self.spec.faults):
            here = f"{self.spec.place}: faults[{number}]"
            try:
                if "gpu" in fault:
                    i = accelerator_index(fault["gpu"], self.position, len(self.names), here)
                    self.slowdown[i] *= float(fault.get("slowdown", 1.0))
                    continue
                a, b = (self._node(end) for end in fault["link"])
                trunk = self._trunk(a, b)
                if trunk is not None:
                    self._trunk_fault(*trunk, fault, here)
                    continue
                memory = self._memory(a, b)
                if memory is not None:
                    if fault.get("failed"):
                        raise memory_cannot_fail(a, b, here)
                    self.memory_share[memory] *= float(fault.get("bandwidth_factor", 1.0))
                    continue
                links = self.find_links(a, b)
                if not links:
                    raise no_such_link(a, b, self.graph(), here)
                if fault.get("failed"):
                    failed.extend(links)
                else:
                    self.link_capacity[links] *= float(fault.get("bandwidth_factor", 1.0))
            except InputError as error:
                errors.append(error)
        raise_all(errors)
        if failed:
            self._reroute(failed)

    def _node(self, end: Any) -> str:
        if isinstance(end, int) and not isinstance(end, bool) and 0 <= end < len(self.names):
            return self.names[end]
        return str(end)

    def _memory(self, a: str, b: str) -> int | None:
        """Index of the accelerator if the link is the one to its own HBM."""
        for x, y in ((a, b), (b, a)):
            i = self.position.get(x)
            if i is not None and self.memory_name(i) == y:
                return i
        return None

    def _trunk(self, a: str, b: str) -> tuple[int, int] | None:
        """(leaf, spine) if the link is a member of an aggregated trunk."""
        if self.lanes > 1 or not self.leaves:
            return None
        for x, y in ((a, b), (b, a)):
            leaf = _trailing(x, "leaf")
            spine = _trailing(y.rsplit("/", 1)[-1], "spine")
            if leaf is None or spine is None or leaf >= self.leaves or spine >= self.spines:
                continue
            if self.spine_name(int(self.pod_of_leaf[leaf]), spine) == y:
                return leaf, spine
        return None

    def _trunk_fault(self, leaf: int, spine: int, fault: Mapping[str, Any], place: str) -> None:
        if fault.get("failed"):
            lost = self.failed_spines.get(leaf, frozenset()) | {spine}
            if len(lost) >= self.spines:
                raise InputError(f"leaf{leaf} has lost all its uplinks: no other way", place=place)
            self.failed_spines[leaf] = frozenset(lost)
            return
        # Equal spreading waits for the slowest member, whatever the others could do.
        factor = float(fault.get("bandwidth_factor", 1.0))
        nominal = self.uplink
        for link in (self.leaf_up + leaf, self.leaf_down + leaf):
            self.link_capacity[link] = min(self.link_capacity[link], nominal * factor)

    def _reroute(self, failed: list[int]) -> None:
        """Find another way around failed links, or say that there is none."""
        total = self.spec.accelerators
        place = self.spec.place
        isolated = np.zeros(total, dtype=bool)
        no_nic = np.zeros(total, dtype=bool)
        mesh_failed: dict[int, set[int]] = {}
        for link in failed:
            if self.spec.domain.kind == "switch" and link < self.down + total:
                isolated[link % total if link < self.down else link - self.down] = True
            elif (
                self.template_links
                and self.mesh <= link < self.mesh + self.domains * self.template_links
            ):
                domain, local = divmod(link - self.mesh, self.template_links)
                mesh_failed.setdefault(domain, set()).add(local)
            elif self.to_nic >= 0 and self.to_nic <= link < self.from_nic + total:
                no_nic[(link - self.to_nic) % total] = True
            elif self.nics and self.nic_out <= link < self.nic_in + self.nics:
                no_nic |= self.nic_of == (link - self.nic_out) % self.nics
            elif (
                self.lanes > 1 and self.leaf_up <= link < self.leaf_down + self.leaves * self.lanes
            ):
                leaf, lane = divmod((link - self.leaf_up) % (self.leaves * self.lanes), self.lanes)
                lost = self.failed_lanes.get(leaf, frozenset()) | {lane}
                if len(lost) >= self.lanes:
                    raise InputError(
                        f"leaf{leaf} has lost all its uplinks: no other way", place=place
                    )
                self.failed_lanes[leaf] = frozenset(lost)
            else:
                a, b = self.blocks.name(link)
                raise InputError(
                    f"link {a} - {b} has failed and there is no other way", place=place
                )
        for domain, lost_links in sorted(mesh_failed.items()):
            router = TemplateRouter(
                self.spec.domain.size, self.template_ends, frozenset(lost_links)
            )
            if not router.reachable:
                raise InputError(
                    f"failed links cut {self.prefix}{domain} apart: there is no other way",
                    place=place,
                )
            self.special_domains[domain] = router
        if isolated.any():
            alone = np.flatnonzero(isolated)
            if self.spec.network.kind == "none" and not self.spec.host_bandwidth:
                raise InputError(
                    f"{self.names[int(alone[0])]} has lost its only link: no other way", place=place
                )
            if (isolated & no_nic).any():
                lost_one = int(np.flatnonzero(isolated & no_nic)[0])
                raise InputError(
                    f"{self.names[lost_one]} has lost its scale-up link and its NIC: no other way",
                    place=place,
                )
            self.isolated = isolated
        if no_nic.any():
            relay = np.arange(total)
            for i in np.flatnonzero(no_nic).tolist():
                peers = np.flatnonzero((self.node_of == self.node_of[i]) & ~no_nic & ~isolated)
                if not len(peers) or self.spec.domain.kind == "none":
                    raise InputError(
                        f"{self.names[i]} has lost its NIC and no peer in its domain has another",
                        place=place,
                    )
                near = np.argsort(np.abs(peers - i), kind="stable")
                relay[i] = peers[near[0]]
            self.relay = relay

    # ------------------------------------------------------------------ graph

    def graph(self) -> nx.Graph:
        """The networkx graph; attributes of like nodes and edges are equal, added in bulk."""
        graph = nx.Graph(name=self.spec.name, fabric=self.spec.network.fabric)
        with paused_collector():
            self._fill(graph)
            # all of it is old from now on, and not gone through when what comes next is young
            gc.collect()
        return graph

    def _fill(self, graph: nx.Graph) -> None:
        spec, net, domain = self.spec, self.spec.network, self.spec.domain
        names = self.names
        kind = spec.accelerator_kind
        types = spec.accelerator_type_names
        type_of = spec.accelerator_type_of
        bulk = _Bulk(graph)
        if type_of is None:
            bulk.nodes(names, type=kind, accelerator=types[0])
        else:
            for t, type_name in enumerate(types):
                mine = [names[i] for i in np.flatnonzero(type_of == t).tolist()]
                bulk.nodes(mine, type=kind, accelerator=type_name)
        hbm = [self.memory_name(i) for i in range(len(names))]
        bulk.nodes(hbm, type="hbm")
        rate = {"bandwidth": spec.memory_bandwidth} if spec.memory_bandwidth else {}
        bulk.edges(names, hbm, link="HBM", latency=0.0, **rate)

        def add(
            tails: list[str], heads: list[str], start: int, link_kind: str, latency: float
        ) -> None:
            """Edges in bulk; those whose rate differs (faults, mixed types) get their own."""
            capacity = self.link_capacity[start : start + len(tails)]
            common = float(np.median(capacity))
            bulk.edges(tails, heads, link=link_kind, bandwidth=common, latency=latency)
            for i in np.flatnonzero(capacity != common).tolist():
                rate = float(capacity[i])
                one = [tails[i]], [heads[i]]
                bulk.edges(*one, link=link_kind, bandwidth=rate, latency=latency)

        if domain.kind == "switch":
            switches = [self.switch_name(d) for d in range(self.domains)]
            bulk.nodes(switches, type="nvswitch", count=domain.switches)
            heads = [switches[d] for d in self.node_of.tolist()]
            add(names, heads, self.up, domain.link_kind, domain.latency)
        elif self.template_links:
            ends = self.template_ends
            once = [i for i, (a, b) in enumerate(ends) if a < b]
            base = np.arange(self.domains)[:, None] * self.per_domain
            tails_at = (base + np.array([ends[i][0] for i in once])).ravel()
            heads_at = (base + np.array([ends[i][1] for i in once])).ravel()
            number = np.arange(self.domains)[:, None] * len(ends) + np.array(once)
            rates = self.link_capacity[self.mesh + number].ravel()
            real = np.maximum(tails_at, heads_at) < len(names)
            for value in np.unique(rates).tolist():
                which = np.flatnonzero((rates == value) & real)
                bulk.edges(
                    [names[i] for i in tails_at[which].tolist()],
                    [names[i] for i in heads_at[which].tolist()],
                    link=domain.link_kind, bandwidth=value, latency=domain.latency,
                )  # fmt: skip
        hosts = [self.host_name(h) for h in range(self.hosts)]
        bulk.nodes(hosts, type="host")
        if spec.host_bandwidth:
            heads = [self.host_side_name(i) for i in range(len(names))]
            if self.switch_up >= 0:
                count = self.hosts * self.host_switches
                inner, outer = zip(*map(self.host_switch_ends, range(count)), strict=True)
                bulk.nodes(list(inner), type="switch")
                wire = (self.switch_up, spec.host_link_kind, spec.host_latency)
                add(list(inner), list(outer), *wire)
            add(names, heads, self.to_host, spec.host_link_kind, spec.host_latency)
        if net.kind != "none":
            nics = [self.nic_name(n) for n in range(self.nics)]
            bulk.nodes(nics, type="nic")
            heads = [nics[n] for n in self.nic_of.tolist()]
            add(names, heads, self.to_nic, "PCIe", spec.host_latency)
            leaves = [f"leaf{leaf}" for leaf in range(self.leaves)]
            bulk.nodes(leaves, type="leaf")
            heads = [leaves[leaf] for leaf in self.leaf_of_nic.tolist()]
            add(nics, heads, self.nic_out, net.link_kind, net.latency)
            if self.leaves > 1:
                self._fill_spines(bulk, leaves)
        for fault in spec.faults:
            if "link" not in fault:
                continue
            one, other = (self._node(end) for end in fault["link"])
            if graph.has_edge(one, other):
                if fault.get("failed"):
                    graph.remove_edge(one, other)
                elif self._trunk(one, other) or self._memory(one, other) is not None:
                    data = dict(graph.edges[one, other])
                    if "bandwidth" in data:
                        data["bandwidth"] *= float(fault.get("bandwidth_factor", 1.0))
                    bulk.edges([one], [other], **data)

    def _fill_spines(self, bulk: _Bulk, leaves: list[str]) -> None:
        net = self.spec.network
        spines = [[self.spine_name(pod, s) for s in range(self.spines)] for pod in range(self.pods)]
        for row in spines:
            bulk.nodes(row, type="spine")
        wire = {"link": net.link_kind, "latency": net.latency}
        tails = [leaf for leaf in leaves for _ in range(self.spines)]
        heads = [s for pod in self.pod_of_leaf.tolist() for s in spines[pod]]
        bulk.edges(tails, heads, bandwidth=self.uplink / self.spines, **wire)
        if self.pods > 1:
            cores = [f"core{s}" for s in range(self.spines)]
            bulk.nodes(cores, type="core")
            tails = [s for row in spines for s in row]
            bulk.edges(tails, cores * self.pods, bandwidth=self.core_rate / self.spines, **wire)


class SharedAttributes(dict[str, Any]):
    """Attributes that many like nodes or edges share, which therefore cannot be changed in place.

    `graph.copy()` gives every node and edge its own ordinary dict.
    """

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError("attributes of a cluster's graph are shared: change a graph.copy()")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = _refuse

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: object) -> dict[str, Any]:
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _Bulk:
    """Adds many like nodes and edges to a networkx graph, all with one attribute object.

    It fills the graph's adjacency dicts itself: add_edges_from makes a dict per edge, which at a
    million edges takes most of the time and memory of building the cluster.
    """

    def __init__(self, graph: nx.Graph) -> None:
        self.graph = graph

    def nodes(self, names: list[str], **attributes: Any) -> None:
        self.graph._node.update(dict.fromkeys(names, SharedAttributes(attributes)))
        self.graph._adj.update((name, {}) for name in names)

    def edges(self, tails: list[str], heads: list[str], **attributes: Any) -> None:
        shared = SharedAttributes(attributes)
        adjacency = self.graph._adj
        for tail, head in zip(tails, heads, strict=True):
            adjacency[tail][head] = shared
            adjacency[head][tail] = shared


def _same(key: IntArray) -> IntArray:
    """How many entries are equal to each entry."""
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    return count[inverse]


def _trailing(name: str, prefix: str) -> int | None:
    """The number of `prefix<number>` (also after a `/`), or None."""
    tail = name.rsplit("/", 1)[-1]
    digits = tail[len(prefix) :]
    return int(digits) if tail.startswith(prefix) and digits.isdigit() else None


def build_fabric(spec: FabricSpec) -> Cluster:
    """The cluster of a checked specification; raises InputError for faults without another way."""
    build = _Build(spec)
    domain, net = spec.domain, spec.network
    total = spec.accelerators
    everyone = np.arange(total)
    router: Router = FabricRouter(build)
    if spec.routes:
        position = build.position
        given: dict[tuple[int, int], tuple[IntArray, FloatArray]] = {}
        place = f"{spec.place}: routes"
        for a, b, paths in spec.routes:
            table: dict[tuple[str, str], int] = {}
            for path in paths:
                for x, y in itertools.pairwise(path):
                    link = build._find_link(x, y)
                    if link is None and build._trunk(x, y) is not None:
                        raise InputError(
                            f"{x} - {y} is one member of a trunk; routes over single spines need "
                            "`network.ecmp: hash`",
                            place=place,
                        )
                    if link is None:
                        raise no_such_link(x, y, build.graph(), place)
                    table[x, y] = link
            given[
                accelerator_index(a, position, total, place),
                accelerator_index(b, position, total, place),
            ] = path_links(a, b, paths, table, build.graph, place)
        router = OverridingRouter(router, given, build.link_latency)
    per_accelerator = domain.bandwidth
    if domain.kind == "mesh":
        out = np.zeros(domain.size)
        for i, j, rate in domain.links:
            out[i] += rate
            out[j] += rate
        per_accelerator = float(out.min())
    elif domain.kind == "torus" and build.torus is not None:
        # The links that an inner accelerator of the slice really has.
        degree = np.bincount([a for a, _ in build.torus.links], minlength=1)
        per_accelerator = domain.bandwidth * int(degree.max())
    elif domain.kind == "pcie":
        per_accelerator = spec.host_bandwidth
    nic_of = build.nic_of
    return Cluster(
        name=spec.name,
        accelerators=build.names,
        accelerator_type_names=spec.accelerator_type_names,
        accelerator_type_of=(
            np.zeros(total, dtype=np.int64)
            if spec.accelerator_type_of is None
            else spec.accelerator_type_of
        ),
        node_of=build.node_of,
        host_of=build.host_of,
        nic_of=nic_of,
        leaf_of=(build.leaf_of_nic[nic_of] if net.kind != "none" else np.full(total, -1)),
        slowdown=build.slowdown,
        link_capacity=build.link_capacity,
        link_latency=build.link_latency,
        link_kind=build.link_kind,
        link_efficiency=np.where(IS_NETWORK[build.link_kind], net.efficiency, 1.0),
        host_link_in=build.from_host + everyone if spec.host_bandwidth else np.full(total, -1),
        host_link_out=build.to_host + everyone if spec.host_bandwidth else np.full(total, -1),
        scale_up=ScaleUp(
            kind=domain.kind,
            link=domain.link,
            bandwidth=per_accelerator,
            size=build.per_domain,
            in_network_reduction=domain.in_network_reduction,
            shape=domain.shape,
            wrap=domain.wrap,
            link_bandwidth=(
                min(rate for _, _, rate in domain.links) if domain.links else domain.bandwidth
            ),
        ),
        scale_out=ScaleOut(
            kind=net.kind,
            link=net.link_kind,
            fabric=net.fabric,
            bandwidth=net.bandwidth,
            nics_per_node=net.nics,
            efficiency=net.efficiency,
            in_network_reduction=net.in_network_reduction,
        ),
        router=router,
        graph_builder=build.graph,
        link_namer=build.blocks.name,
        host_shared_in=(
            (build.switch_down + build.host_switch_of,) if build.switch_down >= 0 else ()
        ),
        host_shared_out=((build.switch_up + build.host_switch_of,) if build.switch_up >= 0 else ()),
        sources=spec.sources,
        memory_share=build.memory_share if (build.memory_share < 1.0).any() else None,
    )
