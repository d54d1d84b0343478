"""How busy every link is over a step, and the topology as a drawing that stays readable.

A link's *use* is the share of the step that it would need for its bytes at full speed:
`work / (capacity * step time)`. `work` (`Timeline.link_bytes`) is what the collectives' algorithms
put on the link, with the protocol's and the fabric's overhead (`simulator.costs.collectives`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.topology.cluster import IS_SCALE_UP, LINK_KINDS, NODE_TYPES, Cluster
from simulator.units import format_bandwidth, format_bytes

#: Node types from the top of the drawing to the bottom.
TIERS = ("core", "spine", "leaf", "switch", "nic", "host", "gpu", "tpu", "nvswitch", "hbm", "other")
#: A drawing has at most this many nodes, and in one tier; else nodes are merged.
_MOST_NODES, _MOST_IN_TIER, _MOST_IN_GRID = 110, 34, 256
_ASIDE = ("host", "hbm")
#: Links of a larger cluster are not all named, only told apart by type.
_MOST_NAMED = 20_000


@dataclass(frozen=True)
class DrawnNode:
    """A node of the drawing: one node of the cluster, or several alike."""

    label: str
    short: str
    """The label without the domain, for narrow places."""
    type: str
    count: int
    x: float
    """0..1, left to right."""
    y: float
    """0..1, top to bottom."""


@dataclass(frozen=True)
class DrawnLink:
    """A link of the drawing: the directed links between two drawn nodes."""

    start: int
    end: int
    kind: str
    count: int
    bandwidth: float
    """byte/s of one directed link."""
    work: float
    """Bytes of one step, mean over the links."""
    mean_use: float
    highest_use: float
    busiest: str
    """Name of the directed link with the highest use."""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What a tooltip says about it."""
        return [
            ("technology", self.kind),
            ("directed links", f"{self.count:,}"),
            ("bandwidth", f"{format_bandwidth(self.bandwidth)} each"),
            ("bytes per step", f"{format_bytes(self.work)} each"),
            ("mean use", f"{self.mean_use:.1%}"),
            ("highest use", f"{self.highest_use:.1%}, {self.busiest}"),
        ]


@dataclass(frozen=True)
class NetworkDrawing:
    """The cluster as nodes in tiers and links with their use."""

    nodes: tuple[DrawnNode, ...]
    links: tuple[DrawnLink, ...]
    rows: int
    """Tiers, for the height of the drawing."""
    merged: str
    """What a drawn node stands for; empty if every node is drawn."""


def network_drawing(
    cluster: Cluster, work: NDArray[np.float64], step_time: float
) -> NetworkDrawing:
    """Draw `cluster` with the use that `work` bytes per directed link make of `step_time` s.

    Small clusters are drawn whole; larger ones with one node per type and scale-up domain, the
    largest with one node per type.
    """
    use = work / (cluster.link_capacity * max(step_time, 1e-30))
    if cluster.links <= _MOST_NAMED:
        ends = [cluster.link_ends(link) for link in range(cluster.links)]
        types = dict(cluster.graph.nodes(data="type"))
        for merge, merged in (
            (_itself, ""),
            (_by_domain, "all nodes of one type in a scale-up domain"),
        ):
            keys = [
                (merge(a, types.get(a) or _type(a)), merge(b, types.get(b) or _type(b)))
                for a, b in ends
            ]
            count = _members(ends, keys)
            drawing = _draw(cluster, keys, count, work, use, merged)
            if drawing is not None:
                return drawing
        keys = [
            (_by_type(a, types.get(a) or _type(a)), _by_type(b, types.get(b) or _type(b)))
            for a, b in ends
        ]
        count = _members(ends, keys)
    else:
        keys = _type_pairs(cluster)
        count = _count_by_type(cluster)
    drawing = _draw(cluster, keys, count, work, use, "all nodes of one type", force=True)
    assert drawing is not None
    return drawing


_Key = tuple[str, str, str]
"""(type, domain, name) of a drawn node; the last two empty where merged."""


def _itself(name: str, kind: str) -> _Key:
    return kind, name.rpartition("/")[0], name


def _by_domain(name: str, kind: str) -> _Key:
    domain = name.rpartition("/")[0]
    return (kind, domain, "") if domain else (kind, "", name)


def _by_type(name: str, kind: str) -> _Key:
    return kind, "", ""


def _type(name: str) -> str:
    """The type that a node's name tells: `node0/gpu3` is a gpu."""
    match = re.search(r"([a-z]+)[^a-z/]*$", name)
    return match[1] if match and match[1] in NODE_TYPES else "other"


def _members(ends: Sequence[tuple[str, str]], keys: Sequence[tuple[_Key, _Key]]) -> dict[_Key, int]:
    members: dict[_Key, dict[str, None]] = {}
    for pair, key in zip(ends, keys, strict=True):
        for name, k in zip(pair, key, strict=True):
            members.setdefault(k, {})[name] = None
    return {key: len(names) for key, names in members.items()}


def _count_by_type(cluster: Cluster) -> dict[_Key, int]:
    accelerator = _type(cluster.accelerators[0])
    counts = {(accelerator, "", ""): len(cluster)}
    if (cluster.nic_of >= 0).any():
        counts["nic", "", ""] = len(np.unique(cluster.nic_of[cluster.nic_of >= 0]))
    if (cluster.leaf_of >= 0).any():
        counts["leaf", "", ""] = len(np.unique(cluster.leaf_of[cluster.leaf_of >= 0]))
    counts["host", "", ""] = len(np.unique(cluster.host_of))
    # the arrays know one switch per domain
    counts["nvswitch", "", ""] = cluster.nodes
    return counts


def _type_pairs(cluster: Cluster) -> list[tuple[_Key, _Key]]:
    """Types of every link's ends, naming few of them: links are numbered in blocks of a type."""
    pairs: list[tuple[_Key, _Key] | None] = [None] * cluster.links

    def at(link: int) -> tuple[_Key, _Key]:
        a, b = cluster.link_ends(link)
        return (_type(a), "", ""), (_type(b), "", "")

    open_ranges = [(0, cluster.links)]
    while open_ranges:
        low, high = open_ranges.pop()
        if high - low <= 8:
            for link in range(low, high):
                pairs[link] = at(link)
            continue
        probes = np.unique(np.linspace(low, high - 1, 9).astype(np.int64)).tolist()
        found = [at(link) for link in probes]
        alike = all(pair == found[0] for pair in found) and (
            np.ptp(cluster.link_capacity[low:high]) == 0
            and np.ptp(cluster.link_kind[low:high]) == 0
        )
        if alike:
            pairs[low:high] = [found[0]] * (high - low)
        else:
            middle = (low + high) // 2
            open_ranges += [(low, middle), (middle, high)]
    return [pair for pair in pairs if pair is not None]


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key by which node10 comes after node9."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    ]


def _draw(
    cluster: Cluster,
    keys: Sequence[tuple[_Key, _Key]],
    count: dict[_Key, int],
    work: NDArray[np.float64],
    use: NDArray[np.float64],
    merged: str,
    *,
    force: bool = False,
) -> NetworkDrawing | None:
    """The drawing with the nodes of `keys`; None if it would have too many."""
    tier_of = {name: index for index, name in enumerate(TIERS)}
    number: dict[tuple[_Key, _Key], int] = {}
    code = np.full(len(keys), -1, dtype=np.int64)
    hidden = _hidden(cluster, keys, work)
    for link, (a, b) in enumerate(keys):
        if not hidden[link]:
            # both directions of a cable are one line
            code[link] = number.setdefault((a, b) if a <= b else (b, a), len(number))
    used = sorted({key for pair in number for key in pair}, key=lambda k: _natural(k[1] + k[2]))
    tiers: dict[int, list[_Key]] = {}
    for key in used:
        tiers.setdefault(tier_of.get(key[0], len(TIERS) - 1), []).append(key)
    width = max((len(tier) for tier in tiers.values()), default=0)
    grid = len(tiers) == 1 and width > 1
    if (
        not force
        and (len(used) > _MOST_NODES or width > _MOST_IN_TIER)
        and not (grid and len(used) <= _MOST_IN_GRID)
    ):
        return None
    nodes: list[DrawnNode] = []
    index: dict[_Key, int] = {}
    rows = len(tiers)
    if grid:
        (keys_of_tier,) = tiers.values()
        columns, rows = _grid(cluster, len(keys_of_tier))
        places = {
            key: ((i % columns + 0.5) / columns, (i // columns) / max(1, rows - 1))
            for i, key in enumerate(keys_of_tier)
        }
    else:
        places = {}
        for row, tier in enumerate(sorted(tiers)):
            for i, key in enumerate(tiers[tier]):
                places[key] = ((i + 0.5) / len(tiers[tier]), row / max(1, rows - 1))
    for key, (x, y) in places.items():
        index[key] = len(nodes)
        kind, domain, name = key
        many = count.get(key, 1)
        short = name.rpartition("/")[2] if name else f"{many:,} {kind}" if many > 1 else kind
        label = f"{domain}: {short}" if domain and not name else short
        nodes.append(DrawnNode(label, short, kind, many, x, y))
    links = _links(cluster, list(number), code, index, work, use)
    return NetworkDrawing(tuple(nodes), tuple(links), rows, merged)


def _hidden(
    cluster: Cluster, keys: Sequence[tuple[_Key, _Key]], work: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Links that are only drawn where something takes them: the way through hosts and to HBM, and
    the network beside a torus."""
    aside = np.array([a[0] in _ASIDE or b[0] in _ASIDE for a, b in keys], dtype=bool)
    groups = [aside]
    if cluster.scale_up.kind == "torus":
        groups.append(~aside & ~IS_SCALE_UP[cluster.link_kind])
    hidden = np.zeros(len(keys), dtype=bool)
    for group in groups:
        if not work[group].any():
            hidden |= group
    return hidden if not hidden.all() else np.zeros(len(keys), dtype=bool)


def _grid(cluster: Cluster, nodes: int) -> tuple[int, int]:
    """Columns and rows of a drawing that has accelerators only: a torus, a mesh."""
    shape = [side for side in cluster.scale_up.shape if side > 1]
    if shape and int(np.prod(shape)) == nodes:
        columns = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        return columns, nodes // columns
    columns = int(np.ceil(np.sqrt(nodes)))
    return columns, -(-nodes // columns)


def _links(
    cluster: Cluster,
    pairs: Sequence[tuple[_Key, _Key]],
    code: NDArray[np.int64],
    index: dict[_Key, int],
    work: NDArray[np.float64],
    use: NDArray[np.float64],
) -> list[DrawnLink]:
    kinds = len(LINK_KINDS)
    drawn_links = np.flatnonzero(code >= 0)
    work, use = work[drawn_links], use[drawn_links]
    combined = code[drawn_links] * kinds + cluster.link_kind[drawn_links]
    found, inverse = np.unique(combined, return_inverse=True)
    count = np.bincount(inverse)
    highest = np.zeros(len(found))
    np.maximum.at(highest, inverse, use)
    mean_use = np.bincount(inverse, use) / count
    mean_work = np.bincount(inverse, work) / count
    bandwidth = np.bincount(inverse, cluster.link_capacity[drawn_links]) / count
    candidates = np.flatnonzero(use >= highest[inverse])
    busiest = candidates[np.unique(inverse[candidates], return_index=True)[1]]
    drawn = []
    for i, value in enumerate(found.tolist()):
        a, b = pairs[value // kinds]
        drawn.append(
            DrawnLink(
                index[a],
                index[b],
                LINK_KINDS[value % kinds],
                int(count[i]),
                float(bandwidth[i]),
                float(mean_work[i]),
                float(mean_use[i]),
                float(highest[i]),
                cluster.link_name(int(drawn_links[busiest[i]])),
            )
        )
    return drawn
