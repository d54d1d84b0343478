"""Step-time percentiles over random per-operation jitter."""

from __future__ import annotations

import numpy as np

from simulator.engine import step_times as simulate_seeds
from simulator.errors import InputError
from simulator.experiment import Experiment
from simulator.programs import build_workload
from simulator.simulation import resolve, traffic_model

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)


def step_times(experiment: Experiment, seeds: int) -> np.ndarray:
    """Step time in seconds for `seeds` consecutive jitter seeds, shape [seeds].

    The cluster is built and the ranks are folded once.

    Raises
    ------
    InputError
        If the experiment has no `jitter`, or further jobs.
    """
    if experiment.jobs:
        raise InputError(
            "a Monte-Carlo run simulates one job; --set jobs=[] leaves the others out", place="jobs"
        )
    if experiment.jitter is None:
        raise InputError(
            "a Monte-Carlo run needs a `jitter` section, such as --set jitter.scale=0.02",
            place="jitter",
        )
    plan, cluster = resolve(experiment)
    first = experiment.jitter.seed
    return simulate_seeds(
        build_workload(plan),
        cluster,
        experiment.jitter,
        range(first, first + seeds),
        traffic=traffic_model(plan.model, plan.profile),
        fold=experiment.fold,
    )


def step_time_percentiles(experiment: Experiment, seeds: int) -> dict[str, float]:
    """Mean, standard deviation, extremes and percentiles of the step time, seconds."""
    times = step_times(experiment, seeds)
    figures = {
        "seeds": float(len(times)),
        "mean_s": float(times.mean()),
        "std_s": float(times.std()),
        "min_s": float(times.min()),
    }
    figures |= {f"p{p}_s": float(np.percentile(times, p)) for p in PERCENTILES}
    figures["max_s"] = float(times.max())
    return figures
