"""The slow, obvious engine: every rank, every operation, plain SimPy processes.

At every change all activities of the whole cluster are shared out again. The fast engine is held
equal to this one. Nothing is imported from `simulator.engine` but the drawing of jitter.
"""

from __future__ import annotations

import numpy as np
import simpy


def dense_max_min(demand: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Progressive filling on a dense [activities, resources] matrix of utilisations."""
    n = len(weight)
    phi = np.zeros(n)
    active = np.ones(n, dtype=bool)
    while active.any():
        room = 1.0 - demand[~active].T @ phi[~active]
        slope = demand[active].T @ weight[active]
        with np.errstate(divide="ignore", invalid="ignore"):
            level_r = np.where(slope > 0, np.maximum(room, 0.0) / slope, np.inf)
        level = min(level_r.min(initial=np.inf), (1.0 / weight[active]).min())
        full = level_r <= level * (1 + 1e-12)
        stop = active & ((demand[:, full] > 0).any(axis=1) | (weight * level >= 1 - 1e-12))
        phi[stop] = np.minimum(1.0, weight[stop] * level)
        active &= ~stop
    return phi


class Activity:
    def __init__(self, body, weight, demand):
        self.body, self.weight, self.demand = body, weight, demand
        self.left = 1.0
        self.phi = 1.0


class Network:
    """All activities in progress; shares everything out again whenever one comes or goes."""

    def __init__(self, env):
        self.env = env
        self.active = []
        self.since = 0.0
        self.kick = env.event()
        env.process(self.run())

    def carry_out(self, activity):
        done = self.env.event()
        if activity.body <= 0.0:
            done.succeed()
            return done
        self.settle()
        activity.done = done
        self.active.append(activity)
        self.share()
        self.wake()
        return done

    def settle(self):
        for a in self.active:
            a.left -= a.phi * (self.env.now - self.since) / a.body
        self.since = self.env.now

    def share(self):
        if not self.active:
            return
        names = sorted({r for a in self.active for r in a.demand})
        column = {name: i for i, name in enumerate(names)}
        demand = np.zeros((len(self.active), len(names)))
        for i, a in enumerate(self.active):
            for r, d in a.demand.items():
                demand[i, column[r]] = d
        for a, phi in zip(
            self.active,
            dense_max_min(demand, np.array([a.weight for a in self.active])),
            strict=True,
        ):
            a.phi = phi

    def wake(self):
        if not self.kick.triggered:
            self.kick.succeed()

    def run(self):
        while True:
            self.kick = self.env.event()
            if self.active:
                delay = min(a.left * a.body / a.phi for a in self.active)
                yield self.env.timeout(max(0.0, delay)) | self.kick
            else:
                yield self.kick
            self.settle()
            # what is left less than the clock can tell apart is nothing
            instant = 4e-16 * self.env.now
            ended = [a for a in self.active if a.left * a.body / a.phi <= instant]
            if ended:
                self.active = [a for a in self.active if a not in ended]
                for a in ended:
                    a.done.succeed()
                self.share()


class Reference:
    def __init__(self, workload, cluster, traffic, *, jitter=None, keys=None, overlap=True):
        self.w, self.cluster, self.traffic = workload, cluster, traffic
        self.jitter, self.keys, self.overlap = jitter, keys, overlap
        self.env = simpy.Environment()
        self.network = Network(self.env)
        self.rows = {}
        self.fired = {}
        self.meetings = {}
        self.counts = {}

    def event(self, rank, number):
        return self.fired.setdefault((rank, number), self.env.event())

    def run(self):
        for rank in range(self.w.ranks):
            program = self.w.programs[self.w.program_of[rank]]
            for s, name in enumerate(program.streams):
                self.env.process(self.stream(rank, s, name, program.streams[name]))
        self.env.run()
        return self.rows

    def stream(self, rank, s, name, entries):
        for e, entry in enumerate(entries):
            for number in entry.waits:
                event = self.event(rank, number)
                if not event.processed:
                    yield event
            factors = np.ones(len(entry.segment.tasks))
            if self.jitter is not None:
                factors = self.jitter.factors(int(self.keys[rank]), s, e, len(factors))
            for k, task in enumerate(entry.segment.tasks):
                group = None
                if entry.peer >= 0 and task.collective is not None:
                    group = [rank, int(self.w.pipeline_peer[entry.peer][rank])]
                elif task.collective is not None:
                    labels = self.w.groups[task.collective.group]
                    if labels[rank] >= 0:
                        group = np.flatnonzero(labels == labels[rank]).tolist()
                        group = group if len(group) > 1 else None
                if group is None:
                    start = self.env.now
                    yield from self.perform([rank], [self.own(rank, task, factors[k])], None, task)
                elif entry.peer >= 0:
                    start = self.env.now
                    demands = [self.own(rank, task, factors[k]), (0.0, 0.0, 0.0)]
                    yield from self.perform(group, demands, group, task)
                else:
                    key0 = (task.collective.group, labels[rank], task.collective.name)
                    count = self.counts.get((rank, *key0), 0)
                    self.counts[(rank, *key0)] = count + 1
                    key = (*key0, count)
                    if key not in self.meetings:
                        self.meetings[key] = ({}, self.env.event(), self.env.event(), [])
                    present, begun, ended, when = self.meetings[key]
                    present[rank] = self.own(rank, task, factors[k])
                    if len(present) == len(group):
                        when.append(self.env.now)
                        begun.succeed()
                        demands = [present[r] for r in group]
                        yield from self.perform(group, demands, group, task)
                        ended.succeed()
                    else:
                        yield ended
                    start = when[0]
                self.rows[rank, name, e, k] = (start, self.env.now)
            for number in entry.signals:
                self.event(rank, number).succeed()
            if entry.peer >= 0:
                receiver = int(self.w.pipeline_peer[entry.peer][rank])
                for number in entry.signals_peer:
                    self.event(receiver, number).succeed()

    def bandwidth(self, rank):
        return self.cluster.memory_bandwidth[self.w.placement[rank]]

    def own(self, rank, task, factor):
        """(latency, SM seconds, HBM seconds) of the rank's own computation."""
        slow = self.w.slowdown[rank]
        return (
            task.latency * factor,
            task.compute * slow * factor,
            task.hbm_bytes * slow / self.bandwidth(rank) * factor,
        )

    def perform(self, ranks, own, group, task):
        latency = max(o[0] for o in own)
        body = max(max(o[1], o[2]) for o in own)
        weight = min(1.0 / self.bandwidth(r) for r in ranks)
        sm = [o[1] for o in own]
        hbm = [o[2] for o in own]
        links = {}
        if group is not None:
            t = self.traffic(
                self.cluster, task.collective.op, self.w.placement[np.array([group])],
                task.collective.bytes,
            )  # fmt: skip
            latency += float(np.broadcast_to(t.latency, 1)[0])
            seconds, flow = 0.0, 0.0
            for link, work in zip(t.link.tolist(), t.work.tolist(), strict=True):
                if work > 0.0:
                    need = work / self.cluster.link_capacity[link]
                    links[link] = need
                    if need > seconds * (1 + 1e-9):
                        seconds, flow = need, work
                    elif need >= seconds * (1 - 1e-9):
                        flow = max(flow, work)
            comm = float(np.broadcast_to(t.hbm_bytes, 1)[0])
            comm = [comm * self.w.slowdown[r] / self.bandwidth(r) for r in ranks]
            body = max(body, seconds, *comm)
            if flow > 0.0 and task.compute == 0.0:
                weight = body / flow
            if self.overlap:
                share = float(np.broadcast_to(t.sm_fraction, 1)[0])
                hbm = [max(a, b) for a, b in zip(hbm, comm, strict=True)]
                sm = [max(a, share * max(seconds, b)) for a, b in zip(sm, comm, strict=True)]
        if latency > 0.0:
            yield self.env.timeout(latency)
        demand = {}
        if body > 0.0:
            for r, a, b in zip(ranks, sm, hbm, strict=True):
                if a > 0.0:
                    demand[("sm", r)] = a / body
                if b > 0.0:
                    demand[("x hbm", r)] = b / body
            for link, need in links.items():
                demand[("link", link)] = need / body
        activity = Activity(body, weight, demand)
        yield self.network.carry_out(activity)
