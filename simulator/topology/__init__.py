"""Clusters as networkx graphs: node and link types, building, routes, importers."""

from simulator.topology.cluster import LINK_KINDS, NODE_TYPES, Cluster, Routes, ScaleOut, ScaleUp
from simulator.topology.files import load_cluster, topology_description, topology_names
from simulator.topology.graphs import from_graph

__all__ = [
    "LINK_KINDS",
    "NODE_TYPES",
    "Cluster",
    "Routes",
    "ScaleOut",
    "ScaleUp",
    "from_graph",
    "load_cluster",
    "topology_description",
    "topology_names",
]
