"""Orders: PyTorch's, Megatron's, DeepSeek's; constraints; peaks of memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.schedules import (
    Action,
    build,
    describe,
    flatten,
    lower,
    names,
    parse_action,
    peak_in_flight,
    register,
    simulate,
    to_csv,
    validate,
)
from simulator.schedules.files import schedule_from_texts

HERE = Path(__file__).parent
ORDERS = json.loads((HERE / "pytorch_orders.json").read_text())
DIGESTS = json.loads((HERE / "pytorch_digests.json").read_text())["rows"]
SIZES = [(1, 1), (2, 4), (3, 6), (4, 8), (4, 16), (6, 12), (8, 16)]


def digest(orders: list[list[str]]) -> str:
    text = "\n".join(",".join(order) for order in orders)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", ORDERS["cases"], ids=lambda c: c["schedule"])
def test_recorded_orders_of_pytorch(case) -> None:
    schedule = build(case["schedule"], case["pp"], case["n_microbatches"], case["virtual"])
    assert schedule.action_texts() == case["rank_actions"]
    assert list(schedule.stage_to_rank) == case["stage_to_rank"]
    if "rank_actions_compute_comms" in case:
        lowered = lower(schedule)
        assert lowered.action_texts() == case["rank_actions_compute_comms"]
        assert to_csv(lowered) == case["csv_compute_comms"]


def test_recorded_digests_of_pytorch() -> None:
    accepted = 0
    for name, ranks, m, virtual, order, lowered in DIGESTS:
        if order is None:
            with pytest.raises(InputError):
                build(name, ranks, m, virtual)
            continue
        schedule = build(name, ranks, m, virtual)
        assert digest(schedule.action_texts()) == order, (name, ranks, m, virtual)
        assert digest(lower(schedule).action_texts()) == lowered, (name, ranks, m, virtual)
        accepted += 1
    assert accepted > 200


@pytest.mark.parametrize("case", ORDERS["rejected"], ids=lambda c: c["schedule"])
def test_what_pytorch_rejects(case) -> None:
    sizes = (case["schedule"], case["pp"], case["n_microbatches"], case["virtual"])
    with pytest.raises(InputError):
        build(*sizes, strict="pytorch")


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p, m", SIZES)
def test_every_schedule_is_valid_and_complete(name: str, p: int, m: int) -> None:
    try:
        schedule = build(name, p, m)
    except InputError:
        # Only sizes outside the stated constraint are rejected.
        assert (name in ("dualpipe", "chimera") and p % 2) or m < 2 * p
        return
    validate(schedule)
    assert len(schedule.actions) == p
    assert sorted(set(schedule.stage_layer_part)) == list(range(schedule.parts))
    assert schedule.stages == schedule.parts * schedule.replicas
    done = [a for order in schedule.actions for a in flatten(order)]
    forwards = sum(a.kind == "F" for a in done)
    assert forwards == schedule.parts * m
    assert simulate(schedule).makespan > 0


def test_megatron_allows_fewer_micro_batches_than_stages() -> None:
    schedule = build("1f1b", 4, 2)
    validate(schedule)
    assert peak_in_flight(schedule) == [2, 2, 2, 1]
    with pytest.raises(InputError, match=r"\(2\) must be greater than or equal"):
        build("1f1b", 4, 2, strict="pytorch")


def test_megatrons_group_size() -> None:
    """Groups of 5 and a last group of 4 on 4 stages: the order of Megatron's schedule table."""
    schedule = build("interleaved-1f1b", 4, 14, 2, microbatch_group_size=5)
    validate(schedule)
    forwards = [a for a in schedule.actions[3] if isinstance(a, Action) and a.kind == "F"]
    assert [(a.stage // 4, a.microbatch) for a in forwards] == [
        (chunk, k)
        for group in (range(5), range(5, 10), range(10, 14))
        for chunk in (0, 1)
        for k in group
    ]
    # Last rank: warm-up of (v - 1) g = 5 forwards, then one forward and one backward in turn.
    kinds = "".join(str(a)[1] for a in schedule.actions[3])
    assert kinds[:9] == "FFFFFFBFB"
    assert max(peak_in_flight(schedule)) == min(14 * 2, 5 + 2 * 3 + 1)


@pytest.mark.parametrize("group, message", [(3, "between"), (15, "between"), (6, "last group of")])
def test_megatrons_group_size_is_checked(group: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("interleaved-1f1b", 4, 14, 2, microbatch_group_size=group)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (("interleaved-1f1b", 4, 14, 3), r"multiple of the number of rounds \(3.*nearest valid"),
        (("interleaved-zb", 4, 9, 2), r"multiple of the number of rounds \(2"),
        (("zb-v", 4, 8, 3), "exactly 2 stages per rank, but got 3"),
        (("dualpipe-v", 4, 7, 2), "at least as many micro-batches as stages"),
        (("dualpipe", 3, 8), "even number of stages"),
        (("dualpipe", 4, 9), "even number of micro-batches"),
        (("dualpipe", 4, 6), "at least two micro-batches per stage"),
        (("chimera", 3, 6), "even number of stages"),
        (("chimera", 4, 6), "multiple of the number of stages"),
        (("hanayo", 4, 8, 3), "even number of chunks"),
        (("pipedream-2bw", 4, 3), "two weight versions"),
        (("1f1b", 4, 8, 2), "one chunk per rank"),
        (("1f1b", 0, 8), "stages must be at least 1"),
        (("1f1b", 4, 0), "micro-batches must be at least 1"),
        (("1f2b", 4, 8), "did you mean '1f1b'"),
    ],
)
def test_constraints(sizes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(*sizes)


def test_unknown_option_is_rejected() -> None:
    with pytest.raises(InputError, match="no option 'group'"):
        build("1f1b", 4, 8, group=4)


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_peaks_of_activations(p: int, rounds: int) -> None:
    """The table of peaks in flight (released at B or W; at B or I where given)."""
    m = rounds * p
    ranks = range(p)

    def peaks(name: str, v: int | None = None, release: str = "W", count: int = m) -> list[int]:
        return peak_in_flight(build(name, p, count, v), release)

    assert peaks("gpipe") == [m] * p
    assert peaks("1f1b") == [min(m, p - r) for r in ranks]
    assert peaks("eager-1f1b") == [min(m, 2 * (p - r) - 1) for r in ranks]
    assert peaks("pipedream-2bw") == peaks("1f1b")
    assert peaks("forward-only") == [1] * p
    assert peaks("zb-h1") == [min(m, p)] * p
    assert peaks("zb-h1", release="I") == [min(m, p - r) for r in ranks]
    assert peaks("chimera") == [p // 2 + 1 + min(r, p - 1 - r) for r in ranks]
    for v in (2, 3):
        assert peaks("looped-bfs", v) == [m * v] * p
        assert peaks("interleaved-1f1b", v) == [
            min(m * v, (v - 1) * p + 2 * (p - 1 - r) + 1) for r in ranks
        ]
        assert peaks("interleaved-zb", v) == [min(m * v, (v - 1) * p + p)] * p
    large = max(m, 2 * p)
    assert peaks("zb-h2", count=large) == [2 * p - 1] * p
    assert peaks("zb-h2", release="I", count=large) == [2 * (p - r) - 1 for r in ranks]
    assert peaks("zb-v", count=large) == [2 * p] * p
    assert peaks("dualpipe", count=large) == [p + 1] * p
    assert peaks("dualpipe-v", count=large) == [2 * p + 1] * p


def test_bidirectional_schedules_hold_two_copies() -> None:
    for name in ("dualpipe", "chimera"):
        schedule = build(name, 4, 8)
        assert (schedule.replicas, schedule.parts, schedule.weight_copies) == (2, 4, 2)
        assert schedule.stage_layer_part == (0, 1, 2, 3, 0, 1, 2, 3)
        assert schedule.stage_to_rank == (0, 1, 2, 3, 3, 2, 1, 0)
        first = [a for order in schedule.actions for a in flatten(order)]
        down = {a.microbatch for a in first if a.stage < 4}
        up = {a.microbatch for a in first if a.stage >= 4}
        assert down | up == set(range(8))
        assert not down & up


def test_a_new_schedule_is_one_function() -> None:
    from simulator.schedules import registry

    @register("test-serial", summary="One micro-batch at a time.", reference="this test")
    def serial(ranks: int, microbatches: int, virtual: int):
        return [
            [Action(rank, kind, k) for k in range(microbatches) for kind in ("F", "B")]
            for rank in range(ranks)
        ]

    try:
        schedule = build("Test_Serial", 3, 4)
        validate(schedule)
        assert simulate(schedule).makespan == 4 * 3 * 3
        assert describe("test-serial").summary == "One micro-batch at a time."
    finally:
        registry._KINDS.pop("test-serial")
        registry._ALIASES.pop("testserial")


@pytest.mark.parametrize("name", names())
def test_every_option_has_one_line_of_help(name: str) -> None:
    for option, text in describe(name).options.items():
        assert text, f"{name}: {option}"
        assert "\n" not in text
        assert len(text) < 160


def test_the_help_of_an_option_states_its_default() -> None:
    assert describe("zb-1p").options["kept_for_weights"].endswith(" Default: 0.4.")
    assert describe("auto").options["kept_for_weights"].endswith(" Default: 1.0.")
    assert "Default" not in describe("auto").options["memory_limit"]  # its text says: no limit


@pytest.mark.parametrize(
    "text", ["2F0", "1UNSHARD", "3SEND_F1", "0REDUCE_GRAD", "12I34", "(3F2;0B0)OVERLAP_F_B"]
)
def test_action_text_round_trip(text: str) -> None:
    assert str(parse_action(f" {text} ")) == text


@pytest.mark.parametrize(
    "text", ["", "F0", "2X0", "2F", "1UNSHARD3", "2F0x", "(3F2)OVERLAP_F_B", "(0B0;3F2)OVERLAP_F_B"]
)
def test_bad_action_text(text: str) -> None:
    with pytest.raises(InputError):
        parse_action(text, place="rank 0, action 3")


def test_numbering_of_the_copies_may_be_apart() -> None:
    """DualPipe's own code numbers the micro-batches of each direction from 0."""
    texts = [
        [f"{s}F{k}" for s in own for k in range(2)] + [f"{s}B{k}" for s in own for k in range(2)]
        for own in ((0, 3), (1, 2))
    ]
    texts[0] = ["0F0", "0F1", "3F0", "3B0", "3F1", "3B1", "0B0", "0B1"]
    texts[1] = ["2F0", "2F1", "1F0", "1B0", "1F1", "1B1", "2B0", "2B1"]
    schedule = schedule_from_texts(texts, stage_to_rank=[0, 1, 1, 0], chain_len=2)
    assert (schedule.microbatches, schedule.replicas) == (4, 2)
