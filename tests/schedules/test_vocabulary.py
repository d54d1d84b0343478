"""Where the passes of vocabulary parallelism stand in a schedule."""

from __future__ import annotations

from collections import Counter

import pytest

from simulator.errors import InputError
from simulator.schedules import Durations, Schedule, build, simulate
from simulator.schedules.actions import flatten
from simulator.schedules.registry import describe, names
from simulator.schedules.vocabulary import (
    VocabularyKind,
    VocabularyPlacement,
    later_backwards,
    place_vocabulary,
)

KIND = VocabularyKind


def passes(placement: VocabularyPlacement, rank: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of a rank in order; stage -1 for vocabulary passes."""
    found: list[tuple[str, int, int]] = []
    actions = placement.schedule.actions[rank]
    for index in range(len(actions) + 1):
        found += [(kind, -1, m) for kind, m in placement.before[rank].get(index, ())]
        if index < len(actions):
            action = actions[index]
            found.append((action.kind, action.stage, action.microbatch))  # type: ignore[union-attr]
    return found


def finishes(placement: VocabularyPlacement) -> bool:
    """Execute passes and communication in their orders, each stream of its own; does all run?"""
    schedule = placement.schedule
    k, ranks = KIND, range(schedule.ranks)
    queues: list[tuple[int, list[tuple[str, int, int]]]] = [
        (rank, passes(placement, rank)) for rank in ranks
    ]
    for kinds in (
        (k.HIDDEN,),
        (k.STATISTICS, k.HIDDEN_GRADIENT),
        (k.EMBEDDED, k.EMBEDDED_GRADIENT),
    ):
        queues.append((-1, [(kind, -1, m) for kind, m in placement.communication if kind in kinds]))
    done: set[tuple[object, ...]] = set()
    chain = schedule.chain_len

    def ready(rank: int, item: tuple[str, int, int]) -> bool:
        kind, stage, m = item
        first = {s for s in range(schedule.stages) if schedule.is_first(s)}
        last = {s for s in range(schedule.stages) if schedule.is_last(s)}
        if kind == "F":
            return ("F", stage - 1, m) in done if stage % chain else (k.EMBEDDED, -1, m) in done
        if kind in ("B", "I"):
            own = ("F", stage, m) in done
            if stage in last:
                return own and (k.HIDDEN_GRADIENT, -1, m) in done
            return own and (("B", stage + 1, m) in done or ("I", stage + 1, m) in done)
        if kind == "W":
            return ("I", stage, m) in done
        needs: dict[str, list[tuple[object, ...]]] = {
            k.EMBEDDED: [(k.LOOKUP, r, m) for r in ranks],
            k.STATISTICS: [(k.SCORES, r, m) for r in ranks],
            k.HIDDEN_GRADIENT: [(k.GRADIENTS, r, m) for r in ranks],
            k.SCORES: [(k.HIDDEN, -1, m)],
            k.GRADIENTS: [(k.STATISTICS, -1, m)],
            k.LOOKUP_GRADIENT: [(k.EMBEDDED_GRADIENT, -1, m)],
        }
        if kind == k.HIDDEN:
            return any(("F", s, m) in done for s in last)
        if kind == k.EMBEDDED_GRADIENT:
            return any((b, s, m) in done for s in first for b in "BI")
        return all(need in done for need in needs.get(kind, []))

    at = [0] * len(queues)
    moved = True
    while moved:
        moved = False
        for number, (rank, queue) in enumerate(queues):
            while at[number] < len(queue) and ready(rank, queue[at[number]]):
                kind, stage, m = queue[at[number]]
                is_pass = rank >= 0 and stage < 0
                done.add((kind, rank, m) if is_pass else (kind, stage, m))
                at[number] += 1
                moved = True
    return all(position == len(queue) for position, (_, queue) in zip(at, queues, strict=True))


def schedules(name: str) -> list[Schedule]:
    found = []
    for ranks in (2, 4):
        for microbatches in (3, 4, 8, 16):
            try:
                virtual = describe(name).default_virtual
                found.append(build(name, ranks, microbatches, virtual))
            except InputError:
                continue
    return found


@pytest.mark.parametrize("name", names())
def test_every_schedule_has_room(name: str) -> None:
    """Each rank runs each vocabulary pass of each micro-batch once, and nothing deadlocks though
    passes and communication are executed strictly in order."""
    assert schedules(name)
    for schedule in schedules(name):
        placement = place_vocabulary(schedule)
        training = schedule.has_backward
        kinds = [KIND.LOOKUP, KIND.SCORES]
        kinds += [KIND.GRADIENTS, KIND.LOOKUP_GRADIENT] if training else []
        expected = Counter((kind, -1, m) for kind in kinds for m in range(schedule.microbatches))
        for rank in range(schedule.ranks):
            own = passes(placement, rank)
            assert Counter(item for item in own if item[1] < 0) == expected
            before = Counter(map(str, flatten(list(schedule.compute_only().actions[rank]))))
            assert Counter(f"{s}{kind}{m}" for kind, s, m in own if s >= 0) == before
        assert finishes(placement)


def test_memory_of_1f1b_grows_by_two_microbatches() -> None:
    """p + 2 in flight on the first rank, 3 on the last (Yeung et al., section 5.2, Vocab-1)."""
    p = 4
    placement = place_vocabulary(build("1f1b", p, 16))
    for rank, order in enumerate(placement.schedule.actions):
        held = most = 0
        for action in flatten(list(order)):
            held += {"F": 1, "B": -1}[action.kind]
            most = max(most, held)
        assert most == p - rank + 2
    assert max(placement.in_flight) <= 2


def test_later_backwards_cost_no_time_in_a_balanced_pipeline() -> None:
    for ranks in (2, 4, 8):
        schedule = build("1f1b", ranks, 4 * ranks)
        shifted = later_backwards(schedule, 2)
        assert simulate(shifted, Durations()).makespan == simulate(schedule, Durations()).makespan
    assert later_backwards(build("gpipe", 4, 8), 2).actions == build("gpipe", 4, 8).actions
