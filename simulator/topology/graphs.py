"""Clusters from any networkx graph, and exact shortest-path ECMP routes on it.

Every node has a `type` (`gpu` or `tpu` for accelerators), every edge a `bandwidth` (byte/s per
direction, or text such as "400 Gb/s"), and optionally `latency`, `link` (technology) and `weight`
(routing metric). Undirected edges are full duplex; a DiGraph states each direction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import defusedxml.ElementTree
import networkx as nx
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from simulator.errors import InputError, nearest, raise_all, unknown_name
from simulator.topology.cluster import (
    IS_NETWORK,
    IS_SCALE_UP,
    KIND_INDEX,
    LINK_KINDS,
    NODE_TYPES,
    Cluster,
    FloatArray,
    IntArray,
    Router,
    Routes,
    ScaleOut,
    ScaleUp,
    routes_from_parts,
)
from simulator.units import no_bool, parse_bandwidth, parse_time

#: Routing metric of an edge that states no `weight`: hops; the way through a shared NIC or a PCIe
#: switch counts double (NVLink comes first), and that through host memory is dear enough that it is
#: only taken where nothing else leads to the target.
_HOST_WEIGHT = 16.0
_NIC_WEIGHT = 2.0
_ACCELERATOR_TYPES = ("gpu", "tpu")
#: Latency of a link that states none, seconds; orders of magnitude of the datasheets.
_DEFAULT_LATENCY = {
    "NVLink": 0.3e-6, "XGMI": 0.5e-6, "ICI": 0.5e-6, "UALink": 0.3e-6, "PCIe": 0.5e-6,
    "C2C": 0.3e-6, "HBM": 0.3e-6,
}  # fmt: skip
_DEFAULT_NETWORK_LATENCY = 0.5e-6


class ShortestPathRouter:
    """Shortest paths with ideal equal-cost multi-path spreading on an arbitrary directed graph.

    At every node traffic splits evenly over the next hops that lie on a shortest path, as switches
    do. Distances are computed once per target and kept. Paths never lead through HBM.
    """

    def __init__(
        self,
        nodes: int,
        tail: IntArray,
        head: IntArray,
        weight: FloatArray,
        latency: FloatArray,
        terminal_of: IntArray,
        names: Sequence[str],
    ) -> None:
        self.nodes = nodes
        self.tail, self.head, self.weight, self.latency = tail, head, weight, latency
        self.terminal_of = terminal_of
        self.names = names
        # Distances to a target are distances from it along reversed links.
        self._reversed = csr_matrix((weight, (head, tail)), shape=(nodes, nodes))
        self._out: list[list[int]] = [[] for _ in range(nodes)]
        for link in range(len(tail)):
            self._out[int(tail[link])].append(link)
        self._distance: dict[int, FloatArray] = {}
        self._cache: dict[tuple[int, int], tuple[list[int], list[float]]] = {}

    def distances(self, targets: Iterable[int]) -> None:
        """Compute and keep the distances of every node to `targets`."""
        missing = sorted({t for t in targets if t not in self._distance})
        if missing:
            table = np.atleast_2d(dijkstra(self._reversed, directed=True, indices=missing))
            for row, target in enumerate(missing):
                self._distance[target] = table[row]

    def path_shares(self, source: int, target: int) -> tuple[list[int], list[float]]:
        """Links between two graph nodes in the order of travel, and their shares."""
        key = (source, target)
        found = self._cache.get(key)
        if found is not None:
            return found
        self.distances([target])
        distance = self._distance[target]
        if not np.isfinite(distance[source]):
            raise InputError(
                f"there is no route from {self.names[source]!r} to {self.names[target]!r}"
            )
        load = {source: 1.0}
        links: list[int] = []
        shares: list[float] = []
        # Nodes in order of falling distance: every predecessor is done before its successors.
        open_nodes = {source}
        while open_nodes:
            here = max(open_nodes, key=lambda node: (distance[node], -node))
            open_nodes.discard(here)
            if here == target:
                continue
            slack = 1e-9 * max(1.0, distance[source])
            hops = [
                link
                for link in self._out[here]
                if abs(self.weight[link] + distance[self.head[link]] - distance[here]) <= slack
            ]
            part = load[here] / len(hops)
            for link in hops:
                links.append(link)
                shares.append(part)
                successor = int(self.head[link])
                load[successor] = load.get(successor, 0.0) + part
                open_nodes.add(successor)
        self._cache[key] = (links, shares)
        return links, shares

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of pairs of accelerators; distinct pairs are computed once."""
        pairs = len(source)
        start, end = self.terminal_of[source], self.terminal_of[target]
        code = start * self.nodes + end
        distinct, inverse = np.unique(code, return_inverse=True)
        self.distances(int(t) for t in np.unique(distinct % self.nodes))
        lengths = np.zeros(len(distinct), dtype=np.int64)
        all_links: list[int] = []
        all_shares: list[float] = []
        for index, value in enumerate(distinct.tolist()):
            a, b = divmod(value, self.nodes)
            if a == b:
                continue
            links, shares = self.path_shares(a, b)
            lengths[index] = len(links)
            all_links.extend(links)
            all_shares.extend(shares)
        offset = np.concatenate([[0], np.cumsum(lengths)])
        count = lengths[inverse]
        pair = np.repeat(np.arange(pairs), count)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
        entry = np.repeat(offset[inverse], count) + within
        link = np.asarray(all_links, dtype=np.int64)[entry]
        share = np.asarray(all_shares, dtype=np.float64)[entry]
        latency: FloatArray = np.bincount(
            pair, weights=share * self.latency[link], minlength=pairs
        ).astype(np.float64)
        return Routes(pair, link, share, latency)


class OverridingRouter:
    """A router with user-given routes for some pairs."""

    def __init__(
        self,
        router: Router,
        given: Mapping[tuple[int, int], tuple[IntArray, FloatArray]],
        link_latency: FloatArray,
    ) -> None:
        self.router, self.given, self.link_latency = router, dict(given), link_latency

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """The given route of a pair where there is one, else the underlying router's."""
        stride = int(max(source.max(initial=0), target.max(initial=0))) + 1
        keys = np.array([a * stride + b for a, b in self.given if a < stride and b < stride])
        mine = np.isin(source * stride + target, keys)
        if not mine.any():
            return self.router.routes(source, target)
        rest = np.flatnonzero(~mine)
        found = self.router.routes(source[rest], target[rest])
        parts: list[tuple[IntArray, IntArray, FloatArray]] = [
            (rest[found.pair], found.link, found.share)
        ]
        for pair in np.flatnonzero(mine).tolist():
            link, share = self.given[int(source[pair]), int(target[pair])]
            parts.append((np.full(len(link), pair), link, share))
        return routes_from_parts(len(source), parts, self.link_latency)


def _number(
    value: Any, parse: Any, place: str, errors: list[InputError], default: float = 0.0
) -> float:
    try:
        return float(parse(value, place=place))
    except InputError as error:
        errors.append(error)
    except (TypeError, ValueError):
        errors.append(
            InputError(f"expected a number or text with a unit, got {value!r}", place=place)
        )
    return default


def from_graph(
    graph: nx.Graph,
    *,
    name: str | None = None,
    accelerator: str | None = None,
    fabric: str | None = None,
    fabric_efficiency: float = 0.97,
    faults: Sequence[Mapping[str, Any]] = (),
    routes: Mapping[tuple[str, str], Sequence[Sequence[str]]] | None = None,
    place: str | None = None,
) -> Cluster:
    """A cluster of any networkx graph; accelerators are the nodes of type `gpu` or `tpu`, in order.

    Parameters
    ----------
    graph:
        `Graph` (full-duplex edges) or `DiGraph`, also multigraphs (parallel edges add up). Node
        attributes: `type` (required), `accelerator` (catalogue name), `node` (scale-up domain),
        `host`. Edge attributes: `bandwidth` (required; byte/s per direction or text with unit),
        `latency` (s or text), `link` (one of `LINK_KINDS`), `weight` (routing metric, default 1).
    accelerator:
        Catalogue name of accelerators that state none.
    fabric_efficiency:
        Share of the line rate that network links reach.
    routes:
        User-given routes: (source, target) accelerator names -> paths of node names; traffic is
        spread evenly over the paths.

    Raises
    ------
    InputError
        For unknown types, missing bandwidths, accelerators that cannot reach each other, bad
        faults or routes: all found errors at once.
    """
    where = place or (f"graph {name!r}" if name else "graph")
    errors: list[InputError] = []
    names = [str(node) for node in graph.nodes]
    if len(set(names)) != len(names):
        raise InputError("node names must differ when written as text", place=where)
    index = {node: i for i, node in enumerate(graph.nodes)}
    types: list[str] = []
    for node, data in graph.nodes(data=True):
        kind = str(data.get("type", "")).lower()
        if kind not in NODE_TYPES:
            here = f"{where}: node {node!r}"
            if kind:
                errors.append(unknown_name("node type", kind, NODE_TYPES, place=here))
            else:
                errors.append(
                    InputError(
                        "has no `type` (expected one of " + ", ".join(NODE_TYPES) + ")", place=here
                    )
                )
        types.append(kind)
    terminals = [i for i, kind in enumerate(types) if kind in _ACCELERATOR_TYPES]
    if not terminals:
        errors.append(
            InputError("has no accelerator: no node has type `gpu` or `tpu`", place=where)
        )

    tail: list[int] = []
    head: list[int] = []
    capacity: list[float] = []
    latency: list[float] = []
    weight: list[float] = []
    kinds: list[int] = []
    for a, b, data in graph.edges(data=True):
        here = f"{where}: edge {a!r} - {b!r}"
        kind = str(data.get("link", "Other"))
        kind = next((k for k in LINK_KINDS if kind.lower().startswith(k.lower())), kind)
        if kind not in KIND_INDEX:
            errors.append(unknown_name("link type", kind, LINK_KINDS, place=here))
            continue
        if "bandwidth" not in data:
            errors.append(
                InputError("has no `bandwidth` (byte/s, or text such as '400 Gb/s')", place=here)
            )
            continue
        rate = _number(data["bandwidth"], parse_bandwidth, f"{here}: bandwidth", errors, 1.0)
        if rate <= 0:
            errors.append(InputError("bandwidth must be positive", place=here))
            continue
        default = _DEFAULT_LATENCY.get(kind, _DEFAULT_NETWORK_LATENCY)
        delay = _number(data.get("latency", default), parse_time, f"{here}: latency", errors)
        ends = {types[index[a]], types[index[b]]}
        usual = 1.0
        if "host" in ends:
            usual = _HOST_WEIGHT
        elif ends & set(_ACCELERATOR_TYPES) and ("nic" in ends or kind == "PCIe"):
            usual = _NIC_WEIGHT
        try:
            metric = float(no_bool(data.get("weight", usual)))
        except (TypeError, ValueError):
            metric = math.nan
        if not 0 < metric < math.inf:
            errors.append(InputError("weight must be a positive number", place=here))
            continue
        directions = [(a, b)] if graph.is_directed() else [(a, b), (b, a)]
        for x, y in directions:
            if x != y:
                tail.append(index[x])
                head.append(index[y])
                capacity.append(rate)
                latency.append(delay)
                weight.append(metric)
                kinds.append(KIND_INDEX[kind])
    raise_all(errors)

    ends_tail = np.array(tail, dtype=np.int64)
    ends_head = np.array(head, dtype=np.int64)
    rates = np.array(capacity)
    delays = np.array(latency)
    metrics = np.array(weight)
    kind_of = np.array(kinds, dtype=np.int8)
    if graph.is_multigraph() and len(ends_tail):
        code = ends_tail * len(names) + ends_head
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        rates = np.bincount(inverse, weights=rates)
        ends_tail, ends_head, kind_of = ends_tail[first], ends_head[first], kind_of[first]
        delays, metrics = delays[first], metrics[first]
    link_of = {
        (names[int(a)], names[int(b)]): link
        for link, (a, b) in enumerate(zip(ends_tail, ends_head, strict=True))
    }

    slowdown = np.ones(len(terminals))
    memory = np.ones(len(terminals))
    terminal_at = {t: i for i, t in enumerate(terminals)}
    position = {names[t]: i for i, t in enumerate(terminals)}
    failed = np.zeros(len(rates), dtype=bool)
    for number, fault in enumerate(faults):
        here = f"{where}: faults[{number}]"
        try:
            if "gpu" in fault:
                slowdown[accelerator_index(fault["gpu"], position, len(terminals), here)] *= float(
                    fault.get("slowdown", 1.0)
                )
            elif "link" not in fault:
                raise InputError("names neither a `gpu` nor a `link`", place=here)
            else:
                a, b = (str(end) for end in fault["link"])
                found = [link_of[key] for key in ((a, b), (b, a)) if key in link_of]
                if not found:
                    raise no_such_link(a, b, graph, here)
                factor = float(fault.get("bandwidth_factor", 1.0))
                ends_of = {int(ends_tail[found[0]]), int(ends_head[found[0]])}
                if any(types[end] == "hbm" for end in ends_of):
                    if fault.get("failed"):
                        raise memory_cannot_fail(a, b, here)
                    for end in ends_of & set(terminal_at):
                        memory[terminal_at[end]] *= factor
                if fault.get("failed"):
                    failed[found] = True
                else:
                    rates[found] *= factor
        except InputError as error:
            errors.append(error)
    raise_all(errors)

    hbm = np.array([kind == "hbm" for kind in types], dtype=bool)
    usable = ~failed & ~hbm[ends_tail] & ~hbm[ends_head]
    # Failed links keep their number and get an infinite metric: no shortest path takes them.
    terminal_of = np.array(terminals, dtype=np.int64)
    routed = np.flatnonzero(usable)
    inner = ShortestPathRouter(
        len(names), ends_tail[routed], ends_head[routed], metrics[routed], delays[routed],
        terminal_of, names,
    )  # fmt: skip
    router: Router = _Renumbered(inner, routed)

    matrix = csr_matrix(
        (np.ones(len(routed)), (ends_tail[routed], ends_head[routed])), shape=(len(names),) * 2
    )
    _, component = connected_components(matrix, directed=True, connection="strong")
    main = np.bincount(component[terminal_of]).argmax()
    lost = [names[t] for t in terminals if component[t] != main]
    if lost:
        listing = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise InputError(
            f"accelerators that the others cannot reach: {listing}"
            + (" (a link has failed and there is no other way)" if failed.any() else ""),
            place=where,
        )

    type_names: list[str] = []
    type_of = np.zeros(len(terminals), dtype=np.int64)
    keys = list(index)
    for i, t in enumerate(terminals):
        data = graph.nodes[keys[t]]
        chosen = str(data.get("accelerator") or accelerator or "")
        if not chosen:
            errors.append(
                InputError(
                    "has no `accelerator` (a name of `simulator list accelerators`)",
                    place=f"{where}: node {names[t]!r}",
                )
            )
            continue
        if chosen not in type_names:
            type_names.append(chosen)
        type_of[i] = type_names.index(chosen)
    raise_all(errors[:1] if len(errors) == len(terminals) else errors)

    node_of = _domains(graph, terminals, index, ends_tail, ends_head, kind_of, types, "node")
    host_of = _domains(graph, terminals, index, ends_tail, ends_head, kind_of, types, "host")
    nic_of, leaf_of = _attached(terminals, ends_tail, ends_head, types)
    host_out = _to_hosts(terminals, ends_tail, ends_head, types, kind_of)
    host_in = _to_hosts(terminals, ends_head, ends_tail, types, kind_of)

    efficiency = np.where(IS_NETWORK[kind_of], fabric_efficiency, 1.0)
    up_kind, up_rate = _scale_up_rate(terminal_of, ends_tail, rates, kind_of)
    network_links = np.flatnonzero(IS_NETWORK[kind_of])
    sizes = np.bincount(node_of)
    if routes:
        given: dict[tuple[int, int], tuple[IntArray, FloatArray]] = {}
        for (a, b), paths in routes.items():
            given[
                accelerator_index(a, position, len(terminals), f"{where}: routes"),
                accelerator_index(b, position, len(terminals), f"{where}: routes"),
            ] = path_links(a, b, paths, link_of, lambda: graph, f"{where}: routes")
        router = OverridingRouter(router, given, delays)

    def namer(link: int) -> tuple[str, str]:
        return names[int(ends_tail[link])], names[int(ends_head[link])]

    return Cluster(
        name=name or str(graph.graph.get("name") or "custom"),
        accelerators=[names[t] for t in terminals],
        accelerator_type_names=tuple(type_names),
        accelerator_type_of=type_of,
        node_of=node_of,
        host_of=host_of,
        nic_of=nic_of,
        leaf_of=leaf_of,
        slowdown=slowdown,
        link_capacity=rates,
        link_latency=delays,
        link_kind=kind_of,
        link_efficiency=efficiency,
        host_link_in=host_in[0],
        host_link_out=host_out[0],
        host_shared_in=host_in[1:],
        host_shared_out=host_out[1:],
        memory_share=memory if (memory < 1.0).any() else None,
        scale_up=ScaleUp(
            kind="graph" if up_rate else "none",
            link=up_kind,
            bandwidth=up_rate,
            size=int(sizes.max()),
            link_bandwidth=up_rate,
        ),
        scale_out=ScaleOut(
            kind="graph" if len(network_links) else "none",
            link=LINK_KINDS[int(kind_of[network_links[0]])] if len(network_links) else "Other",
            fabric=fabric or str(graph.graph.get("fabric") or "") or "default",
            bandwidth=float(rates[network_links].min()) if len(network_links) else 0.0,
            nics_per_node=max(1, round(types.count("nic") / max(1, len(sizes)))),
            efficiency=fabric_efficiency,
        ),
        router=router,
        graph_builder=lambda: graph,
        link_namer=namer,
        sources={},
    )


class _Renumbered:
    """Routes of a router over a subset of links, in the numbers of all links."""

    def __init__(self, router: ShortestPathRouter, numbers: IntArray) -> None:
        self.router, self.numbers = router, numbers

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        found = self.router.routes(source, target)
        return Routes(found.pair, self.numbers[found.link], found.share, found.latency)


#: Neighbours that an error lists.
_LISTED = 8


def no_such_link(a: str, b: str, graph: nx.Graph, place: str) -> InputError:
    """The error for a link that does not exist: the nearest node name, or what `a` has links to."""
    names = {str(node): node for node in graph.nodes}
    for end in (a, b):
        if end not in names:
            guess = nearest(end, names)
            hint = f"; did you mean {guess!r}?" if guess else ""
            return InputError(f"there is no node {end!r}{hint}", place=place)
    around = list(dict.fromkeys(str(node) for node in nx.all_neighbors(graph, names[a])))
    listed = ", ".join(map(repr, around[:_LISTED])) + (", …" if len(around) > _LISTED else "")
    return InputError(
        f"there is no link between {a!r} and {b!r}; {a!r} has links to {listed or 'nothing'}",
        place=place,
    )


def memory_cannot_fail(a: str, b: str, place: str) -> InputError:
    """The error for a failed HBM: the accelerator would be gone, not slower."""
    return InputError(
        f"the memory behind {a} - {b} cannot fail, only slow down (`bandwidth_factor`); leave the "
        "accelerator out with `cluster.placement`",
        place=place,
    )


def accelerator_index(value: Any, position: Mapping[str, int], count: int, place: str) -> int:
    """Index of an accelerator given by index or name; raises InputError."""
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < count:
            return value
        raise InputError(
            f"accelerator {value} does not exist; there are {count} (0..{count - 1})", place=place
        )
    if str(value) in position:
        return position[str(value)]
    guess = nearest(str(value), list(position)[:4096])
    hint = f"; did you mean {guess!r}?" if guess else ""
    raise InputError(f"there is no accelerator {value!r}{hint}", place=place)


def path_links(
    source: str,
    target: str,
    paths: Sequence[Sequence[str]],
    link_of: Mapping[tuple[str, str], int],
    graph: Callable[[], nx.Graph],
    place: str,
) -> tuple[IntArray, FloatArray]:
    """Links and shares of user-given paths (node names), traffic spread evenly over them.

    `graph` gives the cluster's graph, for what an error lists.
    """
    if not paths:
        raise InputError(f"no path given from {source!r} to {target!r}", place=place)
    share: dict[int, float] = {}
    for path in paths:
        steps = [str(step) for step in path]
        if len(steps) < 2 or steps[0] != str(source) or steps[-1] != str(target):
            raise InputError(
                f"a path from {source!r} to {target!r} must start and end there, got {steps}",
                place=place,
            )
        for a, b in itertools.pairwise(steps):
            link = link_of.get((a, b))
            if link is None:
                raise no_such_link(a, b, graph(), place)
            share[link] = share.get(link, 0.0) + 1.0 / len(paths)
    return np.array(list(share), dtype=np.int64), np.array(list(share.values()))


def _domains(
    graph: nx.Graph,
    terminals: Sequence[int],
    index: Mapping[Any, int],
    tail: IntArray,
    head: IntArray,
    kinds: np.ndarray,
    types: Sequence[str],
    attribute: str,
) -> IntArray:
    """Domain per accelerator: the node attribute, or what scale-up (for hosts: PCIe) links join."""
    keys = list(index)
    labels = [graph.nodes[keys[t]].get(attribute) for t in terminals]
    if all(label is not None for label in labels):
        _, first, inverse = np.unique(
            np.array([str(label) for label in labels]), return_index=True, return_inverse=True
        )
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse]
    inside = np.array([kind in ("gpu", "tpu", "nvswitch", "host", "hbm") for kind in types])
    if attribute == "node":
        joins = IS_SCALE_UP[kinds]
    else:
        joins = ~IS_NETWORK[kinds]
    joins = joins & inside[tail] & inside[head]
    if attribute == "node" and not joins.any():
        joins = ~IS_NETWORK[kinds] & inside[tail] & inside[head]
    matrix = csr_matrix(
        (np.ones(int(joins.sum())), (tail[joins], head[joins])), shape=(len(types),) * 2
    )
    _, component = connected_components(matrix, directed=False)
    of = component[np.asarray(terminals)]
    _, first, inverse = np.unique(of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _to_hosts(
    terminals: Sequence[int],
    tail: IntArray,
    head: IntArray,
    types: Sequence[str],
    kinds: np.ndarray,
) -> tuple[IntArray, ...]:
    """Links from each accelerator to the nearest host's memory, through PCIe switches: the first
    link of all, then the second, ...; -1 where the path has ended or there is none. With `tail`
    and `head` exchanged the way back, its last link first."""
    onward: dict[int, list[tuple[int, int]]] = {}
    local = ~IS_NETWORK[kinds] & ~IS_SCALE_UP[kinds]
    for link in np.flatnonzero(local).tolist():
        onward.setdefault(int(tail[link]), []).append((link, int(head[link])))
    paths: list[list[int]] = []
    for t in terminals:
        before: dict[int, tuple[int, int]] = {t: (-1, -1)}  # node -> link and node it came from
        front, at = [t], -1
        while front and at < 0:
            following = []
            for here in front:
                for link, there in onward.get(here, []):
                    if there not in before:
                        before[there] = link, here
                        if types[there] == "switch":
                            following.append(there)
                        elif types[there] == "host" and at < 0:
                            at = there
            front = following
        path: list[int] = []
        while at >= 0 and at != t:
            link, at = before[at]
            path.append(link)
        paths.append(path[::-1])
    levels = max(1, max(map(len, paths), default=0))
    links = np.full((levels, len(terminals)), -1, dtype=np.int64)
    for i, path in enumerate(paths):
        links[: len(path), i] = path
    return tuple(links)


def _attached(
    terminals: Sequence[int], tail: IntArray, head: IntArray, types: Sequence[str]
) -> tuple[IntArray, IntArray]:
    """Nearest NIC of each accelerator, and the leaf of that NIC; -1 where there is none."""
    out: dict[int, list[int]] = {}
    for a, b in zip(tail.tolist(), head.tolist(), strict=True):
        out.setdefault(a, []).append(b)
    numbers = {n: i for i, n in enumerate(n for n, kind in enumerate(types) if kind == "nic")}
    leaves = {
        n: i for i, n in enumerate(n for n, kind in enumerate(types) if kind in ("leaf", "switch"))
    }
    nic_of = np.full(len(terminals), -1, dtype=np.int64)
    leaf_of = np.full(len(terminals), -1, dtype=np.int64)
    users: dict[tuple[int, ...], int] = {}
    for i, t in enumerate(terminals):
        # Breadth first through PCIe switches and hosts to the nearest NICs; accelerators that have
        # the same several NICs at hand take turns.
        seen, front = {t}, [t]
        near: list[int] = []
        while front and not near:
            around = list(dict.fromkeys(n for here in front for n in out.get(here, [])))
            near = [n for n in around if n in numbers]
            front = [n for n in around if n not in seen and types[n] in ("switch", "host")]
            seen.update(front)
        if near:
            turn = users.get(tuple(near), 0)
            users[tuple(near)] = turn + 1
            nic = near[turn % len(near)]
            nic_of[i] = numbers[nic]
            leaf = [n for n in out.get(nic, []) if n in leaves and n not in seen]
        else:
            leaf = [n for n in out.get(t, []) if n in leaves]
        if leaf:
            leaf_of[i] = leaves[leaf[0]]
    return nic_of, leaf_of


def _scale_up_rate(
    terminals: IntArray, tail: IntArray, rates: FloatArray, kinds: np.ndarray
) -> tuple[str, float]:
    """Technology and byte/s over scale-up links out of the least well connected accelerator."""
    up = IS_SCALE_UP[kinds] & np.isin(tail, terminals)
    if not up.any():
        return "PCIe", 0.0
    total = np.bincount(tail[up], weights=rates[up])
    positive = total[total > 0]
    return LINK_KINDS[int(kinds[np.flatnonzero(up)[0]])], float(positive.min())


def read_graph_file(path: Path) -> nx.Graph:
    """A networkx graph of a GraphML, GML or GEXF file; raises InputError where it is broken."""
    readers = {".graphml": nx.read_graphml, ".gml": nx.read_gml, ".gexf": nx.read_gexf}
    try:
        if path.suffix.lower() != ".gml":
            # networkx parses XML trustingly: refuse DTDs, and with them entities, beforehand
            defusedxml.ElementTree.parse(path, forbid_dtd=True)
        graph = readers[path.suffix.lower()](path)
    except KeyError:
        raise InputError("expected a .graphml, .gml or .gexf file", place=str(path)) from None
    except FileNotFoundError:
        raise InputError("no such file", place=str(path)) from None
    except Exception as error:  # the readers raise many kinds of errors for broken files
        raise InputError(f"cannot be read as a graph: {error}", place=str(path)) from None
    return graph
