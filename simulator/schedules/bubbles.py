"""Where a rank's idle time comes from.

Every idle interval of a rank ends when an input arrives. Going back from there along what that
input waited for (its transfer, the action that produced it, the action before that, …) covers the
interval without a hole: it is the critical path of the schedule during the interval. Each piece of
it is a cause:

- a transfer on the path: exposed **communication**;
- an action on the path that takes longer than the mean of its kind over the stages: the excess is
  **imbalance** of that stage;
- any other action: **warm-up** before the rank's first backward, **cool-down** after its last
  forward;
- actions on the path in between, in the steady phase, are compared with two counterfactual runs of
  the same order: what vanishes without transfers is **communication**, what vanishes if moreover
  all stages take the mean is **imbalance**, what is left is **dependency**: the order itself
  puts an input late;
- after the rank's last action: **synchronisation**, the wait for the slowest rank at the end of the
  step. It disappears if the optimizer does not synchronise the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simulator.schedules.actions import Action, parts
from simulator.schedules.timing import Timing, simulate

CAUSES = (
    "warm_up",
    "cool_down",
    "imbalance",
    "communication",
    "dependency",
    "synchronisation",
)


@dataclass(frozen=True)
class IdleTime:
    """Idle time of one rank within the makespan, by cause; the causes add up to `total`.

    Attributes
    ----------
    imbalance_by_stage:
        The part of `imbalance` that each stage is to blame for, by stage index.
    """

    rank: int
    warm_up: Any
    cool_down: Any
    imbalance: Any
    communication: Any
    dependency: Any
    synchronisation: Any
    imbalance_by_stage: tuple[tuple[int, Any], ...]

    @property
    def total(self) -> Any:
        """All idle time: makespan less the time that the rank computes."""
        return sum(getattr(self, cause) for cause in CAUSES)


class _Causes:
    """Finds what an action waited for."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.schedule = timing.schedule
        stages = self.schedule.stages
        self.comm = timing.durations.per_stage("comm", stages)
        self.durations = {k: timing.durations.per_stage(k, stages) for k in ("F", "B", "I", "W")}
        self.mean = {k: sum(values) / stages for k, values in self.durations.items()}
        self.place: dict[Action, tuple[int, int]] = {
            action: (rank, index)
            for rank, order in enumerate(self.schedule.actions)
            for index, entry in enumerate(order)
            for action in parts(entry)
        }
        used = {action.kind for action in self.place}
        totals = [sum(self.durations[k][s] for k in sorted(used)) for s in range(stages)]
        #: The stage with the most work, first among equals.
        self.bottleneck = totals.index(max(totals))

    def remote_input(self, rank: int, index: int) -> tuple[int, int, Any]:
        """(rank, index, delay) of the input that arrived last."""
        best: tuple[Any, int, int, Any] | None = None
        holder = self.schedule.stage_to_rank
        for stage, kind, k in parts(self.schedule.actions[rank][index]):
            producers: tuple[Action, ...] = ()
            neighbour = stage
            if kind == "F" and not self.schedule.is_first(stage):
                neighbour = stage - 1
                producers = (Action(neighbour, "F", k),)
            elif kind in ("I", "B") and not self.schedule.is_last(stage):
                neighbour = stage + 1
                producers = (Action(neighbour, "B", k), Action(neighbour, "I", k))
            for producer in producers:
                if producer not in self.place:
                    continue
                source, at = self.place[producer]
                delay = self.comm[min(stage, neighbour)] if source != holder[stage] else 0
                arrival = self.timing.end[source][at] + delay
                if best is None or arrival > best[0]:
                    best = (arrival, source, at, delay)
        assert best is not None, "a gap always ends with an arrival"
        return best[1], best[2], best[3]

    def path(self, rank: int, index: int, since: Any) -> list[tuple[Any, int, int]]:
        """Pieces (length, rank, index) of the critical path from `since` to the action's start.

        The index is -1 for a transfer.
        """
        start, end = self.timing.start, self.timing.end
        pieces: list[tuple[Any, int, int]] = []
        now = start[rank][index]
        while now > since:
            if index and end[rank][index - 1] >= start[rank][index]:
                index -= 1
            else:
                rank, index, _ = self.remote_input(rank, index)
                arrived = end[rank][index]
                if now > arrived:
                    pieces.append((now - max(arrived, since), rank, -1))
                    now = arrived
                    if now <= since:
                        break
            begin = max(start[rank][index], since)
            pieces.append((now - begin, rank, index))
            now = begin
        return pieces


def attribute(timing: Timing) -> list[IdleTime]:
    """The idle time of every rank by cause; see the module for the rules.

    Times are in the unit of the durations. For every rank the causes add up to the makespan less
    the rank's busy time.
    """
    durations = timing.durations
    stages = timing.schedule.stages
    mean: dict[str, Any] = {}
    for kind in ("F", "B", "I", "W"):
        values = durations.per_stage(kind, stages)
        mean[kind] = values[0] if len(set(values)) == 1 else sum(values) / stages
    silent: list[Any] = [0] * timing.schedule.ranks
    balanced = silent
    results = _split(timing)
    if any(found["dependency"] for found, _ in results):
        without_comm = replace(durations, comm=0)
        silent = [f["dependency"] for f, _ in _split(simulate(timing.schedule, without_comm))]
        even = replace(without_comm, **mean)
        balanced = [f["dependency"] for f, _ in _split(simulate(timing.schedule, even))]
    causes = _Causes(timing)
    idle = []
    for rank, (found, blamed) in enumerate(results):
        steady = found["dependency"]
        transfers = max(0, steady - silent[rank])
        uneven = max(0, steady - transfers - balanced[rank])
        found["communication"] += transfers
        found["imbalance"] += uneven
        found["dependency"] = steady - transfers - uneven
        if uneven:
            blamed[causes.bottleneck] = blamed.get(causes.bottleneck, 0) + uneven
        idle.append(IdleTime(rank, **found, imbalance_by_stage=tuple(sorted(blamed.items()))))
    return idle


def _split(timing: Timing) -> list[tuple[dict[str, Any], dict[int, Any]]]:
    """Per rank the idle time by cause along the critical paths, and the stages to blame."""
    causes = _Causes(timing)
    origin = min(times[0] for times in timing.start if times)
    finish = origin + timing.makespan
    result = []
    for rank, order in enumerate(timing.schedule.actions):
        flags = [[a.kind for a in parts(entry)] for entry in order]
        backward = [i for i, kinds in enumerate(flags) if any(k != "F" for k in kinds)]
        forward = [i for i, kinds in enumerate(flags) if "F" in kinds]
        first_backward = backward[0] if backward else 0
        last_forward = forward[-1] if forward else -1
        found: dict[str, Any] = dict.fromkeys(CAUSES, 0)
        blamed: dict[int, Any] = {}
        previous = origin
        for index in range(len(order)):
            begin = timing.start[rank][index]
            if begin > previous:
                phase = "dependency"
                if index <= first_backward:
                    phase = "warm_up"
                elif index > last_forward:
                    phase = "cool_down"
                for length, source, at in causes.path(rank, index, previous):
                    if at < 0:
                        found["communication"] += length
                        continue
                    excess, stage = (0, 0)
                    if phase != "dependency":
                        excess, stage = _excess(causes, source, at, length)
                    if excess:
                        found["imbalance"] += excess
                        blamed[stage] = blamed.get(stage, 0) + excess
                    found[phase] += length - excess
            previous = timing.end[rank][index]
        found["synchronisation"] += finish - previous
        result.append((found, blamed))
    return result


def _excess(causes: _Causes, rank: int, index: int, length: Any) -> tuple[Any, int]:
    """The share of a piece of the path that is due to a stage above the mean, and the stage."""
    actions = parts(causes.schedule.actions[rank][index])
    worst = max(actions, key=lambda a: causes.durations[a.kind][a.stage] - causes.mean[a.kind])
    own = sum(causes.durations[a.kind][a.stage] for a in actions)
    usual = sum(causes.mean[a.kind] for a in actions)
    if own <= usual * (1 + 1e-12):
        return 0, worst.stage
    return length * (own - usual) / own, worst.stage
