"""Routes: vectorised ones equal networkx's shortest paths; faults re-route or say why not."""

from __future__ import annotations

import itertools
from collections import defaultdict

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.topology import Cluster, load_cluster

NODE = {"accelerators": 4, "scale_up": {"kind": "switch", "link": "NVLink4"}, "nics": 4}


def small(kind="rail", nics=4, per_leaf=2, oversubscription=1.0, spines=2, pods=0, ecmp="ideal"):
    return {
        "accelerator": "H100",
        "node": {**NODE, "nics": nics},
        "network": {
            "kind": kind, "bandwidth": "400 Gb/s", "nodes_per_leaf": per_leaf, "spines": spines,
            "oversubscription": oversubscription, "nodes_per_pod": pods, "ecmp": ecmp,
        },
    }  # fmt: skip


def link_loads(cluster: Cluster, source: int, target: int) -> dict[tuple[str, str], float]:
    routes = cluster.routes([source], [target])
    loads: dict[tuple[str, str], float] = defaultdict(float)
    for link, share in zip(routes.link, routes.share, strict=True):
        loads[cluster.link_ends(int(link))] += float(share)
    return loads


def networkx_loads(cluster: Cluster, source: int, target: int) -> dict[tuple[str, str], float]:
    """Equal spreading over networkx's shortest paths, with spines merged to trunks."""
    graph = cluster.graph.copy()
    graph.remove_nodes_from([n for n, d in graph.nodes(data=True) if d["type"] in ("hbm", "host")])
    a, b = cluster.accelerators[source], cluster.accelerators[target]
    # Traffic passes through no third accelerator.
    others = [n for n, d in graph.nodes(data=True) if d["type"] == "gpu" and n not in (a, b)]
    graph.remove_nodes_from(others)
    # NVLink comes before the way through a shared NIC.
    paths = list(
        nx.all_shortest_paths(graph, a, b, weight=lambda _u, _v, d: 2 if d["link"] == "PCIe" else 1)
    )
    loads: dict[tuple[str, str], float] = defaultdict(float)

    def merged(name: str) -> str:
        head, _, last = name.rpartition("/")
        if last.startswith("spine"):
            return (head + "/" if head else "") + "spine*"
        return "core*" if last.startswith("core") else name

    for path in paths:
        for x, y in itertools.pairwise(path):
            loads[merged(x), merged(y)] += 1.0 / len(paths)
    return loads


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["rail", "fat-tree"]),
    nics=st.sampled_from([1, 2, 4]),
    per_leaf=st.integers(1, 3),
    nodes=st.integers(1, 6),
    pods=st.sampled_from([0, 2]),
    data=st.data(),
)
def test_routes_equal_networkx_shortest_paths(kind, nics, per_leaf, nodes, pods, data):
    cluster = load_cluster(small(kind, nics, per_leaf, pods=pods * per_leaf), nodes=nodes)
    n = len(cluster)
    source = data.draw(st.integers(0, n - 1))
    target = data.draw(st.integers(0, n - 1).filter(lambda x: x != source))
    ours, theirs = link_loads(cluster, source, target), networkx_loads(cluster, source, target)
    assert set(ours) == set(theirs)
    for link, share in theirs.items():
        assert ours[link] == pytest.approx(share)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(nodes=st.integers(2, 5), seed=st.integers(0, 100))
def test_routes_are_connected_paths_with_unit_flow(nodes, seed):
    """Kirchhoff: one byte leaves the source, one arrives, nothing stays in between."""
    cluster = load_cluster(small(pods=2, per_leaf=1), nodes=nodes)
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, len(cluster), (2, 30))
    routes = cluster.routes(source, target)
    for p in range(30):
        balance: dict[str, float] = defaultdict(float)
        part = slice(routes.indptr[p], routes.indptr[p + 1])
        for link, share in zip(routes.link[part], routes.share[part], strict=True):
            tail, head = cluster.link_ends(int(link))
            balance[tail] -= share
            balance[head] += share
        if source[p] == target[p]:
            assert not balance
            assert routes.latency[p] == 0
            continue
        assert balance.pop(cluster.accelerators[source[p]]) == pytest.approx(-1)
        assert balance.pop(cluster.accelerators[target[p]]) == pytest.approx(1)
        assert all(abs(rest) < 1e-9 for rest in balance.values())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(4,), (5,), (3, 4), (4, 4), (2, 3, 4), (2, 2, 2)]),
    wrap=st.booleans(),
    seed=st.integers(0, 50),
)
def test_torus_routes_have_shortest_length(shape, wrap, seed):
    size = int(np.prod(shape))
    cluster = load_cluster(
        {
            "accelerator": "TPU-v5p",
            "node": {
                "accelerators": size,
                "scale_up": {
                    "kind": "torus", "link": "ICI", "shape": list(shape), "wrap": wrap,
                    "dimensions": len(shape),
                },
            },
        },
        accelerators=size,
    )  # fmt: skip
    grid = nx.grid_graph(dim=list(reversed(shape)), periodic=wrap)
    names = list(itertools.product(*map(range, shape)))
    a, b = np.random.default_rng(seed).integers(0, size, (2, 20))
    routes = cluster.routes(a, b)
    hops = np.bincount(routes.pair, weights=routes.share, minlength=20)
    for p in range(20):
        key = [names[i] if len(shape) > 1 else names[i][0] for i in range(size)]
        assert hops[p] == pytest.approx(nx.shortest_path_length(grid, key[a[p]], key[b[p]]))


def test_counted_all_pairs_equal_routed_pairs():
    cluster = load_cluster(small(per_leaf=1, pods=2), nodes=6)
    members = np.array([[0, 1, 5, 9, 17, 20], [2, 6, 10, 14, 18, 22]])
    group, link, amount = cluster.router.all_pairs(members)
    counted = np.zeros((2, cluster.links))
    np.add.at(counted, (group, link), amount)
    for g, row in enumerate(members):
        a, b = zip(*[(x, y) for x in row for y in row if x != y], strict=True)
        routes = cluster.routes(a, b)
        routed = np.bincount(routes.link, weights=routes.share, minlength=cluster.links)
        np.testing.assert_allclose(counted[g], routed)


def test_hashed_paths_use_one_spine_each_and_spread():
    cluster = load_cluster(small("fat-tree", spines=4, per_leaf=1, ecmp="hash"), nodes=8)
    source = np.arange(4, 32)
    routes = cluster.routes(source, np.zeros(28, dtype=int))
    assert set(routes.share) == {1.0}
    spines = {
        cluster.link_ends(int(e))[1] for e in routes.link if "spine" in cluster.link_name(int(e))
    }
    assert len([s for s in spines if s.startswith("spine")]) == 4
    again = cluster.routes(source, np.zeros(28, dtype=int))
    np.testing.assert_array_equal(routes.link, again.link)


def test_rail_stays_behind_its_leaf_and_cross_rail_climbs():
    cluster = load_cluster("dgx-h100", nodes=2)
    assert not any("spine" in "".join(ends) for ends in link_loads(cluster, 0, 8))
    assert any("spine" in "".join(ends) for ends in link_loads(cluster, 0, 9))


def test_oversubscription_narrows_the_trunk():
    full = load_cluster(small("fat-tree"), nodes=4)
    tapered = load_cluster(small("fat-tree", oversubscription=4), nodes=4)
    trunk = [i for i in range(full.links) if "spine" in full.link_name(i)]
    np.testing.assert_allclose(full.link_capacity[trunk], 2 * 4 * 50e9)
    np.testing.assert_allclose(tapered.link_capacity[trunk], 2 * 4 * 50e9 / 4)


# --------------------------------------------------------------------------- faults


def test_degraded_link_scales_both_directions():
    fault = {"link": ["node0/gpu1", "node0/nvswitch"], "bandwidth_factor": 0.5}
    cluster = load_cluster("dgx-h100", faults=[fault])
    slow = [i for i in range(cluster.links) if "node0/gpu1 " in cluster.link_name(i) + " "
            and "nvswitch" in cluster.link_name(i)]  # fmt: skip
    np.testing.assert_allclose(cluster.link_capacity[slow], 225e9)
    assert len(slow) == 2
    assert cluster.graph.edges["node0/gpu1", "node0/nvswitch"]["bandwidth"] == 225e9


def test_slow_accelerator():
    cluster = load_cluster("dgx-h100", nodes=3, faults=[{"gpu": 17, "slowdown": 1.3}])
    assert cluster.slowdown[17] == 1.3
    assert cluster.slowdown.sum() == pytest.approx(24.3)


def test_failed_nic_borrows_a_peers():
    cluster = load_cluster(
        "dgx-h100", nodes=2, faults=[{"link": ["node0/gpu0", "node0/nic0"], "failed": True}]
    )
    loads = link_loads(cluster, 0, 8)
    assert ("node0/gpu0", "node0/nic0") not in loads
    assert loads["node0/gpu0", "node0/nvswitch"] == 1
    assert loads["node0/gpu1", "node0/nic1"] == 1
    assert not cluster.graph.has_edge("node0/gpu0", "node0/nic0")


def test_failed_scale_up_link_goes_by_the_network():
    cluster = load_cluster(
        "dgx-h100", nodes=2, faults=[{"link": ["node0/gpu0", "node0/nvswitch"], "failed": True}]
    )
    loads = link_loads(cluster, 0, 1)
    assert loads["node0/gpu0", "node0/nic0"] == 1
    assert ("node0/gpu0", "node0/nvswitch") not in loads


def test_failed_spine_link_loads_the_others_more():
    fault = {"link": ["leaf0", "spine0"], "failed": True}
    healthy = load_cluster(small("fat-tree", spines=4, per_leaf=1), nodes=3)
    broken = load_cluster(small("fat-tree", spines=4, per_leaf=1), nodes=3, faults=[fault])

    def trunk_seconds(cluster, source, target):
        routes = cluster.routes([source], [target])
        return max(
            share / cluster.link_capacity[link]
            for link, share in zip(routes.link, routes.share, strict=True)
            if "spine" in cluster.link_name(int(link))
        )

    # Three of four spines are left for whoever talks with leaf0, all four for the others.
    assert trunk_seconds(broken, 0, 4) == pytest.approx(trunk_seconds(healthy, 0, 4) * 4 / 3)
    assert trunk_seconds(broken, 8, 0) == pytest.approx(trunk_seconds(healthy, 8, 0) * 4 / 3)
    assert trunk_seconds(broken, 4, 8) == pytest.approx(trunk_seconds(healthy, 4, 8))


def test_failed_mesh_link_is_bridged():
    fault = {"link": ["node0/gpu0", "node0/gpu1"], "failed": True}
    cluster = load_cluster("mi300x", nodes=2, faults=[fault])
    loads = link_loads(cluster, 0, 1)
    # Two hops over each of the six other GPUs.
    assert len(loads) == 12
    assert all(share == pytest.approx(1 / 6) for share in loads.values())
    assert len(link_loads(cluster, 8, 9)) == 1


def test_failed_torus_link_is_bridged():
    cluster = load_cluster("tpu-v5e", accelerators=16)
    a, b = cluster.accelerators[0], cluster.accelerators[1]
    broken = load_cluster("tpu-v5e", accelerators=16, faults=[{"link": [a, b], "failed": True}])
    assert len(link_loads(cluster, 0, 1)) == 1
    assert sum(link_loads(broken, 0, 1).values()) == pytest.approx(3)


@pytest.mark.parametrize(
    ("topology", "fault", "words"),
    [
        ("a100-1nic", {"link": ["node0/nic0", "leaf0"], "failed": True}, "no peer"),
        ("dgx-h100", {"link": ["node0/gpu0", "node0/nvswitc"], "failed": True}, "did you mean"),
        ("dgx-h100", {"link": ["node0/gpu0", "node1/gpu0"], "failed": True}, "no link between"),
        ("dgx-h100", {"gpu": 99, "slowdown": 2}, "99"),
        ("dgx-h100", {"gpu": 1, "slowdown": 0.5}, "slowdown"),
        ("dgx-h100", {"gpu": 1, "link": ["a", "b"]}, "either"),
    ],
)
def test_impossible_faults_are_one_clear_error(topology, fault, words):
    with pytest.raises(InputError, match=words):
        load_cluster(topology, nodes=2, faults=[fault])


def test_user_given_route():
    content = small("fat-tree", per_leaf=1, spines=2, ecmp="hash")
    path = ["node0/gpu0", "node0/nic0", "leaf0", "spine1", "leaf1", "node1/nic0", "node1/gpu0"]
    content["routes"] = [{"source": "node0/gpu0", "target": "node1/gpu0", "paths": [path]}]
    cluster = load_cluster(content, nodes=2)
    assert list(link_loads(cluster, 0, 4)) == list(itertools.pairwise(path))
    # Other pairs keep the router's routes, also in the same query.
    routes = cluster.routes([0, 1], [4, 5])
    assert routes.pairs == 2
    assert np.diff(routes.indptr).min() == 6
    content["routes"][0]["paths"][0][3] = "spine7"
    with pytest.raises(InputError, match="spine7"):
        load_cluster(content, nodes=2)
    content["network"]["ecmp"] = "ideal"
    content["routes"][0]["paths"][0][3] = "spine1"
    with pytest.raises(InputError, match="ecmp: hash"):
        load_cluster(content, nodes=2)


def test_hashed_flows_avoid_failed_spine_links():
    content = small("fat-tree", per_leaf=1, spines=2, ecmp="hash")
    fault = {"link": ["leaf0", "spine0"], "failed": True}
    cluster = load_cluster(content, nodes=4, faults=[fault])
    a, b = np.divmod(np.arange(256), 16)
    routes = cluster.routes(a, b)
    names = [cluster.link_name(int(link)) for link in routes.link]
    assert "leaf0 -> spine0" not in names
    assert "spine0 -> leaf0" not in names
    assert "leaf0 -> spine1" in names
    assert "leaf1 -> spine0" in names


@pytest.mark.parametrize("ecmp", ["ideal", "hash"])
def test_leaf_without_uplinks_is_an_error(ecmp):
    content = small("fat-tree", per_leaf=1, spines=2, ecmp=ecmp)
    faults = [{"link": ["leaf0", f"spine{s}"], "failed": True} for s in range(2)]
    with pytest.raises(InputError, match="lost all its uplinks"):
        load_cluster(content, nodes=2, faults=faults)


def test_degraded_spine_link_slows_its_trunk():
    content = small("fat-tree", per_leaf=1, spines=2)
    fault = {"link": ["leaf0", "spine1"], "bandwidth_factor": 0.25}
    healthy, slow = load_cluster(content, nodes=2), load_cluster(content, nodes=2, faults=[fault])
    trunks = [i for i in range(slow.links) if "spine" in slow.link_name(i)]
    ratio = slow.link_capacity[trunks] / healthy.link_capacity[trunks]
    # Equal spreading waits for the slowest member.
    assert sorted(ratio) == [0.25, 0.25, 1, 1]
    assert slow.graph.edges["leaf0", "spine1"]["bandwidth"] == pytest.approx(
        0.25 * slow.graph.edges["leaf0", "spine0"]["bandwidth"]
    )


def test_faults_of_a_graph_are_checked_too():
    graph = load_cluster("dgx-h100").graph
    with pytest.raises(InputError, match="did you mean 'slowdown'"):
        load_cluster(graph, faults=[{"gpu": 1, "slowdow": 2}])
    assert load_cluster(graph, faults=[{"gpu": 1, "slowdown": 2}]).slowdown[1] == 2


@pytest.mark.parametrize(
    ("shape", "wrap", "members"),
    [
        ((4, 4), (True, True), "all"),
        ((4, 6), (True, False), "all"),
        ((2, 4, 4), (False, True, True), "all"),
        ((4, 8), (True, True), [[0, 1, 2, 3], [4, 5, 6, 7], [16, 17, 18, 19]]),
        ((4, 8), (True, True), [[0, 2, 4, 6, 16, 18, 20, 22], [9, 11, 13, 15, 25, 27, 29, 31]]),
        ((4, 8), (True, True), [[0, 8, 16, 24], [3, 11, 19, 27]]),
    ],
)
def test_counted_torus_pairs_equal_routed_pairs(shape, wrap, members):
    size = int(np.prod(shape))
    up = {"kind": "torus", "link": "ICI", "shape": list(shape), "wrap": list(wrap),
          "dimensions": len(shape)}  # fmt: skip
    content = {"accelerator": "TPU-v5p", "node": {"accelerators": size, "scale_up": up}}
    cluster = load_cluster(content, accelerators=size)
    rows = np.arange(size)[None] if members == "all" else np.array(members)
    group, link, amount = cluster.router.all_pairs(rows)
    counted = np.zeros((len(rows), cluster.links))
    np.add.at(counted, (group, link), amount)
    for g, row in enumerate(rows):
        a, b = (grid.ravel() for grid in np.meshgrid(row, row))
        routes = cluster.routes(a, b)
        routed = np.bincount(routes.link, weights=routes.share, minlength=cluster.links)
        np.testing.assert_allclose(counted[g], routed)


def test_members_that_are_no_box_are_routed_pair_by_pair():
    cluster = load_cluster("tpu-v5e", accelerators=64)
    assert cluster.router.all_pairs(np.array([[0, 1, 9, 18]])) is None
