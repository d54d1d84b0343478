"""Cluster graphs from the text of `nvidia-smi topo -m`.

The matrix names the kind of way between every two devices, nearest first (legend of nvidia-smi):
`NV#` bonded NVLinks, `PIX` one PCIe bridge, `PXB` several bridges, `PHB` a host bridge, `NODE`
host bridges of one NUMA domain, `SYS` the link between sockets. It has no rates: those of NVLink
and PCIe are the accelerator's, the network's must be given.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from simulator.catalog.accelerators import Accelerator
from simulator.catalog.accelerators import accelerator as accelerator_named
from simulator.errors import InputError, raise_all
from simulator.importers.files import read_text
from simulator.importers.links import PCIE_WEIGHT, SOCKET_DEFAULT, network_kind

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DEVICE = re.compile(r"^(GPU\d+|NIC\d+|mlx\d+_\w+|[a-z][a-z0-9_]*\d\w*)$")
_CELL = re.compile(r"^(X|NV\d{1,3}|PIX|PXB|PHB|NODE|SYS|SOC)$")
_NIC_LEGEND = re.compile(r"^\s*(NIC\d+)\s*:\s*(\S+)\s*$")
_GPU_LIST = re.compile(r"^GPU (\d+): (.+?)\s*(?:\(UUID|$)")
_MAX_DEVICES = 4096


@dataclass(frozen=True)
class TopologyMatrix:
    """What the text says: devices, the relation of every pair, and the NUMA domain of each."""

    devices: tuple[str, ...]
    relation: tuple[tuple[str, ...], ...]
    numa: tuple[str, ...]
    """NUMA (or CPU) affinity by device; empty text where not printed."""
    nic_names: dict[str, str]
    """`NIC0` -> `mlx5_0`."""
    models: dict[int, str]
    """GPU number -> product name, if `nvidia-smi -L` is in the text too."""

    @property
    def gpus(self) -> list[int]:
        return [i for i, name in enumerate(self.devices) if name.startswith("GPU")]

    @property
    def nics(self) -> list[int]:
        return [i for i, name in enumerate(self.devices) if not name.startswith("GPU")]


def parse_matrix(text: str, *, place: str = "nvidia-smi topo -m") -> TopologyMatrix:
    """Read the matrix out of `text`; lines before and after it are skipped.

    Raises
    ------
    InputError
        If there is no matrix, or it has unknown cells, missing rows or is not symmetric.
    """
    lines = _ANSI.sub("", text).splitlines()
    errors: list[InputError] = []
    start = next(
        (n for n, line in enumerate(lines) if re.match(r"^\s*GPU0\s+(GPU1|CPU|[a-zN])", line)), None
    )
    if start is None:
        raise InputError("no line of device names that starts with GPU0", place=place)
    columns: list[str] = []
    for token in lines[start].split():
        if not _DEVICE.match(token) or token in ("CPU", "NUMA"):
            break
        columns.append(token)
    if len(set(columns)) != len(columns) or len(columns) > _MAX_DEVICES:
        raise InputError("a device is named twice in the header", place=f"{place}:{start + 1}")
    rows: dict[str, tuple[str, ...]] = {}
    numa: dict[str, str] = {}
    numa_column = re.search(r"NUMA", lines[start])
    for number, line in enumerate(lines[start + 1 :], start + 2):
        tokens = line.split()
        if not tokens or tokens[0] not in columns:
            if tokens and tokens[0].startswith("Legend"):
                break
            continue
        cells = tuple(tokens[1 : len(columns) + 1])
        bad = [cell for cell in cells if not _CELL.match(cell)]
        if len(cells) < len(columns) or bad:
            got = f"got {bad[0]!r}" if bad else f"got {len(cells)} cells"
            errors.append(
                InputError(
                    f"row {tokens[0]}: expected {len(columns)} cells of X, NV#, PIX, PXB, PHB, "
                    f"NODE or SYS, {got}",
                    place=f"{place}:{number}",
                )
            )
            continue
        if tokens[0] in rows:
            errors.append(InputError(f"row {tokens[0]} appears twice", place=f"{place}:{number}"))
        rows[tokens[0]] = tuple("SYS" if cell == "SOC" else cell for cell in cells)
        rest = tokens[len(columns) + 1 :]
        if rest:
            numa[tokens[0]] = rest[1] if numa_column and len(rest) > 1 else rest[0]
    missing = [name for name in columns if name not in rows]
    if missing and not errors:
        errors.append(InputError(f"no row for {', '.join(missing[:8])}", place=place))
    raise_all(errors)
    relation = tuple(rows[name] for name in columns)
    for i, row in enumerate(relation):
        for j, cell in enumerate(row):
            if (cell == "X") != (i == j) or relation[j][i] != cell:
                raise InputError(
                    f"{columns[i]} - {columns[j]} is {cell!r}, but {columns[j]} - {columns[i]} is "
                    f"{relation[j][i]!r}; expected a symmetric matrix with X on its diagonal",
                    place=place,
                )
    legend = {m.group(1): m.group(2) for line in lines if (m := _NIC_LEGEND.match(line))}
    models = {int(m.group(1)): m.group(2) for line in lines if (m := _GPU_LIST.match(line))}
    return TopologyMatrix(
        devices=tuple(columns),
        relation=relation,
        numa=tuple(numa.get(name, "") for name in columns),
        nic_names=legend,
        models=models,
    )


def read_topo_matrix(
    path: str | Path, *, accelerator: str | None = None, network: float | None = None
) -> nx.Graph:
    """The graph of one host from a file with the output of `nvidia-smi topo -m`."""
    matrix = parse_matrix(read_text(path, limit=16 * 2**20), place=str(path))
    return matrix_graph(matrix, accelerator=accelerator, network=network, place=str(path))


def matrix_graph(
    matrix: TopologyMatrix,
    *,
    accelerator: str | None = None,
    network: float | None = None,
    place: str = "nvidia-smi topo -m",
) -> nx.Graph:
    """The graph of one host, as `Cluster.from_graph` takes it.

    Parameters
    ----------
    matrix:
        From `parse_matrix`.
    accelerator:
        Catalogue name of the GPUs; may be left out where the text has `nvidia-smi -L` as well.
    network:
        byte/s per direction of one NIC; NICs get a leaf each only when it is given.

    Raises
    ------
    InputError
        If the accelerator is unknown or has no NVLinks although the matrix does.
    """
    name = accelerator or _model(matrix)
    if name is None:
        raise InputError(
            "the matrix does not say which GPUs these are; name them (--accelerator NAME)",
            place=place,
        )
    chip = accelerator_named(name)
    graph = nx.Graph(name="imported")
    for i in matrix.gpus:
        graph.add_node(_node(matrix, i), type="gpu", accelerator=chip.name, node="0", host="0")
    _add_nvlinks(graph, matrix, chip, place)
    _add_pcie(graph, matrix, chip)
    for i in matrix.nics if network is not None else []:
        device = matrix.nic_names.get(matrix.devices[i], matrix.devices[i])
        leaf = f"leaf {device}"
        graph.add_node(leaf, type="leaf")
        graph.add_edge(_node(matrix, i), leaf, bandwidth=network, link=network_kind(device))
    return graph


def _model(matrix: TopologyMatrix) -> str | None:
    names = sorted(set(matrix.models.values()))
    if len(names) > 1:
        raise InputError(f"different GPUs in one host: {', '.join(names)}; name the accelerator")
    return re.sub(r"^NVIDIA\s+|^Tesla\s+", "", names[0]).replace(" ", "-") if names else None


def _node(matrix: TopologyMatrix, i: int) -> str:
    name = matrix.devices[i]
    if name.startswith("GPU"):
        return name.lower()
    return f"nic {matrix.nic_names.get(name, name)}"


def _add_nvlinks(graph: nx.Graph, matrix: TopologyMatrix, chip: Accelerator, place: str) -> None:
    """A switch where a GPU shows more links than it has (all of them to each), else direct ones."""
    pairs = {
        (i, j): int(matrix.relation[i][j][2:])
        for i in matrix.gpus
        for j in matrix.gpus
        if i < j and matrix.relation[i][j].startswith("NV")
    }
    if not pairs:
        return
    if chip.scale_up_links <= 0:
        raise InputError(f"the matrix has NVLinks, but {chip.name} has none", place=place)
    per_link = chip.scale_up_bandwidth / chip.scale_up_links
    total: Counter[int] = Counter()
    widest: Counter[int] = Counter()
    for (i, j), count in pairs.items():
        for end in (i, j):
            total[end] += count
            widest[end] = max(widest[end], count)
    if max(widest.values()) > chip.scale_up_links:
        raise InputError(
            f"NV{max(widest.values())}: {chip.name} has only {chip.scale_up_links} NVLinks",
            place=place,
        )
    switched = {i for i in total if total[i] > chip.scale_up_links}
    if switched:
        graph.add_node("nvswitch", type="nvswitch")
    for i in sorted(switched):
        bandwidth = widest[i] * per_link
        graph.add_edge(_node(matrix, i), "nvswitch", bandwidth=bandwidth, link="NVLink")
    for (i, j), count in pairs.items():
        if not (i in switched and j in switched):
            graph.add_edge(
                _node(matrix, i), _node(matrix, j), bandwidth=count * per_link, link="NVLink"
            )


def _add_pcie(graph: nx.Graph, matrix: TopologyMatrix, chip: Accelerator) -> None:
    """PCIe switches from PIX and PXB, hosts from everything nearer than SYS."""
    count = len(matrix.devices)
    rate = chip.host_bandwidth
    # NVLink hides the PCIe relation of two GPUs: nearness then follows from NICs and affinity.
    inner = _clusters(matrix, ("PIX",), count)
    outer = _clusters(matrix, ("PIX", "PXB"), count)
    domains = _host_domains(matrix, count)
    hosts = sorted(set(domains))
    for host in hosts:
        graph.add_node(f"host{host}", type="host")
    outer_sizes, inner_sizes = Counter(outer), Counter(inner)
    for i in range(count):
        if i in matrix.nics:
            graph.add_node(_node(matrix, i), type="nic")
        parent = f"host{domains[i]}"
        if outer_sizes[outer[i]] > inner_sizes[inner[i]]:
            parent = _bridge(graph, f"pcie root {outer[i]}", parent, rate)
        if inner_sizes[inner[i]] > 1:
            parent = _bridge(graph, f"pcie {inner[i]}", parent, rate)
        graph.add_edge(parent, _node(matrix, i), bandwidth=rate, link="PCIe")
        if not parent.startswith("host"):
            graph.edges[parent, _node(matrix, i)]["weight"] = PCIE_WEIGHT
    for index, a in enumerate(hosts):
        for b in hosts[index + 1 :]:
            graph.add_edge(f"host{a}", f"host{b}", bandwidth=SOCKET_DEFAULT, link="Other")


def _bridge(graph: nx.Graph, name: str, parent: str, rate: float) -> str:
    if name not in graph:
        graph.add_node(name, type="switch")
        graph.add_edge(parent, name, bandwidth=rate, link="PCIe")
        if not parent.startswith("host"):
            graph.edges[parent, name]["weight"] = PCIE_WEIGHT
    return name


def _clusters(matrix: TopologyMatrix, kinds: tuple[str, ...], count: int) -> list[int]:
    """Label (smallest member) of the devices that relations of `kinds` join."""
    near: nx.Graph = nx.Graph()
    near.add_nodes_from(range(count))
    near.add_edges_from(
        (i, j) for i in range(count) for j in range(i) if matrix.relation[i][j] in kinds
    )
    label = [0] * count
    for component in nx.connected_components(near):
        smallest = min(component)
        for member in component:
            label[member] = smallest
    return label


def _host_domains(matrix: TopologyMatrix, count: int) -> list[int]:
    """NUMA domain of every device, numbered from 0 in order of appearance."""
    near: nx.Graph = nx.Graph()
    near.add_nodes_from(range(count))
    near.add_edges_from(
        (i, j)
        for i in range(count)
        for j in range(i)
        if matrix.relation[i][j] in ("PIX", "PXB", "PHB", "NODE")
    )
    first: dict[str, int] = {}
    for i in matrix.gpus:
        affinity = matrix.numa[i]
        if affinity and affinity != "N/A":
            near.add_edge(first.setdefault(affinity, i), i)
    if not first and all(matrix.relation[i][j].startswith("NV")
                         for i in matrix.gpus for j in matrix.gpus if i != j):  # fmt: skip
        near.add_edges_from((matrix.gpus[0], i) for i in matrix.gpus)
    number: dict[int, int] = {}
    label = [0] * count
    for component in sorted(nx.connected_components(near), key=min):
        value = number.setdefault(min(component), len(number))
        for member in component:
            label[member] = value
    return label
