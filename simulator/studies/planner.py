"""The planner: the best parallel plan of a model on a cluster.

All valid plans are enumerated; each gets a lower bound of its step time and of its memory in
well under a millisecond (`lower_bounds.step_bound`, `memory_bound`). The most promising are
examined first: memory exactly, then the longest path through the plan's programs, then, if that is
still better than the best plans known, a simulation. What no bound excludes is simulated, so the
plans returned are the best of all. Plans that execute the same programs are simulated once.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from simulator.catalog.frameworks import framework, framework_from_mapping
from simulator.errors import InputError, nearest
from simulator.experiment import Experiment
from simulator.model.lookup import resolve_model
from simulator.plan.mesh import Mesh
from simulator.studies.lower_bounds import (
    LayerCosts,
    LeastSeconds,
    computing_bound,
    data_bound,
    layer_costs,
    memory_bound,
    program_bound,
    stage_costs,
    step_bound,
)
from simulator.studies.plan_space import Choice, PlanSpace, enumerate_choices
from simulator.studies.pool import open_pool
from simulator.studies.sweep import shared_cluster
from simulator.summary import summarize

Objective = Literal["time", "cost", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("time", "cost", "energy")

#: Bounds and simulation round differently; a bound only excludes what is worse by more.
ROUNDING = 1e-9

#: Called with (plans settled, plans in all, simulations so far, best objective or None).
Progress = Callable[[int, int, int, float | None], None]


@dataclass(frozen=True)
class Ranked:
    """A simulated plan."""

    choice: Choice
    objective: float
    """Seconds, USD or joules per step."""
    summary: Mapping[str, Any]
    limited_by: tuple[tuple[str, float], ...]
    """What its time goes to besides matrix products, largest first, as shares of the step."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "plan": self.choice.values(),
            "objective": self.objective,
            "limited_by": dict(self.limited_by),
            "summary": dict(self.summary),
        }


@dataclass(frozen=True)
class PlannerResult:
    """The best plans, and what became of all others."""

    best: tuple[Ranked, ...]
    objective: Objective
    valid: int
    """Valid plans of the space."""
    simulated: int
    invalid: Mapping[str, int]
    """Combinations that are no plan, by reason."""
    dropped: Mapping[str, int]
    """Valid plans that were not simulated, by reason."""
    accelerators: int
    gap: float

    def experiment(self, base: Experiment, index: int = 0) -> Experiment:
        """`base` under one of the best plans."""
        return self.best[index].choice.experiment(_on(base, self.accelerators))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "objective": self.objective,
            "accelerators": self.accelerators,
            "valid": self.valid,
            "simulated": self.simulated,
            "dropped": dict(self.dropped),
            "invalid": dict(self.invalid),
            "gap": self.gap,
            "best": [ranked.to_dict() for ranked in self.best],
        }


#: Reasons of plans that were not simulated.
DOES_NOT_FIT = "does not fit into memory"
SELECTS_NOTHING = "selective recomputation selects nothing here: the plan without it is the same"
SLOWER_PASSES = "cannot beat the plans shown: passes, gradients and parameters alone take longer"
SLOWER_PROGRAM = "cannot beat the plans shown: its operations take longer even without contention"


def plan(
    experiment: Experiment,
    accelerators: int | None = None,
    *,
    objective: Objective = "time",
    space: PlanSpace | Mapping[str, Any] | None = None,
    top: int = 10,
    gap: float = 0.05,
    jobs: int | None = None,
    exhaustive: bool = False,
    progress: Progress | None = None,
) -> PlannerResult:
    """Find the best parallel plans of a model on a cluster.

    Parameters
    ----------
    experiment:
        Model, cluster, training and framework; its parallel sizes, sharding, schedule,
        micro-batch size and recomputation are what is looked for. `training.global_batch_size`
        must be given.
    accelerators:
        Number of accelerators; the experiment's own when left out.
    objective:
        `time` of a step, its `cost` in USD, or its `energy` in joules.
    space:
        Values that are tried, by dimension; the rest is chosen to suit the model.
    top:
        How many plans to return, best first.
    gap:
        The first plan is always the best of the space. Of the others, one may be missing that is
        better than the last one shown by less than this share; 0: none is.
    jobs:
        Processes; all cores when left out.
    exhaustive:
        Simulate every plan that fits, without any lower bound of time.

    Raises
    ------
    InputError
        If the experiment cannot be planned for, or no plan is valid or fits.
    """
    if objective not in OBJECTIVES:
        guess = nearest(str(objective), OBJECTIVES)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise InputError(
            f"expected one of {', '.join(OBJECTIVES)}, got {objective!r}{hint}", place="objective"
        )
    if not 0.0 <= gap < 1.0:
        raise InputError(f"expected a share from 0 to less than 1, got {gap!r}", place="gap")
    if top < 1:
        raise InputError(f"expected at least 1, got {top!r}", place="top")
    if experiment.jobs:
        raise InputError("several jobs on one cluster cannot be planned for", place="jobs")
    if not isinstance(space, PlanSpace):
        space = PlanSpace.from_mapping(space or {})
    base = _on(experiment, accelerators)
    model = resolve_model(base.model, place="model")
    cluster = shared_cluster(base)
    placed = base.cluster.placement
    count = len(placed) if placed is not None else len(cluster)
    chip = cluster.accelerator_types[0]
    if objective == "cost" and any(t.price_usd_per_hour is None for t in cluster.accelerator_types):
        raise InputError(f"{chip.name} has no price in the catalogue", place="objective")
    found = enumerate_choices(base, model, count, space)
    if not found.choices:
        reasons = "; ".join(f"{name} ({n})" for name, n in found.invalid.most_common(4))
        raise InputError(f"no plan is valid: {reasons}", place="space")
    search = _Search(base, found.choices, objective, top, gap, exhaustive, progress)
    search.bound(jobs)
    search.examine(jobs)
    if not search.best:
        raise InputError(
            f"none of {len(found.choices)} plans can be run: "
            + "; ".join(f"{name} ({n})" for name, n in search.dropped.most_common(4)),
            place="space",
        )
    return PlannerResult(
        best=tuple(search.ranked()),
        objective=objective,
        valid=len(found.choices),
        simulated=search.simulated,
        invalid=dict(found.invalid.most_common()),
        dropped=dict(search.dropped.most_common()),
        accelerators=count,
        gap=gap,
    )


def _on(experiment: Experiment, accelerators: int | None) -> Experiment:
    """The experiment on a number of accelerators, without jitter."""
    cluster = experiment.cluster
    if accelerators is not None:
        if accelerators < 1:
            raise InputError(f"expected at least 1, got {accelerators}", place="accelerators")
        cluster = dataclasses.replace(
            cluster, accelerators=accelerators, nodes=None, placement=None
        )
    return dataclasses.replace(experiment, cluster=cluster, jitter=None)


# ---------------------------------------------------------------------------------- search


class _Search:
    """Best bound first, until no bound is better than the `top`-th plan."""

    def __init__(
        self,
        base: Experiment,
        choices: Sequence[Choice],
        objective: Objective,
        top: int,
        gap: float,
        exhaustive: bool,
        progress: Progress | None,
    ) -> None:
        self.base, self.choices, self.objective = base, choices, objective
        self.top, self.gap, self.exhaustive = top, gap, exhaustive
        self.progress = progress
        self.dropped: Counter[str] = Counter()
        self.simulated = 0
        self.settled = 0
        #: (bound, numbers of choices with the same programs) of what is left, best first.
        self.queue: list[tuple[float, list[int]]] = []
        self.best: list[Ranked] = []
        self._worst: list[float] = []

    @property
    def threshold(self) -> float:
        """A plan whose bound is above this need not be simulated."""
        if self.exhaustive or len(self._worst) < self.top:
            return math.inf
        best, last = -max(self._worst), -self._worst[0]
        return max(best, last * (1.0 - self.gap)) * (1.0 + ROUNDING)

    def bound(self, jobs: int | None) -> None:
        """Bound all plans; those that cannot fit are dropped."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, choice in enumerate(self.choices):
            groups.setdefault(_layer_key(choice, self.base), []).append(index)
        chunks = [
            (self.base, self.objective, indices, [self.choices[i] for i in indices])
            for indices in groups.values()
        ]
        given = self.base.framework
        fsdp = (framework_from_mapping(given) if isinstance(given, dict) else framework(given)).fsdp
        alike: dict[Choice, tuple[float, list[int]]] = {}
        with open_pool(_bound_chunk, jobs=jobs) as pool:
            for (_, _, indices, _), bounds, error in pool.map(chunks):
                if error is not None:
                    self._drop(_reason(error), len(indices))
                    continue
                for index, (value, reason) in zip(indices, bounds, strict=True):
                    if reason is not None:
                        self._drop(reason)
                        continue
                    key = _programs_key(self.choices[index], fsdp)
                    least, same = alike.setdefault(key, (value, []))
                    same.append(index)
                    alike[key] = (min(least, value), same)
        self.queue = [(value, sorted(same)) for value, same in alike.values()]
        # equal bounds: the simpler plan first, so that the order does not depend on the workers
        self.queue.sort(key=lambda item: (item[0], self.choices[item[1][0]]))

    def examine(self, jobs: int | None) -> None:
        """Examine the rest best first."""
        work = functools.partial(_examine, self.base, self.objective)
        with open_pool(work, jobs=jobs) as pool:
            for (indices, _, _), outcomes, error in pool.map(self._promising()):
                if error is not None:
                    self._drop(_reason(error), len(indices))
                    continue
                for index, outcome in zip(indices, outcomes, strict=True):
                    if isinstance(outcome, str):
                        self._drop(outcome)
                    else:
                        self._add(index, *outcome)

    def _promising(self) -> Iterator[_Item]:
        for position, (value, indices) in enumerate(self.queue):
            threshold = self.threshold
            if value > threshold:
                left = sum(len(same) for _, same in self.queue[position:])
                self._drop(SLOWER_PASSES, left)
                return
            yield indices, [self.choices[index] for index in indices], threshold

    def _add(self, index: int, objective: float, summary: dict[str, Any]) -> None:
        self.simulated += 1
        self.best.append(Ranked(self.choices[index], objective, summary, _limits(summary)))
        heapq.heappush(self._worst, -objective)
        if len(self._worst) > self.top:
            heapq.heappop(self._worst)
        self._settle()

    def _drop(self, reason: str, count: int = 1) -> None:
        self.dropped[reason] += count
        self._settle(count)

    def _settle(self, count: int = 1) -> None:
        self.settled += count
        if self.progress:
            best = min((ranked.objective for ranked in self.best), default=None)
            self.progress(self.settled, len(self.choices), self.simulated, best)

    def ranked(self) -> list[Ranked]:
        """The best plans; the simpler one first where two are equal."""
        return sorted(self.best, key=lambda ranked: (ranked.objective, ranked.choice))[: self.top]


#: Numbers of choices with the same programs, the choices, and the threshold.
_Item = tuple[list[int], list[Choice], float]


def _programs_key(choice: Choice, fsdp: bool) -> Choice:
    """Equal for choices whose programs are the same and only the memory differs.

    Where the gradients of a step are summed before they are reduced once, sharding them (ZeRO-2)
    changes where they are kept, not what is sent.
    """
    if choice.sharding == "zero2" and not fsdp:
        return dataclasses.replace(choice, sharding="zero1")
    return choice


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return f"not valid: {error.problem}"
    return f"failed: {type(error).__name__}: {error}"


def _limits(summary: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    step = float(summary["step_time_s"]) or 1.0
    shares = {
        name: float(seconds) / step
        for name, seconds in summary["breakdown_s"].items()
        if name not in ("gemm", "attention") and seconds > 0.0
    }
    return tuple(sorted(shares.items(), key=lambda item: -item[1])[:4])


# --------------------------------------------------------------------------------- workers


def _layer_key(choice: Choice, base: Experiment) -> tuple[Any, ...]:
    """What the costs of a layer depend on."""
    batch = base.training.global_batch_size or 1
    microbatches = batch // (choice.micro_batch_size * choice.data)
    return (
        choice.tensor,
        choice.context,
        choice.expert,
        choice.expert_tensor,
        choice.micro_batch_size,
        choice.recompute,
        choice.sequence_parallel,
        min(microbatches, 2),
    )


@functools.lru_cache(maxsize=64)
def _costs(base: _Base, key: tuple[Any, ...]) -> tuple[LayerCosts, Any]:
    """Costs of the layers, and the resolved one-stage plan that they come from."""
    from simulator.simulation import resolve, traffic_model

    tensor, context, expert, expert_tensor, micro_batch, recompute, sequence, several = key
    experiment = base.experiment
    cluster = shared_cluster(experiment)
    placed = experiment.cluster.placement
    data = (len(placed) if placed is not None else len(cluster)) // (tensor * context)
    choice = Choice(
        tensor, context, 1, data, 1, expert, expert_tensor, micro_batch, recompute, "none",
        "1f1b", sequence,
    )  # fmt: skip
    one = choice.experiment(experiment)
    training = dataclasses.replace(one.training, global_batch_size=micro_batch * data * several)
    # one stage holds every layer, so that the number of micro-batches costs nothing
    plan, _ = resolve(dataclasses.replace(one, training=training), cluster=cluster)
    traffic = traffic_model(plan.model, plan.profile)
    return layer_costs(plan, cluster, several, traffic), plan


@dataclass(frozen=True)
class _Base:
    """The base experiment as a key: there is one per planner run and process."""

    experiment: Experiment = field(compare=False)
    text: str = ""

    @classmethod
    def of(cls, experiment: Experiment) -> _Base:
        return cls(experiment, repr(experiment))


def _bound_chunk(
    chunk: tuple[Experiment, Objective, Sequence[int], Sequence[Choice]],
) -> list[tuple[float, str | None]]:
    """Bound, or the reason why it is dropped, of choices with the same layer costs."""
    experiment, objective, _, choices = chunk
    base = _Base.of(experiment)
    results: list[tuple[float, str | None]] = []
    from simulator.simulation import straggler_pace

    known: dict[Any, Any] = {}
    hosts = _hosts(base)
    batch = experiment.training.global_batch_size or 1
    for choice in choices:
        try:
            costs, plan = _costs(base, _layer_key(choice, experiment))
            if choice.recompute == "selective" and "same" not in known:
                without = dataclasses.replace(choice, recompute="none")
                known["same"] = costs == _costs(base, _layer_key(without, experiment))[0]
            if choice.recompute == "selective" and known["same"]:
                results.append((math.inf, SELECTS_NOTHING))
                continue
            microbatches = batch // (choice.micro_batch_size * choice.data)
            key = (choice.pipeline, choice.virtual_stages, choice.schedule)
            if key not in known:
                pace = straggler_pace(hosts / choice.pipeline, experiment.cluster.variability)
                stages = stage_costs(costs, choice, experiment, pace)
                known[key] = stages
            stages = known[key]
            if memory_bound(stages, choice, plan, microbatches) > _capacity(base):
                results.append((math.inf, DOES_NOT_FIT))
                continue
            least = _least(base, _mesh_key(choice))
            alike = ("step", key, _programs_key(choice, plan.profile.fsdp).sharding)
            if alike not in known:
                known[alike] = max(
                    data_bound(stages, choice, plan, least, microbatches),
                    step_bound(stages, choice, plan, least, microbatches),
                )
            seconds = known[alike]
            computing = computing_bound(stages, choice.pipeline, microbatches)
            results.append((_objective(objective, base, seconds, computing), None))
        except InputError as error:
            results.append((math.inf, _reason(error)))
    return results


@functools.lru_cache(maxsize=4)
def _chips(base: _Base) -> tuple[tuple[Any, int], ...]:
    """Accelerator types of the cluster and how many of each take part."""
    cluster = shared_cluster(base.experiment)
    placed = base.experiment.cluster.placement
    types = np.asarray(cluster.accelerator_type_of)
    if placed is not None:
        types = types[np.asarray(placed)]
    kinds, counts = np.unique(types, return_counts=True)
    return tuple(
        (cluster.accelerator_types[int(kind)], int(count))
        for kind, count in zip(kinds, counts, strict=True)
    )


@functools.lru_cache(maxsize=4)
def _hosts(base: _Base) -> int:
    """Hosts that take part."""
    hosts = np.asarray(shared_cluster(base.experiment).host_of)
    placed = base.experiment.cluster.placement
    return len(np.unique(hosts if placed is None else hosts[np.asarray(placed)]))


def _capacity(base: _Base) -> float:
    return min(chip.memory_bytes for chip, _ in _chips(base))


def _mesh_key(choice: Choice) -> tuple[int, ...]:
    return (
        choice.tensor,
        choice.context,
        choice.data,
        choice.pipeline,
        choice.expert,
        choice.expert_tensor,
    )


@functools.lru_cache(maxsize=256)
def _least(base: _Base, key: tuple[int, ...]) -> LeastSeconds:
    """Collectives alone on one mesh; shared by all plans that have it."""
    tensor, context, data, pipeline, expert, expert_tensor = key
    experiment = base.experiment
    cluster = shared_cluster(experiment)
    placed = experiment.cluster.placement
    placement = np.arange(len(cluster)) if placed is None else np.asarray(placed, dtype=np.int64)
    mesh = Mesh(
        tensor=tensor,
        context=context,
        data=data,
        pipeline=pipeline,
        expert=expert,
        expert_tensor=expert_tensor,
        shard_group=experiment.parallel.shard_group or 0,
    )
    return LeastSeconds(cluster, mesh, placement, every=bool(experiment.cluster.faults))


def _objective(objective: Objective, base: _Base, seconds: float, computing: float) -> float:
    """The objective of a step of `seconds` in which the mean rank computes for `computing`."""
    if objective == "time":
        return seconds
    total = 0.0
    for chip, number in _chips(base):
        if objective == "cost":
            total += chip.price_usd_per_hour * number * seconds / 3600.0
        else:
            active = chip.power_w - chip.idle_power_w
            total += number * (chip.idle_power_w * seconds + active * computing)
    return total


def _examine(
    base: Experiment, objective: Objective, item: _Item
) -> list[str | tuple[float, dict[str, Any]]]:
    """The objective and summary of plans with the same programs, or why they were not simulated."""
    from simulator.simulation import execute, fold_plan, plan_memory, resolve

    _, choices, threshold = item
    cluster = shared_cluster(base)
    plans = [resolve(choice.experiment(base), cluster=cluster)[0] for choice in choices]
    memory = [plan_memory(plan) for plan in plans]
    fitting = [index for index, report in enumerate(memory) if report.fits]
    outcomes: list[str | tuple[float, dict[str, Any]]] = [DOES_NOT_FIT] * len(choices)
    if not fitting:
        return outcomes
    one = plans[fitting[0]]
    quotient = fold_plan(one, cluster)
    if threshold < math.inf:
        bound = program_bound(quotient)
        value = _objective(objective, _Base.of(base), bound.seconds, bound.computing)
        if value > threshold:
            for index in fitting:
                outcomes[index] = SLOWER_PROGRAM
            return outcomes
    result = execute(one, cluster, memory=memory[fitting[0]], quotient=quotient)
    for index in fitting:
        summary = result.summary
        if index != fitting[0]:
            summary = summarize(
                plans[index], cluster, result.timeline, memory[index], ranks=range(one.mesh.ranks)
            )
        values = {
            "time": summary.step_time_s,
            "cost": summary.cost_usd_per_step,
            "energy": summary.energy_j_per_step,
        }
        outcomes[index] = float(values[objective] or 0.0), summary.to_dict()
    return outcomes
