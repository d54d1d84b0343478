"""The project's own regression tests: steps of every kind of plan against stored baselines.

A deliberate change of the model: `pytest tests/regression --simulator-update`, and review the diff.
"""

from __future__ import annotations

from typing import Any

import pytest

from simulator.experiment import parse_experiment
from simulator.simulation import run
from simulator.testing.plugin import SimulatorBaseline

STEPS: dict[str, dict[str, Any]] = {
    # Megatron-LM's classic: tensor and interleaved pipeline parallelism
    "gpt3-175b-64-a100": {
        "model": "gpt3-175b",
        "cluster": {"topology": "dgx-a100", "nodes": 8},
        "parallel": {"tensor": 8, "pipeline": 8, "virtual_stages": 2, "sequence_parallel": True},
        "training": {"global_batch_size": 32, "recompute": "selective"},
    },
    # distributed optimizer, data parallelism across nodes
    "llama3-8b-16-h100-zero1": {
        "model": "llama3-8b",
        "cluster": {"topology": "dgx-h100", "nodes": 2},
        "parallel": {"tensor": 2, "sequence_parallel": True, "sharding": "zero1"},
        "training": {"global_batch_size": 32, "sequence_length": 4096},
    },
    # fully sharded
    "llama2-7b-16-a100-fsdp": {
        "model": "llama2-7b",
        "cluster": {"topology": "dgx-a100", "nodes": 2},
        "parallel": {"sharding": "zero3"},
        "framework": "torchtitan",
        "training": {"global_batch_size": 32, "recompute": "full"},
    },
    # experts
    "mixtral-8x7b-32-h100": {
        "model": "mixtral-8x7b",
        "cluster": {"topology": "dgx-h100", "nodes": 4},
        "parallel": {"tensor": 2, "pipeline": 2, "expert": 8, "sequence_parallel": True,
                     "sharding": "zero1"},
        "training": {"global_batch_size": 32, "sequence_length": 4096},
    },
    # context parallelism and a split backward
    "llama2-13b-32-h100-context": {
        "model": "llama2-13b",
        "cluster": {"topology": "dgx-h100", "nodes": 4},
        "parallel": {"tensor": 4, "context": 2, "pipeline": 2, "sequence_parallel": True,
                     "schedule": "zb-h1"},
        "training": {"global_batch_size": 16, "sequence_length": 16384},
    },
    # a degraded cluster
    "llama2-7b-16-a100-slow-gpu": {
        "model": "llama2-7b",
        "cluster": {"topology": "dgx-a100", "nodes": 2, "faults": [{"gpu": 5, "slowdown": 1.3}]},
        "parallel": {"tensor": 2, "pipeline": 4},
        "training": {"global_batch_size": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, simulator_baseline: SimulatorBaseline) -> None:
    simulator_baseline(run(parse_experiment(STEPS[name])))
