"""Own schedules: files, and the rejection of what cannot run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.schedules import (
    build,
    lower,
    read_schedule,
    simulate,
    to_csv,
    validate,
    write_csv,
)
from simulator.schedules.files import schedule_from_texts, to_json

NAMES = ("1f1b", "zb-h1", "zb-v", "interleaved-1f1b", "dualpipe-v", "hanayo", "forward-only")


@pytest.mark.parametrize("name", [*NAMES, "dualpipe", "chimera"])
@pytest.mark.parametrize("lowered", [False, True])
def test_files_round_trip(name: str, lowered: bool, tmp_path) -> None:
    schedule = build(name, 4, 8)
    if lowered:
        schedule = lower(schedule)
    if schedule.replicas == 1:
        path = tmp_path / "order.csv"
        write_csv(schedule, path)
        again = read_schedule(path)
        assert again.actions == schedule.actions
        assert again.stage_to_rank == schedule.stage_to_rank
        assert to_csv(again) == to_csv(schedule)
    path = tmp_path / "order.json"
    path.write_text(json.dumps(to_json(schedule)))
    again = read_schedule(path)
    assert replace(again, name=schedule.name) == schedule


def test_idle_cells_are_read_as_idle(tmp_path) -> None:
    path = tmp_path / "order.csv"
    path.write_text("0F0,0F1,,,0B0,0B1\r\n,1F0,1B0,1F1,1B1,\r\n")
    assert simulate(read_schedule(path)).makespan == 9


def broken(texts: list[list[str]], **options):
    return schedule_from_texts(texts, **options)


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([["0F0", "0B0"], ["1F0"]], {}, r"rank 1: 1B0 is missing"),
        ([["0F0", "0B0"], ["1B0", "1F0"]], {}, r"rank 1, action 0: 1B0 comes before 1F0"),
        ([["0B0"], ["1F0", "1B0"]], {}, r"rank 0: 0F0 is missing"),
        ([["0F0", "0I0"], ["1F0", "1B0"]], {}, r"rank 0: 0W0 is missing"),
        ([["0F0", "0W0", "0I0"], ["1F0", "1B0"]], {}, r"0W0 comes before 0I0"),
        ([["0F0", "0F0", "0B0"], ["1F0", "1B0"]], {}, r"action 1: 0F0 is there twice"),
        ([["0F0", "0I0", "0B0"], ["1F0", "1B0"]], {}, r"0B0 and 0I0: a backward is either"),
        ([["0F0", "1F0", "0B0"], ["1B0"]], {}, "stage 1 has actions on rank 0 and on rank 1"),
        ([["0F0"], ["2F0"]], {}, "stage 1 has no action"),
        ([["0F0", "0B0"], ["1F0", "1B0"]], {"stage_to_rank": [0, 0]}, "stage 1 is on rank 0"),
        ([["0F0", "0B0"], ["1F0", "1B0"]], {"stage_to_rank": [0, 5]}, r"stage_to_rank\[1\]"),
        ([["0F0", "0B0"], ["1F0", "1B0"]], {"microbatches": 2}, "0F1 is missing"),
        ([["0F1", "0B1"], ["1F1", "1B1"]], {"microbatches": 1}, "there is no micro-batch 1"),
        ([["0F0", "0Q0"], ["1F0", "1B0"]], {}, "rank 0, action 1: expected an action"),
        ([[], []], {}, "no action"),
    ],
)
def test_what_is_wrong_is_named(texts, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        broken(texts, **options)


def test_deadlock_names_the_circle() -> None:
    """Rank 0 wants its backward first, rank 1 the forward of the second micro-batch."""
    texts = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    with pytest.raises(InputError, match=r"deadlock at 0B0: 0B0 \(rank 0\) waits for 1B0 .*1F1"):
        broken(texts)


def test_receive_without_send() -> None:
    schedule = lower(build("1f1b", 2, 2))
    orders = tuple(tuple(a for a in order if str(a) != "0SEND_F1") for order in schedule.actions)
    with pytest.raises(InputError, match="1RECV_F1 waits for 0SEND_F1, which is missing"):
        validate(replace(schedule, actions=orders))


def test_missing_receive() -> None:
    schedule = lower(build("1f1b", 2, 2))
    orders = tuple(tuple(a for a in o if str(a) != "1RECV_F1") for o in schedule.actions)
    with pytest.raises(InputError, match="1F1 waits for 1RECV_F1, which is missing"):
        validate(replace(schedule, actions=orders))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.sampled_from(NAMES), st.data())
def test_a_changed_schedule_runs_or_is_rejected(name: str, data) -> None:
    """Whatever `validate` lets through can be timed; a dropped or doubled action never passes."""
    schedule = build(name, 3, 6)
    rank = data.draw(st.integers(0, 2))
    order = list(schedule.actions[rank])
    index = data.draw(st.integers(0, len(order) - 1))
    what = data.draw(st.sampled_from(["drop", "double", "move"]))
    entry = order.pop(index)
    if what == "double":
        order[index:index] = [entry, entry]
    elif what == "move":
        order.insert(data.draw(st.integers(0, len(order))), entry)
    orders = list(schedule.actions)
    orders[rank] = tuple(order)
    changed = replace(schedule, actions=tuple(orders))
    try:
        validate(changed)
    except InputError:
        return
    assert what == "move"
    simulate(changed)


def test_simulate_reports_a_deadlock_as_well() -> None:
    schedule = build("1f1b", 2, 2)
    crossed = replace(schedule, actions=(schedule.actions[0], schedule.actions[1][::-1]))
    with pytest.raises(InputError, match="rank"):
        simulate(crossed)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "3", "expected an object"),
        ("a.json", '{"orders": []}', "expected `actions`"),
        ("a.json", '{"actions": [["0F0"]], "microbatches": "x"}', "expected an integer"),
        ("a.csv", "0F0,0B9x\n", r"rank 0, action 1"),
    ],
)
def test_files_that_are_no_schedules(name: str, text: str, message: str, tmp_path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_schedule(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot read the schedule"):
        read_schedule(tmp_path / "none.csv")
    path = tmp_path / "one.csv"
    path.write_text("0F0,0B0\n")
    with pytest.raises(InputError, match="orders of 3 ranks, got 1"):
        read_schedule(path, ranks=3)
