"""Cluster graphs from `nvidia-smi topo -m`, NCCL's XML and GraphML."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import yaml

from simulator.errors import InputError
from simulator.importers import (
    read_graphml,
    read_nccl_xml,
    read_topo_matrix,
    replicate,
    write_graphml,
)
from simulator.importers.hosts import topology_mapping
from simulator.importers.links import pcie_bandwidth
from simulator.importers.nccl_xml import parse_nccl_xml
from simulator.importers.topo_matrix import matrix_graph, parse_matrix
from simulator.topology import Cluster, load_cluster


def test_switched_matrix_gives_every_gpu_its_whole_nvlink_bandwidth(data: Path) -> None:
    graph = read_topo_matrix(data / "dgx_h100_topo.txt", accelerator="H100")
    cluster = Cluster.from_graph(graph)
    assert len(cluster.accelerators) == 8
    # 18 NVLink 4 of 25 GB/s per direction (NVIDIA H100 whitepaper)
    assert cluster.scale_up.bandwidth == 18 * 25e9
    assert [graph.nodes[f"gpu{i}"]["type"] for i in range(8)] == ["gpu"] * 8
    hosts = [next(n for n in graph[f"gpu{i}"] if n.startswith("host")) for i in range(8)]
    assert hosts == ["host0"] * 4 + ["host1"] * 4


def test_direct_matrix_keeps_the_hybrid_cube_mesh(data: Path) -> None:
    graph = read_topo_matrix(data / "dgx1_v100_topo.txt", accelerator="V100", network=12.5e9)
    links = {
        tuple(sorted(edge[:2])): edge[2]["bandwidth"]
        for edge in graph.edges(data=True)
        if edge[2]["link"] == "NVLink"
    }
    # DGX-1: every V100 has six NVLinks of 25 GB/s
    for i in range(8):
        assert sum(rate for ends, rate in links.items() if f"gpu{i}" in ends) == 6 * 25e9
    assert links["gpu0", "gpu3"] == 2 * links["gpu0", "gpu1"]
    assert "nvswitch" not in graph
    cluster = Cluster.from_graph(graph)
    # two GPUs and one NIC behind each PCIe switch
    assert cluster.nic_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_matrix_as_topology_file_loads(data: Path) -> None:
    graph = read_topo_matrix(data / "dgx1_v100_topo.txt", accelerator="V100", network=12.5e9)
    mapping = yaml.safe_load(yaml.safe_dump(topology_mapping(graph)))
    cluster = load_cluster(mapping, nodes=4)
    assert len(cluster.accelerators) == 32
    assert cluster.scale_up.bandwidth == 6 * 25e9


def test_traffic_stays_on_nvlink_though_a_pcie_switch_is_as_near(data: Path) -> None:
    cluster = Cluster.from_graph(read_nccl_xml(data / "hgx_a100_nccl.xml"))
    routes = cluster.routes(np.array([0, 0]), np.array([1, 7]))
    assert {cluster.link_kind_name(int(link)) for link in routes.link} == {"NVLink"}


def test_nccl_xml_rates(data: Path) -> None:
    graph = read_nccl_xml(data / "hgx_a100_nccl.xml")
    # six NVSwitches, two NVLink 3 of 25 GB/s to each
    assert graph.edges["gpu0", "nvswitch"]["bandwidth"] == 12 * 25e9
    assert graph.nodes["gpu0"]["accelerator"] == "A100"
    # 200 Gb/s NICs, PCIe 4 x16: 16 GT/s x 16 lanes x 128/130 / 8
    assert graph.edges["nic mlx5_0", "leaf mlx5_0"]["bandwidth"] == 25e9
    pcie = next(d for *_, d in graph.edges("nic mlx5_0", data=True) if d["link"] == "PCIe")
    assert pcie["bandwidth"] == pytest.approx(31.5e9, rel=1e-3)
    cluster = Cluster.from_graph(replicate(graph, 2))
    assert sorted(cluster.nic_of.tolist()) == list(range(16))
    assert cluster.node_of.tolist() == [0] * 8 + [1] * 8
    routes = cluster.routes(np.array([0]), np.array([8]))
    kinds = {cluster.link_kind_name(int(link)) for link in routes.link}
    assert kinds == {"PCIe", "InfiniBand"}


@pytest.mark.parametrize(
    ("speed", "width", "rate"),
    [
        ("2.5 GT/s PCIe", "16", 4e9),
        ("8 GT/s", "16", 15.754e9),
        ("16.0 GT/s PCIe", "8", 15.754e9),
        ("32.0 GT/s PCIe", "16", 63.015e9),
        ("", "0", 15.754e9),
    ],
)
def test_pcie_rates(speed: str, width: str, rate: float) -> None:
    assert pcie_bandwidth(speed, width) == pytest.approx(rate, rel=1e-3)


def test_nvlink_pair_in_a_virtual_machine_without_pcie_speeds() -> None:
    gpu = (
        '<cpu numaid="{i}" arch="x86_64" vendor="AuthenticAMD"><pci busid="000{i}:00:00.0" '
        'class="0x030200" device="0x20b5" link_speed="" link_width="0"><gpu dev="{i}" sm="80">'
        '<nvlink target="000{j}:00:00.0" count="12" tclass="0x030200"/></gpu></pci></cpu>'
    )
    text = "<system>" + gpu.format(i=1, j=2) + gpu.format(i=2, j=1) + "</system>"
    graph = parse_nccl_xml(text)
    assert graph.edges["gpu1", "gpu2"]["bandwidth"] == 12 * 25e9
    assert graph.edges["host1", "host2"]["link"] == "Other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<system", "not valid XML"),
        ("<a/>", "expected a <system>"),
        ("<system/>", "no <cpu>"),
        ('<!DOCTYPE s [<!ENTITY a "b">]><system><cpu>&a;</cpu></system>', "DTDs and entities"),
        ('<!DOCTYPE s SYSTEM "file:///etc/passwd"><system/>', "DTDs and entities"),
        ("<system>" + "<cpu>" * 100 + "</cpu>" * 100 + "</system>", "nested too deep"),
        ('<system><cpu><pci busid="1"><gpu sm="80"/></pci></cpu></system>', "name the accelerator"),
        ('<system><cpu><pci busid="1" link_speed="fast"/></cpu></system>', "16.0 GT/s"),
    ],
)
def test_bad_xml(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_nccl_xml(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("GPU0     X    NV18", "GPU0     X    NV17", "symmetric"),
        ("GPU3    NV18  NV18", "GPU3    NV18  QPI9", "row GPU3"),
        ("GPU7    NV18", "CPU7    NV18", "no row for GPU7"),
        ("GPU0  GPU1", "gpus", "no line of device names"),
    ],
)
def test_bad_matrix(data: Path, old: str, new: str, message: str) -> None:
    text = (data / "dgx_h100_topo.txt").read_text().replace(old, new)
    with pytest.raises(InputError, match=message):
        parse_matrix(text)


def test_matrix_needs_the_accelerator(data: Path) -> None:
    text = (data / "dgx_h100_topo.txt").read_text()
    with pytest.raises(InputError, match="--accelerator"):
        matrix_graph(parse_matrix(text))
    named = text + "\nGPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"
    assert matrix_graph(parse_matrix(named)).nodes["gpu0"]["accelerator"].startswith("H100")


def test_graphml_round_trip(tmp_path: Path, data: Path) -> None:
    graph = replicate(read_nccl_xml(data / "hgx_a100_nccl.xml"), 2)
    path = tmp_path / "cluster.graphml"
    write_graphml(graph, path)
    back = read_graphml(path)
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert nx.utils.edges_equal(list(back.edges(data=True)), list(graph.edges(data=True)))
    assert load_cluster(str(path)).scale_up.bandwidth == 300e9
    assert [p.name for p in tmp_path.iterdir()] == ["cluster.graphml"]


def test_graphml_with_entities_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.graphml"
    path.write_text('<!DOCTYPE g [<!ENTITY a "aaaa">]><graphml>&a;</graphml>')
    with pytest.raises(InputError, match="DTDs and entities"):
        read_graphml(path)
    with pytest.raises(InputError, match="cannot be read as a graph"):
        load_cluster(str(path))


def test_nothing_half_written(tmp_path: Path) -> None:
    graph = nx.Graph()
    graph.add_nodes_from([1, "1"])
    target = tmp_path / "out.graphml"
    target.write_text("before")
    with pytest.raises(InputError, match="must differ"):
        write_graphml(graph, target)
    assert target.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_replicas_need_a_network(data: Path) -> None:
    graph = read_topo_matrix(data / "dgx_h100_topo.txt", accelerator="H100")
    with pytest.raises(InputError, match="--network"):
        replicate(graph, 2)
