"""Assembling clusters from the graph of one host, in the form `Cluster.from_graph` takes.

Nodes carry `type` (`gpu`, `nvswitch`, `switch`, `host`, `nic`, `leaf`, `spine`), accelerators also
`accelerator` (catalogue name), `node` (scale-up domain) and `host`; edges carry `bandwidth` (byte/s
per direction), `link` and `latency` where it is known.
"""

from __future__ import annotations

from typing import Any

import networkx as nx

from simulator.errors import InputError

#: Hops of the fabric that NIC-less hosts cannot use are never made: a host without NICs can only
#: be a cluster of its own.
_MAX_NODES = 100_000


def replicate(
    host: nx.Graph, nodes: int, *, bandwidth: float | None = None, oversubscription: float = 1.0
) -> nx.Graph:
    """`nodes` copies of one host, NICs with the same leaf joined rail by rail.

    Every leaf of the host's graph becomes one switch that all copies share (a rail); where there
    are several rails, a spine joins them.

    Parameters
    ----------
    host:
        Graph of one host; its leaves (`type` `leaf`) are the rails.
    nodes:
        Number of hosts, at least 1.
    bandwidth:
        byte/s per direction that replaces the line rate of every NIC.
    oversubscription:
        Sum of a leaf's downlinks over its uplink to the spine.

    Raises
    ------
    InputError
        If `nodes` is not in 1..100000, or several nodes are asked for and there is no NIC.
    """
    if not 1 <= nodes <= _MAX_NODES:
        raise InputError(f"expected 1 to {_MAX_NODES} nodes, got {nodes}", place="nodes")
    if oversubscription < 1.0:
        raise InputError("must be at least 1", place="oversubscription")
    leaves = [node for node, data in host.nodes(data=True) if data.get("type") == "leaf"]
    if nodes > 1 and not leaves:
        raise InputError(
            "the host has no network to join several nodes by: no NIC with a known rate "
            "(give the rate, e.g. --network '400 Gb/s')",
            place="nodes",
        )
    result = nx.Graph(name=host.graph.get("name", "imported"))
    shared = set(leaves)
    for number in range(nodes):

        def renamed(node: str, number: int = number) -> str:
            return node if node in shared or nodes == 1 else f"n{number}.{node}"

        for node, data in host.nodes(data=True):
            if node in shared:
                continue
            copied = dict(data)
            for key in ("node", "host"):
                if key in copied and nodes > 1:
                    copied[key] = f"n{number}.{copied[key]}"
            result.add_node(renamed(node), **copied)
        for leaf in leaves:
            result.add_node(leaf, **host.nodes[leaf])
        for a, b, data in host.edges(data=True):
            changed = dict(data)
            if bandwidth is not None and shared & {a, b}:
                changed["bandwidth"] = bandwidth
            result.add_edge(renamed(a), renamed(b), **changed)
    if nodes > 1 and len(leaves) > 1:
        result.add_node("spine", type="spine")
        for leaf in leaves:
            down = [data for _, _, data in result.edges(leaf, data=True)]
            rate = sum(data["bandwidth"] for data in down) / oversubscription
            result.add_edge(leaf, "spine", bandwidth=rate, link=down[0]["link"])
    return result


def topology_mapping(
    graph: nx.Graph, *, bandwidth: float | None = None, nodes_per_leaf: int = 32
) -> dict[str, Any]:
    """The content of a topology file (as in `topologies/`) for the graph of one host.

    `bandwidth` (byte/s per direction) replaces the NICs' line rate.

    Raises
    ------
    InputError
        If the host is not regular: unlike accelerators, PCIe links or NICs, or NVLinks that are
        neither to a switch alike for all nor direct. GraphML keeps such a host as it is.
    """
    gpus = [node for node, data in graph.nodes(data=True) if data.get("type") in ("gpu", "tpu")]
    if not gpus:
        raise InputError("the graph has no accelerator")
    names = [str(graph.nodes[gpu].get("accelerator")) for gpu in gpus]
    if len(set(names)) > 1:
        raise _irregular(f"accelerators differ ({', '.join(sorted(set(names)))})")
    to_switch: dict[str, float] = {}
    direct: list[tuple[int, int, float]] = []
    host_rates: list[tuple[str, float]] = []
    index = {gpu: i for i, gpu in enumerate(gpus)}
    for gpu in gpus:
        for other, data in graph[gpu].items():
            if data["link"] == "NVLink" and graph.nodes[other]["type"] == "nvswitch":
                to_switch[gpu] = float(data["bandwidth"])
            elif data["link"] == "NVLink" and other in index:
                if index[gpu] < index[other]:
                    direct.append((index[gpu], index[other], float(data["bandwidth"])))
            elif data["link"] in ("PCIe", "C2C"):
                host_rates.append((str(data["link"]), float(data["bandwidth"])))
    if len(set(host_rates)) > 1:
        raise _irregular("the accelerators' host links differ")
    scale_up: dict[str, Any]
    if to_switch:
        if len(to_switch) != len(gpus) or len(set(to_switch.values())) > 1 or direct:
            raise _irregular("not all accelerators have the same links to the NVSwitch")
        scale_up = {"kind": "switch", "link": "NVLink", "bandwidth": next(iter(to_switch.values()))}
    elif direct:
        unit = min(rate for _, _, rate in direct)
        scale_up = {
            "kind": "mesh",
            "link": "NVLink",
            "bandwidth": unit,
            "links": [[a, b, rate / unit] for a, b, rate in direct],
        }
    else:
        scale_up = {"kind": "pcie", "link": "PCIe"}
    node: dict[str, Any] = {"accelerators": len(gpus), "scale_up": scale_up}
    if host_rates:
        node["host"] = {"link": host_rates[0][0], "bandwidth": host_rates[0][1]}
    mapping: dict[str, Any] = {
        "description": f"imported: {len(gpus)} x {names[0]}",
        "accelerator": names[0],
        "node": node,
    }
    rates = [
        (str(data["link"]), float(data["bandwidth"]))
        for a, b, data in graph.edges(data=True)
        if "leaf" in (graph.nodes[a]["type"], graph.nodes[b]["type"])
    ]
    if rates:
        if len(set(rates)) > 1:
            raise _irregular("the NICs differ")
        node["nics"] = len(rates)
        mapping["network"] = {
            "kind": "rail" if len(rates) > 1 else "fat-tree",
            "link": rates[0][0],
            "bandwidth": bandwidth or rates[0][1],
            "nodes_per_leaf": nodes_per_leaf,
        }
    return mapping


def _irregular(why: str) -> InputError:
    return InputError(
        f"{why}: a topology file describes regular hosts only; write a .graphml file instead"
    )
