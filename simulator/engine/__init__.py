"""The engine: executes a workload on a cluster, and nothing else has a clock.

    timeline = simulate(workload, cluster)

`core` is the discrete-event engine, `sharing` the max-min solver, `jitter` the random factors;
`simulator.folding` decides which ranks are simulated. See docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from simulator.engine.core import Engine
from simulator.engine.jitter import Factors, Jitter, JitterSpec
from simulator.engine.sharing import max_min_shares
from simulator.folding import Quotient, System, Traffic, TrafficModel, resolve
from simulator.folding import fold as fold_system
from simulator.timeline import Timeline
from simulator.workload import Workload

__all__ = [
    "Jitter",
    "JitterSpec",
    "Traffic",
    "TrafficModel",
    "max_min_shares",
    "simulate",
    "step_times",
]


def simulate(
    workload: Workload,
    cluster: Any,
    *,
    traffic: TrafficModel | None = None,
    fold: bool = True,
    jitter: JitterSpec | None = None,
    overlap_sharing: bool = True,
) -> Timeline:
    """Execute one step.

    Parameters
    ----------
    cluster:
        A `simulator.topology.Cluster`, or any object with `link_capacity` (byte/s per directed
        link) and `memory_bandwidth` (byte/s per accelerator).
    traffic:
        What collectives do to links; default `simulator.costs.collectives.collective_traffic`.
    fold:
        False: simulate every rank. The timeline is the same.
    jitter:
        Random factors on what ranks compute; with `per="rank"` nothing folds.
    overlap_sharing:
        False: communication takes no SMs and no HBM bandwidth from what it overlaps.

    Raises
    ------
    SimulatorError
        If the programs deadlock; it names the entries that wait.
    InputError
        If the programs use groups, peers or events that do not exist.
    """
    system = resolve(workload, cluster, traffic or _default_traffic())
    quotient, keys = _quotient(system, fold, jitter)
    return _run(quotient, keys, jitter, overlap_sharing)


def step_times(
    workload: Workload,
    cluster: Any,
    jitter: JitterSpec,
    seeds: Iterable[int],
    *,
    traffic: TrafficModel | None = None,
    fold: bool = True,
    overlap_sharing: bool = True,
) -> np.ndarray:
    """Step time [s] for each seed of the jitter: a Monte-Carlo run, folded only once.

    `np.percentile(step_times(...), [5, 50, 95])` are its percentiles. Parameters and errors as
    `simulate`; the seed of `jitter` itself is not used.
    """
    system = resolve(workload, cluster, traffic or _default_traffic())
    quotient, keys = _quotient(system, fold, jitter)
    times = []
    for seed in seeds:
        spec = Jitter(jitter.distribution, jitter.scale, int(seed), jitter.per)
        times.append(_run(quotient, keys, spec, overlap_sharing).step_time)
    return np.array(times)


def _default_traffic() -> TrafficModel:
    from simulator.costs.collectives import collective_traffic

    return collective_traffic


def _quotient(
    system: System, folded: bool, jitter: JitterSpec | None
) -> tuple[Quotient, np.ndarray | None]:
    """The classes to simulate, and what each rank's jitter is drawn by."""
    if jitter is None:
        return fold_system(system, discrete=not folded), None
    if jitter.per == "rank":
        return fold_system(system, discrete=True), np.arange(system.workload.ranks)
    quotient = fold_system(system)
    keys = quotient.class_of
    return (quotient if folded else fold_system(system, discrete=True)), keys


def _run(
    quotient: Quotient,
    keys: np.ndarray | None,
    jitter: JitterSpec | None,
    overlap_sharing: bool,
) -> Timeline:
    engine = Engine(
        quotient,
        jitter=None if jitter is None else Factors(jitter),
        jitter_keys=keys,
        overlap_sharing=overlap_sharing,
    )
    return Timeline(quotient, engine.execute(), jitter=engine.jitter)
