"""Folding: the classes people expect, and that the partition found is equitable."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import simulate
from simulator.folding import fold, resolve
from simulator.model.operations import Collective
from simulator.topology import load_cluster
from simulator.topology.cluster import Routes
from simulator.workload import Entry, RankProgram, Segment, Task, Workload


def comm(name, op, group, nbytes):
    return Task(name, op, -1, "F", bytes=nbytes, collective=Collective(name, op, group, nbytes))


KERNEL = Task("gemm", "gemm", 0, "F", 1e-6, 1e-3, 1e6, 1.0, 1e6)
LAYER = Segment("layer", (KERNEL, comm("tp", "all_reduce", "tensor", 1e7), KERNEL))


@dataclass
class FatTree:
    """Nodes of `node` accelerators with a NIC each, leaves of `leaf` nodes per rail, one spine.

    Links: NVLink out, in; NIC to leaf, leaf to NIC (each per accelerator); leaf up, down.
    """

    size: int
    node: int = 8
    leaf: int = 16
    oversubscription: float = 1.0

    def __post_init__(self):
        a = np.arange(self.size)
        self.leaf_of = a // (self.node * self.leaf) * self.node + a % self.node
        self.leaves = int(self.leaf_of.max()) + 1
        up = 50e9 * self.leaf / self.oversubscription
        self.link_capacity = np.concatenate(
            [np.full(2 * self.size, 450e9), np.full(2 * self.size, 50e9),
             np.full(2 * self.leaves, up)]
        )  # fmt: skip
        self.memory_bandwidth = np.full(self.size, 3.35e12)

    def hops(self, s, t):
        """(pair, link) along the routes, in order."""
        n, pair = self.size, np.arange(s.size)
        inside = s // self.node == t // self.node
        out, cross = ~inside, ~inside & (self.leaf_of[s] != self.leaf_of[t])
        parts = [
            (pair[inside], s[inside], 0), (pair[inside], n + t[inside], 1),
            (pair[out], 2 * n + s[out], 0), (pair[cross], 4 * n + self.leaf_of[s[cross]], 1),
            (pair[cross], 4 * n + self.leaves + self.leaf_of[t[cross]], 2),
            (pair[out], 3 * n + t[out], 3),
        ]  # fmt: skip
        pairs = np.concatenate([p[0] for p in parts])
        links = np.concatenate([p[1] for p in parts])
        place = np.concatenate([np.full(p[0].size, p[2]) for p in parts])
        order = np.lexsort((place, pairs))
        return pairs[order], links[order]

    def routes(self, s, t):
        pair, link = self.hops(np.asarray(s), np.asarray(t))
        return Routes(pair, link, np.ones(pair.size), np.zeros(len(s)))


@dataclass
class Rings:
    latency: np.ndarray
    group: np.ndarray
    link: np.ndarray
    work: np.ndarray
    hbm_bytes: float
    sm_fraction: float


def rings(cluster, op, ranks, nbytes):
    g, n = ranks.shape
    if op == "send_recv":
        s, t, hop = ranks[:, 0], ranks[:, 1], float(nbytes)
    else:
        s, t = ranks.reshape(-1), np.roll(ranks, -1, axis=1).reshape(-1)
        hop = nbytes * (n - 1) / n * (2 if op == "all_reduce" else 1)
    pair, link = cluster.hops(s, t)
    group = pair // (s.size // g)
    key, count = np.unique(group * len(cluster.link_capacity) + link, return_counts=True)
    return Rings(
        np.full(g, 1e-6 * n), key // len(cluster.link_capacity),
        key % len(cluster.link_capacity), count * hop, 2.0 * nbytes, 0.1,
    )  # fmt: skip


def pipeline(tensor, data, stages, microbatches=2, slow=()):
    """GPipe's forward pass with sends, and gradient reductions that overlap the last kernels."""
    programs = []
    for p in range(stages):
        compute, sends, grads = [], [], []
        for m in range(microbatches):
            compute.append(Entry(LAYER, p, m, (m,) if p else (), (microbatches + m,)))
            if p + 1 < stages:
                segment = Segment("send", (comm("send", "send_recv", "pipeline", 5e7),))
                sends.append(Entry(segment, p, m, (microbatches + m,), (), p + 1, (m,)))
            reduce = Segment("grad", (comm(f"grad{m}", "reduce_scatter", "data", 1e8),))
            grads.append(Entry(reduce, p, m, (microbatches + m,)))
        streams = {"compute": tuple(compute), "data": tuple(grads)}
        if sends:
            streams["pipeline"] = tuple(sends)
        programs.append(RankProgram(f"stage {p}", streams, 2 * microbatches))
    ranks = tensor * data * stages
    r = np.arange(ranks)
    t, d, p = r % tensor, r // tensor % data, r // (tensor * data)
    slowdown = np.ones(ranks)
    for rank in slow:
        slowdown[rank] = 1.3
    return Workload(
        programs=tuple(programs), program_of=p, placement=r,
        groups={"tensor": r // tensor, "data": t + tensor * p},
        pipeline_peer=np.stack([t + tensor * (d + data * q) for q in range(stages)]),
        slowdown=slowdown,
    )  # fmt: skip


def test_a_regular_cluster_folds_to_its_stages():
    q = fold(resolve(pipeline(8, 64, 4), FatTree(2048), rings))
    assert q.classes == 4
    assert q.counts.tolist() == [512] * 4
    assert q.representatives.tolist() == [0, 512, 1024, 1536]


def test_an_uplink_that_is_not_oversubscribed_tells_nobody_apart():
    """Data groups of 24 nodes straddle leaves of 16 unevenly; only oversubscription shows it."""
    workload = pipeline(8, 24, 2)
    assert fold(resolve(workload, FatTree(384), rings)).classes == 2
    assert fold(resolve(workload, FatTree(384, oversubscription=4.0), rings)).classes > 2


@pytest.mark.parametrize("oversubscription", [1.0, 4.0])
def test_what_is_left_out_changes_nothing(oversubscription):
    """Folded with implied links left out = every rank and every link."""
    workload = pipeline(2, 6, 2, slow=[5])
    cluster = FatTree(24, node=2, leaf=4, oversubscription=oversubscription)
    folded = simulate(workload, cluster, traffic=rings)
    plain = FatTree(24, node=2, leaf=4, oversubscription=oversubscription)
    plain.routes = None
    whole = simulate(workload, plain, traffic=rings, fold=False)
    a, b = folded.frame("all"), whole.frame("all")
    np.testing.assert_allclose(a["end"], b["end"], rtol=1e-9)
    np.testing.assert_allclose(a["start"], b["start"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "network",
    [
        {"nodes_per_leaf": 2},
        {"nodes_per_leaf": 2, "oversubscription": 4.0},
        {"nodes_per_leaf": 1, "nodes_per_pod": 2, "pod_oversubscription": 3.0},
        {"kind": "fat-tree", "nodes_per_leaf": 3},
    ],
)
def test_links_left_out_of_a_real_cluster_change_nothing(network):
    """By what its router states of trunks, by routes looked at, or none at all."""
    topology = {
        "accelerator": "H100-80GB-SXM",
        "node": {"accelerators": 2, "scale_up": {"kind": "switch", "link": "NVLink4"}, "nics": 2},
        "network": {"kind": "rail", "link": "InfiniBand", "bandwidth": "100 Gb/s", **network},
    }
    cluster = load_cluster(topology, nodes=12)
    workload = pipeline(2, 6, 2, slow=[5])

    class Sampled:
        routes = cluster.router.routes

    frames = [
        simulate(workload, cluster).frame("all"),
        simulate(workload, replace(cluster, router=Sampled())).frame("all"),
        simulate(workload, cluster, fold=False).frame("all"),
    ]
    for other in frames[1:]:
        for column in ("start", "end"):
            np.testing.assert_allclose(frames[0][column], other[column], rtol=1e-9, atol=1e-15)


def test_one_slow_gpu_splits_what_it_touches():
    """Its pipeline's tensor groups (its own rail apart), and its rail in all the others."""
    q = fold(resolve(pipeline(8, 64, 4, slow=[77]), FatTree(2048), rings))
    assert q.classes == 4 * 4
    assert sorted(set(q.counts.tolist())) == [1, 7, 63, 441]
    assert q.counts[q.class_of[77]] == 1


def test_a_degraded_link_splits_what_it_touches():
    cluster = FatTree(256)
    cluster.link_capacity[2 * 256 + 9] /= 2  # the NIC of rank 9
    q = fold(resolve(pipeline(8, 16, 2), cluster, rings))
    assert 2 < q.classes <= 8
    assert q.counts[q.class_of[9]] == 1


def test_mixed_accelerators_split():
    cluster = FatTree(256)
    cluster.memory_bandwidth[128:] *= 2.0
    assert fold(resolve(pipeline(8, 16, 2), cluster, rings)).classes == 2
    cluster.memory_bandwidth[:64] *= 2.0
    assert fold(resolve(pipeline(8, 16, 2), cluster, rings)).classes == 4


@given(
    tensor=st.sampled_from([1, 2, 4]), data=st.integers(1, 6), stages=st.integers(1, 3),
    node=st.sampled_from([2, 4]), leaf=st.sampled_from([1, 2, 3]),
    oversubscription=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=40)
def test_equitable(tensor, data, stages, node, leaf, oversubscription, seed):
    """Every rank of a class meets, in every family, groups of the same class composition."""
    rng = np.random.default_rng(seed)
    ranks = tensor * data * stages
    slow = rng.choice(ranks, size=int(rng.integers(0, 3))).tolist()
    workload = pipeline(tensor, data, stages, slow=slow)
    q = fold(resolve(workload, FatTree(ranks, node, leaf, oversubscription), rings))
    assert np.array_equal(np.sort(np.unique(q.class_of)), np.arange(q.classes))
    assert q.counts.sum() == ranks
    for labels in workload.groups.values():
        met = {}
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            composition = tuple(np.bincount(q.class_of[members], minlength=q.classes))
            for rank in members:
                assert met.setdefault(q.class_of[rank], composition) == composition
    for peer in workload.pipeline_peer:
        met = {}
        for rank in range(ranks):
            assert (
                met.setdefault(q.class_of[rank], q.class_of[peer[rank]]) == q.class_of[peer[rank]]
            )


def test_large_clusters_are_quick():
    """16,384 ranks; the 131,072 of the benchmark take eight times as long."""
    workload, cluster = pipeline(8, 128, 16), FatTree(16384)
    system = resolve(workload, cluster, rings)
    begin = time.process_time()
    q = fold(system)
    assert time.process_time() - begin < 1.5
    assert q.classes == 16
