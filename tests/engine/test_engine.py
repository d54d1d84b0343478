"""What the engine does, in closed forms and invariants."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from simulator.engine import Jitter, simulate, step_times
from simulator.errors import InputError, SimulatorError
from simulator.workload import Segment

from .synthetic import Builder, RingTraffic, comm, compute, mesh_workload, random_case, toy_cluster

QUIET = RingTraffic(alpha=0.0, hbm_factor=0.0, sm_fraction=0.0)


def run(builder, tensor=1, data=1, traffic=QUIET, cluster=None, slowdown=None, **kwargs):
    workload = mesh_workload(builder.programs(), tensor, data, slowdown)
    cluster = cluster or toy_cluster(workload.ranks)
    return simulate(workload, cluster, traffic=traffic, **kwargs)


def ends(timeline, rank=0):
    frame = timeline.frame([rank])
    return dict(zip(frame["operation"], frame["end"], strict=True))


def test_kernel_alone_is_the_roofline():
    b = Builder(1)
    b.add(0, "compute", Segment("s", (compute("a", 3e-4, 1e8, 1e-5), compute("b", 1e-5, 1e9, 0))))
    # 1e8 B at 1e12 B/s is less than 3e-4 s of SMs; 1e9 B is more
    assert ends(run(b)) == pytest.approx({"a": 3.1e-4, "b": 1.31e-3})


def test_slowdown_stretches_what_is_computed_not_latency():
    b = Builder(1)
    b.add(0, "compute", Segment("s", (compute("a", 1e-3, 0.0, 1e-4),)))
    assert ends(run(b, slowdown=np.array([2.0])))["a"] == pytest.approx(2.1e-3)


def test_ring_all_reduce_is_its_closed_form():
    """2 (n - 1) / n S / B plus (n - 1) alpha."""
    b = Builder(1)
    b.add(0, "data", Segment("s", (comm("ar", "all_reduce", "data", 8e6),)))
    timeline = run(b, data=8, cluster=toy_cluster(8, node_size=8), traffic=RingTraffic())
    assert timeline.step_time == pytest.approx(7 * 2e-6 + 2 * 7 / 8 * 8e6 / 100e9, rel=1e-12)


def test_overlapped_communication_slows_compute_by_what_it_takes():
    """A gradient reduction holds 0.2 of the SMs: the kernel beside it runs at 0.8."""
    b = Builder(1)
    b.add(0, "compute", Segment("s", tuple(compute(f"k{i}", 1e-3, 0.0, 0.0) for i in range(10))))
    b.add(0, "data", Segment("d", (comm("grad", "all_reduce", "data", 3.2e7),)))
    traffic = RingTraffic(alpha=0.0, hbm_factor=0.0, sm_fraction=0.2)
    timeline = run(b, data=2, traffic=traffic, cluster=toy_cluster(2, node_size=1))
    result = ends(timeline)
    assert result["grad"] == pytest.approx(3.2e-3)  # undisturbed
    assert result["k0"] == pytest.approx(1.25e-3)
    assert result["k9"] == pytest.approx(10e-3 + 0.2 * 3.2e-3)
    free = run(b, data=2, traffic=traffic, cluster=toy_cluster(2, node_size=1),
               overlap_sharing=False)  # fmt: skip
    assert free.step_time == pytest.approx(10e-3)


def test_oversubscribed_spine_shows_in_a_cross_leaf_collective_only():
    for oversubscription, cross in ((1.0, 1.0), (4.0, 4.0)):
        cluster = toy_cluster(16, node_size=1, leaf_size=4, oversubscription=oversubscription)
        times = {}
        for name, tensor, data in (("local", 4, 4), ("cross", 4, 4)):
            b = Builder(1)
            group = "tensor" if name == "local" else "data"
            b.add(0, "data", Segment("s", (comm("ar", "all_gather", group, 4e6),)))
            times[name] = run(b, tensor, data, cluster=cluster).step_time
        assert times["local"] == pytest.approx(0.75 * 4e6 / 10e9)
        assert times["cross"] == pytest.approx(0.75 * 4e6 / 10e9 * cross)


def test_a_transfer_starts_at_the_sender_and_wakes_the_receiver():
    b = Builder(2)
    sent, arrived = b.event(0), b.event(1)
    b.add(0, "compute", Segment("f", (compute("f", 1e-3, 0.0, 0.0),)), signals=[sent])
    b.add(0, "pipeline", Segment("s", (comm("send", "send_recv", "pipeline", 1e7),)), [sent],
          peer=1, signals_peer=(arrived,))  # fmt: skip
    b.add(1, "compute", Segment("g", (compute("g", 1e-3, 0.0, 0.0),)), [arrived])
    timeline = run(b, cluster=toy_cluster(2, node_size=1))
    frame = timeline.frame("all").set_index("operation")
    assert frame.loc["send", "start"] == pytest.approx(1e-3)
    assert frame.loc["g", "start"] == pytest.approx(2e-3)
    assert frame.loc["g", "waited_for"] == "pipeline: send"
    assert timeline.step_time == pytest.approx(3e-3)
    assert timeline.critical_path()["operation"].tolist() == ["f", "send", "g"]
    assert timeline.link_bytes().sum() == pytest.approx(2e7)  # NIC out and NIC in


def test_collective_waits_for_its_last_member():
    b = Builder(1)
    segment = Segment(
        "s", (compute("k", 1e-3, 0.0, 0.0), comm("ar", "all_reduce", "tensor", 1e6),
              compute("l", 1e-3, 0.0, 0.0))
    )  # fmt: skip
    for _ in range(3):
        b.add(0, "compute", segment)
    slowdown = np.array([1.0, 1.5, 1.0, 1.0])
    timeline = run(b, tensor=4, slowdown=slowdown)
    assert timeline.classes == 2
    each = 2e-3 * 1.5 + 1.5 * 1e6 / 100e9
    assert timeline.step_time == pytest.approx(3 * each)
    frame = timeline.frame([0])
    collectives = frame[frame["operation"] == "ar"]
    assert collectives["start"].iloc[0] == pytest.approx(1.5e-3)
    assert collectives["waited_for"].unique().tolist() == ["compute: k"]
    # the last member waits for nobody but its own computation, which ends as the collective starts
    slow = timeline.frame([1])
    own = slow[slow["operation"] == "ar"]
    assert own["waited_for"].unique().tolist() == ["compute: k"]
    before = slow[slow["operation"] == "k"]
    assert own["start"].to_numpy() == pytest.approx(before["end"].to_numpy())


def test_deadlock_names_what_waits():
    b = Builder(2)
    never = b.event(0)
    b.add(0, "compute", Segment("stuck", (compute("k", 1e-3, 0.0),)), [never], microbatch=3)
    b.add(1, "data", Segment("s", (comm("sync", "all_reduce", "world", 1e6),)))
    with pytest.raises(
        SimulatorError, match=r"deadlock.*'stuck', micro-batch 3.*event\(s\) 0"
    ) as e:
        run(b, data=2)
    assert "'sync' for the other members of its 'world' group" in str(e.value)


def test_bad_programs_are_input_errors():
    b = Builder(1)
    b.add(0, "compute", Segment("s", ()), [4])
    with pytest.raises(InputError, match="uses event 4"):
        run(b)
    b = Builder(1)
    b.add(0, "compute", Segment("s", (comm("x", "all_reduce", "nobody", 1e6),)))
    with pytest.raises(InputError, match="'nobody'"):
        run(b)
    b = Builder(1)
    b.add(0, "compute", Segment("s", (comm("x", "send_recv", "pipeline", 1e6),)), peer=5)
    with pytest.raises(InputError, match="pipeline coordinate 5"):
        run(b)
    with pytest.raises(InputError, match="did you mean 'normal'"):
        run(Builder(1), jitter=Jitter("normall"))


def test_an_event_fires_once():
    b = Builder(1)
    event = b.event(0)
    for _ in range(2):
        b.add(0, "compute", Segment("s", ()), signals=[event])
    with pytest.raises(SimulatorError, match="fired twice"):
        run(b)


@pytest.mark.parametrize("seed", range(300, 330))
def test_invariants(seed):
    workload, cluster, traffic = random_case(seed)
    timeline = simulate(workload, cluster, traffic=traffic)
    again = simulate(workload, cluster, traffic=traffic)
    assert np.array_equal(timeline.record.start, again.record.start)
    assert np.array_equal(timeline.record.end, again.record.end)
    total_flops = 0.0
    for c in range(timeline.classes):
        table = timeline.program_table(c)
        start, end = timeline.start(c), timeline.end(c)
        tiny = 1e-12 * timeline.step_time
        assert np.all(end >= start)
        for s in range(len(table.streams)):
            rows = np.flatnonzero(table.stream == s)
            assert np.all(start[rows[1:]] >= end[rows[:-1]] - tiny)  # one at a time, in order
        # causality: nothing starts before what it waits for
        cause = timeline.causes[timeline._rows(c)]
        known = cause >= 0
        assert np.all(start[known] >= timeline.record.end[cause[known]] - tiny)
        # no kernel is faster than alone, and the step no faster than its busiest resource
        rank = int(timeline.representatives[c])
        slow, hbm = workload.slowdown[rank], cluster.memory_bandwidth[workload.placement[rank]]
        sm = table.numbers("compute", float) * slow
        alone = table.numbers("latency", float) + np.maximum(
            sm, table.numbers("hbm_bytes", float) * slow / hbm
        )
        assert np.all(end - start >= alone * (1 - 1e-9) - tiny)
        assert timeline.step_time >= sm.sum() * (1 - 1e-9)
        total_flops += timeline.flops(c) * len(timeline.members(c))
    assert timeline.step_time >= (timeline.link_bytes() / cluster.link_capacity).max() * (1 - 1e-9)
    expected = sum(
        t.flops
        for p in workload.program_of
        for entries in workload.programs[p].streams.values()
        for e in entries
        for t in e.segment.tasks
    )
    assert total_flops == pytest.approx(expected)
    path = timeline.critical_path()
    if len(path):
        assert path["end"].iloc[-1] == pytest.approx(timeline.step_time)
        assert path["start"].iloc[0] == pytest.approx(0.0, abs=tiny)
        gaps = path["start"].to_numpy()[1:] - path["end"].to_numpy()[:-1]
        assert np.abs(gaps).max(initial=0.0) <= 1e-9 * timeline.step_time


@pytest.mark.parametrize("seed", range(3))
def test_faster_everything_scales_time(seed):
    """Twice the bandwidth and speed everywhere halve every time: the engine has no scale of its
    own (latencies aside)."""
    workload, cluster, _ = random_case(seed)
    traffic = RingTraffic(alpha=0.0)
    strip = {}

    def faster(segment):
        if id(segment) not in strip:
            strip[id(segment)] = Segment(
                segment.name,
                tuple(dataclasses.replace(t, latency=0.0) for t in segment.tasks),
            )
        return strip[id(segment)]

    programs = tuple(
        dataclasses.replace(
            p,
            streams={
                k: tuple(dataclasses.replace(e, segment=faster(e.segment)) for e in v)
                for k, v in p.streams.items()
            },
        )
        for p in workload.programs
    )
    workload = dataclasses.replace(workload, programs=programs)
    slow = simulate(workload, cluster, traffic=traffic)
    cluster.link_capacity = cluster.link_capacity * 2.0
    cluster.memory_bandwidth = cluster.memory_bandwidth * 2.0
    workload = dataclasses.replace(workload, slowdown=np.asarray(workload.slowdown))
    halved = dataclasses.replace(
        workload,
        programs=tuple(
            dataclasses.replace(
                p,
                streams={
                    k: tuple(
                        dataclasses.replace(
                            e,
                            segment=Segment(
                                e.segment.name,
                                tuple(
                                    dataclasses.replace(t, compute=t.compute / 2.0)
                                    for t in e.segment.tasks
                                ),
                            ),
                        )
                        for e in v
                    )
                    for k, v in p.streams.items()
                },
            )
            for p in workload.programs
        ),
    )
    fast = simulate(halved, cluster, traffic=traffic)
    assert fast.step_time == pytest.approx(slow.step_time / 2.0, rel=1e-9)


def test_more_bandwidth_never_hurts_a_chain():
    """Without sharing there are no anomalies: the step is monotone in bandwidth."""
    times = []
    for nic in (5e9, 10e9, 20e9, 40e9):
        b = Builder(2)
        for m in range(4):
            done, arrived = b.event(0), b.event(1)
            b.add(0, "compute", Segment("f", (compute("f", 1e-3, 0.0),)), signals=[done])
            b.add(0, "pipeline", Segment("s", (comm("s", "send_recv", "pipeline", 2e7),)), [done],
                  peer=1, signals_peer=(arrived,), microbatch=m)  # fmt: skip
            b.add(1, "compute", Segment("g", (compute("g", 1e-3, 0.0),)), [arrived])
        times.append(run(b, cluster=toy_cluster(2, node_size=1, nic=nic)).step_time)
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


@pytest.mark.parametrize("distribution", ["lognormal", "normal", "uniform", "gamma"])
def test_jitter_moments(distribution):
    from simulator.engine.jitter import Factors

    draw = Factors(Jitter(distribution, 0.1, seed=7)).factors
    sample = np.concatenate([draw(k, 0, e, 50) for k in range(40) for e in range(20)])
    assert sample.mean() == pytest.approx(1.0, abs=2e-3)
    assert sample.std() == pytest.approx(0.1, rel=2e-2)
    assert np.array_equal(draw(3, 1, 2, 9), draw(3, 1, 2, 20)[:9])
    assert not np.array_equal(
        draw(3, 1, 2, 9), Factors(Jitter(distribution, 0.1, 8)).factors(3, 1, 2, 9)
    )


def test_jitter_seeds_differ_and_repeat():
    b = Builder(1)
    b.add(0, "compute", Segment("s", tuple(compute(f"k{i}", 1e-3, 0.0) for i in range(20))))
    times = [run(b, data=4, jitter=Jitter(seed=s, scale=0.1)).step_time for s in (1, 2, 1)]
    assert times[0] == times[2] != times[1]


@pytest.mark.parametrize("per", ["rank", "class"])
def test_monte_carlo_is_the_single_runs(per):
    """And the expected maximum over ranks grows with what each rank draws for itself."""
    b = Builder(1)
    kernels = tuple(compute(f"k{i}", 1e-3, 0.0, 0.0) for i in range(4))
    b.add(0, "compute", Segment("s", (*kernels, comm("ar", "all_reduce", "data", 1e3))))
    workload = mesh_workload(b.programs(), 1, 8)
    cluster = toy_cluster(8)
    times = step_times(workload, cluster, Jitter(per=per, scale=0.1), range(200), traffic=QUIET)
    single = simulate(workload, cluster, traffic=QUIET, jitter=Jitter(per=per, scale=0.1, seed=9))
    assert times[9] == single.step_time
    # the largest of 8 standard normals is 1.42 on average (David & Nagaraja, Order Statistics)
    expected = 4e-3 + (1.42 * 0.1 * 2e-3 if per == "rank" else 0.0)
    assert times.mean() == pytest.approx(expected, rel=0.01)
