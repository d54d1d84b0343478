"""Loads of many groups: one pattern and a shift give what every group has by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.costs.collectives import collective_traffic
from simulator.topology import load_cluster
from simulator.topology.loads import LinkLoads, equal_rows

H100 = {
    "accelerator": "H100-80GB-SXM",
    "node": {
        "accelerators": 8,
        "scale_up": {"kind": "switch", "link": "NVLink4", "bandwidth": "450 GB/s"},
        "nics": 8,
    },
    "network": {"kind": "rail", "link": "InfiniBand", "bandwidth": "400 Gb/s", "nodes_per_leaf": 3},
}
FAULTS = {
    "none": [],
    "slow NIC": [{"link": ["node3/nic2", "leaf10"], "bandwidth_factor": 0.5}],
    "no NIC": [{"link": ["node3/gpu2", "node3/nic2"], "failed": True}],
    "no NVLink": [{"link": ["node3/gpu2", "node3/nvswitch"], "failed": True}],
    "lost spine": [{"link": ["leaf10", "spine1"], "failed": True}],
}


def cluster_of(kind, fault, nodes=10):
    if kind == "torus":
        return load_cluster("tpu-v4", accelerators=128)
    topology = dict(H100)
    changes = {
        "rail": {},
        "two GPUs per NIC": {"nics": 4},
        "fat-tree": {"kind": "fat-tree"},
        "pods": {"nodes_per_leaf": 2, "nodes_per_pod": 4},
        "hashed": {"ecmp": "hash"},
    }[kind]
    topology["node"] = {**H100["node"], "nics": changes.pop("nics", 8)}
    topology["network"] = {**H100["network"], **changes}
    return load_cluster(topology, nodes=nodes, faults=fault)


def written_out(loads, links):
    table = np.zeros((int(loads.group.max()) + 1, links))
    np.add.at(table, loads.entries()[:2], loads.entries()[2])
    return table


def groups_of(total, size, stride, rng):
    """Disjoint groups of equal stride, as a mesh of ranks has, some in another order."""
    rank = np.arange(total // (size * stride) * size * stride)
    groups = rank.reshape(-1, size, stride).swapaxes(1, 2).reshape(-1, size)
    return groups[rng.permutation(len(groups))]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("op", "size", "stride"),
    [("all_reduce", 8, 1), ("reduce_scatter", 5, 8), ("all_gather", 4, 2), ("send_recv", 2, 24),
     ("all_to_all", 8, 4)],
)  # fmt: skip
def test_groups_together_are_as_each_alone(fault, op, size, stride):
    faults = FAULTS[fault]
    cluster = cluster_of("rail", faults)
    groups = groups_of(80, size, stride, np.random.default_rng(size))
    fixed = {  # else chosen by the first group of each shape
        "algorithm": collective_traffic(cluster, op, groups, 1e8).algorithm,
        "protocol": "Simple",
    }
    table = written_out(collective_traffic(cluster, op, groups, 1e8, **fixed).loads, cluster.links)
    for g, members in enumerate(groups):
        alone = collective_traffic(cluster, op, members[None, :], 1e8, **fixed)
        np.testing.assert_allclose(table[g], written_out(alone.loads, cluster.links)[0], rtol=1e-12)


@given(
    kind=st.sampled_from(["rail", "two GPUs per NIC", "fat-tree", "pods", "hashed", "torus"]),
    op=st.sampled_from(["all_reduce", "all_gather", "send_recv", "all_to_all"]),
    size=st.sampled_from([2, 3, 4, 8]), stride=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=40)
def test_shifted_patterns_are_what_routes_give(kind, op, size, stride, seed):
    """The same with a router that says nothing about like groups."""
    cluster = cluster_of(kind, [])
    groups = groups_of(len(cluster), size, stride, np.random.default_rng(seed))
    assume(len(groups))

    class Plain:
        routes = cluster.router.routes

    plain = replace(cluster, router=Plain())
    one, other = (collective_traffic(c, op, groups, 1e8) for c in (cluster, plain))
    np.testing.assert_allclose(
        written_out(one.loads, cluster.links), written_out(other.loads, cluster.links), rtol=1e-12
    )
    np.testing.assert_allclose(one.latency, other.latency)
    np.testing.assert_allclose(one.duration(cluster), other.duration(plain), rtol=1e-12)


def test_like_groups_have_one_pattern():
    """64 data-parallel rings of 16 nodes need the links of one."""
    cluster = load_cluster("dgx-h100", nodes=128)
    ranks = np.arange(1024).reshape(8, 16, 8).swapaxes(1, 2).reshape(64, 16)
    loads = collective_traffic(cluster, "all_gather", ranks, 1e9).loads
    assert len(loads.start) - 1 <= 4
    assert len(loads.entries()[0]) >= 64 * 64


@given(st.integers(0, 2**32))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_pieces_and_joined_parts_give_all_entries(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3, size=(int(rng.integers(1, 30)), 12)) * rng.random(12)
    group, link = np.nonzero(table)
    order = rng.permutation(len(group))
    loads = LinkLoads.of(len(table), group[order], link[order], table[group, link][order])
    empty = LinkLoads.of(3, *(np.zeros(0, dtype=int),) * 2, np.zeros(0))
    loads = LinkLoads.joined([loads, empty.numbered(np.arange(3) + len(table))])
    found = np.zeros_like(table)
    for rows, entries, links in loads.pieces():
        work = np.broadcast_to(loads.work[entries], links.shape)
        np.add.at(found, (np.broadcast_to(loads.group[rows], links.shape), links), work)
    np.testing.assert_array_equal(found, table)
    np.testing.assert_array_equal(written_out(loads, 12)[: len(table)], table)
    capacity = 1.0 + rng.random(12)
    seconds, work = loads.alone(capacity)
    np.testing.assert_allclose(seconds[: len(table)], (table / capacity).max(axis=1))
    assert np.all(work[: len(table)] <= table.max(axis=1))
    total = np.zeros(12)
    times = rng.integers(0, 3, size=len(table) + 3).astype(float)
    loads.add_to(total, times)
    np.testing.assert_allclose(total, times[: len(table)] @ table)


@given(st.integers(0, 2**32))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_equal_rows(seed):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, 2, size=(20, k)) for k in (2, 1, 2)]
    class_of, first = equal_rows(columns)
    table = np.concatenate(columns, axis=1)
    for i in range(20):
        assert class_of[i] == class_of[min(j for j in range(20) if (table[j] == table[i]).all())]
    assert np.all(np.diff(first) > 0)
    np.testing.assert_array_equal(class_of[first], np.arange(len(first)))
