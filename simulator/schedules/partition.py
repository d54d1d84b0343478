"""Cut a model's layers into stages that take equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulator.errors import InputError
from simulator.schedules.registry import loop
from simulator.schedules.timing import Durations


@dataclass(frozen=True)
class Layer:
    """One layer of a model, or its embedding or head, as the partitioner sees it.

    Attributes
    ----------
    forward, backward_input, backward_weight:
        Times of its passes for one micro-batch, in any one unit.
    memory:
        Memory that it takes on its rank (weights, optimizer state), any unit.
    vocabulary:
        Whether its work is proportional to the vocabulary (embedding, output head with loss), so
        that vocabulary parallelism can spread it.
    name:
        For messages.
    """

    forward: float
    backward_input: float
    backward_weight: float
    memory: float = 0.0
    vocabulary: bool = False
    name: str = ""

    @property
    def time(self) -> float:
        """All passes of one micro-batch."""
        return self.forward + self.backward_input + self.backward_weight


@dataclass(frozen=True)
class Partition:
    """Which layers each stage holds.

    Attributes
    ----------
    stages:
        Per stage the range of its layers (of the list given to `partition`; with vocabulary
        parallelism, without the vocabulary layers).
    durations:
        Per-stage F, I and W (B = I + W) for `simulate`, slow ranks included.
    memory:
        Memory per rank.
    rank_times:
        Time per micro-batch of every rank; the largest is the bottleneck.
    """

    stages: tuple[range, ...]
    durations: Durations
    memory: tuple[float, ...]
    rank_times: tuple[float, ...]

    @property
    def bottleneck(self) -> float:
        """The largest rank time."""
        return max(self.rank_times)

    @property
    def imbalance(self) -> float:
        """Bottleneck over mean rank time, less 1; 0 is perfectly balanced."""
        mean = sum(self.rank_times) / len(self.rank_times)
        return self.bottleneck / mean - 1 if mean else 0.0


def partition(
    layers: Sequence[Layer],
    ranks: int,
    virtual: int = 1,
    *,
    stage_to_rank: Sequence[int] | None = None,
    speeds: Sequence[float] | None = None,
    memory_limit: float | None = None,
    vocabulary_parallel: bool = False,
    vocabulary_overhead: float = 0.0,
    comm: Any = 0,
) -> Partition:
    """Contiguous stages with the smallest possible bottleneck.

    With one chunk per rank the result is optimal: no other cut has a smaller bottleneck, and among
    those with the same bottleneck none has a smaller sum of squares (dynamic programming). With
    more chunks, stage boundaries are then moved one layer at a time while that lowers the largest
    rank time.

    Parameters
    ----------
    layers:
        In model order.
    ranks, virtual:
        p and v; every stage gets at least one layer.
    stage_to_rank:
        Placement of the v p stages; the default is stage s on rank s mod p.
    speeds:
        Relative speed of each rank (1 is what the layers' times are for, 0.5 is half as fast).
    memory_limit:
        Largest `memory` of a rank; only with one chunk per rank.
    vocabulary_parallel:
        Spread vocabulary layers evenly over all ranks, after VocabularyParallelism (Yeung et al.,
        arXiv:2411.05288): every rank does 1/p of their passes for every micro-batch.
    vocabulary_overhead:
        Extra time per micro-batch and rank of its collectives, added to F.
    comm:
        Passed on to `Partition.durations`.

    Raises
    ------
    InputError
        If there are fewer layers than stages, or no cut fits the memory limit.
    """
    stages = ranks * virtual
    placement = tuple(stage_to_rank) if stage_to_rank is not None else loop(ranks, virtual)
    if len(placement) != stages:
        raise InputError(f"stage_to_rank: expected {stages} ranks, got {len(placement)}")
    pace = tuple(speeds) if speeds is not None else (1.0,) * ranks
    if len(pace) != ranks or any(speed <= 0 for speed in pace):
        raise InputError(f"speeds: expected {ranks} positive numbers, got {list(pace)}")
    spread = [layer for layer in layers if layer.vocabulary] if vocabulary_parallel else []
    kept = [layer for layer in layers if not (vocabulary_parallel and layer.vocabulary)]
    if len(kept) < stages:
        raise InputError(
            f"{len(kept)} layers cannot fill {stages} stages ({ranks} ranks x {virtual} chunks)"
        )
    share = _Share.of(spread, ranks, vocabulary_overhead)
    cuts = _cut(kept, placement, pace, memory_limit, share, virtual)
    if virtual > 1:
        cuts = _move_boundaries(kept, placement, pace, cuts)
    ranges = tuple(range(cuts[s], cuts[s + 1]) for s in range(stages))
    times: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    memory = [share.memory] * ranks
    for stage, own in enumerate(ranges):
        speed = pace[placement[stage]]
        group = [kept[index] for index in own]
        times["F"].append((sum(x.forward for x in group) + share.forward / virtual) / speed)
        times["I"].append((sum(x.backward_input for x in group) + share.inputs / virtual) / speed)
        times["W"].append((sum(x.backward_weight for x in group) + share.weights / virtual) / speed)
        memory[placement[stage]] += sum(x.memory for x in group)
    rank_times = [0.0] * ranks
    for stage in range(stages):
        rank_times[placement[stage]] += sum(times[kind][stage] for kind in "FIW")
    durations = Durations(F=tuple(times["F"]), I=tuple(times["I"]), W=tuple(times["W"]), comm=comm)
    return Partition(ranges, durations, tuple(memory), tuple(rank_times))


@dataclass(frozen=True)
class _Share:
    """What every rank gets of the vocabulary layers."""

    forward: float
    inputs: float
    weights: float
    memory: float

    @classmethod
    def of(cls, spread: Sequence[Layer], ranks: int, overhead: float) -> _Share:
        return cls(
            sum(x.forward for x in spread) / ranks + (overhead if spread else 0.0),
            sum(x.backward_input for x in spread) / ranks,
            sum(x.backward_weight for x in spread) / ranks,
            sum(x.memory for x in spread) / ranks,
        )

    @property
    def time(self) -> float:
        return self.forward + self.inputs + self.weights


def _cut(
    layers: Sequence[Layer],
    placement: Sequence[int],
    pace: Sequence[float],
    memory_limit: float | None,
    share: _Share,
    virtual: int,
) -> list[int]:
    """Boundaries of the best cut: first the smallest maximum, then the smallest sum of squares."""
    count, stages = len(layers), len(placement)
    time = [0.0]
    memory = [0.0]
    for layer in layers:
        time.append(time[-1] + layer.time)
        memory.append(memory[-1] + layer.memory)
    infinite = float("inf")

    def cost(stage: int, first: int, last: int) -> float:
        if memory_limit is not None and virtual == 1:
            used = memory[last] - memory[first] + share.memory
            if used > memory_limit * (1 + 1e-12):
                return infinite
        own = time[last] - time[first] + share.time / virtual
        return own / pace[placement[stage]]

    # least[last] = smallest maximum over the first `stage + 1` stages that end before layer `last`.
    least = [infinite] * (count + 1)
    least[0] = 0.0
    for stage in range(stages):
        following = [infinite] * (count + 1)
        for last in range(stage + 1, count - (stages - stage - 1) + 1):
            following[last] = min(
                max(least[first], cost(stage, first, last)) for first in range(stage, last)
            )
        least = following
    bottleneck = least[count]
    if bottleneck == infinite:
        raise InputError(f"no cut into {stages} stages fits the memory limit {memory_limit}")
    ceiling = bottleneck * (1 + 1e-12)
    total = [infinite] * (count + 1)
    total[0] = 0.0
    choices: list[list[int]] = []
    for stage in range(stages):
        following = [infinite] * (count + 1)
        choice = [0] * (count + 1)
        for last in range(stage + 1, count - (stages - stage - 1) + 1):
            for first in range(stage, last):
                own = cost(stage, first, last)
                if own <= ceiling and total[first] + own * own < following[last]:
                    following[last] = total[first] + own * own
                    choice[last] = first
        total = following
        choices.append(choice)
    cuts = [count]
    for choice in reversed(choices):
        cuts.append(choice[cuts[-1]])
    return cuts[::-1]


def _move_boundaries(
    layers: Sequence[Layer], placement: Sequence[int], pace: Sequence[float], cuts: list[int]
) -> list[int]:
    """Move single boundaries while the largest rank time (then the sum of squares) falls."""

    def key(bounds: list[int]) -> tuple[float, float]:
        times = [0.0] * len(pace)
        for stage, rank in enumerate(placement):
            own = sum(layer.time for layer in layers[bounds[stage] : bounds[stage + 1]])
            times[rank] += own / pace[rank]
        return max(times), sum(value * value for value in times)

    best = key(cuts)
    moved = True
    while moved:
        moved = False
        for index in range(1, len(cuts) - 1):
            for step in (-1, 1):
                bounds = list(cuts)
                bounds[index] += step
                if not bounds[index - 1] < bounds[index] < bounds[index + 1]:
                    continue
                found = key(bounds)
                if found < best:
                    best, cuts, moved = found, bounds, True
    return cuts
