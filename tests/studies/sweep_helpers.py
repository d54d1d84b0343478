"""Fast stand-ins for the simulation, importable by worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.experiment import Experiment

BASE: dict[str, Any] = {
    "model": "gpt3-175b",
    "cluster": {"topology": "dgx-a100", "nodes": 8},
    "parallel": {"tensor": 8},
    "training": {"global_batch_size": 64},
}


def product(experiment: Experiment, allow_oom: bool) -> Mapping[str, Any]:
    """A figure that is a function of the experiment alone."""
    parallel, training = experiment.parallel, experiment.training
    return {
        "step_time_s": training.micro_batch_size / (parallel.tensor * parallel.pipeline),
        "breakdown_s": {"gemm": float(parallel.tensor), "bubble": 1 / 3},
        "memory": ({"total": 1.0},),
        "fits": not allow_oom,
    }


def slow_product(experiment: Experiment, allow_oom: bool) -> Mapping[str, Any]:
    time.sleep(0.01)
    return product(experiment, allow_oom)


def picky(experiment: Experiment, allow_oom: bool) -> Mapping[str, Any]:
    """Refuses tensor = 2, has a bug at 4, and dies at 8."""
    size = experiment.parallel.tensor
    if size == 2:
        raise InputError("2 is refused", place="parallel.tensor")
    if size == 4:
        raise ZeroDivisionError("a bug")
    if size == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return product(experiment, allow_oom)


def logged(experiment: Experiment, allow_oom: bool) -> Mapping[str, Any]:
    """Notes every call in the file that the environment names."""
    line = f"{experiment.parallel.tensor} {experiment.training.micro_batch_size}\n"
    with Path(os.environ["SWEEP_LOG"]).open("a") as file:
        file.write(line)
    return slow_product(experiment, allow_oom)
