"""A proved lower bound on the time of any schedule under a memory limit.

Every term below is a necessary condition on one rank, so their maximum is a bound whatever the
order. Notation for rank r: its stages S_r; head: earliest start of its first forward; RT_s: the
shortest time from the start of F(s, k) to the end of I(s, k) (the micro-batch must go to the last
stage and back); arrival: the earliest time that a gradient can reach the rank; tail_s: what must
still follow the end of an I of stage s: the I of every stage before it, and one W of stage 0.

- *work*: head + all work of the rank.
- *warm-up*: until the first gradient arrives, memory admits only so much forward work; all other
  work comes after the arrival (Qi et al., arXiv:2401.10241, appendix B, generalised to unequal
  stages, several chunks and any limit).
- *last gradient*: after the last I of the rank the stages before it still have to do theirs.
  Weight gradients can move behind that I, but only as many as memory can hold.
- *flow*: at most n micro-batches fit into memory between F and I (or W) of a stage, so the
  (n + j)-th forward waits for the j-th I (or W), which takes a round trip (`_flows`).
- *memory x time*: memory held times its duration does not exceed limit times time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulator.schedules.timing import Durations

_SLACK = 1e-9


@dataclass(frozen=True)
class Problem:
    """A pipeline to be scheduled: one chain of stages with split backward passes.

    Attributes
    ----------
    ranks, microbatches:
        p and m.
    stage_to_rank:
        The rank of each stage.
    durations:
        F, I, W per stage and comm; `B` is not used.
    activation:
        Memory that a forward of each stage takes.
    kept:
        What of it stays from I to W, per stage.
    limits:
        Memory limit of each rank.
    """

    ranks: int
    microbatches: int
    stage_to_rank: tuple[int, ...]
    durations: Durations
    activation: tuple[float, ...]
    kept: tuple[float, ...]
    limits: tuple[float, ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.stage_to_rank)

    def hops(self) -> list[Any]:
        """Delay between stage s and s + 1: `comm`, or 0 if one rank holds both."""
        comm = self.durations.per_stage("comm", self.stages)
        held = self.stage_to_rank
        return [comm[s] if held[s] != held[s + 1] else 0 for s in range(self.stages - 1)]


@dataclass(frozen=True)
class LowerBound:
    """Bounds on the makespan and on the longest window, with the term that gives each."""

    makespan: Any
    window: Any
    makespan_term: str
    window_term: str


def _floor(value: float) -> int:
    return int(value * (1 + _SLACK) + _SLACK)


def lower_bound(problem: Problem) -> LowerBound:
    """The bound of the module's docstring; times are in the unit of the durations."""
    p, m, stages = problem.ranks, problem.microbatches, problem.stages
    f = problem.durations.per_stage("F", stages)
    i = problem.durations.per_stage("I", stages)
    w = problem.durations.per_stage("W", stages)
    hops = problem.hops()
    depart: list[Any] = [0] * stages  # earliest start of F(s, 0)
    for s in range(1, stages):
        depart[s] = depart[s - 1] + f[s - 1] + hops[s - 1]
    back: list[Any] = [0] * stages  # earliest start of I(s, 0)
    back[-1] = depart[-1] + f[-1]
    for s in range(stages - 2, -1, -1):
        back[s] = back[s + 1] + i[s + 1] + hops[s]
    tail: list[Any] = [0] * stages
    for s in range(1, stages):
        tail[s] = tail[s - 1] + i[s - 1] + hops[s - 1]
    held = [[s for s in range(stages) if problem.stage_to_rank[s] == r] for r in range(p)]
    spans: list[tuple[Any, str]] = []
    windows: list[tuple[Any, str]] = []
    both: list[tuple[Any, str]] = []
    for r in range(p):
        own, limit = held[r], problem.limits[r]
        head = min(depart[s] for s in own)
        arrival = min(back[s] for s in own)
        work = m * sum(f[s] + i[s] + w[s] for s in own)
        early = _forward_work(problem, own, f, limit)
        late = work - early
        # Behind the last I of the rank: at most what fits in memory of W. One of them is of that I.
        if any(problem.kept[s] > 0 for s in own):
            movable = _weight_work(problem, own, w, limit)
        else:
            movable = m * sum(w[s] for s in own)
        follow = min(tail[s] + (w[0] if s else w[s]) for s in own)
        needed = max(0, work - movable)
        spans.append((head + work, f"work of rank {r}"))
        windows.append((work, f"work of rank {r}"))
        spans.append((arrival + late, f"warm-up of rank {r}"))
        windows.append((arrival - head + late, f"warm-up of rank {r}"))
        # These paths begin with the first action of stage 0 and end with a W of stage 0, so they
        # bound the window of its rank as well.
        ends = max(head + needed, arrival + max(0, late - movable)) + follow
        both.append((ends, f"last gradient of rank {r}"))
        for s in own:
            trip = back[s] + i[s] - depart[s]
            after = tail[s] + (w[0] if s else 0)
            for term, flow in _flows(problem, s, limit, trip, f, i, w):
                both.append((depart[s] + flow + after, f"{term} of stage {s}"))
                spans.append((depart[s] + flow + w[s], f"{term} of stage {s}"))
                windows.append((depart[s] - head + flow + w[s], f"{term} of stage {s}"))
    spans += both
    windows += both
    best_span = max(spans, key=lambda item: item[0])
    best_window = max(windows, key=lambda item: item[0])
    return LowerBound(best_span[0], best_window[0], best_span[1], best_window[1])


def _flows(
    problem: Problem,
    stage: int,
    limit: float,
    trip: Any,
    f: Sequence[Any],
    i: Sequence[Any],
    w: Sequence[Any],
) -> list[tuple[str, Any]]:
    """Lower bounds on the time from the first F of a stage to the end of its last I, by term.

    Let a_j, b_j, c_j be the j-th start of F, end of I and end of W of the stage in time (each
    sorted), and n (n') the activations that memory can hold between F and I (F and W).

    1. b_j >= a_k + trip + (j - k) g for k <= j: the j - k + 1 micro-batches that start at a_k or
       later all pass F and I of the last stage, g = F + I there, one after the other.
    2. a_(j+n) >= b_j. Moreover a_(j+n+k) >= b_j + k (f + i): at most j + n forwards start before
       b_j, so k forwards and k input gradients lie in between on this rank.
    3. a_(j+n'+k) >= c_j + k (f + i + w) by the same argument with W. (Input gradients done before
       c_j in advance do not help: by 1, q of them delay c_j by q g >= q i.)

    The recursion below carries these bounds from micro-batch to micro-batch.
    """
    m = problem.microbatches
    size, kept = problem.activation[stage], problem.kept[stage]
    forward, inputs, weights = f[stage], i[stage], w[stage]
    pace = max(f[-1] + i[-1], inputs)
    to_input = max(1, min(m, _floor(limit / size))) if size > 0 else m
    to_weight = max(1, min(m, _floor(limit / kept))) if kept > 0 else m
    starts: list[Any] = []
    ends: list[Any] = []
    after_input: Any = None
    after_weight: Any = None
    for j in range(m):
        start = starts[-1] + forward if starts else 0
        if j >= to_input:
            after_input = _later(after_input, forward + inputs, ends[j - to_input])
            start = max(start, after_input)
        if j >= to_weight:
            ended = ends[j - to_weight] + weights
            after_weight = _later(after_weight, forward + inputs + weights, ended)
            start = max(start, after_weight)
        starts.append(start)
        ends.append(max(start + trip, ends[-1] + pace) if ends else start + trip)
    flows = [("flow", ends[-1])]
    if limit > 0:
        flows.append(("memory x time", m * size * trip / limit))
    return flows


def _later(previous: Any, step: Any, ended: Any) -> Any:
    return ended if previous is None else max(previous + step, ended)


def _forward_work(problem: Problem, own: Sequence[int], f: Sequence[Any], limit: float) -> Any:
    """The most forward work that fits in memory without any backward (fractional knapsack)."""
    room = limit
    work: Any = 0
    ratio = sorted(own, key=lambda s: -(f[s] / max(problem.activation[s], 1e-300)))
    equal = len({problem.activation[s] for s in own}) == 1
    for s in ratio:
        size = problem.activation[s]
        count: Any = problem.microbatches
        if size > 0:
            fits = room / size
            count = min(count, _floor(fits) if equal else fits)
        work += count * f[s]
        room -= count * size
    return work


def _weight_work(problem: Problem, own: Sequence[int], w: Sequence[Any], limit: float) -> Any:
    """The most W work that can be pending at once (fractional knapsack over the kept memory)."""
    room = limit
    work: Any = 0
    for s in sorted(own, key=lambda s: -(w[s] / max(problem.kept[s], 1e-300))):
        count: float = problem.microbatches
        if problem.kept[s] > 0:
            count = min(count, room / problem.kept[s] * (1 + _SLACK))
        work += count * w[s]
        room -= count * problem.kept[s]
    return work
