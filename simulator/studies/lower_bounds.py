"""Lower bounds of a plan's step time, memory and energy: what it takes at the very least.

All follow from two facts of the engine. An activity never lasts less than alone, since sharing
only takes capacity from it; and every stream executes its operations in a fixed order, so that the
start of everything can only move later when any duration grows. Hence:

* `pass_bound`: a pipeline rank computes all its micro-batches one after the other; before its
  first pass the stages in front have worked once, after its last backward the stages in front work
  once more. For equal stages it is the ideal time of 1F1B and interleaved 1F1B. Costs microseconds.
* `data_bound`: a rank's data-parallel collectives run one after the other on one stream.
* `step_bound`: the passes again, which start when their parameters have been gathered and are
  followed by the reduction of the last gradients and the optimizer. Costs 0.1 ms.
* `program_bound`: the longest path through the programs themselves, every operation as fast as when
  nothing but its own kind runs (ranks that behave alike do it at the same time). It is the step
  time if no operation ever slowed another.
* `memory_bound`: parameters, gradients, optimizer state and the activations in flight, without
  working sets and gathered layers.

The tests hold each of them under what the engine and the memory model say, over random plans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.costs.collectives import collective_traffic
from simulator.experiment import Experiment
from simulator.folding import Quotient, TrafficModel
from simulator.model.activations import activation_bytes
from simulator.model.layers import layer_operations
from simulator.model.operations import BYTES_PER_ELEMENT, Collective
from simulator.model.optimizer import (
    has_master_weights,
    optimizer_bytes_per_parameter,
    optimizer_operations,
)
from simulator.model.spec import LayerId, ModelSpec
from simulator.plan.memory import PROCESS_BYTES, rank_parameters
from simulator.plan.mesh import Mesh
from simulator.plan.sharding import sharded_around_passes, step_sharding
from simulator.plan.stages import assign_stages, with_ends
from simulator.programs import Plan, TaskFactory
from simulator.schedules.registry import describe
from simulator.studies.plan_space import Choice
from simulator.topology import Cluster
from simulator.workload import Entry, Task

#: Micro-batches that stand for "many" where a cost is spread over them.
_MANY = 1_000_000


# ------------------------------------------------------------------------ collectives alone


class LeastSeconds:
    """Seconds of a collective when nothing else runs, of the fastest group of its name.

    Groups that lie alike on nodes, leaf switches and positions in the node take the same time on
    the cluster families of `simulator.topology`; one of each pattern is asked. On custom graphs,
    and where `every` says so (faults), every group is.
    """

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        placement: np.ndarray,
        *,
        every: bool = False,
        traffic: TrafficModel = collective_traffic,
    ) -> None:
        self._traffic = traffic
        self._cluster, self._mesh, self._placement = cluster, mesh, placement
        ascending = bool(np.all(np.diff(np.asarray(cluster.node_of)) >= 0))
        self._every = (
            every or not ascending or "graph" in (cluster.scale_up.kind, cluster.scale_out.kind)
        )
        self._groups: dict[str, np.ndarray] = {}
        self._seconds: dict[tuple[str, str, float], float] = {}

    def __call__(self, collective: Collective) -> float:
        """Seconds; 0 for a group of one."""
        key = (collective.op, collective.group, collective.bytes)
        if key not in self._seconds:
            groups = self._members(collective.group)
            seconds = 0.0
            if groups.shape[1] > 1:
                seconds = self._least(collective.op, groups, collective.bytes)
            self._seconds[key] = seconds
        return self._seconds[key]

    def _least(self, op: str, groups: np.ndarray, nbytes: float) -> float:
        traffic = self._traffic(self._cluster, op, groups, nbytes)
        body = np.zeros(len(groups))
        np.maximum.at(body, traffic.group, traffic.work / self._cluster.link_capacity[traffic.link])
        return float(np.min(np.asarray(traffic.latency) + body))

    def _members(self, name: str) -> np.ndarray:
        if name not in self._groups:
            labels = self._mesh.group_labels(name)
            ranks = np.flatnonzero(labels >= 0)
            order = ranks[np.argsort(labels[ranks], kind="stable")]
            size = int(np.sum(labels == labels[ranks[0]])) if ranks.size else 1
            groups = self._placement[order.reshape(-1, size)]
            self._groups[name] = self._representatives(groups)
        return self._groups[name]

    def _representatives(self, groups: np.ndarray) -> np.ndarray:
        cluster = self._cluster
        if self._every or len(groups) == 1:
            return groups
        node = np.asarray(cluster.node_of)[groups]
        leaf = np.asarray(cluster.leaf_of)[groups]
        first = np.searchsorted(np.asarray(cluster.node_of), node)  # node_of ascends
        pattern = np.concatenate([_canonical(node), _canonical(leaf), groups - first], axis=1)
        # rows by a fixed random projection modulo 2^64: sorting numbers is faster than rows
        weights = np.random.default_rng(0).integers(1, 2**63, pattern.shape[1], dtype=np.uint64)
        with np.errstate(over="ignore"):
            mark = (pattern.astype(np.uint64) * (2 * weights + np.uint64(1))).sum(
                axis=1, dtype=np.uint64
            )
        _, chosen = np.unique(mark, return_index=True)
        return groups[np.sort(chosen)]


def _canonical(labels: np.ndarray) -> np.ndarray:
    """Each row's labels renumbered by first appearance."""
    order = np.argsort(labels, axis=1, kind="stable")
    sorted_labels = np.take_along_axis(labels, order, axis=1)
    new = np.ones_like(sorted_labels, dtype=bool)
    new[:, 1:] = sorted_labels[:, 1:] != sorted_labels[:, :-1]
    # the first position of each run is that of its label's first appearance (stable sort)
    columns = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    start = np.maximum.accumulate(np.where(new, columns, 0), axis=1)
    first = np.take_along_axis(order, start, axis=1)
    result = np.empty_like(labels)
    np.put_along_axis(result, order, first, axis=1)
    return result


def task_seconds(task: Task, bandwidth: float, collective: Callable[[Collective], float]) -> float:
    """Seconds of a task when nothing else runs; `bandwidth` is HBM's in byte/s."""
    seconds = task.latency + max(task.compute, task.hbm_bytes / bandwidth)
    if task.collective is not None:
        alone = collective(task.collective)
        if task.compute or task.hbm_bytes:
            # a kernel that hides its own collective lasts the longer of the two
            return max(seconds, alone)
        return task.latency + alone
    return seconds


def _kernel(task: Task) -> Task:
    """What works of a task: its kernel, without collective and without waiting for the host."""
    return dataclasses.replace(
        task, collective=None, latency=task.latency - task.host_wait, host_wait=0.0
    )


# ------------------------------------------------------------------------------- pass bound


@dataclass(frozen=True)
class LayerCosts:
    """What the layers of a model take under one context, per micro-batch and rank, at least."""

    model: ModelSpec
    blocks: tuple[int, ...]
    """Per transformer layer, the index of its kind of block."""
    forward: tuple[float, ...]
    """Seconds per kind of block; then those of embedding, head, mtp by `special`."""
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    bodies: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Of these seconds, those that a slower accelerator stretches."""
    computing: tuple[float, ...]
    """Seconds of kernels alone, forward and backward."""
    stored: tuple[float, ...]
    """Bytes of activations kept for the backward."""
    dense: tuple[float, ...]
    expert: tuple[float, ...]
    special: tuple[str, ...]

    def kind(self, layer: LayerId) -> int:
        """Index into the tuples."""
        if isinstance(layer, int):
            return self.blocks[layer]
        return len(self.forward) - len(self.special) + self.special.index(layer)


def layer_costs(
    plan: Plan, cluster: Cluster, microbatches: int, traffic: TrafficModel = collective_traffic
) -> LayerCosts:
    """Costs of a resolved plan's layers; its pipeline and schedule do not matter.

    Parameters
    ----------
    microbatches:
        Per step, of the plans that are to be bounded; only whether it is more than one matters.
    traffic:
        What collectives do to links.
    """
    model = plan.model
    context = dataclasses.replace(plan.context, micro_batches=1 if microbatches == 1 else _MANY)
    if plan.experiment.parallel.vocabulary_parallel:
        # a bound all the same: what pipelines spread over their ranks is left out
        context = dataclasses.replace(context, vocabulary_ranks=2)
    faults = bool(plan.experiment.cluster.faults)
    least = LeastSeconds(cluster, plan.mesh, plan.placement, every=faults, traffic=traffic)
    overlapped = plan.behaviour.expert
    distinct: dict[Any, int] = {}
    layers: list[LayerId] = []
    blocks = []
    for index in range(model.layers):
        block = model.block(index)
        if block not in distinct:
            distinct[block] = len(layers)
            layers.append(index)
        blocks.append(distinct[block])
    special = [layer for layer in model.layer_ids if not isinstance(layer, int)]
    layers += special
    used = [plan.accelerators[int(i)] for i in np.unique(plan.accelerator_of)]
    rows: dict[str, list[float]] = {
        name: [] for name in ("F", "I", "W", "F body", "I body", "W body", "computing")
    }
    for layer in layers:
        operations = layer_operations(model, layer, context)
        best: dict[str, float] = {}
        for accelerator in used:
            factory = TaskFactory(
                accelerator, plan.profile, plan.collective_seconds, plan.mesh.tensor
            )
            sums: dict[str, float] = {}
            kernels = dict.fromkeys("FBIW", 0.0)
            # the unsplit backward is launched as one list: host time is spread over all of it
            for kind, chosen in (("F", operations.forward), ("B", operations.backward),
                                 ("I", operations.input_gradient),
                                 ("W", operations.weight_gradient)):  # fmt: skip
                total = body = 0.0
                for task in factory.tasks(chosen, -1):
                    if (
                        overlapped
                        and task.collective is not None
                        and (task.collective.group == "expert")
                    ):  # may be hidden under another micro-batch
                        continue
                    seconds = task_seconds(task, accelerator.memory_bandwidth, least)
                    total += seconds
                    if task.collective is None:
                        body += seconds - task.latency
                    if task.compute or task.hbm_bytes:
                        kernels[kind] += task_seconds(
                            _kernel(task),
                            accelerator.memory_bandwidth,
                            least,
                        )
                sums[kind], sums[f"{kind} body"] = total, body
            # what B takes at least, whether split or not
            sums["computing"] = kernels["F"] + min(kernels["B"], kernels["I"] + kernels["W"])
            sums["I"] = min(sums["I"], sums["B"])
            sums["W"] = min(sums["W"], max(0.0, sums["B"] - sums["I"]))
            for name, value in sums.items():
                best[name] = min(best.get(name, value), value)
        for name, values in rows.items():
            values.append(best[name])
    parameters = [rank_parameters(model, context, [layer]) for layer in layers]
    return LayerCosts(
        model=model,
        blocks=tuple(blocks),
        forward=tuple(rows["F"]),
        input_gradient=tuple(rows["I"]),
        weight_gradient=tuple(rows["W"]),
        bodies=(tuple(rows["F body"]), tuple(rows["I body"]), tuple(rows["W body"])),
        computing=tuple(rows["computing"]),
        stored=tuple(activation_bytes(model, layer, context) for layer in layers),
        dense=tuple(item.dense for item in parameters),
        expert=tuple(item.expert for item in parameters),
        special=tuple(str(layer) for layer in special),
    )


@functools.lru_cache(maxsize=4096)
def _stages(
    layers: int, specials: tuple[str, ...], pipeline: int, virtual: int,
    embedding: bool | None, loss: bool | None, mtp_layers: int,
) -> tuple[tuple[LayerId, ...], ...]:  # fmt: skip
    blocks = assign_stages(
        layers, pipeline, virtual, count_embedding=embedding, count_loss=loss, mtp_layers=mtp_layers
    )
    return with_ends(blocks, specials)


@dataclass(frozen=True)
class StageCosts:
    """What every stage of a schedule takes, and every pipeline rank holds, at least."""

    rank_of: np.ndarray
    """Pipeline rank of each global stage."""
    chain: int
    """Stages of one pass through the model."""
    splits: bool
    """Whether weight gradients are passes of their own."""
    forward: np.ndarray
    input_gradient: np.ndarray
    weight_gradient: np.ndarray
    computing: float
    """Kernel seconds of one micro-batch over all stages of one pass."""
    stored_least: np.ndarray
    """Per rank: bytes of activations of its smallest stage, and of its largest."""
    stored_most: np.ndarray
    dense: np.ndarray
    """Per rank: parameters."""
    expert: np.ndarray
    layer: float
    """Parameters of the largest layer."""
    special: np.ndarray
    """Per rank: parameters of embedding, head and the like."""
    parameters: np.ndarray
    """Per global stage: parameters without experts; then those of its first and last layer."""
    first: np.ndarray
    last: np.ndarray


def stage_costs(
    costs: LayerCosts, choice: Choice, base: Experiment, pace: float = 1.0
) -> StageCosts:
    """Per global stage of the choice's schedule; raises `InputError` if layers do not spread.

    `pace` >= 1 stretches what every rank computes (that of the fastest).
    """
    kind = describe(choice.schedule)
    rank_of = np.array(kind.placement(choice.pipeline, choice.virtual_stages))
    # a bidirectional schedule holds the model twice
    chain = choice.pipeline * choice.virtual_stages
    parts = _stages(
        costs.model.layers,
        costs.special,
        choice.pipeline,
        choice.virtual_stages,
        base.parallel.account_for_embedding,
        base.parallel.account_for_loss,
        costs.model.mtp_layers,
    )
    first_special = len(costs.forward) - len(costs.special)
    counts = np.zeros((len(parts), len(costs.forward)))
    for stage, part in enumerate(parts):
        for layer in part:
            counts[stage, costs.kind(layer)] += 1.0
    index = np.arange(len(rank_of)) % chain

    def sums(values: Sequence[float]) -> np.ndarray:
        return (counts @ np.array(values))[index]

    def held(values: np.ndarray) -> np.ndarray:
        return np.bincount(rank_of, weights=values, minlength=choice.pipeline)

    stored = sums(costs.stored)
    least, most = np.full(choice.pipeline, np.inf), np.zeros(choice.pipeline)
    np.minimum.at(least, rank_of, stored)
    np.maximum.at(most, rank_of, stored)
    special = np.array(costs.dense)
    special[:first_special] = 0.0
    backward = 0.0 if base.training.inference else 1.0
    first, last = (
        np.array([costs.dense[costs.kind(part[end])] if part else 0.0 for part in parts])[index]
        for end in (0, -1)
    )
    return StageCosts(
        rank_of=rank_of,
        chain=chain,
        splits=kind.splits_backward,
        forward=sums(costs.forward) + (pace - 1.0) * sums(costs.bodies[0]),
        input_gradient=backward
        * (sums(costs.input_gradient) + (pace - 1.0) * sums(costs.bodies[1])),
        weight_gradient=backward
        * (sums(costs.weight_gradient) + (pace - 1.0) * sums(costs.bodies[2])),
        computing=float((counts @ np.array(costs.computing)).sum()),
        stored_least=least,
        stored_most=most,
        dense=held(sums(costs.dense)),
        expert=held(sums(costs.expert)),
        layer=max(costs.dense[:first_special], default=0.0),
        special=held(sums(list(special))),
        parameters=sums(costs.dense),
        first=first,
        last=last,
    )


def pass_bound(stages: StageCosts, pipeline: int, microbatches: int) -> float:
    """Seconds that the passes of one step take at least."""
    ranks, chain = stages.rank_of, stages.chain
    each = microbatches * chain / len(ranks)  # per copy of the model
    backward = stages.input_gradient
    if not stages.splits:
        backward = backward + stages.weight_gradient
    whole = stages.forward + stages.input_gradient + stages.weight_gradient

    def before(values: np.ndarray) -> np.ndarray:
        by_copy = values.reshape(-1, chain)
        return (np.cumsum(by_copy, axis=1) - by_copy).reshape(-1)

    head, tail = np.full(pipeline, np.inf), np.full(pipeline, np.inf)
    np.minimum.at(head, ranks, before(stages.forward))
    # the last pass may be a weight gradient, which nothing waits for
    np.minimum.at(tail, ranks, 0.0 * whole if stages.splits else before(backward))
    work = np.bincount(ranks, weights=whole, minlength=pipeline)
    return float(np.max(head + each * work + tail))


def computing_bound(stages: StageCosts, pipeline: int, microbatches: int) -> float:
    """Seconds per step that the mean rank's kernels take at least."""
    return microbatches * stages.computing / pipeline


def data_bound(
    stages: StageCosts, choice: Choice, plan: Plan, least: LeastSeconds, microbatches: int
) -> float:
    """Seconds per step of the gradient and parameter traffic of the busiest pipeline rank.

    All of a rank's data-parallel collectives run one after the other on one stream. Each is
    counted at the rate of a very large one, which is the best rate.
    """
    rates = _data_rates(choice, plan, least)
    reduced, whole = stages.dense * rates.reduce, stages.dense * rates.gather
    if rates.per_pass:
        again = np.zeros_like(whole)
        if rates.regather:
            # parameters of the last units of the forward may still be there
            kept = stages.special + 2.0 * stages.layer * (stages.chain / choice.pipeline)
            again = np.maximum(0.0, stages.dense - kept) * rates.gather
        each = microbatches * stages.chain / len(stages.rank_of)
        return float(np.max(each * (whole + again + reduced)))
    return float(np.max(reduced + whole))


@dataclass(frozen=True)
class _DataRates:
    """Data-parallel traffic of a plan, seconds per parameter at least."""

    gather: float = 0.0
    reduce: float = 0.0
    per_pass: bool = False
    """Parameters are gathered and gradients reduced by every pass."""
    regather: bool = False
    """Backward passes gather as well."""


def _data_rates(choice: Choice, plan: Plan, least: LeastSeconds) -> _DataRates:
    parallel, profile = plan.experiment.parallel, plan.profile
    if plan.experiment.training.inference or parallel.shard_group:
        return _DataRates()
    if choice.data * choice.context == 1:
        return _DataRates()
    sharding = step_sharding(choice.sharding, profile, choice.pipeline)
    wide = plan.context.precision in ("fp32", "tf32")
    reduce = 4.0 if wide else profile.grad_reduce_bytes
    reduce *= _seconds_per_byte(least, "all_reduce" if sharding == "none" else "reduce_scatter")
    gather = 0.0
    if sharding != "none":
        gather = 4.0 if wide else profile.param_gather_bytes
        if profile.fp8_param_gather:
            gather = min(gather, 1.0)
        gather *= _seconds_per_byte(least, "all_gather")
    return _DataRates(
        gather,
        reduce,
        per_pass=sharded_around_passes(sharding, profile, choice.pipeline),
        regather=sharding == "zero3" and profile.fsdp_regather_backward,
    )


def optimizer_bound(parameters: float, plan: Plan) -> float:
    """Seconds that the optimizer's kernels take at least for so many parameters on a rank."""
    training = plan.experiment.training
    operations = optimizer_operations(
        parameters, training.optimizer, plan.context.precision, plan.profile,
        clip=training.gradient_clipping,
    )  # fmt: skip
    kernels = [op for op in operations if not isinstance(op, Collective)]
    best = np.inf
    for index in np.unique(plan.accelerator_of):
        chip = plan.accelerators[int(index)]
        factory = TaskFactory(chip, plan.profile, plan.collective_seconds, plan.mesh.tensor)
        tasks = [factory.task(op, -1) for op in kernels]
        best = min(best, sum(task_seconds(t, chip.memory_bandwidth, lambda _: 0.0) for t in tasks))
    return float(best)


def step_bound(
    stages: StageCosts, choice: Choice, plan: Plan, least: LeastSeconds, microbatches: int
) -> float:
    """Seconds per step of the passes and of what has to come before and after them.

    On a pipeline rank, let s be one of its stages. No pass of s or of a later stage starts before
    the first micro-batch has passed the stages in front of s, each with its parameters gathered.
    When the last backward of s is done, the stages in front work once more, and the gradients of s
    and of the rank's earlier stages are still to be reduced (of s at least those of its first
    layer). Between the two the rank's compute stream executes the forwards of s and later stages
    and all backwards, or all forwards and the backwards of s and later stages.

    Parameters that are gathered by every pass are not prefetched before the pass in front has
    ended: a pass takes the gather of its first layer as well, and never less than all its gathers.
    """
    behaviour, profile = plan.behaviour, plan.profile
    host = profile.step_host_time
    pipeline, chain = choice.pipeline, stages.chain
    if plan.experiment.training.inference or chain != len(stages.rank_of):
        return host + pass_bound(stages, pipeline, microbatches)
    rates = _data_rates(choice, plan, least)
    forward, inputs, weights = stages.forward, stages.input_gradient, stages.weight_gradient
    backward = inputs if stages.splits else inputs + weights
    order = np.argsort(stages.rank_of, kind="stable")  # by rank, then by stage

    def grid(values: np.ndarray) -> np.ndarray:
        return values[order].reshape(pipeline, -1)

    def line(values: np.ndarray) -> np.ndarray:
        result = np.empty(chain)
        result[order] = values.reshape(-1)
        return result

    def earlier(values: np.ndarray) -> np.ndarray:
        """Per stage, the sum over the earlier stages of its rank."""
        by_rank = grid(values)
        return line(np.cumsum(by_rank, axis=1) - by_rank)

    def later(values: np.ndarray) -> np.ndarray:
        """Per stage, the sum over itself and the later stages of its rank."""
        by_rank = grid(values)
        return line(np.cumsum(by_rank[:, ::-1], axis=1)[:, ::-1])

    def along(floor: np.ndarray, step: np.ndarray) -> np.ndarray:
        """x[0] = floor[0], x[s] = max(floor[s], x[s - 1] + step[s - 1])."""
        before = np.cumsum(step) - step
        return before + np.maximum.accumulate(floor - before)

    gather, reduced = stages.parameters * rates.gather, stages.parameters * rates.reduce
    updated = 0.0
    parameters = float(np.min(grid(stages.parameters).sum(axis=1)))
    shards = 1 if choice.sharding == "none" else choice.data * choice.context
    if not plan.experiment.parallel.shard_group:
        updated = optimizer_bound(parameters / shards, plan)
    start, end = np.full(chain, host), np.full(chain, updated)
    forward_pass, backward_pass = forward, backward
    if rates.per_pass:
        start[0] = max(host, stages.first[0] * rates.gather)
        end += stages.first * rates.reduce
        forward_pass = np.maximum(forward + stages.first * rates.gather, gather)
        if rates.regather:
            backward_pass = np.maximum(backward + stages.last * rates.gather, gather)
    else:
        if choice.sharding != "none":
            if behaviour.param_gather:
                begin = earlier(gather) + stages.first * rates.gather
                begin = np.maximum(begin, earlier(gather) + gather - forward)
                start = np.maximum(start, begin)
            else:
                end += line(np.broadcast_to(grid(gather).sum(axis=1)[:, None], grid(gather).shape))
        if behaviour.grad_reduce:
            last = weights if stages.splits else backward
            finish = earlier(reduced) + stages.first * rates.reduce
            end += np.maximum(finish, earlier(reduced) + reduced - last)
        else:
            whole = grid(reduced).sum(axis=1)[:, None]
            end += line(np.broadcast_to(whole, grid(reduced).shape))
    before = along(start, forward)
    # the gather of the first of these passes may lie before
    before = before + microbatches * later(forward_pass) - (forward_pass - forward)
    head = grid(before).max(axis=1)
    after = along(end + (weights if stages.splits else 0.0), backward)
    tail = grid(after + microbatches * later(backward_pass)).max(axis=1)
    if stages.splits:
        # weight gradients may come in any order after the input gradients
        work = microbatches * grid(backward_pass + weights).sum(axis=1)
        tail = np.maximum(tail, work + grid(end).min(axis=1))
    return float(np.max(head + tail))


_HUGE = 1e13


def _seconds_per_byte(least: LeastSeconds, op: str) -> float:
    return least(Collective("rate", op, "data_context", _HUGE)) / _HUGE


# ----------------------------------------------------------------------------- memory bound


def _in_flight(name: str, pipeline: int, virtual: int, microbatches: int) -> np.ndarray:
    """Activations of a chunk that each rank holds at once, at least; 1 where nothing is known."""
    behind = pipeline - np.arange(pipeline)
    if name == "gpipe":
        return np.full(pipeline, microbatches * virtual)
    if name in ("1f1b", "zb-h1"):
        return np.minimum(behind, microbatches)
    if name == "interleaved-1f1b" and microbatches % pipeline == 0:
        held = 2 * (behind - 1) + (virtual - 1) * pipeline + 1
        return np.minimum(held, microbatches * virtual)
    return np.ones(pipeline)


def memory_bound(stages: StageCosts, choice: Choice, plan: Plan, microbatches: int) -> float:
    """Bytes that the fullest rank needs at least."""
    context, training = plan.context, plan.experiment.training
    state = optimizer_bytes_per_parameter(training.optimizer, context.precision, plan.profile)
    weight, gradient, rest = state.parameters, state.gradients, state.optimizer
    sharding = step_sharding(choice.sharding, plan.profile, choice.pipeline)
    if sharding == "zero3" and has_master_weights(context.precision) and gradient >= 4.0:
        weight, rest = 4.0, rest - 4.0
    if training.inference:
        weight, gradient, rest = BYTES_PER_ELEMENT[context.wide], 0.0, 0.0
    shard = choice.data * choice.context
    expert_data = choice.tensor * shard // (choice.expert * choice.expert_tensor)
    group = plan.experiment.parallel.shard_group
    if group:
        shard, expert_data = min(shard, group), min(expert_data, group)
    total = np.full(choice.pipeline, PROCESS_BYTES)
    for count, n in ((stages.dense, shard), (stages.expert, expert_data)):
        per_parameter = weight / (n if sharding == "zero3" else 1)
        per_parameter += gradient / (n if sharding in ("zero2", "zero3") else 1)
        per_parameter += rest / (n if sharding != "none" else 1)
        total = total + per_parameter * count
    if not training.inference and not training.activation_offload:
        held = _in_flight(choice.schedule, choice.pipeline, choice.virtual_stages, microbatches)
        total = total + held * stages.stored_least + (stages.stored_most - stages.stored_least)
    return float(total.max())


# ---------------------------------------------------------------------------- program bound


@dataclass(frozen=True)
class ProgramBound:
    """The longest path through a workload."""

    seconds: float
    computing: float
    """Seconds of kernels of the mean rank on its compute stream."""


def program_bound(quotient: Quotient) -> ProgramBound:
    """The step time if nothing overlapped with anything else.

    Every operation lasts as long as when only its own class of activities runs: ranks of a class
    do the same at the same time, so that what they share among themselves is always shared.
    """
    path = _LongestPath(quotient)
    return ProgramBound(path.run(), path.computing)


#: Part of a segment: seconds, and the activity whose members (other classes) meet before it.
_Piece = tuple[float, int]


class _LongestPath:
    """Executes the programs of one rank per class with every operation as fast as alone."""

    def __init__(self, quotient: Quotient) -> None:
        self.quotient = quotient
        workload = quotient.system.workload
        self.computing = 0.0
        self.streams: list[_Stream] = []
        self.event_time: list[list[float]] = []
        self.waiting: dict[tuple[int, int], list[_Stream]] = {}
        self.arrived: dict[tuple[int, str, int], dict[int, tuple[float, _Stream]]] = {}
        self.met: dict[tuple[int, str, int], float] = {}
        self.count: dict[tuple[int, int, str], int] = {}
        self._pieces: dict[tuple[int, int, int], tuple[list[_Piece], list[str], float]] = {}
        for index, rank in enumerate(quotient.representatives.tolist()):
            program = workload.programs[int(workload.program_of[rank])]
            share = len(quotient.members(index)) / workload.ranks
            self.event_time.append([-1.0] * program.events)
            for name, entries in program.streams.items():
                pieces = [self._cut(index, rank, entry) for entry in entries]
                if name == "compute":
                    self.computing += share * sum(computing for _, _, computing in pieces)
                self.streams.append(_Stream(index, rank, entries, pieces))

    def _cut(self, index: int, rank: int, entry: Entry) -> tuple[list[_Piece], list[str], float]:
        key = (index, id(entry.segment), entry.peer)
        if key in self._pieces:
            return self._pieces[key]
        q = self.quotient
        slowdown = float(q.system.workload.slowdown[rank])
        bandwidth = float(q.system.hbm_bandwidth[rank]) / slowdown
        pieces: list[_Piece] = []
        names: list[str] = []
        total = computing = 0.0
        for task in entry.segment.tasks:
            latency = task.latency
            body = max(task.compute * slowdown, task.hbm_bytes / bandwidth)
            if task.compute or task.hbm_bytes:
                computing += latency - task.host_wait + body
            collective = task.collective
            activity = -1
            if collective is not None:
                name = "" if entry.peer >= 0 else collective.group
                place = (name, entry.peer, collective.op, float(collective.bytes))
                variant = q.system.variant_index[place]
                activity = int(q.class_activity[q.system.variants[variant].family, index])
            if activity >= 0:
                share = q.shares[activity, variant]
                latency += share.latency
                body = max(body, share.seconds, share.hbm_bytes / bandwidth)
                if entry.peer < 0 and len(q.activity_members[activity]) > 1:
                    assert collective is not None
                    pieces.append((total, -1))
                    pieces.append((latency + body, activity))
                    names += ["", collective.name]
                    total = 0.0
                    continue
            total += latency + body
        pieces.append((total, -1))
        names.append("")
        self._pieces[key] = (pieces, names, computing)
        return self._pieces[key]

    def run(self) -> float:
        """The end of the last entry, seconds."""
        ready = list(self.streams)
        last = 0.0
        while ready:
            last = max(last, self._advance(ready.pop(), ready))
        return last

    def _advance(self, stream: _Stream, ready: list[_Stream]) -> float:
        times = self.event_time[stream.index]
        entries = stream.entries
        q = self.quotient
        peers = q.system.workload.pipeline_peer
        while stream.at < len(entries):
            entry = entries[stream.at]
            if stream.piece == 0:
                start = stream.clock
                for event in entry.waits:
                    when = times[event]
                    if when < 0.0:
                        self.waiting.setdefault((stream.index, event), []).append(stream)
                        return stream.clock
                    start = max(start, when)
                stream.clock = start
            pieces, names, _ = stream.pieces[stream.at]
            while stream.piece < len(pieces):
                seconds, activity = pieces[stream.piece]
                if activity >= 0 and not self._meet(stream, activity, names[stream.piece], ready):
                    return stream.clock
                stream.clock += seconds
                stream.piece += 1
            stream.piece = 0
            stream.at += 1
            for event in entry.signals:
                self._fire(stream.index, event, stream.clock, ready)
            if entry.peer >= 0 and entry.signals_peer:
                receiver = int(q.class_of[int(peers[entry.peer][stream.rank])])
                for event in entry.signals_peer:
                    self._fire(receiver, event, stream.clock, ready)
        return stream.clock

    def _meet(self, stream: _Stream, activity: int, name: str, ready: list[_Stream]) -> bool:
        """Wait for the other classes of a collective; True when all are there."""
        mine = (stream.index, activity, name)
        number = self.count.get(mine, 0)
        key = (activity, name, number)
        if key not in self.met:
            arrived = self.arrived.setdefault(key, {})
            arrived[stream.index] = (stream.clock, stream)
            if len(arrived) < len(self.quotient.activity_members[activity]):
                return False
            self.met[key] = max(when for when, _ in arrived.values())
            ready.extend(other for _, other in arrived.values() if other is not stream)
        stream.clock = max(stream.clock, self.met[key])
        self.count[mine] = number + 1
        return True

    def _fire(self, index: int, event: int, when: float, ready: list[_Stream]) -> None:
        self.event_time[index][event] = when
        ready.extend(self.waiting.pop((index, event), ()))


class _Stream:
    __slots__ = ("at", "clock", "entries", "index", "piece", "pieces", "rank")

    def __init__(self, index: int, rank: int, entries: Any, pieces: list[Any]) -> None:
        self.index = index
        self.rank = rank
        self.entries = entries
        self.pieces = pieces
        self.at = 0
        self.piece = 0
        self.clock = 0.0
