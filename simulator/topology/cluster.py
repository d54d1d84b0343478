"""The cluster: accelerators, directed links as arrays, routes, and the networkx graph.

A `Cluster` keeps two views of the same machine. `Cluster.graph` is a `networkx` graph with typed
nodes and links for people, importers and algorithms. The arrays (`link_capacity`, `link_latency`,
...) and `Cluster.routes` are what the simulation uses: one entry per *directed* link, so that a
full-duplex cable is two links, and routes of many pairs at once as incidence arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

#: Technologies of links; `Cluster.link_kind` holds indices into this tuple.
LINK_KINDS: tuple[str, ...] = (
    "NVLink", "XGMI", "ICI", "PCIe", "C2C", "InfiniBand", "RoCE", "EFA", "Slingshot",
    "Ethernet", "DCN", "HBM", "UALink", "Other",
)  # fmt: skip
KIND_INDEX: dict[str, int] = {name: index for index, name in enumerate(LINK_KINDS)}
#: Kinds that join accelerators of one scale-up domain.
SCALE_UP_KINDS: frozenset[str] = frozenset({"NVLink", "XGMI", "ICI", "UALink"})
#: Kinds of the scale-out network, to which `fabric_efficiency` applies.
NETWORK_KINDS: frozenset[str] = frozenset(
    {"InfiniBand", "RoCE", "EFA", "Slingshot", "Ethernet", "DCN"}
)
#: Boolean by kind index: is it a link of the scale-out network?
IS_NETWORK: NDArray[np.bool_] = np.array([kind in NETWORK_KINDS for kind in LINK_KINDS])
#: Boolean by kind index: is it a link inside a scale-up domain?
IS_SCALE_UP: NDArray[np.bool_] = np.array([kind in SCALE_UP_KINDS for kind in LINK_KINDS])

NODE_TYPES: tuple[str, ...] = (
    "gpu", "tpu", "hbm", "host", "nic", "nvswitch", "leaf", "spine", "core", "switch",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Routes:
    """Which directed links the pairs of one query cross; entries sorted by pair.

    A byte of pair `pair[e]` puts `share[e]` bytes on link `link[e]` (ideal ECMP spreads one byte
    over several paths, so shares of parallel links are fractions). `latency[p]` is the sum of the
    links' latencies along pair `p`'s path in seconds (the mean over its paths).
    """

    pair: IntArray
    link: IntArray
    share: FloatArray
    latency: FloatArray

    @property
    def pairs(self) -> int:
        """Number of pairs of the query."""
        return len(self.latency)

    @cached_property
    def indptr(self) -> IntArray:
        """`link[indptr[p]:indptr[p + 1]]` are the links of pair `p` (CSR)."""
        return np.searchsorted(self.pair, np.arange(self.pairs + 1)).astype(np.int64)


def routes_from_parts(
    pairs: int,
    parts: Sequence[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating] | float]],
    link_latency: FloatArray,
) -> Routes:
    """`Routes` of (pair, link, share) pieces in any order."""
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Routes(empty, empty, np.zeros(0), np.zeros(pairs))
    pair = np.concatenate([part[0] for part in parts]).astype(np.int64, copy=False)
    link = np.concatenate([part[1] for part in parts]).astype(np.int64, copy=False)
    share = np.concatenate(
        [np.broadcast_to(np.asarray(part[2], dtype=np.float64), part[0].shape) for part in parts]
    )
    # A stable sort keeps the order along the path: pieces come in the order of travel.
    order = np.argsort(pair, kind="stable")
    pair, link, share = pair[order], link[order], share[order]
    latency: FloatArray = np.bincount(
        pair, weights=share * link_latency[link], minlength=pairs
    ).astype(np.float64)
    return Routes(pair, link, share, latency)


class Router(Protocol):
    """Finds routes between accelerators; `simulator.topology` has one per family of fabrics."""

    def routes(self, source: IntArray, target: IntArray) -> Routes:
        """Routes of the pairs (source[i], target[i]) of accelerator indices."""
        ...


@dataclass(frozen=True)
class ScaleUp:
    """What the collectives need to know of a scale-up domain (NVLink node, rack, TPU slice)."""

    kind: str
    """`switch` (every accelerator at full rate to every other), `mesh`, `torus`, `pcie`, `graph`
    or `none`."""
    link: str
    """Name of the link technology, e.g. `NVLink4`: key of the constants of collectives."""
    bandwidth: float
    """byte/s per direction and accelerator, over all its links."""
    size: int
    """Accelerators per domain."""
    in_network_reduction: bool = False
    """The switch reduces (NVLink SHARP)."""
    shape: tuple[int, ...] = ()
    """Torus: accelerators per axis of a slice."""
    wrap: tuple[bool, ...] = ()
    """Torus: whether the axis closes to a ring."""
    link_bandwidth: float = 0.0
    """Torus, mesh: byte/s per direction of one link."""


@dataclass(frozen=True)
class ScaleOut:
    """What the collectives need to know of the network between domains."""

    kind: str
    """`rail`, `fat-tree`, `graph` or `none`."""
    link: str
    """Link technology, a member of `LINK_KINDS`."""
    fabric: str
    """Key of the fabric's constants (latency, ramp) of collectives."""
    bandwidth: float
    """Line rate of one NIC, byte/s per direction."""
    nics_per_node: int
    efficiency: float
    """Share of the line rate that large messages reach (`fabric_efficiency`)."""
    in_network_reduction: bool = False
    """The switches reduce (SHARP, CollNet)."""


@dataclass(frozen=True, eq=False)
class Cluster:
    """A cluster of accelerators; immutable after building.

    Accelerator `i` is the i-th of `accelerators`; links are directed and numbered from 0.
    Bandwidths are byte/s, latencies seconds.
    """

    name: str
    accelerators: Sequence[str]
    """Names of the accelerators, which are also their node names in `graph`."""
    accelerator_type_names: tuple[str, ...]
    """Catalogue names of the accelerator types that occur."""
    accelerator_type_of: IntArray
    """Index into `accelerator_types`, per accelerator."""
    node_of: IntArray
    """Scale-up domain (NVLink node or rack, TPU slice) of each accelerator."""
    host_of: IntArray
    """Host (server, compute tray) of each accelerator."""
    nic_of: IntArray
    """Index of the NIC that each accelerator uses; -1 without a network."""
    leaf_of: IntArray
    """Leaf switch of that NIC; -1 where there is none."""
    slowdown: FloatArray
    """>= 1, per accelerator: stretches all that it computes (a fault)."""
    link_capacity: FloatArray
    link_latency: FloatArray
    link_kind: NDArray[np.int8]
    """Index into `LINK_KINDS`, per directed link."""
    link_efficiency: FloatArray
    """Share of the capacity that payload reaches: `fabric_efficiency` on network links."""
    host_link_in: IntArray
    """Link from the host's memory to the accelerator (PCIe or C2C); -1 where unknown."""
    host_link_out: IntArray
    """Link from the accelerator to the host's memory; -1 where unknown."""
    scale_up: ScaleUp
    scale_out: ScaleOut
    router: Router = field(repr=False)
    graph_builder: Callable[[], nx.Graph] = field(repr=False)
    link_namer: Callable[[int], tuple[str, str]] = field(repr=False)
    host_shared_in: tuple[IntArray, ...] = ()
    """Further links between the host's memory and the accelerator, which it shares with others (of
    PCIe switches): one array per level; -1 where there is none."""
    host_shared_out: tuple[IntArray, ...] = ()
    """The same towards the host."""
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    memory_share: FloatArray | None = None
    """Share of its datasheet bandwidth that each accelerator's HBM reaches (a fault); None: all."""

    def __len__(self) -> int:
        return len(self.accelerators)

    @property
    def links(self) -> int:
        """Number of directed links."""
        return len(self.link_capacity)

    @cached_property
    def graph(self) -> nx.Graph:
        """The cluster as a networkx graph, built when first asked for.

        Nodes carry `type` (one of `NODE_TYPES`); edges carry `link` (one of `LINK_KINDS`),
        `bandwidth` (byte/s per direction) and `latency` (s).
        """
        return self.graph_builder()

    @cached_property
    def accelerator_types(self) -> tuple:
        """Catalogue entries of `accelerator_type_names`; raises InputError for an unknown one."""
        from simulator.catalog.accelerators import accelerator

        return tuple(accelerator(name) for name in self.accelerator_type_names)

    @cached_property
    def memory_bandwidth(self) -> FloatArray:
        """HBM bandwidth of every accelerator, byte/s."""
        per_type = np.array([kind.memory_bandwidth for kind in self.accelerator_types])
        bandwidth = per_type[self.accelerator_type_of]
        return bandwidth if self.memory_share is None else bandwidth * self.memory_share

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Accelerator index by name."""
        return {name: index for index, name in enumerate(self.accelerators)}

    @property
    def nodes(self) -> int:
        """Number of scale-up domains."""
        return int(self.node_of[-1]) + 1 if len(self.node_of) else 0

    def link_ends(self, link: int) -> tuple[str, str]:
        """Names of the graph nodes that directed link `link` leaves and enters."""
        if not 0 <= link < self.links:
            raise InputError(f"there is no link {link}; the cluster has {self.links}")
        return self.link_namer(int(link))

    def link_name(self, link: int) -> str:
        """`"from -> to"` of directed link `link`."""
        tail, head = self.link_ends(link)
        return f"{tail} -> {head}"

    def link_kind_name(self, link: int) -> str:
        """Technology of directed link `link`, one of `LINK_KINDS`."""
        return LINK_KINDS[int(self.link_kind[link])]

    def routes(self, source: object, target: object) -> Routes:
        """Routes of many pairs of accelerators at once.

        Parameters
        ----------
        source, target:
            int arrays [pairs] of accelerator indices. A pair with source == target has no links.

        Raises
        ------
        InputError
            If an index is out of range, or a pair has no route.
        """
        src = np.atleast_1d(np.asarray(source, dtype=np.int64))
        dst = np.atleast_1d(np.asarray(target, dtype=np.int64))
        src, dst = (array.ravel() for array in np.broadcast_arrays(src, dst))
        for ends in (src, dst):
            if len(ends) and (ends.min() < 0 or ends.max() >= len(self)):
                raise InputError(
                    f"accelerator indices must lie in 0..{len(self) - 1}, "
                    f"got {int(ends.min())}..{int(ends.max())}"
                )
        return self.router.routes(src, dst)

    @staticmethod
    def from_graph(graph: nx.Graph, **options: object) -> Cluster:
        """A cluster of the user's own graph; see `simulator.topology.graphs.from_graph`."""
        from simulator.topology.graphs import from_graph

        return from_graph(graph, **options)  # type: ignore[arg-type]
