"""Deep models: the work grows with the number of layers, not with its square."""

from __future__ import annotations

import cProfile
import dataclasses
import pstats
from typing import Any

import pytest

from simulator.experiment import parse_experiment
from simulator.simulation import run
from simulator.workload import Task

CASES: dict[str, dict[str, Any]] = {
    "one bucket per pass": {},
    "gathered layer by layer": {"parallel": {"sharding": "zero3"}},
    "recomputed": {"training": {"global_batch_size": 8, "recompute": "full"}},
    "pipeline of many chunks": {"parallel": {"pipeline": 2, "virtual_stages": 25}},
}


def calls(layers: int, changes: dict[str, Any]) -> int:
    """Function calls of one run: the same on every machine."""
    experiment = parse_experiment(
        {
            "model": {"family": "gpt", "layers": layers, "hidden": 256, "heads": 4, "vocab": 1024,
                      "max_seq": 128},
            "cluster": {"topology": "dgx-h100", "nodes": 1},
            "training": {"global_batch_size": 8},
            **changes,
        }
    )  # fmt: skip
    profile = cProfile.Profile()
    profile.enable()
    run(experiment)
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
def test_four_times_the_layers_are_about_four_times_the_work(case: str) -> None:
    calls(50, CASES[case])  # what is read and computed once per process
    assert calls(400, CASES[case]) < 4.5 * calls(100, CASES[case])


def test_a_task_of_another_layer() -> None:
    task = Task("mlp.fc1", "gemm", -1, "F", 1e-6, 2e-6, 3.0, 4.0, 5.0)
    assert task.at_layer(7) == dataclasses.replace(task, layer=7)
    fields = [getattr(task, field.name) for field in dataclasses.fields(Task)]
    assert len(set(map(repr, fields))) == len(fields)  # none can be mixed up unseen
