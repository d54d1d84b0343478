"""Cluster graphs from NCCL's topology XML (`NCCL_TOPO_DUMP_FILE`, `NCCL_TOPO_FILE`).

The file is a tree: `system` > `cpu` (NUMA domains) > `pci` (bridges and devices) > `gpu` (with
`nvlink` and `c2c`) or `nic` > `net`. Format: NCCL src/graph/xml.cc and topo.cc (2.27). Parsed with
defusedxml: no DTDs, no entities, no external references.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree as SafeTree
import networkx as nx
from defusedxml.common import DefusedXmlException

from simulator.errors import InputError, raise_all
from simulator.importers.files import read_bytes
from simulator.importers.links import (
    DEVICE_NAMES,
    NVLINK_BY_SM,
    PCIE_DEFAULT,
    PCIE_WEIGHT,
    SOCKET_BY_VENDOR,
    SOCKET_DEFAULT,
    network_kind,
    pcie_bandwidth,
)

_MAX_DEPTH = 64
_MAX_ELEMENTS = 200_000


def read_nccl_xml(path: str | Path, *, accelerator: str | None = None) -> nx.Graph:
    """The graph of one host from an NCCL topology file; see `parse_nccl_xml`."""
    return parse_nccl_xml(read_bytes(path, limit=64 * 2**20), accelerator, place=str(path))


def parse_nccl_xml(
    text: bytes | str, accelerator: str | None = None, *, place: str = "topology XML"
) -> nx.Graph:
    """The graph of one host (or of a multi-node NVLink domain, `system` elements in `systems`).

    Parameters
    ----------
    text:
        The XML.
    accelerator:
        Catalogue name of the GPUs; when left out it follows from their PCI device ids.

    Returns
    -------
    networkx.Graph
        Accelerators in the order of their `dev` number, as `Cluster.from_graph` takes it; every
        network device hangs on a `leaf` of its own.

    Raises
    ------
    InputError
        For XML that is broken, uses DTDs or entities, or is no NCCL topology.
    """
    try:
        root = SafeTree.fromstring(text, forbid_dtd=True)
    except DefusedXmlException as error:
        raise InputError(f"DTDs and entities are not allowed: {error}", place=place) from None
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise InputError(f"not valid XML: {error}", place=place) from None
    if root.tag != "system":
        raise InputError(
            f"expected a <system> element as NCCL writes it, got <{root.tag[:60]}>", place=place
        )
    reader = _Reader(accelerator, place)
    reader.check_size(root)
    cpus = root.findall("cpu")
    if not cpus:
        raise InputError("has no <cpu> element", place=place)
    for position, cpu in enumerate(cpus):
        reader.cpu(cpu, position)
    return reader.finish()


class _Reader:
    def __init__(self, accelerator: str | None, place: str) -> None:
        self.accelerator = accelerator
        self.place = place
        self.graph = nx.Graph(name="imported")
        self.errors: list[InputError] = []
        self.gpus: list[tuple[int, int, str]] = []
        """(dev, order of appearance, node name)"""
        self.nvlinks: list[tuple[str, str, str, float]] = []
        """(gpu node, target bus id, target class, byte/s)"""
        self.by_bus: dict[str, str] = {}
        self.attributes: dict[str, dict[str, object]] = {}
        self.edges: dict[tuple[str, str], dict[str, object]] = {}
        self.sockets: list[tuple[str, str]] = []
        """(host node, vendor)"""
        self.nets: dict[str, str] = {}

    def check_size(self, root: Element) -> None:
        stack, seen = [(root, 0)], 0
        while stack:
            element, depth = stack.pop()
            seen += 1
            if depth > _MAX_DEPTH or seen > _MAX_ELEMENTS:
                raise InputError("nested too deep or too large for a topology", place=self.place)
            stack.extend((child, depth + 1) for child in element)

    def fail(self, problem: str, element: Element) -> None:
        name = element.get("busid") or element.get("name") or element.get("dev") or ""
        self.errors.append(
            InputError(
                problem, place=f"{self.place}: <{element.tag} {name[:40]}>".replace(" >", ">")
            )
        )

    def number(
        self, element: Element, key: str, default: float | None = None, base: int = 10
    ) -> float:
        text = element.get(key)
        if text is None and default is not None:
            return default
        try:
            value = float(int(text or "", base)) if base != 10 else float(text or "")
        except (ValueError, OverflowError):
            value = -1.0
        if not 0 <= value < 1e15:
            self.fail(f"{key} must be a number, got {text!r}", element)
            return default if default is not None else 0.0
        return value

    def node(self, name: str, **attributes: object) -> str:
        self.attributes.setdefault(name, attributes)
        return name

    def edge(self, a: str, b: str, bandwidth: float, link: str) -> None:
        key = (a, b) if a <= b else (b, a)
        self.edges[key] = {"bandwidth": bandwidth, "link": link}
        ends = {self.attributes.get(end, {}).get("type") for end in key}
        if link == "PCIe" and "host" not in ends:
            self.edges[key]["weight"] = PCIE_WEIGHT

    def cpu(self, cpu: Element, position: int) -> None:
        label = cpu.get("numaid", str(position))
        host_hash = cpu.get("host_hash", "")
        name = self.node(f"{host_hash}host{label}" if host_hash else f"host{label}", type="host")
        arch = cpu.get("arch", "x86_64")
        self.sockets.append((name, cpu.get("vendor", arch) if arch == "x86_64" else arch))
        for child in cpu:
            self.child(child, name, PCIE_DEFAULT)

    def child(self, element: Element, parent: str, rate: float) -> None:
        """`element` below the graph node `parent`, whose link has `rate` byte/s."""
        if element.tag == "pci":
            self.pci(element, parent)
        elif element.tag == "nic":
            for net in element.findall("net"):
                self.net(net, parent, rate)
        elif element.tag == "gpu":
            self.fail("a <gpu> must lie in a <pci>", element)

    def pci(self, pci: Element, parent: str) -> None:
        bus = (pci.get("busid") or "").lower()
        if not bus:
            self.fail("has no busid", pci)
            return
        if bus in self.by_bus:
            self.fail(f"busid {bus!r} appears twice", pci)
            return
        try:
            rate = pcie_bandwidth(pci.get("link_speed", ""), pci.get("link_width", ""))
        except InputError as error:
            self.fail(error.problem, pci)
            return
        self.by_bus[bus] = ""
        gpu = pci.find("gpu")
        if gpu is not None:
            self.gpu(gpu, pci, parent, rate)
        elif pci.find("nic") is not None:
            for nic in pci.findall("nic"):
                self.child(nic, parent, rate)
        elif pci.find("pci") is not None:
            name = self.node(f"pcie {bus}", type="switch")
            self.by_bus[bus] = name
            self.edge(parent, name, rate, "PCIe")
            for child in pci:
                self.child(child, name, rate)

    def gpu(self, gpu: Element, pci: Element, parent: str, rate: float) -> None:
        bus = (pci.get("busid") or "").lower()
        dev = int(self.number(gpu, "dev", float(len(self.gpus))))
        sm = int(self.number(gpu, "sm", 0.0))
        chosen = self.accelerator or DEVICE_NAMES.get((pci.get("device") or "").lower())
        if chosen is None:
            self.fail(
                f"unknown PCI device {pci.get('device')!r}; name the accelerator "
                "(--accelerator NAME)",
                pci,
            )
            return
        name = f"gpu{dev}"
        if name in self.attributes:
            name = f"gpu{dev} {bus}"
        self.node(name, type="gpu", accelerator=chosen)
        self.by_bus[bus] = name
        self.gpus.append((dev, len(self.gpus), name))
        c2c = [
            self.number(item, "bw") * self.number(item, "count", 1.0) for item in gpu.findall("c2c")
        ]
        if sum(c2c) > 0:
            self.edge(parent, name, sum(c2c) * 1e6, "C2C")  # bw is in MB/s
        else:
            self.edge(parent, name, rate, "PCIe")
        links = gpu.findall("nvlink")
        if links and sm not in NVLINK_BY_SM:
            known = ", ".join(str(value) for value in NVLINK_BY_SM)
            self.fail(f"no NVLink rate is known for sm {sm} (known: {known})", gpu)
            return
        for link in links:
            count = self.number(link, "count", 1.0)
            target = (link.get("target") or "").lower()
            self.nvlinks.append((name, target, link.get("tclass", ""), count * NVLINK_BY_SM[sm]))

    def net(self, net: Element, parent: str, rate: float) -> None:
        name = net.get("name") or f"net{net.get('dev', len(self.nets))}"
        speed = self.number(net, "speed", 0.0)  # Mb/s
        if name in self.nets or speed <= 0:
            return  # a NIC without affinity is listed under every CPU; one without a rate is down
        nic = self.node(f"nic {name}", type="nic")
        self.nets[name] = nic
        self.edge(parent, nic, rate, "PCIe")
        leaf = self.node(f"leaf {name}", type="leaf")
        self.edge(nic, leaf, speed * 1e6 / 8, network_kind(name))

    def finish(self) -> nx.Graph:
        for gpu, target, target_class, rate in self.nvlinks:
            if target_class.startswith("0x0680") and not target_class.startswith("0x068001"):
                # NCCL sees all NVSwitches of a domain as one (topo.cc: ncclTopoConnectCpus, NVS)
                self.node("nvswitch", type="nvswitch")
                known = self.edges.get((gpu, "nvswitch"), {"bandwidth": 0.0})["bandwidth"]
                self.edge(gpu, "nvswitch", rate + float(known), "NVLink")  # type: ignore[arg-type]
            elif self.by_bus.get(target):
                self.edge(gpu, self.by_bus[target], rate, "NVLink")
            elif target_class.startswith("0x068001"):
                host = next(
                    (a if b == gpu else b for a, b in self.edges
                     if gpu in (a, b) and "host" in (a if b == gpu else b)), None,
                )  # fmt: skip
                if host is not None:
                    self.edge(gpu, host, rate, "NVLink")
            else:
                self.errors.append(
                    InputError(f"{gpu}: NVLink to unknown device {target!r}", place=self.place)
                )
        if not self.gpus and not self.errors:
            self.errors.append(InputError("has no <gpu> element", place=self.place))
        raise_all(self.errors)
        for i, (a, vendor) in enumerate(self.sockets):
            for b, _ in self.sockets[i + 1 :]:
                self.edge(a, b, SOCKET_BY_VENDOR.get(vendor, SOCKET_DEFAULT), "Other")
        graph = self.graph
        for _, _, name in sorted(self.gpus):
            graph.add_node(name, **self.attributes[name], node="0", host="0")
        for name, attributes in self.attributes.items():
            graph.add_node(name, **attributes)
        for (a, b), data in self.edges.items():
            graph.add_edge(a, b, **data)
        return graph
