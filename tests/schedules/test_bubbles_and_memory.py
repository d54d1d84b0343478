"""Where idle time comes from, what memory does, and how layers are cut."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.schedules import (
    ActivationMemory,
    Durations,
    Layer,
    attribute,
    build,
    memory_curves,
    partition,
    peak_in_flight,
    simulate,
)
from simulator.schedules.bubbles import CAUSES

NAMES = ("gpipe", "1f1b", "zb-h1", "zb-v", "interleaved-1f1b", "dualpipe", "chimera", "hanayo")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from(NAMES), st.data())
def test_causes_add_up_to_the_idle_time(name: str, data) -> None:
    schedule = build(name, 4, 8)
    stage = st.lists(st.integers(1, 9), min_size=schedule.stages, max_size=schedule.stages)
    f, i, w = (tuple(data.draw(stage)) for _ in range(3))
    timing = simulate(schedule, Durations(F=f, I=i, W=w, comm=data.draw(st.integers(0, 4))))
    for idle, busy in zip(attribute(timing), timing.busy, strict=True):
        assert float(idle.total) == pytest.approx(float(timing.makespan - busy))
        assert all(getattr(idle, cause) >= -1e-9 for cause in CAUSES)
        assert sum(t for _, t in idle.imbalance_by_stage) == pytest.approx(float(idle.imbalance))


def test_one_f_one_b_idles_in_fill_and_drain() -> None:
    """Rank r waits for r forwards, 3(p-1-r) for its first gradient, p-1-r gaps in the drain."""
    timing = simulate(build("1f1b", 4, 8), Durations(F=1, B=2))
    for r, idle in enumerate(attribute(timing)):
        assert idle.warm_up == r + 2 * (3 - r)
        assert idle.cool_down == 3 - r
        assert idle.synchronisation == 2 * r
        assert idle.imbalance == idle.communication == idle.dependency == 0


def test_a_slow_stage_is_blamed() -> None:
    timing = simulate(build("1f1b", 4, 64), Durations(F=(1, 1, 2, 1), B=(2, 2, 4, 2)))
    for r, idle in enumerate(attribute(timing)):
        if r == 2:
            continue
        assert [stage for stage, _ in idle.imbalance_by_stage] == [2]
        # 64 micro-batches of 3 wait for 64 of 6.
        assert idle.imbalance > 0.85 * 64 * 3
        assert idle.communication == 0


def test_exposed_communication_is_what_vanishes_without_it() -> None:
    schedule = build("1f1b", 4, 32)
    quiet, loud = (simulate(schedule, Durations(F=4, B=8, comm=c)) for c in (0, 1))
    extra = loud.makespan - quiet.makespan
    for idle in attribute(loud):
        assert idle.dependency == idle.imbalance == 0
        assert 0 < idle.communication <= extra
    # On the first rank everything that transfers add is exposed, in warm-up, steady state or drain.
    first = attribute(loud)[0]
    before = attribute(quiet)[0]
    assert first.total - before.total == extra


def test_synchronisation_is_makespan_less_window() -> None:
    timing = simulate(build("zb-h2", 4, 8), Durations())
    idle = attribute(timing)
    assert [i.synchronisation for i in idle] == [3, 2, 1, 0]
    assert all(i.cool_down == i.dependency == 0 for i in idle)


@pytest.mark.parametrize("name", [*NAMES, "zb-h2", "dualpipe-v", "forward-only"])
def test_the_curves_peak_is_the_peak_in_flight(name: str) -> None:
    schedule = build(name, 4, 8)
    timing = simulate(schedule, Durations(comm=0.25), sequential_overlap=True)
    curves = memory_curves(timing)
    assert [curve.peak for curve in curves] == peak_in_flight(schedule)
    for rank, curve in enumerate(curves):
        assert curve.values[-1] == 0
        assert (curve.values >= 0).all()
        at = curve.peak_time
        assert at in timing.start[rank]


def test_releasing_at_the_input_gradient() -> None:
    schedule = build("zb-h1", 4, 8)
    curves = memory_curves(simulate(schedule), ActivationMemory(kept_for_weights=0.0))
    assert [curve.peak for curve in curves] == peak_in_flight(schedule, "I")


def test_recomputation_stores_less_and_takes_longer() -> None:
    schedule = build("1f1b", 4, 8)
    full = ActivationMemory(activation=10.0, recompute=1.0, checkpoint=0.1)
    timing = simulate(schedule, full.durations(Durations(F=1, B=2)))
    assert timing.makespan == simulate(schedule, Durations(F=1, B=3)).makespan
    # In flight: checkpoints of 1; one micro-batch is whole while it runs forward or backward.
    assert [curve.peak for curve in memory_curves(timing, full)] == [13, 12, 11, 10]


def test_selective_recomputation_is_in_between() -> None:
    schedule = build("1f1b", 4, 8)
    peaks = []
    for share in (0.0, 0.5, 1.0):
        memory = ActivationMemory(recompute=share)
        timing = simulate(schedule, memory.durations(Durations(F=1, B=2)))
        peaks.append((memory_curves(timing, memory)[0].peak, -timing.makespan))
    assert peaks == sorted(peaks, reverse=True)


def test_offload_frees_what_waits_long_enough() -> None:
    timing = simulate(build("gpipe", 2, 8), Durations(F=1, B=2))
    none, all_ = (
        memory_curves(timing, ActivationMemory(offload=share, offload_time=1))[0]
        for share in (0.0, 1.0)
    )
    assert none.peak == 8
    assert all_.peak < 4
    assert all_.host_busy == 2 * 8
    # A micro-batch whose backward comes at once stays on the device.
    last = memory_curves(timing, ActivationMemory(offload=1.0, offload_time=40))[1]
    assert (last.peak, last.host_busy) == (8, 0)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=4, max_size=9), st.integers(2, 4))
def test_partition_has_the_smallest_bottleneck(times: list[int], p: int) -> None:
    layers = [Layer(t, t, t) for t in times]
    found = partition(layers, p)
    best = min(
        max(3 * sum(times[a:b]) for a, b in zip((0, *cut), (*cut, len(times)), strict=True))
        for cut in combinations(range(1, len(times)), p - 1)
    )
    assert found.bottleneck == best
    assert [len(r) for r in found.stages] == [r.stop - r.start for r in found.stages]
    assert sum(len(r) for r in found.stages) == len(times)


def model(blocks: int = 16) -> list[Layer]:
    """Blocks of 3 with an embedding of 0.5 and a head of 9."""
    head = Layer(3, 3, 3, vocabulary=True, name="head")
    return [Layer(0.1, 0, 0.4, vocabulary=True), *[Layer(1, 1, 1)] * blocks, head]


def test_balanced_stages_shrink_the_bubble() -> None:
    layers = model()
    even = Durations(F=(4.1, 4, 4, 7), I=(4, 4, 4, 7), W=(4.4, 4, 4, 7))
    schedule = build("1f1b", 4, 32)
    naive = simulate(schedule, even)
    cut = partition(layers, 4)
    balanced = simulate(schedule, cut.durations)
    assert balanced.makespan < 0.85 * naive.makespan
    assert sum(balanced.busy) == pytest.approx(sum(naive.busy))
    assert cut.imbalance < 0.06


def test_vocabulary_parallelism_balances_exactly() -> None:
    cut = partition(model(), 4, vocabulary_parallel=True)
    assert cut.imbalance == pytest.approx(0)
    assert [len(r) for r in cut.stages] == [4, 4, 4, 4]
    total = sum(layer.time for layer in model())
    assert sum(cut.rank_times) == pytest.approx(total)
    slower = partition(model(), 4, vocabulary_parallel=True, vocabulary_overhead=0.25)
    assert slower.bottleneck == pytest.approx(cut.bottleneck + 0.25)


def test_a_slow_rank_gets_fewer_layers() -> None:
    cut = partition([Layer(1, 1, 1)] * 14, 4, speeds=[1, 1, 0.5, 1])
    assert [len(own) for own in cut.stages] == [4, 4, 2, 4]
    assert cut.rank_times == (12, 12, 12, 12)


def test_partition_with_chunks_balances_ranks() -> None:
    layers = model(15)
    cut = partition(layers, 4, 2)
    assert len(cut.stages) == 8
    assert cut.bottleneck <= 18


def test_partition_respects_memory() -> None:
    layers = [Layer(1, 1, 1, memory=m) for m in (4, 4, 1, 1, 1, 1)]
    assert [len(r) for r in partition(layers, 2).stages] == [3, 3]
    assert [len(r) for r in partition(layers, 2, memory_limit=8).stages] == [2, 4]
    with pytest.raises(InputError, match="no cut into 2 stages fits"):
        partition(layers, 2, memory_limit=5)
    with pytest.raises(InputError, match="6 layers cannot fill 8 stages"):
        partition(layers, 4, 2)
