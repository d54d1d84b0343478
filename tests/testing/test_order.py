"""The order of passes as a text that reads back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.schedules import build
from simulator.schedules.actions import flatten
from simulator.testing.order import Pass, first_difference, order_of, order_text


def passes_of(name: str, ranks: int, microbatches: int, virtual: int, rank: int) -> list[Pass]:
    schedule = build(name, ranks, microbatches, virtual).without_overlap().compute_only()
    return [(a.kind, a.stage, int(a.microbatch or 0)) for a in flatten(schedule.actions[rank])]


def test_one_f_one_b_reads_as_people_write_it() -> None:
    assert order_text(passes_of("1f1b", 4, 8, 1, 0)) == ("stage 0: 4x[F0]+1 4x[B0 F4]+1 4x[B4]+1")
    assert order_text(passes_of("1f1b", 4, 8, 1, 3)) == "stage 3: 8x[F0 B0]+1"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("name", "virtual", "longest"),
    [("gpipe", 1, 40), ("1f1b", 1, 60), ("interleaved-1f1b", 2, 400), ("zb-h1", 1, 400)],
)
def test_schedules_read_back_and_are_short(
    name: str, virtual: int, longest: int, rank: int
) -> None:
    passes = passes_of(name, 4, 64, virtual, rank)
    text = order_text(passes)
    assert order_of(text) == passes
    assert len(text) < longest


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("FBIW"), st.integers(0, 3), st.integers(0, 5)), max_size=40)
)
def test_any_order_reads_back(passes: list[Pass]) -> None:
    assert order_of(order_text(passes)) == passes


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_repetition_reads_back(length: int, step: int, count: int, first: int) -> None:
    pattern = [("FB"[i % 2], i % 3, first + i) for i in range(length)]
    passes = [(k, s, m + step * n) for n in range(count) for k, s, m in pattern]
    assert order_of(order_text(passes)) == passes


def test_the_first_difference_is_found() -> None:
    old = [("F", 0, 0), ("F", 0, 1), ("B", 0, 0)]
    assert first_difference(old, list(old)) is None
    assert first_difference(old, old[:2]) == (2, "0B0", "the end")
    assert first_difference(old, [old[0], old[2], old[1]]) == (1, "0F1 0B0", "0B0 0F1")
