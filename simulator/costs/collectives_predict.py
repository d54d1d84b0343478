"""Predict one measured collective from a few words about the machine, as tables of benchmarks
give them: the GPU's name, how many per node, and a line about the network."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from simulator.catalog.accelerators import Accelerator, accelerator
from simulator.costs.collectives import (
    ALGORITHMS,
    OPERATIONS,
    algorithm_name,
    collective_traffic,
)
from simulator.costs.collectives_constants import fabric_constants
from simulator.errors import InputError, unknown_name
from simulator.topology import Cluster, load_cluster

#: NVLink generation of a GPU family.
_NVLINK = {"pascal": "NVLink1", "volta": "NVLink2", "turing": "NVLink2", "ampere": "NVLink3",
           "ada": "NVLink3", "hopper": "NVLink4", "blackwell": "NVLink5",
           "rubin": "NVLink6"}  # fmt: skip
_NVLS_FAMILIES = ("hopper", "blackwell", "rubin")
_XGMI_FAMILIES = ("cdna", "cdna2", "cdna3", "cdna4")
#: Below this a card's NVLink is a bridge to one other card (A40, RTX A6000: 56 GB/s).
_BRIDGE_RATE = 75e9
#: PCIe boxes of more GPUs have two sockets.
_GPUS_PER_SOCKET = 4

#: Operations under the names of NCCL, nccl-tests, MPI, PyTorch and JAX, letters only -> operation
#: whose busiest link carries as much: a gather or scatter fills its root's link as an all-to-all
#: every link, and nccl-tests' hypercube is an all-gather.
_MEASURED_AS = {
    "allreduce": "all_reduce", "psum": "all_reduce", "reduce": "broadcast",
    "allgather": "all_gather", "allgatherintotensor": "all_gather", "allgatherv": "all_gather",
    "hypercube": "all_gather", "reducescatter": "reduce_scatter", "psumscatter": "reduce_scatter",
    "reducescattertensor": "reduce_scatter", "reducescatterv": "reduce_scatter",
    "alltoall": "all_to_all", "alltoallv": "all_to_all", "alltoallsingle": "all_to_all",
    "alltoallbase": "all_to_all", "gather": "all_to_all", "scatter": "all_to_all",
    "broadcast": "broadcast", "bcast": "broadcast", "sendrecv": "send_recv", "send": "send_recv",
    "recv": "send_recv", "p2p": "send_recv", "pointtopoint": "send_recv",
    "collectivepermute": "send_recv", "ppermute": "send_recv", "isendirecv": "send_recv",
}  # fmt: skip


def measured_operation(name: str) -> str:
    """The operation of `simulator.costs.collectives` that stands for a benchmark's (`AllReduce`,
    `all_gather_perf`, `ncclReduceScatter`, `alltoallv`, `gather`); raises InputError."""
    folded = re.sub(r"[^a-z0-9]", "", name.casefold())
    folded = re.sub(r"^(nccl|rccl|mpi)|(perf|bench|test)$", "", folded)
    try:
        return _MEASURED_AS[folded]
    except KeyError:
        raise unknown_name("collective", name, OPERATIONS) from None


#: Words of a network's description -> (link type, fabric); the first match counts.
_FABRICS: tuple[tuple[str, str, str], ...] = (
    (r"efa\s*v?3|efav3", "EFA", "efa-v3"),
    (r"efa\s*v?2|efav2", "EFA", "efa-v2"),
    (r"\befa", "EFA", "efa-v1"),
    (r"slingshot", "Slingshot", "slingshot"),
    (r"tcpx|fastrak", "Ethernet", "tcpx"),
    (r"roce|connectx.*ethernet|spectrum", "RoCE", "roce"),
    (r"\bxdr\b", "InfiniBand", "infiniband-xdr"),
    (r"\bndr\b", "InfiniBand", "infiniband-ndr"),
    (r"\bhdr\b", "InfiniBand", "infiniband-hdr"),
    (r"\bedr\b", "InfiniBand", "infiniband-edr"),
    (r"infiniband|\bib\b", "InfiniBand", "infiniband"),
    (r"omni-?path|\bopa\b", "InfiniBand", "infiniband-edr"),
    (r"ethernet|\btcp\b", "Ethernet", "ethernet"),
)
_RATE_BY_FABRIC = {"infiniband-xdr": 800, "infiniband-ndr": 400, "infiniband-hdr": 200,
                   "infiniband-edr": 100}  # fmt: skip
#: Gb/s per GPU of the vendor's reference systems (DGX-1/-2, DGX A100, DGX H100, DGX B200, MI300X).
_RATE_BY_FAMILY = {"pascal": 100, "volta": 100, "ampere": 200, "hopper": 400, "blackwell": 400,
                   "cdna3": 400, "cdna4": 400}  # fmt: skip


def reference_rate(family: str) -> int:
    """Gb/s per GPU of the reference system of a GPU family; 200 where there is none."""
    return _RATE_BY_FAMILY.get(family, 200)


_BUNDLE = re.compile(
    r"(?:(?P<count>\d+)\s*[x×*]\s*(?:[A-Za-z][\w-]*\s+)*?)?(?P<rate>\d+)\s*(?:G\b|Gb\b|Gbps|Gb/s|Gbit)",
    re.IGNORECASE,
)


def parse_network(
    text: str, gpus_per_node: int, family: str | None = None
) -> tuple[str, str, int, float]:
    """(link type, fabric, NICs per node, byte/s of one NIC) of a description such as
    `NVLink4 + EFA v2 32x100G per node`.

    Where the text names a fabric but no rate, it is that of the GPU family's reference system.
    Raises InputError where neither can be read.
    """
    link, fabric = "InfiniBand", "default"
    for pattern, kind, name in _FABRICS:
        if re.search(pattern, text, re.IGNORECASE):
            link, fabric = kind, name
            break
    # What joins the GPUs inside the node is not the network.
    outside = " + ".join(
        p for p in re.split(r"\s*\+\s*", text) if not p.lower().startswith("nvlink") or "," in p
    )
    match = _BUNDLE.search(outside)
    if match:
        rate = float(match["rate"]) * 1e9 / 8
        count = int(match["count"]) if match["count"] else gpus_per_node
        if (
            not match["count"]
            and re.search(r"per node", text, re.IGNORECASE)
            and not re.search(r"per gpu", text, re.IGNORECASE)
        ):
            count = 1
    elif fabric in _RATE_BY_FABRIC:
        rate, count = _RATE_BY_FABRIC[fabric] * 1e9 / 8, gpus_per_node
    elif (fabric != "default" or not text.strip()) and family in _RATE_BY_FAMILY:
        rate, count = _RATE_BY_FAMILY[family] * 1e9 / 8, gpus_per_node
    else:
        raise InputError(f"cannot read the network's rate (such as '8x400G') from {text!r}")
    return link, fabric, count, rate


def machine_topology(
    gpu: str,
    gpus_per_node: int,
    network: str,
    *,
    n_nodes: int,
    fabric_efficiency: float | None = None,
    sharp: bool = False,
    default_network: str | None = None,
) -> dict[str, Any]:
    """A topology mapping for `load_cluster` from a few words about a GPU machine.

    `default_network` describes the fabric where `network` names none that can be understood.

    Raises
    ------
    InputError
        For an unknown GPU, a TPU, or a network of which no rate can be read.
    """
    device = accelerator(gpu)
    if device.kind == "tpu":
        raise InputError("collectives of TPUs are costed on their torus: name a topology")
    up = _scale_up(device, gpus_per_node, network)
    node: dict[str, Any] = {"accelerators": gpus_per_node, "scale_up": up}
    content: dict[str, Any] = {
        "name": f"{n_nodes} x {gpus_per_node} {device.name}",
        "accelerator": device.name,
        "node": node,
    }
    if n_nodes * gpus_per_node > up.get("domain", gpus_per_node) and n_nodes > 1:
        try:
            kind, fabric, count, rate = parse_network(network, gpus_per_node, device.family)
        except InputError:
            if default_network is None:
                raise
            kind, fabric, count, rate = parse_network(default_network, gpus_per_node, device.family)
        if count % gpus_per_node and gpus_per_node % count:
            rate, count = rate * count / gpus_per_node, gpus_per_node
        if count > gpus_per_node and count % gpus_per_node == 0:
            rate, count = rate * (count // gpus_per_node), gpus_per_node
        node["nics"] = count
        content["network"] = {
            "kind": "rail",
            "link": kind,
            "fabric": fabric,
            "bandwidth": rate,
            "nodes_per_leaf": max(32, n_nodes),
            "fabric_efficiency": fabric_efficiency or fabric_constants(fabric).efficiency,
            "in_network_reduction": sharp,
        }
    return content


def _scale_up(device: Accelerator, gpus_per_node: int, text: str) -> dict[str, Any]:
    """What joins the GPUs of a node, from the device and the words about it."""
    inside = text.split("+")[0]
    mesh = re.search(r"mesh(?:\s*\((\d+)\s*GPU)?", text, re.IGNORECASE)
    rack = re.search(r"nvl\s*(72|36)|mnnvl|multi-?node nvlink", text, re.IGNORECASE)
    bridged = (
        "PCIe" in device.name
        or device.name.endswith("NVL")
        or 0 < device.scale_up_bandwidth < _BRIDGE_RATE
    )
    if device.family in _XGMI_FAMILIES:
        up: dict[str, Any] = {"kind": "mesh", "link": "XGMI", "links": "full", "latency": "0.5 us"}
        if gpus_per_node == 1:
            up = {"kind": "none"}
    elif (
        device.scale_up_bandwidth <= 0
        or re.search(r"\bpcie\b", inside, re.IGNORECASE)
        or (bridged and gpus_per_node > 2)  # NVLink bridges join two cards
    ):
        up = {"kind": "pcie", "link": _pcie_link(device, gpus_per_node)}
    else:
        link = _NVLINK.get(device.family, "NVLink")
        up = {"kind": "switch", "link": link}
        if mesh and gpus_per_node > 1:
            members = max(int(mesh[1] or gpus_per_node), gpus_per_node)
            rate = device.scale_up_bandwidth / (members - 1)
            up = {"kind": "mesh", "link": link, "links": "full", "bandwidth": rate}
        elif device.family in _NVLS_FAMILIES and not bridged:
            up["in_network_reduction"] = True
    if rack:
        size = int(rack[1] or 72)
        if size % gpus_per_node == 0:
            up["domain"] = size
    return up


def _pcie_link(device: Accelerator, gpus: int) -> str:
    """Key of the constants of a box without NVLink between its GPUs."""
    if re.match(r"RTX-\d", device.name):
        return "PCIe-host"  # GeForce cards have no peer-to-peer
    return "PCIe" if gpus <= _GPUS_PER_SOCKET else "PCIe-sockets"


#: Topologies that are called as the instances, not as their chips.
_INSTANCES = {"Trainium1": "trn1", "Trainium2": "trn2"}


def slice_topology(device: Accelerator) -> str:
    """Name of the topology of slices (or instances) of a chip whose links form a torus."""
    return _INSTANCES.get(device.name, device.name.casefold())


def _tpu_cluster(device: Accelerator, chips: int) -> Cluster:
    """A slice of TPUs: the topology of its generation, or that of the like number of links."""
    like = "tpu-v5p" if device.scale_up_links > 4 else "tpu-v5e"
    # A benchmark may run on a part of a slice, such as two chips.
    part = {"other_shapes": "any"}
    try:
        content = {"extends": slice_topology(device), "node": {"scale_up": part}}
        return load_cluster(content, accelerators=chips)
    except InputError:
        scale_up = {**part, "bandwidth": device.scale_up_bandwidth}
        content = {"extends": like, "accelerator": device.name, "node": {"scale_up": scale_up}}
        return load_cluster(content, accelerators=chips)


def _names_fabric(text: str) -> bool:
    return bool(_BUNDLE.search(text)) or any(
        re.search(pattern, text, re.IGNORECASE) for pattern, _, _ in _FABRICS
    )


@functools.lru_cache(maxsize=256)
def benchmark_cluster(
    gpu: str, n_nodes: int, gpus_per_node: int, network: str | None,
    fabric_efficiency: float | None = None, sharp: bool = False,
) -> Cluster:  # fmt: skip
    """The cluster of a benchmark's row; raises InputError for what cannot be understood.

    A network of which the text says no rate is that of the GPU family's reference system; racks
    (GB200, GB300) whose text names no fabric are joined by NVLink.
    """
    device = accelerator(gpu)
    if device.kind == "tpu":
        return _tpu_cluster(device, n_nodes * gpus_per_node)
    text = network or ""
    if re.match(r"GB\d", device.name) and n_nodes > 1 and not _names_fabric(text):
        text += " NVL72"
    content = machine_topology(
        device.name,
        gpus_per_node,
        text,
        n_nodes=n_nodes,
        fabric_efficiency=fabric_efficiency,
        sharp=sharp,
        default_network=f"{reference_rate(device.family)}G per GPU",
    )
    rack = "domain" in content["node"]["scale_up"]
    return load_cluster(
        content, nodes=None if rack else n_nodes, accelerators=n_nodes * gpus_per_node
    )


def predict_collective(
    op: str,
    gpu: str,
    n_gpus: int,
    n_nodes: int,
    gpus_per_node: int,
    nbytes: float,
    *,
    network: str | None = None,
    algorithm: str | None = None,
    source: str | None = None,
    fabric_efficiency: float | None = None,
    in_place: bool = False,
) -> float:
    """Seconds of a collective as nccl-tests measures it (out of place, nothing else running).

    Parameters
    ----------
    op:
        `all_reduce`, `all_gather`, `reduce_scatter`, `alltoall`, `sendrecv`, `broadcast`, `reduce`,
        `gather`, ..., under any of the usual names (`measured_operation`).
    gpu:
        Name of the accelerator catalogue, or an alias.
    n_gpus, n_nodes, gpus_per_node:
        Who takes part; of nodes with more GPUs than take part, `n_gpus / n_nodes` of each.
    nbytes:
        Size by the convention of nccl-tests.
    network:
        A description such as `NVLink4 + NDR InfiniBand, one 400G NIC per GPU used`.
    algorithm:
        `ring`, `tree`, `nvls`, ...; None, `nccl-default`, `p2p`: the fastest predicted.
    source:
        Where the measurement comes from. Not used: a fabric has properties, a publication has not.
    fabric_efficiency:
        Measured share of the line rate, in place of the fabric's usual one.
    in_place:
        The result goes to the buffer of the input.

    Raises
    ------
    InputError
        For unknown names, or counts that contradict each other.
    """
    op = measured_operation(op)
    if n_nodes > 0 and n_gpus % n_nodes == 0:
        gpus_per_node = n_gpus // n_nodes
    if n_gpus != n_nodes * gpus_per_node:
        raise InputError(f"{n_nodes} nodes of {gpus_per_node} GPUs are not {n_gpus} GPUs")
    if algorithm is not None:
        folded = algorithm.casefold()
        if folded in ("", "nan", "default", "p2p", "auto") or folded.startswith("nccl"):
            algorithm = None
        elif folded.startswith("collnet") or folded == "sharp":
            algorithm = "collnet"
        elif folded == "nvls" and n_nodes > 1:
            algorithm = "nvlstree"
        try:
            algorithm = None if algorithm is None else algorithm_name(algorithm, op)
        except InputError:
            if (algorithm or "").casefold() in ALGORITHMS:
                algorithm = None  # NCCL falls back where an algorithm does not serve the operation
            else:
                raise
    cluster = benchmark_cluster(
        gpu, n_nodes, gpus_per_node, network, fabric_efficiency, algorithm == "collnet"
    )
    traffic = collective_traffic(
        cluster, op, np.arange(n_gpus), nbytes, algorithm=algorithm, in_place=in_place
    )
    return float(traffic.duration(cluster)[0])
