"""A small network with a traffic model of its own, and random workloads on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.model.operations import Collective
from simulator.workload import Entry, RankProgram, Segment, Task, Workload


@dataclass
class ToyCluster:
    """Nodes with a switch inside, one NIC per accelerator, leaves joined by one spine.

    Links: NVLink out and in per accelerator, NIC out and in per accelerator, up and down per leaf.
    """

    node_size: int
    leaf_size: int
    link_capacity: np.ndarray
    memory_bandwidth: np.ndarray

    @property
    def size(self) -> int:
        return len(self.memory_bandwidth)


def toy_cluster(
    accelerators, *, node_size=4, leaf_size=8, nvlink=100e9, nic=10e9, oversubscription=1.0,
    hbm=1000e9,
):  # fmt: skip
    leaves = -(-accelerators // leaf_size)
    capacity = np.concatenate(
        [
            np.full(2 * accelerators, nvlink),
            np.full(2 * accelerators, nic),
            np.full(2 * leaves, nic * leaf_size / oversubscription),
        ]
    )
    return ToyCluster(node_size, leaf_size, capacity, np.full(accelerators, hbm))


@dataclass
class ToyTraffic:
    latency: np.ndarray
    group: np.ndarray
    link: np.ndarray
    work: np.ndarray
    hbm_bytes: np.ndarray
    sm_fraction: float


FACTOR = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "send_recv": 1.0}


@dataclass
class RingTraffic:
    """Every collective is a ring in rank order; a transfer is one hop."""

    alpha: float = 2e-6
    hbm_factor: float = 3.0
    sm_fraction: float = 0.15

    def __call__(self, cluster, op, ranks, nbytes):
        ranks = np.asarray(ranks)
        g, n = ranks.shape
        a = cluster.size
        if op == "send_recv":
            source, target = ranks[:, :1], ranks[:, 1:]
            hop = np.full(source.shape, float(nbytes))
        else:
            source, target = ranks, np.roll(ranks, -1, axis=1)
            hop = np.full(source.shape, nbytes * FACTOR[op] * (n - 1) / n)
        group = np.repeat(np.arange(g), source.shape[1])
        s, t, w = source.reshape(-1), target.reshape(-1), hop.reshape(-1)
        same = s // cluster.node_size == t // cluster.node_size
        leaf_s, leaf_t = s // cluster.leaf_size, t // cluster.leaf_size
        cross = leaf_s != leaf_t
        leaves = -(-a // cluster.leaf_size)
        parts = [
            (group[same], s[same], w[same]),
            (group[same], a + t[same], w[same]),
            (group[~same], 2 * a + s[~same], w[~same]),
            (group[~same], 3 * a + t[~same], w[~same]),
            (group[cross], 4 * a + leaf_s[cross], w[cross]),
            (group[cross], 4 * a + leaves + leaf_t[cross], w[cross]),
        ]
        group, link, work = (np.concatenate([p[i] for p in parts]) for i in range(3))
        key, inverse = np.unique(group * len(cluster.link_capacity) + link, return_inverse=True)
        return ToyTraffic(
            latency=np.full(g, self.alpha * (n - 1)),
            group=key // len(cluster.link_capacity),
            link=key % len(cluster.link_capacity),
            work=np.bincount(inverse, weights=work, minlength=key.size),
            hbm_bytes=np.full(g, self.hbm_factor * nbytes),
            sm_fraction=self.sm_fraction,
        )


def mesh_workload(programs, tensor, data, slowdown=None, placement=None, labels=None):
    """Ranks laid out tensor first, then data, then pipeline; one program per pipeline stage."""
    pipeline = len(programs)
    ranks = tensor * data * pipeline
    r = np.arange(ranks)
    t, d, p = r % tensor, r // tensor % data, r // (tensor * data)
    groups = {
        "tensor": r // tensor,
        "data": t + tensor * p,
        "stage": p,
        "pipeline": t + tensor * d,
        "world": np.zeros(ranks, dtype=int),
    }
    half = max(1, data // 2)
    groups["half"] = (p * tensor + t) * 2 + (d < half)
    peer = np.stack([t + tensor * (d + data * q) for q in range(pipeline)])
    return Workload(
        programs=tuple(programs),
        program_of=p,
        placement=np.arange(ranks) if placement is None else placement,
        groups=groups,
        pipeline_peer=peer,
        slowdown=np.ones(ranks) if slowdown is None else slowdown,
        labels={"tensor": t, "data": d, "pipeline": p} if labels is None else labels,
    )


class Builder:
    """Programs of all stages, built in one global order, so that they cannot deadlock."""

    def __init__(self, stages, streams=("compute", "data", "pipeline")):
        self.streams = [{name: [] for name in streams} for _ in range(stages)]
        self.events = [0] * stages

    def event(self, stage):
        self.events[stage] += 1
        return self.events[stage] - 1

    def add(self, program, stream, segment, waits=(), signals=(), **kwargs):
        self.streams[program][stream].append(
            Entry(segment, waits=tuple(waits), signals=tuple(signals), **kwargs)
        )

    def programs(self):
        return [
            RankProgram(f"stage {i}", {k: tuple(v) for k, v in s.items()}, self.events[i])
            for i, s in enumerate(self.streams)
        ]


def compute(name, sm, hbm_bytes, latency=1e-6, flops=1.0):
    return Task(name, "gemm", 0, "F", latency, sm, hbm_bytes, flops, hbm_bytes)


def comm(name, op, group, nbytes):
    return Task(name, op, -1, "F", bytes=nbytes, collective=Collective(name, op, group, nbytes))


def random_case(seed):
    """(workload, cluster, traffic): topology, programs and perturbations drawn from `seed`."""
    rng = np.random.default_rng(seed)
    tensor = int(rng.choice([1, 2, 4]))
    data = int(rng.choice([1, 2, 3, 4]))
    stages = int(rng.choice([1, 2, 3, 4]))
    ranks = tensor * data * stages
    cluster = toy_cluster(
        ranks,
        node_size=int(rng.choice([2, 4, 8])),
        leaf_size=int(rng.choice([4, 8, 16])),
        oversubscription=float(rng.choice([1.0, 2.0, 4.0])),
        hbm=float(rng.choice([200e9, 1000e9])),
    )
    traffic = RingTraffic(
        alpha=float(rng.choice([0.0, 2e-6])),
        hbm_factor=float(rng.choice([0.0, 2.0, 30.0])),
        sm_fraction=float(rng.choice([0.0, 0.15, 0.6])),
    )
    streams = ["compute", "data", "pipeline"] + (["extra"] if rng.random() < 0.4 else [])
    b = Builder(stages, streams)
    known = [[] for _ in range(stages)]
    segments = {}

    def tasks_of(n, with_groups, stream):
        tasks = []
        for i in range(n):
            x = rng.random()
            if x < 0.3 and with_groups:
                op = str(rng.choice(["all_reduce", "all_gather", "reduce_scatter"]))
                group = str(rng.choice(with_groups))
                tasks.append(
                    comm(f"{op} {group} {stream}", op, group, float(rng.choice([2e5, 1e6])))
                )
            elif x < 0.35 and with_groups:
                c = Collective(f"fused {stream}", "all_gather", "tensor", 3e5)
                tasks.append(Task("fused", "gemm", 0, "F", 1e-6, 3e-5, 2e6, 5.0, 1.0, c))
            else:
                sm = float(rng.choice([0.0, 1e-5, 4e-5, 1e-4]))
                hbm = float(rng.choice([0.0, 1e6, 3e7]))
                tasks.append(compute(f"k{i}", sm, hbm, float(rng.choice([0.0, 1e-6, 5e-6]))))
        return tuple(tasks)

    def waits(stage):
        if not known[stage] or rng.random() < 0.4:
            return []
        return [int(e) for e in rng.choice(known[stage], size=min(2, len(known[stage])))]

    for step in range(int(rng.integers(5, 30))):
        kind = rng.random()
        stage = int(rng.integers(stages))
        signal = [b.event(stage)] if rng.random() < 0.7 else []
        if kind < 0.5:
            stream = "compute" if rng.random() < 0.8 else str(rng.choice(streams))
            key = (int(rng.integers(4)), stream)
            if key not in segments:
                names = ["tensor"] if rng.random() < 0.7 else ["tensor", "data", "half"]
                tasks = tasks_of(int(rng.integers(0, 7)), names, stream)
                segments[key] = Segment(f"segment {key}", tasks)
            b.add(stage, stream, segments[key], waits(stage), signal, microbatch=step, stage=stage)
        elif kind < 0.7:
            size = float(rng.choice([5e5, 4e6]))
            op = str(rng.choice(["all_reduce", "reduce_scatter"]))
            group = str(rng.choice(["data", "data", "half", "stage"]))
            b.add(stage, "data", Segment("dp", (comm("grad", op, group, size),)), waits(stage),
                  signal)  # fmt: skip
        elif kind < 0.92 and stages > 1:
            other = int((stage + rng.choice([1, stages - 1])) % stages)
            arrived = b.event(other)
            send = comm("send", "send_recv", "pipeline", float(rng.choice([3e5, 2e6])))
            b.add(stage, "pipeline", Segment("send", (send,)), waits(stage), signal, peer=other,
                  signals_peer=(arrived,))  # fmt: skip
            known[other].append(arrived)
        else:
            group = str(rng.choice(["world", "pipeline"]))
            stream = str(rng.choice(["data", "compute"]))
            segment = Segment("all", (comm(f"global {stream}", "all_reduce", group, 1e6),))
            for p in range(stages):
                b.add(p, stream, segment, waits(p), signal if p == stage else ())
        known[stage].extend(signal)
    slowdown = np.ones(ranks)
    if rng.random() < 0.4:
        slowdown[rng.integers(ranks)] = 1.3
    if rng.random() < 0.3:
        cluster.link_capacity = cluster.link_capacity.copy()
        cluster.link_capacity[rng.integers(len(cluster.link_capacity))] /= 2.0
    if rng.random() < 0.2:
        cluster.memory_bandwidth = cluster.memory_bandwidth.copy()
        cluster.memory_bandwidth[: ranks // 2] *= 2.0
    placement = rng.permutation(ranks) if rng.random() < 0.15 else None
    return mesh_workload(b.programs(), tensor, data, slowdown, placement), cluster, traffic
