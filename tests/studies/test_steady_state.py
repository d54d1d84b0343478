"""Long accumulations from two shorter steps, against simulating every micro-batch."""

from __future__ import annotations

import pytest

import simulator
from simulator.experiment import parse_experiment
from simulator.studies.steady_state import step_summary


@pytest.mark.parametrize(
    ("pipeline", "virtual", "sharding"),
    [(1, 1, "zero3"), (4, 1, "none"), (4, 2, "zero1")],
)
def test_extrapolated_step_equals_the_simulated_one(
    pipeline: int, virtual: int, sharding: str
) -> None:
    experiment = parse_experiment(
        {
            "model": {"layers": 16, "hidden": 1024, "heads": 16, "vocab": 32000},
            "cluster": {"topology": "dgx-a100-80gb", "nodes": 1},
            "parallel": {
                "pipeline": pipeline,
                "virtual_stages": virtual,
                "sharding": sharding,
            },
            "training": {
                "global_batch_size": 24 * max(pipeline, 2) // 2 * 8 // pipeline,
                "sequence_length": 1024,
            },
        }
    )
    whole = simulator.run(experiment).summary
    short = step_summary(experiment)
    assert short.step_time_s == pytest.approx(whole.step_time_s, rel=0.01)
    assert short.tokens_per_step == whole.tokens_per_step
    assert short.mfu == pytest.approx(whole.mfu, rel=0.01)
    assert sum(short.breakdown_s.values()) == pytest.approx(short.step_time_s)
