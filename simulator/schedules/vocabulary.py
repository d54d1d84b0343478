"""Where the passes of vocabulary parallelism stand in a pipeline schedule.

Vocabulary parallelism (Yeung et al., arXiv 2411.05288, section 5) gives every rank passes for the
vocabulary layers of every micro-batch: a lookup before the first stage's forward, S and T between
the last stage's forward and its backward, and the table's gradient after the first stage's
backward. They are placed between the passes of a schedule so that the communication around them
has time: every rank runs `EXTRA_FORWARDS` forwards more before its backwards, which is what the two
barriers of the paper's Algorithm 1 ("Vocab-1") cost in activations (p + 2 micro-batches in place of
p on 1F1B's first rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from simulator.schedules.actions import Action, flatten
from simulator.schedules.schedule import Schedule
from simulator.schedules.timing import Durations, simulate

#: One per barrier between the last stage's forward and its backward.
EXTRA_FORWARDS = 2


class VocabularyKind(StrEnum):
    """Passes that every rank executes, and communication between them, of one micro-batch."""

    LOOKUP = "lookup"
    EMBEDDED = "embedded"
    HIDDEN = "hidden"
    SCORES = "scores"
    STATISTICS = "statistics"
    GRADIENTS = "gradients"
    HIDDEN_GRADIENT = "hidden_gradient"
    EMBEDDED_GRADIENT = "embedded_gradient"
    LOOKUP_GRADIENT = "lookup_gradient"


@dataclass(frozen=True, eq=False)
class VocabularyPlacement:
    """A schedule with room for the vocabulary passes, and where they are."""

    schedule: Schedule
    """Compute actions only, overlap pairs taken apart."""
    before: tuple[Mapping[int, tuple[tuple[VocabularyKind, int], ...]], ...]
    """Per rank: index of an action -> (pass, micro-batch) just before it; the index after the last
    action has those at the end."""
    communication: tuple[tuple[VocabularyKind, int], ...]
    """(kind, micro-batch) in the order in which all ranks issue it."""
    in_flight: tuple[int, ...]
    """Per rank: most micro-batches between pass S and pass T at one time."""


def later_backwards(schedule: Schedule, forwards: int) -> Schedule:
    """The same schedule with every backward that many of its rank's forwards later."""
    orders = []
    for order in schedule.compute_only().actions:
        actions = list(flatten(list(order)))
        ahead = [action for action in actions if action.kind == "F"]
        moved: list[Action] = []
        passed = done = 0
        for action in actions:
            if action.kind == "F":
                passed += 1
                continue
            upto = min(passed + forwards, len(ahead))
            moved += [*ahead[done:upto], action]
            done = max(done, upto)
        orders.append((*moved, *ahead[done:]))
    return replace(schedule, actions=tuple(orders))


def place_vocabulary(schedule: Schedule) -> VocabularyPlacement:
    """Put the vocabulary passes of every micro-batch between a schedule's actions.

    All passes and communication get times of one clock, that of the schedule with unit passes.
    Every dependency goes forward in it, so that no order of ranks or streams that is taken from it
    can deadlock.

    Raises
    ------
    InputError
        If the schedule deadlocks once its backwards come later.
    """
    schedule = later_backwards(schedule, EXTRA_FORWARDS)
    timing = simulate(schedule, Durations())
    first: dict[int, tuple[float, float]] = {}  # forward of the first stage: start, end
    last: dict[int, tuple[int, float]] = {}  # forward of the last stage: rank, end
    loss: dict[int, float] = {}  # start of the last stage's backward
    returned: dict[int, tuple[int, float]] = {}  # backward of the first stage: rank, end
    for rank, order in enumerate(schedule.actions):
        for action, start, end in zip(
            flatten(list(order)), timing.start[rank], timing.end[rank], strict=True
        ):
            number = int(action.microbatch or 0)
            if action.kind == "F" and schedule.is_first(action.stage):
                first[number] = start, end
            if action.kind == "F" and schedule.is_last(action.stage):
                last[number] = rank, end
            if action.kind in ("B", "I") and schedule.is_last(action.stage):
                loss[number] = start
            if action.kind in ("B", "I") and schedule.is_first(action.stage):
                returned[number] = rank, end
    k = VocabularyKind
    # (time, order at one time, kind, micro-batch) of every rank; actions have order 9
    placed: list[list[tuple[float, int, VocabularyKind, int]]] = [[] for _ in schedule.actions]
    shared: list[tuple[float, int, VocabularyKind, int]] = []
    previous = -1.0
    for number, (start, _) in sorted(first.items(), key=lambda item: item[1]):
        # one micro-batch ahead
        shared.append((previous, 1, k.EMBEDDED, number))
        for passes in placed:
            passes.append((previous, 0, k.LOOKUP, number))
        previous = start
    for number, (source, end) in last.items():
        # T halfway between the last stage's forward and backward; S of other ranks not at once:
        # they go on with a pass of their own while the hidden state is on its way
        half = end + (loss[number] - end) / 2 if number in loss else end + 1.0
        shared.append((end, 2, k.HIDDEN, number))
        reached = end
        for rank, passes in enumerate(placed):
            at = end if rank == source else min(end + 0.25, half)
            reached = max(reached, at)
            passes.append((at, 3, k.SCORES, number))
            if number in loss:
                passes.append((half, 5, k.GRADIENTS, number))
        shared.append((reached, 4, k.STATISTICS, number))
        if number in loss:
            shared.append((half, 6, k.HIDDEN_GRADIENT, number))
    for number, (source, end) in returned.items():
        shared.append((end, 7, k.EMBEDDED_GRADIENT, number))
        for rank, passes in enumerate(placed):
            passes.append((end if rank == source else end + 1.0, 8, k.LOOKUP_GRADIENT, number))
    before = []
    in_flight = []
    for passes, starts in zip(placed, timing.start, strict=True):
        passes.sort(key=lambda item: (item[0], item[1], item[3]))
        own: dict[int, list[tuple[VocabularyKind, int]]] = {}
        index = held = most = 0
        for time, _, kind, number in passes:
            while index < len(starts) and starts[index] < time:
                index += 1
            own.setdefault(index, []).append((kind, number))
            held += (kind is k.SCORES) - (kind is k.GRADIENTS)
            most = max(most, held)
        before.append({index: tuple(kinds) for index, kinds in own.items()})
        in_flight.append(most)
    shared.sort(key=lambda item: (item[0], item[1], item[3]))
    return VocabularyPlacement(
        schedule,
        tuple(before),
        tuple((kind, number) for _, _, kind, number in shared),
        tuple(in_flight),
    )
