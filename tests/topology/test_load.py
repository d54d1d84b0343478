"""Topology files: the shipped ones, sizes, overrides, and bad input."""

from __future__ import annotations

import pickle

import networkx as nx
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from simulator.catalog.accelerators import accelerators
from simulator.cli.show import command as show
from simulator.costs.collectives_predict import slice_topology
from simulator.errors import InputError
from simulator.topology import (
    LINK_KINDS,
    NODE_TYPES,
    load_cluster,
    topology_description,
    topology_names,
)
from simulator.topology.files import DATA


@pytest.mark.parametrize("name", topology_names())
def test_shipped_topologies_build_and_connect(name):
    cluster = load_cluster(name)
    n = len(cluster)
    a, b = np.divmod(np.arange(n * n), n)
    routes = cluster.routes(a, b)
    assert (np.diff(routes.indptr)[a != b] > 0).all()
    assert (cluster.link_capacity > 0).all()
    assert {d["type"] for _, d in cluster.graph.nodes(data=True)} <= set(NODE_TYPES)
    for _, _, data in cluster.graph.edges(data=True):
        assert data["link"] in LINK_KINDS
        assert data["bandwidth"] > 0
    described = topology_description(name)
    assert described["node"]["accelerators"] >= 4
    assert described["name"] == name

    content = yaml.safe_load((DATA / f"{name}.yaml").read_text())
    assert content["description"]
    assert content.get("sources") or content.get("extends")


def test_a_file_is_described_under_its_own_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("description: mine\nextends: dgx-h100\nnodes: 3\n")
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\nname: third\n")
    mine = topology_description(str(tmp_path / "mine.yaml"))
    other = topology_description(str(tmp_path / "other.yaml"))
    parent = topology_description("dgx-h100")
    assert (mine["name"], mine["description"], mine["extends"]) == ("mine", "mine", "dgx-h100")
    assert (other["name"], other["description"], other["extends"]) == ("third", "", "mine.yaml")
    assert mine["node"] == other["node"] == parent["node"]
    assert other["nodes"] == 3
    outcome = CliRunner().invoke(show, ["topology", str(tmp_path / "mine.yaml")])
    assert outcome.output.split()[:2] == ["name", "mine"]
    assert load_cluster(tmp_path / "mine.yaml").name == "mine"


def test_arrays_agree_with_the_graph():
    cluster = load_cluster("dgx-h100", nodes=3)
    graph = cluster.graph
    for link in range(cluster.links):
        tail, head = cluster.link_ends(link)
        if "*" in tail + head:
            continue  # a trunk stands for all edges to the spines
        data = graph.edges[tail, head]
        assert data["bandwidth"] == cluster.link_capacity[link]
        assert data["latency"] == cluster.link_latency[link]
        assert data["link"] == cluster.link_kind_name(link)
    trunk = sum(d["bandwidth"] for _, head, d in graph.edges("leaf0", data=True) if "spine" in head)
    up = next(i for i in range(cluster.links) if cluster.link_name(i) == "leaf0 -> spine*")
    assert trunk == pytest.approx(cluster.link_capacity[up])


def test_counts():
    assert len(load_cluster("dgx-h100", nodes=4)) == 32
    assert len(load_cluster("dgx-h100", accelerators=4)) == 4
    cluster = load_cluster("dgx-h100", nodes=4, accelerators=8)
    assert cluster.node_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rack = load_cluster("gb200-nvl72", accelerators=64)
    assert rack.nodes == 1
    assert rack.scale_up.size == 64
    racks = load_cluster("gb200-nvl72", accelerators=256)
    assert np.bincount(racks.node_of).tolist() == [64] * 4
    assert load_cluster("gb200-nvl72", accelerators=72).nodes == 1


def test_network_rate_is_per_accelerator():
    cluster = load_cluster("a100-4nic", nodes=2, network="100 Gb/s")
    assert cluster.scale_out.bandwidth == pytest.approx(25e9)  # two GPUs share a NIC
    assert load_cluster("dgx-h100", nodes=2, network=25e9).scale_out.bandwidth == 25e9
    assert load_cluster("dgx-h100", fabric_efficiency=0.8).link_efficiency.min() == 0.8


def test_more_nics_than_accelerators_are_bundles():
    cluster = load_cluster("aws-p5", nodes=2)
    assert cluster.scale_out.bandwidth == pytest.approx(50e9)


@pytest.mark.parametrize(
    ("name", "chips", "shape", "wrap"),
    [
        ("tpu-v5e", 256, (16, 16), (True, True)),
        ("tpu-v5e", 128, (8, 16), (False, True)),
        ("tpu-v5e", 64, (8, 8), (False, False)),
        ("tpu-v4", 64, (4, 4, 4), (True, True, True)),
        ("tpu-v4", 32, (2, 4, 4), (False, True, True)),
        ("tpu-v5p", 8960, (16, 20, 28), (True, True, True)),
        ("tpu-v4", 768, (8, 8, 12), (True, True, True)),
        ("tpu-v2", 256, (16, 16), (True, True)),
        ("tpu-v3", 16, (4, 4), (False, False)),
        ("tpu-v3", 512, (16, 32), (False, True)),
        ("tpu-v3", 1024, (32, 32), (True, True)),
        ("tpu-v7", 64, (4, 4, 4), (True, True, True)),
        ("tpu-v7", 9216, (16, 24, 24), (True, True, True)),
        ("trn1", 16, (4, 4), (True, True)),
        ("trn2", 64, (4, 4), (True, True)),
    ],
)
def test_slice_shapes_and_wrap_around(name, chips, shape, wrap):
    cluster = load_cluster(name, accelerators=chips)
    assert cluster.scale_up.shape == shape
    assert cluster.scale_up.wrap == wrap


def test_every_tpu_of_the_catalogue_has_slices():
    for chip in accelerators().values():
        if chip.kind == "tpu":
            cluster = load_cluster(slice_topology(chip), accelerators=64)
            assert cluster.accelerator_type_names == (chip.name,)
            assert cluster.scale_up.link_bandwidth == pytest.approx(
                chip.scale_up_bandwidth, rel=0.1
            )
            # a 2D torus has 4 links per chip, a 3D one 6
            assert 2 * len(cluster.scale_up.shape) == chip.scale_up_links


def test_slices_are_joined_by_the_data_centre_network():
    cluster = load_cluster("tpu-v5e", accelerators=512)
    assert cluster.nodes == 2
    kinds = {cluster.link_kind_name(int(i)) for i in cluster.routes([0], [256]).link}
    assert "DCN" in kinds
    assert load_cluster("tpu-v5e", nodes=4, accelerators=64).scale_up.shape == (4, 4)


def test_mixed_generations():
    content = {
        "mix": [{"accelerator": "A100", "nodes": 1}, {"accelerator": "H100", "nodes": 2}],
        "node": {"accelerators": 8, "scale_up": {"kind": "switch", "link": "NVLink3"}, "nics": 8},
        "network": {"kind": "rail", "bandwidth": "200 Gb/s"},
    }
    cluster = load_cluster(content)
    assert len(cluster) == 24
    assert np.bincount(cluster.accelerator_type_of).tolist() == [8, 16]
    assert [t.name for t in cluster.accelerator_types] == ["A100-80GB-SXM", "H100-80GB-SXM"]


def test_a_new_cluster_in_a_few_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: dgx-h100\nnodes: 2\nnetwork: {bandwidth: 200 Gb/s, oversubscription: 2}\n"
    )
    cluster = load_cluster(path)
    assert cluster.name == "mine"
    assert len(cluster) == 16
    assert cluster.scale_out.bandwidth == 25e9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: dgx-h10", "did you mean 'dgx-h100'"),
        ("extends: dgx-h100\nnode: {nic: 3}", "node.nic: unknown key; did you mean 'nics'"),
        (
            "extends: dgx-h100\nnetwork: {bandwidth: 400 Gx/s}",
            "network.bandwidth: expected a bandwidth",
        ),
        ("extends: dgx-h100\naccelerator: H1000", "accelerator"),
        ("extends: dgx-h100\nnode: {scale_up: {kind: ring}}", "'switch'"),
        ("extends: dgx-h100\nnode: {scale_up: {domain: 12}}", "multiple"),
        ("node: {accelerators: 8}", "scale_up"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("extends: ring.yaml", "circle|no such file"),
        ("extends: dgx-h100\nnode: {nics: 0}", "nics"),
        ("extends: tpu-v5e\nnode: {scale_up: {shape: [3, 5]}}", "holds 15"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_cluster(path, accelerators=16)
    assert ".yaml" in str(caught.value)


def test_all_errors_of_a_file_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("extends: dgx-h100\nnodes: 0\nnode: {nic: 3}\nnetwork: {kind: star}\n")
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nodes": 0}, "positive"),
        ({"nodes": 2, "accelerators": 17}, "do not fit"),
        ({"nodes": 2, "accelerators": 15}, "evenly"),
    ],
)
def test_bad_counts(arguments, words):
    with pytest.raises(InputError, match=words):
        load_cluster("dgx-h100", **arguments)


# --------------------------------------------------------------------------- graphs


def ring_graph(n=4):
    graph = nx.cycle_graph(n)
    nx.set_node_attributes(graph, "gpu", "type")
    nx.set_node_attributes(graph, "A100", "accelerator")
    nx.set_edge_attributes(graph, "50 GB/s", "bandwidth")
    nx.set_edge_attributes(graph, "NVLink", "link")
    return graph


def test_custom_graph_splits_over_equal_paths():
    cluster = load_cluster(ring_graph(4))
    routes = cluster.routes([0], [2])
    assert len(routes.link) == 4
    np.testing.assert_allclose(routes.share, 0.5)
    assert cluster.nodes == 1


def test_unreachable_accelerators_are_named():
    graph = ring_graph(4)
    graph.add_node("far", type="gpu", accelerator="A100")
    with pytest.raises(InputError, match="far"):
        load_cluster(graph)


def test_graph_errors_come_together():
    graph = ring_graph(3)
    graph.add_node("x", type="gpuu")
    graph.add_node("y")
    graph.add_edge("x", "y")
    with pytest.raises(InputError) as caught:
        load_cluster(graph)
    text = str(caught.value)
    assert "did you mean 'gpu'" in text
    assert "has no `type`" in text
    assert "has no `bandwidth`" in text


def test_graph_faults_and_given_routes():
    cluster = load_cluster(ring_graph(4), faults=[{"link": [0, 1], "failed": True}])
    assert len(cluster.routes([0], [1]).link) == 3
    with pytest.raises(InputError, match="no other way"):
        load_cluster(ring_graph(4), faults=[{"link": [0, 1], "failed": True},
                                            {"link": [0, 3], "failed": True}])  # fmt: skip
    from simulator.topology import from_graph

    routed = from_graph(ring_graph(4), routes={("0", "2"): [["0", "3", "2"]]})
    assert [routed.link_ends(int(i)) for i in routed.routes([0], [2]).link] == [
        ("0", "3"),
        ("3", "2"),
    ]


def test_graphml_round_trip(tmp_path):
    original = load_cluster("polaris", nodes=2)
    path = tmp_path / "polaris.graphml"
    nx.write_graphml(original.graph, path)
    again = load_cluster(path)
    assert len(again) == 8
    assert again.node_of.tolist() == original.node_of.tolist()
    assert again.nic_of.tolist() == original.nic_of.tolist()
    a, b = np.divmod(np.arange(64), 8)
    ours, theirs = original.routes(a, b), again.routes(a, b)
    for p in range(64):
        assert sum(theirs.share[theirs.indptr[p] : theirs.indptr[p + 1]]) == pytest.approx(
            sum(ours.share[ours.indptr[p] : ours.indptr[p + 1]])
        )
    broken = tmp_path / "broken.graphml"
    broken.write_text("<graphml><nod")
    with pytest.raises(InputError, match="cannot be read"):
        load_cluster(broken)


def test_graph_spelt_out_in_yaml(tmp_path):
    path = tmp_path / "pair.yaml"
    path.write_text(
        """
accelerator: A100
graph:
  nodes: {a: gpu, b: {type: gpu}, sw: switch}
  edges:
    - {from: a, to: sw, bandwidth: 100 Gb/s, link: RoCE, latency: 1 us}
    - {from: sw, to: b, bandwidth: 100 Gb/s, link: RoCE}
"""
    )
    cluster = load_cluster(path)
    routes = cluster.routes([0], [1])
    assert len(routes.link) == 2
    np.testing.assert_allclose(cluster.link_capacity, 12.5e9)
    path.write_text(path.read_text().replace("to: b", "to: bb"))
    with pytest.raises(InputError, match="did you mean 'b'"):
        load_cluster(path)


def test_shared_attributes_cannot_be_changed_by_accident():
    graph = load_cluster("dgx-h100", nodes=2).graph
    with pytest.raises(TypeError, match="copy"):
        graph.edges["node0/gpu0", "node0/nvswitch"]["bandwidth"] = 1.0
    mine = graph.copy()
    mine.edges["node0/gpu0", "node0/nvswitch"]["bandwidth"] = 1.0
    assert mine.edges["node0/gpu1", "node0/nvswitch"]["bandwidth"] == 450e9
    assert graph.to_directed().number_of_edges() == 2 * graph.number_of_edges()
    assert pickle.loads(pickle.dumps(graph)).number_of_nodes() == graph.number_of_nodes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graph": 5}, "graph"),
        ({"graph": {"nodes": [1], "edges": []}}, "graph.*nodes"),
        ({"graph": {"nodes": {"a": "gpu"}, "edges": 1}}, "edges"),
        ({"routes": [{"a": 1}]}, "routes.0.source: is missing"),
        ({"fabric_efficiency": 2}, "less than or equal to 1"),
        ({"nodez": 1}, "unknown key"),
    ],
)
def test_bad_graph_files_are_clear_errors(change, words):
    good = {
        "accelerator": "A100",
        "graph": {
            "nodes": {"a": "gpu", "b": "gpu"},
            "edges": [{"from": "a", "to": "b", "bandwidth": 1e9, "weight": 2}],
        },
    }
    assert len(load_cluster(good)) == 2
    with pytest.raises(InputError, match=words):
        load_cluster({**good, **change})


def test_sizes_beyond_memory_are_refused_at_once():
    with pytest.raises(InputError, match="at most"):
        load_cluster("dgx-h100", nodes=10**9)
    with pytest.raises(InputError, match="spines"):
        load_cluster({"extends": "dgx-h100", "network": {"spines": 10**9}})
