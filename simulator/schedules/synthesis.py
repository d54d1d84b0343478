"""Find a schedule for given durations under a memory limit.

Candidates come from three sources: every registered schedule that fits, the Zero Bubble paper's
automatic scheduler, and an event-driven list scheduler with a family of rules (`Rule`). The best
ones are then improved by changing the order along the critical path. The result is never worse
than the best candidate, and `lower_bound` says how far from the optimum it can be at most.

Everything is deterministic: the number of candidates and of moves is fixed by `effort`, not by a
clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

from simulator.errors import InputError, unknown_name
from simulator.schedules.actions import Action, Overlap, flatten
from simulator.schedules.automatic import (
    GivenDurations,
    KeptForWeights,
    MemoryModel,
    automatic_orders,
)
from simulator.schedules.bounds import LowerBound, Problem, lower_bound
from simulator.schedules.registry import (
    RankOrders,
    build,
    describe,
    loop,
    names,
    register,
    wave,
)
from simulator.schedules.schedule import Schedule
from simulator.schedules.timing import Durations, simulate

OBJECTIVES = ("makespan", "window")

#: An order of one rank: (kind, stage) in sequence; micro-batches of a stage go in ascending order.
_Sequence = list[tuple[str, int]]


@dataclass(frozen=True)
class Rule:
    """How the list scheduler decides what an idle rank does next.

    Attributes
    ----------
    depth:
        Forwards between F and I that rank r may have: `base` + `depth` for every hop to the last
        rank; None is as many as memory admits.
    base:
        See `depth`.
    wait_for_backward:
        A forward (or W) that would delay a backward known to arrive is not started if the backward
        arrives within this share of its duration.
    wait_for_forward:
        The same for a W that would delay a forward.
    forward_first:
        Prefer a forward to a backward if both can start.
    """

    depth: float | None = None
    base: float = 1.0
    wait_for_backward: float = 0.0
    wait_for_forward: float = 0.0
    forward_first: bool = False


@dataclass(frozen=True)
class Synthesis:
    """A synthesised schedule and what is known of it.

    Attributes
    ----------
    schedule:
        The best schedule found.
    makespan, window:
        Its makespan and its longest rank window, in the unit of the durations.
    objective:
        Which of the two was minimised.
    bound:
        Proved lower bounds on both.
    source:
        The candidate that it was found from.
    named:
        Objective of every named schedule that fits, by name.
    peak_memory:
        Largest memory of each rank.
    """

    schedule: Schedule
    makespan: Any
    window: Any
    objective: str
    bound: LowerBound
    source: str
    named: dict[str, Any]
    peak_memory: tuple[float, ...]

    @property
    def value(self) -> Any:
        """The objective's value."""
        return self.makespan if self.objective == "makespan" else self.window

    @property
    def lower_bound(self) -> Any:
        """The bound on the objective."""
        return self.bound.makespan if self.objective == "makespan" else self.bound.window

    @property
    def bound_term(self) -> str:
        """Which necessary condition gives the lower bound."""
        makespan = self.objective == "makespan"
        return self.bound.makespan_term if makespan else self.bound.window_term

    @property
    def gap(self) -> float:
        """Value over lower bound, less 1: the result is at most this far from the optimum."""
        return float(self.value / self.lower_bound - 1) if self.lower_bound else 0.0


def synthesise(
    ranks: int,
    microbatches: int,
    durations: Durations | None = None,
    *,
    memory_limit: float | Sequence[float] | None = None,
    activation: float | Sequence[float] = 1.0,
    kept_for_weights: float = 1.0,
    virtual: int = 1,
    objective: str = "makespan",
    effort: int = 2,
) -> Synthesis:
    """Search a schedule for p ranks and m micro-batches under a memory limit.

    Parameters
    ----------
    durations:
        F, I, W, B and comm of one chunk, uniform or per stage.
    memory_limit:
        Largest activation memory of a rank, in the unit of `activation` (one number or one per
        rank); None is no limit.
    activation:
        Memory of one micro-batch in one stage (one number or one per stage).
    kept_for_weights:
        Share of it that stays from I to W.
    virtual:
        1, or an even number of chunks per rank placed in waves (2 is the V of ZB-V).
    objective:
        `"makespan"`, or `"window"`: the longest of the ranks' own windows.
    effort:
        0 candidates only, 1 and up: rounds of improvement.

    Raises
    ------
    InputError
        If a limit is too small for a single micro-batch, or an argument is out of range.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if virtual != 1 and (virtual < 1 or virtual % 2):
        raise InputError(f"synthesis takes 1 or an even number of chunks per rank, got {virtual}")
    if ranks < 1 or microbatches < 1:
        raise InputError("synthesis needs at least one stage and one micro-batch")
    durations = durations or Durations()
    problem = _problem(
        ranks, microbatches, durations, memory_limit, activation, kept_for_weights, virtual
    )
    search = _Search(problem, durations, objective, virtual)
    search.try_named()
    search.try_automatic()
    search.try_rules()
    search.try_blocks()
    if search.best is None:
        raise InputError(
            f"no schedule found within the memory limit {memory_limit}; one micro-batch in every "
            f"stage of a rank must fit"
        )
    for _ in range(effort):
        if search.gap() <= 0 or not search.improve(budget=400):
            break
    return search.result()


def _problem(
    ranks: int,
    microbatches: int,
    durations: Durations,
    memory_limit: float | Sequence[float] | None,
    activation: float | Sequence[float],
    kept_for_weights: float,
    virtual: int,
) -> Problem:
    placement = loop(ranks, 1) if virtual == 1 else wave(ranks, virtual)
    stages = len(placement)
    sizes = tuple(activation) if isinstance(activation, Sequence) else (activation,) * stages
    if len(sizes) != stages:
        raise InputError(f"activation: expected one number or {stages}, got {len(sizes)}")
    if not 0 <= kept_for_weights <= 1:
        raise InputError(f"kept_for_weights is a share from 0 to 1, got {kept_for_weights}")
    if memory_limit is None:
        limits = tuple(
            sum(microbatches * sizes[s] for s in range(stages) if placement[s] == r) + 0.0
            for r in range(ranks)
        )
    elif isinstance(memory_limit, Sequence):
        limits = tuple(memory_limit)
    else:
        limits = (memory_limit,) * ranks
    if len(limits) != ranks:
        raise InputError(f"memory_limit: expected one number or {ranks}, got {len(limits)}")
    for rank, limit in enumerate(limits):
        needed = sum(sizes[s] for s in range(stages) if placement[s] == rank)
        if limit < needed * (1 - 1e-12):
            raise InputError(
                f"the memory limit of rank {rank} must hold one micro-batch in each of its "
                f"stages ({needed:g}), got {limit:g}"
            )
    kept = tuple(kept_for_weights * size for size in sizes)
    return Problem(ranks, microbatches, placement, durations, sizes, kept, limits)


class _Search:
    """The state of one synthesis: the problem as plain lists and the best order so far."""

    def __init__(
        self, problem: Problem, durations: Durations, objective: str, virtual: int
    ) -> None:
        self.problem = problem
        self.durations = durations
        self.objective = objective
        self.virtual = virtual
        stages = problem.stages
        self.cost = {k: durations.per_stage(k, stages) for k in ("F", "I", "W", "B")}
        self.hops = problem.hops()
        self.held = [
            [s for s in range(stages) if problem.stage_to_rank[s] == r]
            for r in range(problem.ranks)
        ]
        self.delta = {
            "F": list(problem.activation),
            "I": [k - a for a, k in zip(problem.activation, problem.kept, strict=True)],
            "W": [-k for k in problem.kept],
            "B": [-a for a in problem.activation],
        }
        self.bound = lower_bound(_with_cheapest_backward(problem))
        self.best: list[_Sequence] | None = None
        self.best_key: tuple[Any, Any] | None = None
        self.source = ""
        self.named: dict[str, Any] = {}
        self.pool: list[tuple[tuple[Any, Any], str, list[_Sequence]]] = []

    # -- candidates ------------------------------------------------------------------------------

    def try_named(self) -> None:
        """Every registered schedule of this placement that fits."""
        problem = self.problem
        for name in names():
            kind = describe(name)
            if kind.weight_copies != 1 or not kind.flush or name in ("forward-only",):
                continue
            if kind.needs_durations:
                continue
            if name == "interleaved-zb" and self.virtual == 1:
                continue  # it is zb-h1
            try:
                schedule = build(name, problem.ranks, problem.microbatches, self.virtual)
            except InputError:
                continue
            if schedule.stage_to_rank != problem.stage_to_rank:
                continue
            orders = [[(a.kind, a.stage) for a in flatten(order)] for order in schedule.actions]
            if not self.fits(orders):
                continue
            timing = simulate(schedule, self.durations)
            span, window = timing.makespan, max(timing.windows)
            self.named[name] = span if self.objective == "makespan" else window
            self.offer(orders, name)

    def try_automatic(self) -> None:
        """The Zero Bubble paper's scheduler, for one chunk per rank."""
        if self.virtual != 1:
            return
        problem = self.problem
        memory = MemoryModel(problem.activation, problem.kept)
        orders = automatic_orders(
            problem.ranks, problem.microbatches, self.durations, memory, problem.limits
        )
        if orders is not None:
            self.offer(
                [[(a.kind, a.stage) for a in flatten(order)] for order in orders], "zb-automatic"
            )

    def try_rules(self) -> None:
        """The list scheduler with every rule of the family."""
        for rule in _rules(self):
            orders = self.construct(rule)
            if orders is not None:
                self.offer(orders, "list scheduler")

    def try_blocks(self, most: int = 60) -> None:
        """Repeated building blocks in a V, after Qi et al., arXiv:2405.15362.

        One micro-batch's actions are placed with constant offsets between neighbouring ranks, and
        repeated with a period in which no two of them meet on a rank. The longer an activation
        lives within the block, the more are in flight; the paper's V-Min, V-Half and V-ZB are
        such blocks. `most` limits how many are timed.
        """
        if self.virtual != 2:
            return
        problem = self.problem
        found = []
        for period in (6, 7, 8, 9):
            for offsets in product((1, 2, 3, 4), repeat=4):
                block = _block(problem.ranks, period, offsets)
                if block is None:
                    continue
                if any(
                    self.steady_memory(times, period) > limit * (1 + 1e-9)
                    for times, limit in zip(block, problem.limits, strict=True)
                ):
                    continue
                latency = max(max(times.values()) for times in block)
                found.append((period, latency, offsets, block))
        found.sort(key=lambda item: item[:3])
        for period, _, _, block in found[:most]:
            orders = self.repeated(block, period)
            if self.fits(orders):
                self.offer(orders, "building block")
            urgency = {entry: at for times in block for entry, at in times.items()}
            built = self.construct(Rule(), urgency, period)
            if built is not None:
                self.offer(built, "building block")

    def steady_memory(self, times: dict[tuple[str, int], int], period: int) -> float:
        """Largest memory of a rank once a block repeats, if I releases its share at once."""
        stages = [stage for kind, stage in times if kind == "F"]
        peak = 0.0
        for at in (times["F", stage] for stage in stages):
            held = 0.0
            for stage in stages:
                # Blocks (by their start) of which this stage's action is done or running at `at`.
                begun = (at - times["F", stage]) // period
                half = (at - 1 - times["I", stage]) // period
                done = (at - 1 - times["W", stage]) // period
                kept = self.problem.kept[stage]
                held += (begun - half) * (self.problem.activation[stage] - kept)
                held += (begun - done) * kept
            peak = max(peak, held)
        return peak

    def repeated(self, block: list[dict[tuple[str, int], int]], period: int) -> list[_Sequence]:
        """The orders of all ranks for a block that starts anew every `period`."""
        result = []
        for times in block:
            events = [
                (at + period * k, entry)
                for k in range(self.problem.microbatches)
                for entry, at in times.items()
            ]
            events.sort()
            result.append([entry for _, entry in events])
        return result

    def offer(self, orders: list[_Sequence], source: str) -> bool:
        """Keep the orders if they are better than the best; True if so."""
        value = self.evaluate(orders)
        if value is None:
            return False
        self.pool.append((value, source, orders))
        self.pool.sort(key=lambda item: item[0])
        del self.pool[4:]
        if self.best_key is None or value < self.best_key:
            self.best_key, self.best, self.source = value, orders, source
            return True
        return False

    def fits(self, orders: Sequence[_Sequence]) -> bool:
        """Whether no rank exceeds its limit."""
        for rank, order in enumerate(orders):
            held = 0.0
            limit = self.problem.limits[rank] * (1 + 1e-9)
            for kind, stage in order:
                held += self.delta[kind][stage]
                if held > limit:
                    return False
        return True

    def peaks(self, orders: Sequence[_Sequence]) -> tuple[float, ...]:
        """Largest memory of each rank."""
        result = []
        for order in orders:
            held = peak = 0.0
            for kind, stage in order:
                held += self.delta[kind][stage]
                peak = max(peak, held)
            result.append(peak)
        return tuple(result)

    def evaluate(self, orders: Sequence[_Sequence]) -> tuple[Any, Any] | None:
        """(objective, the other measure) of the orders, or None if they deadlock."""
        timed = self.times(orders)
        if timed is None:
            return None
        starts, ends = timed
        span = max(e[-1] for e in ends if e) - min(s[0] for s in starts if s)
        window = max(e[-1] - s[0] for s, e in zip(starts, ends, strict=True) if s)
        return (span, window) if self.objective == "makespan" else (window, span)

    def times(self, orders: Sequence[_Sequence]) -> tuple[list[list[Any]], list[list[Any]]] | None:
        """Start and end of every entry, or None if the orders deadlock."""
        ranks, stages = self.problem.ranks, self.problem.stages
        hops, cost = self.hops, self.cost
        holder = self.problem.stage_to_rank
        done_f: list[list[Any]] = [[] for _ in range(stages)]
        done_i: list[list[Any]] = [[] for _ in range(stages)]
        starts: list[list[Any]] = [[] for _ in range(ranks)]
        ends: list[list[Any]] = [[] for _ in range(ranks)]
        started_f, started_i = [0] * stages, [0] * stages
        position = [0] * ranks
        clock: list[Any] = [0] * ranks
        stack = list(range(ranks - 1, -1, -1))
        queued = [True] * ranks
        last = stages - 1
        while stack:
            rank = stack.pop()
            queued[rank] = False
            order, now, at = orders[rank], clock[rank], position[rank]
            own_starts, own_ends = starts[rank], ends[rank]
            size = len(order)
            while at < size:
                kind, stage = order[at]
                if kind == "F":
                    k = started_f[stage]
                    if stage:
                        source = done_f[stage - 1]
                        if len(source) <= k:
                            break
                        arrival = source[k] + hops[stage - 1]
                        if arrival > now:
                            now = arrival
                    started_f[stage] = k + 1
                    own_starts.append(now)
                    now = now + cost["F"][stage]
                    done_f[stage].append(now)
                    wake = holder[stage + 1] if stage < last else rank
                elif kind == "W":
                    own_starts.append(now)
                    now = now + cost["W"][stage]
                    wake = rank
                else:
                    k = started_i[stage]
                    if len(done_f[stage]) <= k:
                        break
                    if stage < last:
                        source = done_i[stage + 1]
                        if len(source) <= k:
                            break
                        arrival = source[k] + hops[stage]
                        if arrival > now:
                            now = arrival
                    started_i[stage] = k + 1
                    own_starts.append(now)
                    now = now + cost[kind][stage]
                    done_i[stage].append(now)
                    wake = holder[stage - 1] if stage else rank
                own_ends.append(now)
                at += 1
                if wake != rank and not queued[wake]:
                    queued[wake] = True
                    stack.append(wake)
            clock[rank], position[rank] = now, at
        if any(position[r] < len(orders[r]) for r in range(ranks)):
            return None
        return starts, ends

    # -- list scheduler --------------------------------------------------------------------------

    def construct(
        self, rule: Rule, urgency: dict[tuple[str, int], int] | None = None, period: int = 0
    ) -> list[_Sequence] | None:
        """Run the event-driven list scheduler; None if it gets stuck.

        With `urgency` (slot of every kind and stage in a building block that repeats after
        `period`), the action that is due first is started, in place of the rule's preferences.
        """
        problem = self.problem
        ranks, stages, m = problem.ranks, problem.stages, problem.microbatches
        holder, hops, held_stages = problem.stage_to_rank, self.hops, self.held
        cost_f, cost_i, cost_w = self.cost["F"], self.cost["I"], self.cost["W"]
        activation, kept = problem.activation, problem.kept
        limits = [limit * (1 + 1e-9) for limit in problem.limits]
        arrive_f: list[list[Any]] = [[] for _ in range(stages)]
        arrive_i: list[list[Any]] = [[] for _ in range(stages)]
        arrive_f[0] = [0] * m
        count_f, count_i, count_w = [0] * stages, [0] * stages, [0] * stages
        memory = [0.0] * ranks
        free: list[Any] = [0] * ranks
        orders: list[_Sequence] = [[] for _ in range(ranks)]
        caps = [
            float("inf")
            if rule.depth is None
            else max(1.0, rule.base + rule.depth * (ranks - 1 - r)) * len(held_stages[r])
            for r in range(ranks)
        ]
        # Room that must stay free for the later chunks of the rank, or it could deadlock.
        reserve = [
            sum(activation[t] for t in held_stages[holder[s]] if t > s) for s in range(stages)
        ]
        flying = [0] * ranks
        events: list[tuple[Any, int]] = [(0, r) for r in range(ranks)]
        heapq.heapify(events)
        left = 3 * m * stages
        while events:
            now, rank = heapq.heappop(events)
            if free[rank] > now:
                continue
            own = held_stages[rank]
            backward = forward = weight = -1
            next_backward = next_forward = None
            for s in own:
                k = count_i[s]
                if k < m and len(arrive_i[s]) > k:
                    at = arrive_i[s][k]
                    if at <= now:
                        if backward < 0:
                            backward = s
                    elif next_backward is None or at < next_backward:
                        next_backward = at
                k = count_f[s]
                if k < m and len(arrive_f[s]) > k and flying[rank] < caps[rank]:
                    at = arrive_f[s][k]
                    if memory[rank] + activation[s] + reserve[s] <= limits[rank]:
                        if at <= now:
                            forward = s  # the latest chunk wins
                        elif next_forward is None or at < next_forward:
                            next_forward = at
                if count_w[s] < count_i[s] and weight < 0:
                    weight = s
            if (
                forward >= 0
                and backward < 0
                and next_backward is not None
                and next_backward - now < rule.wait_for_backward * cost_f[forward]
            ):
                forward = -1
            choice = "F" if forward >= 0 and (rule.forward_first or backward < 0) else "I"
            if urgency is not None and (backward >= 0 or forward >= 0 or weight >= 0):
                due: list[tuple[int, str, int]] = []
                for s in own:
                    if count_i[s] < len(arrive_i[s]) and arrive_i[s][count_i[s]] <= now:
                        due.append((urgency["I", s] + period * count_i[s], "I", s))
                    if (
                        count_f[s] < min(m, len(arrive_f[s]))
                        and arrive_f[s][count_f[s]] <= now
                        and memory[rank] + activation[s] + reserve[s] <= limits[rank]
                    ):
                        due.append((urgency["F", s] + period * count_f[s], "F", s))
                    if count_w[s] < count_i[s]:
                        due.append((urgency["W", s] + period * count_w[s], "W", s))
                _, choice, stage = min(due)
                forward = backward = weight = stage
            elif choice == "I" and backward < 0:
                choice = "W"
                if weight >= 0:
                    duration = cost_w[weight]
                    if (
                        next_backward is not None
                        and next_backward - now < rule.wait_for_backward * duration
                    ) or (
                        next_forward is not None
                        and next_forward - now < rule.wait_for_forward * duration
                    ):
                        weight = -1
                if weight < 0:
                    coming = [t for t in (next_backward, next_forward) if t is not None]
                    if coming:
                        heapq.heappush(events, (min(coming), rank))
                    continue
            if choice == "F":
                stage = forward
                end = now + cost_f[stage]
                memory[rank] += activation[stage]
                count_f[stage] += 1
                flying[rank] += 1
                if stage + 1 < stages:
                    target, at = stage + 1, end + hops[stage]
                    arrive_f[target].append(at)
                else:
                    target, at = stage, end
                    arrive_i[stage].append(at)
            elif choice == "I":
                stage = backward
                end = now + cost_i[stage]
                memory[rank] -= activation[stage] - kept[stage]
                count_i[stage] += 1
                flying[rank] -= 1
                if stage:
                    target, at = stage - 1, end + hops[stage - 1]
                    arrive_i[target].append(at)
                else:
                    target, at = stage, end
            else:
                stage = weight
                end = now + cost_w[stage]
                memory[rank] -= kept[stage]
                count_w[stage] += 1
                target, at = stage, end
            orders[rank].append((choice, stage))
            left -= 1
            free[rank] = end
            heapq.heappush(events, (end, rank))
            if choice != "W" and holder[target] != rank:
                heapq.heappush(events, (at, holder[target]))
        return orders if left == 0 else None

    # -- improvement -----------------------------------------------------------------------------

    def improve(self, budget: int) -> bool:
        """Descend from the best orders of the pool by moves on the critical path.

        `budget` is the number of orders that are timed. True if the best got better.
        """
        before = self.best_key
        for value, source, orders in list(self.pool):
            current, key, spent = orders, value, 0
            progress = True
            while progress and spent < budget // len(self.pool):
                progress = False
                for changed in self.neighbours(current):
                    spent += 1
                    found = self.evaluate(changed)
                    if found is not None and found < key:
                        current, key, progress = changed, found, True
                        break
                    if spent >= budget // len(self.pool):
                        break
            self.offer(current, source)
        return self.best_key is not None and self.best_key != before

    def neighbours(self, orders: list[_Sequence]) -> Iterator[list[_Sequence]]:
        """Orders in which one action of a critical path is moved past its neighbours."""
        timed = self.times(orders)
        if timed is None:
            return
        starts, ends = timed
        for rank, index in self.critical(orders, starts, ends):
            for target in (
                index - 1,
                index - 2,
                index + 1,
                index + 2,
                index + 4,
                len(orders[rank]),
            ):
                if 0 <= target < len(orders[rank]) + 1 and target != index:
                    order = list(orders[rank])
                    entry = order.pop(index)
                    order.insert(target, entry)
                    if order != orders[rank] and self.legal(rank, order):
                        changed = list(orders)
                        changed[rank] = order
                        yield changed

    def legal(self, rank: int, order: _Sequence) -> bool:
        """F before I before W for every stage, and never more memory than the limit."""
        count: dict[tuple[str, int], int] = {}
        held = 0.0
        limit = self.problem.limits[rank] * (1 + 1e-9)
        for kind, stage in order:
            done = count.get((kind, stage), 0) + 1
            count[kind, stage] = done
            held += self.delta[kind][stage]
            if held > limit:
                return False
            if kind in ("I", "B") and done > count.get(("F", stage), 0):
                return False
            if kind == "W" and done > count.get(("I", stage), 0):
                return False
        return True

    def critical(
        self, orders: list[_Sequence], starts: list[list[Any]], ends: list[list[Any]]
    ) -> list[tuple[int, int]]:
        """(rank, index) of the actions of a critical path that follow their predecessor at once."""
        place: dict[tuple[str, int, int], tuple[int, int]] = {}
        numbers: list[list[int]] = []
        for rank, order in enumerate(orders):
            count: dict[tuple[str, int], int] = {}
            own = []
            for index, (kind, stage) in enumerate(order):
                letter = "I" if kind == "B" else kind
                k = count.get((letter, stage), 0)
                count[letter, stage] = k + 1
                place[letter, stage, k] = (rank, index)
                own.append(k)
            numbers.append(own)
        if self.objective == "makespan":
            rank = max(range(len(orders)), key=lambda r: (ends[r][-1], -r))
        else:
            rank = max(range(len(orders)), key=lambda r: (ends[r][-1] - starts[r][0], -r))
        index = len(orders[rank]) - 1
        found: list[tuple[int, int]] = []
        while True:
            if index and ends[rank][index - 1] >= starts[rank][index]:
                found.append((rank, index))
                index -= 1
                continue
            kind, stage = orders[rank][index]
            k = numbers[rank][index]
            if kind == "F" and stage:
                rank, index = place["F", stage - 1, k]
            elif kind in ("I", "B") and stage + 1 < self.problem.stages:
                rank, index = place["I", stage + 1, k]
            else:
                return found

    def gap(self) -> Any:
        """Objective of the best orders less its lower bound."""
        bound = self.bound
        assert self.best_key is not None
        least = bound.makespan if self.objective == "makespan" else bound.window
        return self.best_key[0] - least * (1 + 1e-12)

    def result(self) -> Synthesis:
        """The best schedule as a `Synthesis`."""
        assert self.best is not None
        problem = self.problem
        schedule = Schedule(
            name="synthesised",
            ranks=problem.ranks,
            stages=problem.stages,
            microbatches=problem.microbatches,
            stage_to_rank=problem.stage_to_rank,
            actions=tuple(tuple(_numbered(order)) for order in self.best),
            chain_len=problem.stages,
        )
        timing = simulate(schedule, self.durations)
        return Synthesis(
            schedule=schedule,
            makespan=timing.makespan,
            window=max(timing.windows),
            objective=self.objective,
            bound=self.bound,
            source=self.source,
            named=self.named,
            peak_memory=self.peaks(self.best),
        )


def _block(
    ranks: int, period: int, offsets: tuple[int, ...]
) -> list[dict[tuple[str, int], int]] | None:
    """Slots of one micro-batch's actions in a V, per rank; None if two of them always meet.

    `offsets` are the slots from rank to rank of the forward down and up the V, and of the input
    gradient down and up. At the turning points the next pass starts as soon as its slots are free.
    """
    last = 2 * ranks - 1
    taken: list[set[int]] = [set() for _ in range(ranks)]
    block: list[dict[tuple[str, int], int]] = [{} for _ in range(ranks)]
    down, up = list(range(ranks)), list(range(ranks - 1, -1, -1))
    begin = 0
    passes = (("F", down, False), ("F", up, True), ("I", down, True), ("I", up, False))
    for (kind, path, second), offset in zip(passes, offsets, strict=True):
        for first in range(begin, begin + period):
            slots = [first + offset * step for step in range(ranks)]
            if all(t % period not in taken[r] for r, t in zip(path, slots, strict=True)):
                break
        else:
            return None
        for rank, at in zip(path, slots, strict=True):
            taken[rank].add(at % period)
            block[rank][kind, last - rank if second else rank] = at
        begin = slots[-1] + 1
    for rank in range(ranks):
        for stage in (last - rank, rank):
            at = block[rank]["I", stage] + 1
            while at % period in taken[rank]:
                at += 1
            taken[rank].add(at % period)
            block[rank]["W", stage] = at
    return block


def _rules(search: _Search) -> list[Rule]:
    """The family of rules that are tried."""
    cost = search.cost
    stages = search.problem.stages
    mean = {k: sum(cost[k]) / stages for k in ("F", "I", "W")}
    period = mean["F"] + mean["I"] + mean["W"]
    hop = sum(search.hops) / max(1, len(search.hops))
    # Micro-batches in flight per hop that keep the round trip covered.
    natural = float((mean["F"] + mean["I"] + 2 * hop) / period) if period else 1.0
    slopes: list[float | None] = [None, 1.0, 2.0, natural, 1.5 * natural, 1.5]
    rules = []
    for depth in slopes:
        for backward in (0.0, 0.5, 1.0):
            for forward in (0.0, 0.5, 1.0):
                rules.append(Rule(depth, 1.0, backward, forward))
    for depth in (0.25, 0.75, 1.0, natural):
        for backward, forward in ((0.0, 1.0), (0.5, 0.5), (1.0, 1.0)):
            rules.append(Rule(depth, 1.0, backward, forward, forward_first=True))
            rules.append(Rule(depth, 2.0, backward, forward))
    return rules


def _with_cheapest_backward(problem: Problem) -> Problem:
    """The problem whose bound also holds for unsplit backward passes.

    Where B takes less than I + W, a whole backward is cheaper than its halves; counting I and
    B - I bounds both.
    """
    if problem.durations.B is None:
        return problem
    stages = problem.stages
    cost = {k: problem.durations.per_stage(k, stages) for k in ("I", "W", "B")}
    i = tuple(min(a, b) for a, b in zip(cost["I"], cost["B"], strict=True))
    w = tuple(min(x, max(0, b - a)) for x, b, a in zip(cost["W"], cost["B"], i, strict=True))
    return replace(problem, durations=replace(problem.durations, I=i, W=w, B=None))


def _numbered(order: _Sequence) -> list[Action | Overlap]:
    count: dict[tuple[str, int], int] = {}
    actions: list[Action | Overlap] = []
    for kind, stage in order:
        k = count.get((kind, stage), 0)
        count[kind, stage] = k + 1
        actions.append(Action(stage, kind, k))
    return actions


def _placement(ranks: int, virtual: int) -> tuple[int, ...]:
    return loop(ranks, 1) if virtual == 1 else wave(ranks, virtual)


@register(
    "auto",
    summary="Synthesised for the given durations and memory limit; never worse than the others.",
    reference="simulator.schedules.synthesis",
    constraint="1 or an even number of chunks per rank; the limit holds one micro-batch",
    chunks="any",
    splits_backward=True,
    memory="the limit",
    placement=_placement,
    aliases=("synthesised", "synthesized", "synthesise", "synthesize"),
)
def auto(
    ranks: int,
    microbatches: int,
    virtual: int,
    durations: GivenDurations = None,
    memory_limit: Annotated[
        float | Sequence[float] | None,
        "Largest number of activations of one chunk on a rank, or a list of one per rank; "
        "no limit if not given.",
    ] = None,
    kept_for_weights: KeptForWeights = 1.0,
    objective: Annotated[
        str, "What to minimise: makespan, or window, the longest of the ranks' own windows."
    ] = "makespan",
    effort: Annotated[int, "Rounds of improvement; 0 takes the best candidate as it is."] = 2,
) -> RankOrders:
    """The order that `synthesise` finds."""
    found = synthesise(
        ranks,
        microbatches,
        durations,
        memory_limit=memory_limit,
        kept_for_weights=kept_for_weights,
        virtual=virtual,
        objective=objective,
        effort=effort,
    )
    return [list(order) for order in found.schedule.actions]
