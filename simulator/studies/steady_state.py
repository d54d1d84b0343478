"""The step time of many micro-batches from two shorter steps.

Once a pipeline is full its schedule is periodic: every further group of `pipeline` micro-batches
adds the same time, and the same to each part of the breakdown. Two steps with kp and (k+1)p
micro-batches therefore give the step with any larger number of them by a straight line. Sweeps,
the planner and validation use it for long accumulations; `simulator run` simulates every
micro-batch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from simulator.experiment import Experiment
from simulator.simulation import Plan, resolve, run
from simulator.summary import Summary
from simulator.uncertainty import band

if TYPE_CHECKING:
    from simulator.topology import Cluster

#: Steps with fewer micro-batches than this many pipeline lengths are simulated as they are.
SHORTEST = 5


def step_summary(
    experiment: Experiment, *, cluster: Cluster | None = None, plan: Plan | None = None
) -> Summary:
    """The summary of `experiment`, extrapolated where it has many micro-batches.

    `events` counts the events of the shorter steps.
    """
    if plan is None or cluster is None:
        plan, cluster = resolve(experiment, cluster=cluster)
    pipeline = max(plan.mesh.pipeline, 2)
    count = plan.microbatches
    if count < SHORTEST * pipeline or count % plan.mesh.pipeline or experiment.jobs:
        return run(experiment, cluster=cluster).summary
    # interleaved 1F1B is periodic from p micro-batches on, others may need 2p to fill
    interleaved = plan.experiment.parallel.virtual_stages > 1 and schedule_is_1f1b(plan)
    first = 1 if interleaved and plan.vocabulary is None else 2
    sizes = (first * pipeline, (first + 1) * pipeline)
    per_microbatch = experiment.training.micro_batch_size * plan.mesh.data
    short, longer = (
        run(
            experiment.replace(**{"training.global_batch_size": size * per_microbatch}),
            cluster=cluster,
        ).summary
        for size in sizes
    )
    return _extended(short, longer, sizes, count, plan)


def schedule_is_1f1b(plan: Plan) -> bool:
    """Is it (interleaved) 1F1B?"""
    return plan.schedule.name in ("1f1b", "interleaved-1f1b")


def _extended(
    short: Summary, longer: Summary, sizes: tuple[int, int], count: int, plan: Plan
) -> Summary:
    ratio = (count - sizes[0]) / (sizes[1] - sizes[0])

    def line(first: float, second: float) -> float:
        return first + (second - first) * ratio

    step = line(short.step_time_s, longer.step_time_s)
    keys = dict.fromkeys([*longer.breakdown_s, *short.breakdown_s])
    breakdown = {
        key: line(short.breakdown_s.get(key, 0.0), longer.breakdown_s.get(key, 0.0)) for key in keys
    }
    exposed = {
        key: line(short.exposed_communication_s.get(key, 0.0), value)
        for key, value in longer.exposed_communication_s.items()
    }
    model_flops = line(short.model_flops_per_step, longer.model_flops_per_step)
    hardware = line(short.hardware_flops_per_step, longer.hardware_flops_per_step)
    tokens = line(short.tokens_per_step, longer.tokens_per_step)
    achieved = model_flops / step / longer.accelerators
    peak = longer.model_tflops_per_accelerator * 1e12 / longer.mfu
    family = plan.accelerators[int(plan.accelerator_of[0])].family
    spread = band(breakdown, family)
    cost = None
    if short.cost_usd_per_step is not None and longer.cost_usd_per_step is not None:
        cost = line(short.cost_usd_per_step, longer.cost_usd_per_step)
    return dataclasses.replace(
        longer,
        step_time_s=step,
        step_time_low_s=spread.low_s,
        step_time_high_s=spread.high_s,
        tokens_per_step=tokens,
        tokens_per_s=tokens / step,
        tokens_per_s_per_accelerator=tokens / step / longer.accelerators,
        model_flops_per_step=model_flops,
        hardware_flops_per_step=hardware,
        model_tflops_per_accelerator=achieved / 1e12,
        mfu=achieved / peak,
        hfu=hardware / step / longer.accelerators / peak,
        bubble_fraction=breakdown.get("bubble", 0.0) / step,
        exposed_communication_s=exposed,
        breakdown_s=breakdown,
        events=short.events + longer.events,
        energy_j_per_step=line(short.energy_j_per_step, longer.energy_j_per_step),
        cost_usd_per_step=cost,
    )
