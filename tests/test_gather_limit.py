"""Framework profiles: `fsdp_limit_all_gathers` bounds how far parameters are gathered ahead."""

from __future__ import annotations

import pytest

from simulator.experiment import parse_experiment
from simulator.model.layers import layer_parameters
from simulator.simulation import Result, run


def step(limited: bool, prefetch: int = 1) -> Result:
    return run(
        parse_experiment(
            {
                "model": "llama2-7b",
                "cluster": {"topology": "dgx-a100", "nodes": 1},
                "parallel": {"sharding": "zero3"},
                "framework": {
                    "base": "torchtitan",
                    "fsdp_limit_all_gathers": limited,
                    "fsdp_prefetch": prefetch,
                },
                "training": {"global_batch_size": 8, "sequence_length": 4096},
            }
        )
    )


def gathered_ahead(result: Result) -> int:
    """Most units of the first forward that are gathered, or being gathered, and not yet used."""
    frame = result.frame()
    forward = frame[(frame["microbatch"] == 0) & (frame["rank"] == 0) & (frame["phase"] == "F")]
    gathers = forward[forward["stream"] == "data"].sort_values("start")
    layers = forward[forward["stream"] == "compute"]
    ends = layers.groupby("layer", sort=True)["end"].max()
    freed = sorted(ends[ends.index >= 0].tolist())
    return max(
        index + 1 - sum(end <= start + 1e-12 for end in freed)
        for index, start in enumerate(gathers["start"])
    )


def test_gathers_wait_for_units_to_be_freed() -> None:
    units = len(step(True).plan.model.layer_ids)
    assert gathered_ahead(step(True)) <= 1 + 1 + 1  # the root unit is freed late
    assert gathered_ahead(step(True, prefetch=3)) <= 3 + 1 + 1
    assert gathered_ahead(step(False)) > units // 2


def test_memory_without_the_limit() -> None:
    limited, free = step(True), step(False)
    plan = free.plan
    sizes = [layer_parameters(plan.model, x, plan.context).total for x in plan.model.layer_ids]
    parts = [r.memory.stages[0].buffer_parts["gathered_parameters"] for r in (limited, free)]
    assert parts[0] == pytest.approx(2.0 * sum(sorted(sizes)[-2:]))
    assert parts[1] == pytest.approx(2.0 * sum(sizes))
    assert free.step_time <= limited.step_time * (1 + 1e-9)
