"""The timing model against an independent one, and its invariants."""

from __future__ import annotations

from fractions import Fraction

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.schedules import Durations, Overlap, build, parts, simulate
from simulator.schedules.schedule import Schedule

NAMES = (
    "gpipe", "1f1b", "eager-1f1b", "zb-h1", "zb-h2", "zb-v", "interleaved-1f1b", "looped-bfs",
    "interleaved-zb", "dualpipe", "dualpipe-v", "chimera", "hanayo", "forward-only",
)  # fmt: skip


def longest_paths(schedule: Schedule, durations: Durations) -> dict:
    """Start of every entry as a longest path in the graph of all dependencies."""
    s = schedule.stages
    cost = {k: durations.per_stage(k, s) for k in ("F", "B", "I", "W", "comm")}
    where = {
        a: (r, i) for r, o in enumerate(schedule.actions) for i, e in enumerate(o) for a in parts(e)
    }

    def length(node) -> Fraction:
        entry = schedule.actions[node[0]][node[1]]
        return sum(cost[a.kind][a.stage] for a in parts(entry))

    graph = nx.DiGraph()
    for a, node in where.items():
        graph.add_node(node)
        if node[1]:
            before = (node[0], node[1] - 1)
            graph.add_edge(before, node, weight=length(before))
        sources = []
        if a.kind == "F" and a.stage % schedule.chain_len:
            sources = [(a._replace(stage=a.stage - 1), a.stage - 1)]
        if a.kind in "IB" and (a.stage + 1) % schedule.chain_len:
            sources = [(a._replace(stage=a.stage + 1, kind=kind), a.stage) for kind in "IB"]
        for source, boundary in sources:
            if source in where:
                origin = where[source]
                delay = cost["comm"][boundary] if origin[0] != node[0] else 0
                weight = length(origin) + delay
                old = graph.get_edge_data(origin, node, {"weight": 0})["weight"]
                graph.add_edge(origin, node, weight=max(weight, old))
    start = {}
    for node in nx.topological_sort(graph):
        start[node] = max(
            (start[b] + d["weight"] for b, _, d in graph.in_edges(node, data=True)), default=0
        )
    return start


numbers = st.fractions(min_value=0, max_value=5, max_denominator=8)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.sampled_from(NAMES), st.sampled_from([2, 4]), st.integers(1, 3), st.data())
def test_equals_longest_paths(name: str, p: int, rounds: int, data) -> None:
    m = 2 * p * rounds
    schedule = build(name, p, m)
    per_stage = st.lists(numbers, min_size=schedule.stages, max_size=schedule.stages)
    durations = Durations(
        **{key: tuple(data.draw(per_stage)) for key in ("F", "B", "I", "W")},
        comm=data.draw(numbers),
    )
    timing = simulate(schedule, durations)
    expected = longest_paths(schedule, durations)
    for (rank, index), start in expected.items():
        assert timing.start[rank][index] == start
    # Conservation: a rank's busy time is the sum of its actions, whatever the order.
    for rank, order in enumerate(schedule.actions):
        work = sum(
            durations.per_stage(a.kind, schedule.stages)[a.stage] for e in order for a in parts(e)
        )
        assert timing.busy[rank] == work
        ends = timing.end[rank]
        assert all(b >= a for a, b in zip(ends, timing.start[rank][1:], strict=False))
    assert timing.makespan >= max(timing.windows) >= timing.ideal


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.sampled_from(NAMES), numbers, numbers)
def test_more_communication_is_never_faster(name: str, first, second) -> None:
    schedule = build(name, 4, 8)
    low, high = sorted((first, second))
    assert (
        simulate(schedule, Durations(comm=low)).makespan
        <= simulate(schedule, Durations(comm=high)).makespan
    )


def test_scaling_all_durations_scales_all_times() -> None:
    schedule = build("zb-v", 4, 12)
    one = simulate(schedule, Durations(F=3, I=4, W=2, comm=1))
    five = simulate(schedule, Durations(F=15, I=20, W=10, comm=5))
    assert five.makespan == 5 * one.makespan
    assert [[5 * t for t in row] for row in one.start] == [list(row) for row in five.start]


def test_overlap_is_one_block_or_two_actions() -> None:
    schedule = build("dualpipe-v", 2, 4)
    fused = simulate(schedule, Durations(F=1, B=2))
    apart = simulate(schedule, Durations(F=1, B=2), sequential_overlap=True)
    assert any(isinstance(a, Overlap) for a in fused.schedule.actions[0])
    assert not any(isinstance(a, Overlap) for a in apart.schedule.actions[0])
    assert apart.makespan <= fused.makespan
    assert apart.busy == fused.busy
    quick = simulate(schedule, Durations(F=1, B=2, overlap=2))
    assert quick.makespan < fused.makespan


def test_communication_actions_take_no_time() -> None:
    from simulator.schedules import lower

    schedule = build("interleaved-zb", 2, 4, 2)
    assert simulate(lower(schedule)).start == simulate(schedule).start


def test_durations_are_checked() -> None:
    with pytest.raises(InputError, match="finite and not negative"):
        Durations(F=-1)
    with pytest.raises(InputError, match="finite"):
        Durations(F=(1, float("nan")))
    with pytest.raises(InputError, match=r"one per stage \(4\), got 3"):
        simulate(build("1f1b", 4, 4), Durations(F=(1, 1, 1)))


def test_vocabulary_parallelism_artifact_shape() -> None:
    """A last stage three times as slow sets the pace: the steady period is its F + B."""
    slow = Durations(F=(1, 1, 1, 3), B=(2, 2, 2, 6))
    times = [simulate(build("1f1b", 4, m), slow).makespan for m in (16, 32)]
    assert times[1] - times[0] == 16 * 9
