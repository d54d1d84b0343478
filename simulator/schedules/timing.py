"""When each action of a schedule starts and ends under abstract durations.

The timing model: every rank is one serial engine that executes its actions in the listed order.
An action starts at the later of the end of the rank's previous action and the arrival of all its
inputs: F(s, k) needs F(s-1, k); I or B(s, k) needs F(s, k) and I or B(s+1, k); W(s, k) needs
I(s, k); the last stage's backward needs only its own forward. An input from another rank arrives
`comm` after its producer's end (of B as a whole if it is not split), one from the same rank at
once. Transfers are pure delay: no bandwidth, no queue, no engine time. An overlap pair is one
block that needs the inputs of both parts first and yields both outputs at its end.

Times are in the unit of the durations. Any ordered number type works; `fractions.Fraction` gives
exact results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.schedule import Schedule

#: A duration: one for all stages, or one per stage.
Duration = Any


@dataclass(frozen=True)
class Durations:
    """Durations of the actions of one chunk, uniform (a number) or per stage (a sequence).

    Attributes
    ----------
    F, B, I, W:
        Forward, unsplit backward, input-gradient and weight-gradient pass. If `B` is None it is
        I + W.
    comm:
        One-way delay of an activation or gradient between two ranks; a sequence gives the delay
        between stage s and s + 1 at index s.
    overlap:
        Duration of an overlapped pair of a forward and a backward; None means the sum of both.
    """

    F: Duration = 1
    B: Duration = None
    I: Duration = 1  # noqa: E741  (the field's name for the input gradient)
    W: Duration = 1
    comm: Duration = 0
    overlap: Duration = None

    def __post_init__(self) -> None:
        for key in ("F", "B", "I", "W", "comm", "overlap"):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, key, tuple(value))
                values = tuple(value)
            else:
                values = (value,)
            for number in values:
                real = isinstance(number, Real) and not isinstance(number, bool)
                if not real or not math.isfinite(number) or number < 0:
                    raise InputError(
                        f"duration {key} must be finite and not negative, got {number!r}"
                    )

    def per_stage(self, key: str, stages: int) -> list[Any]:
        """The durations `key` ("F", "B", "I", "W", "comm") of all stages as a list.

        Raises
        ------
        InputError
            If a sequence has another length than there are stages (boundaries for "comm").
        """
        value = getattr(self, key)
        if key == "B" and value is None:
            inputs, weights = self.per_stage("I", stages), self.per_stage("W", stages)
            return [i + w for i, w in zip(inputs, weights, strict=True)]
        if not isinstance(value, tuple):
            return [value] * stages
        allowed = (stages, stages - 1) if key == "comm" else (stages,)
        if len(value) not in allowed:
            raise InputError(
                f"durations {key}: expected one number or one per stage ({stages}), "
                f"got {len(value)} numbers"
            )
        return [*value, 0] if len(value) == stages - 1 and key == "comm" else list(value)

    def with_recomputation(self, fraction: Duration = 1) -> Durations:
        """The backward pass first repeats `fraction` of the forward pass (1 is full recomputation).

        The repeated forward starts when the gradient has arrived, as in Megatron-LM
        (Korthikanti et al., arXiv:2205.05198), so it lengthens B and I and leaves W alone.
        """

        def longer(backward: Duration) -> Duration:
            if backward is None:
                return None
            if isinstance(backward, tuple) or isinstance(self.F, tuple):
                count = len(backward) if isinstance(backward, tuple) else len(self.F)
                b = backward if isinstance(backward, tuple) else (backward,) * count
                f = self.F if isinstance(self.F, tuple) else (self.F,) * count
                return tuple(x + fraction * y for x, y in zip(b, f, strict=True))
            return backward + fraction * self.F

        return replace(self, B=longer(self.B), I=longer(self.I))


@dataclass(frozen=True)
class Timing:
    """Start and end of every action of a schedule.

    Attributes
    ----------
    schedule:
        The schedule as it was timed (overlap pairs taken apart if that was asked for).
    durations:
        The durations it was timed with.
    start, end:
        Per rank, aligned with `schedule.actions`; time 0 is the first possible start.
    """

    schedule: Schedule
    durations: Durations
    start: tuple[list[Any], ...]
    end: tuple[list[Any], ...]

    @cached_property
    def makespan(self) -> Any:
        """From the first start to the last end over all ranks."""
        first = min(times[0] for times in self.start if times)
        last = max(times[-1] for times in self.end if times)
        return last - first

    @cached_property
    def busy(self) -> tuple[Any, ...]:
        """Time that each rank computes."""
        return tuple(
            sum((e - s for s, e in zip(starts, ends, strict=True)), start=0)
            for starts, ends in zip(self.start, self.end, strict=True)
        )

    @cached_property
    def ideal(self) -> Any:
        """The makespan if no rank ever waited and work were spread evenly: total work / p.

        For stages of equal cost this is m v (F + B).
        """
        total = sum(self.busy, start=0)
        ranks = self.schedule.ranks
        return total // ranks if isinstance(total, int) and total % ranks == 0 else total / ranks

    @cached_property
    def windows(self) -> tuple[Any, ...]:
        """Each rank's time from its own first start to its own last end."""
        return tuple(
            ends[-1] - starts[0] if starts else 0
            for starts, ends in zip(self.start, self.end, strict=True)
        )

    @property
    def bubble_fraction(self) -> float:
        """1 - ideal / makespan."""
        return _fraction_idle(self.ideal, self.makespan)

    @property
    def window_bubble_fraction(self) -> float:
        """1 - ideal / longest window: the "bubble rate" of the Zero Bubble paper.

        It is the steady rate from step to step if the optimizer does not synchronise the ranks
        (Qi et al., arXiv:2401.10241, section 5.3).
        """
        return _fraction_idle(self.ideal, max(self.windows))


def _fraction_idle(ideal: Any, span: Any) -> float:
    return float((span - ideal) / span) if span else 0.0


def simulate(
    schedule: Schedule, durations: Durations | None = None, *, sequential_overlap: bool = False
) -> Timing:
    """Time every action of `schedule`, see the module's timing model.

    Parameters
    ----------
    schedule:
        The orders; communication and sharding actions take no time and are skipped.
    durations:
        The default is F = I = W = 1, B = 2, no communication.
    sequential_overlap:
        Execute an overlap pair as its forward and then its backward.

    Raises
    ------
    InputError
        If the schedule deadlocks or an input is never produced (names the action), or durations
        per stage do not fit the number of stages.
    """
    durations = durations or Durations()
    schedule = schedule.compute_only()
    if sequential_overlap:
        schedule = schedule.without_overlap()
    stages, chain = schedule.stages, schedule.chain_len
    comm = durations.per_stage("comm", stages)
    holder = schedule.stage_to_rank
    # Delay of a stage's input from its neighbour below and above; None: there is no such input.
    below: list[Any] = [None] * stages
    above: list[Any] = [None] * stages
    for stage in range(stages):
        if stage % chain:
            below[stage] = comm[stage - 1] if holder[stage - 1] != holder[stage] else 0
        if (stage + 1) % chain:
            above[stage] = comm[stage] if holder[stage + 1] != holder[stage] else 0
    tables = {kind: durations.per_stage(kind, stages) for kind in ("F", "B", "I", "W")}
    width = _microbatch_width(schedule)
    # The end of F(s, k) is at 2 (s width + k), that of I or B(s, k) one after it.
    done: list[Any] = [None] * (2 * stages * width)
    waiting: dict[int, int] = {}
    orders = schedule.actions
    starts: tuple[list[Any], ...] = tuple([] for _ in orders)
    ends: tuple[list[Any], ...] = tuple([] for _ in orders)
    position = [0] * schedule.ranks
    clock: list[Any] = [0] * schedule.ranks
    runnable = list(range(schedule.ranks - 1, -1, -1))
    step = 2 * width
    while runnable:
        rank = runnable.pop()
        order = orders[rank]
        now = clock[rank]
        at = position[rank]
        rank_starts, rank_ends = starts[rank], ends[rank]
        size = len(order)
        while at < size:
            action = order[at]
            if len(action) == 2:  # Overlap
                result = _overlap_inputs(action, step, done, below, above)
                if result[0] >= 0:
                    waiting[result[0]] = rank
                    break
                now = max(now, result[1])
                rank_starts.append(now)
                forward, backward = action
                now = now + (
                    durations.overlap
                    if durations.overlap is not None
                    else tables["F"][forward.stage] + tables[backward.kind][backward.stage]
                )
                rank_ends.append(now)
                at += 1
                for part, offset in ((forward, 0), (backward, 1)):
                    assert part.microbatch is not None
                    key = part.stage * step + 2 * part.microbatch + offset
                    done[key] = now
                    if key in waiting:
                        runnable.append(waiting.pop(key))
                continue
            stage, kind, k = action
            assert k is not None
            if kind == "F":
                key = stage * step + 2 * k
                delay = below[stage]
                if delay is not None:
                    arrival = done[key - step]
                    if arrival is None:
                        waiting[key - step] = rank
                        break
                    arrival += delay
                    if arrival > now:
                        now = arrival
            elif kind == "I" or kind == "B":
                key = stage * step + 2 * k + 1
                if done[key - 1] is None:
                    waiting[key - 1] = rank
                    break
                delay = above[stage]
                if delay is not None:
                    arrival = done[key + step]
                    if arrival is None:
                        waiting[key + step] = rank
                        break
                    arrival += delay
                    if arrival > now:
                        now = arrival
            else:
                key = -1
                if done[stage * step + 2 * k + 1] is None:
                    waiting[stage * step + 2 * k + 1] = rank
                    break
            rank_starts.append(now)
            now = now + tables[kind][stage]
            rank_ends.append(now)
            at += 1
            if key >= 0:
                done[key] = now
                if key in waiting:
                    runnable.append(waiting.pop(key))
        clock[rank] = now
        position[rank] = at
    if any(position[rank] < len(order) for rank, order in enumerate(orders)):
        from simulator.schedules.checking import deadlock_error

        raise deadlock_error(schedule, position)
    return Timing(schedule, durations, starts, ends)


def steady_bubble_fraction(one: Timing, two: Timing) -> float:
    """Bubble of one more step of a schedule without a flush (`Schedule.flush` is False).

    Parameters
    ----------
    one, two:
        Timings of m and of 2 m micro-batches: without a flush, the micro-batches of the next step
        follow those of this one.
    """
    return _fraction_idle(one.ideal, two.makespan - one.makespan)


def _microbatch_width(schedule: Schedule) -> int:
    """One more than the largest micro-batch index."""
    width = schedule.microbatches
    for order in schedule.actions:
        for action in order:
            for part in action if isinstance(action, Overlap) else (action,):
                assert isinstance(part, Action)
                if part.microbatch is not None and part.microbatch >= width:
                    width = part.microbatch + 1
    return width


def _overlap_inputs(
    pair: Overlap, step: int, done: list[Any], below: list[Any], above: list[Any]
) -> tuple[int, Any]:
    """(key of the first missing input or -1, arrival of the last input) of an overlap pair."""
    latest: Any = 0
    forward, backward = pair
    assert forward.microbatch is not None
    assert backward.microbatch is not None
    own = backward.stage * step + 2 * backward.microbatch
    needs = [(own, 0)]
    if below[forward.stage] is not None:
        needs.append(((forward.stage - 1) * step + 2 * forward.microbatch, below[forward.stage]))
    if above[backward.stage] is not None:
        needs.append((own + step + 1, above[backward.stage]))
    for key, delay in needs:
        if done[key] is None:
            return key, 0
        latest = max(latest, done[key] + delay)
    return -1, latest
