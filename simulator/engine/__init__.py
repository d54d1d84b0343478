"""The engine: executes a workload on a cluster, and nothing else has a clock.

    timeline = simulate(workload, cluster)

`core` is the discrete-event engine, `sharing` the max-min solver, `jitter` the random factors;
`simulator.folding` decides which ranks are simulated. See docs/engine.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.engine.core import Engine
from simulator.engine.jitter import Factors, Jitter, JitterSpec
from simulator.engine.sharing import max_min_shares
from simulator.folding import Traffic, TrafficModel, fold, resolve
from simulator.timeline import Timeline
from simulator.workload import Workload

__all__ = ["Jitter", "JitterSpec", "Traffic", "TrafficModel", "max_min_shares", "simulate"]

_fold = fold


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
    if traffic is None:
        from simulator.costs.collectives import collective_traffic

        traffic = collective_traffic
    system = resolve(workload, cluster, traffic)
    keys: np.ndarray | None = None
    if jitter is None:
        quotient = _fold(system, discrete=not fold)
    elif jitter.per == "rank":
        keys = np.arange(workload.ranks)
        quotient = _fold(system, discrete=True)
    else:
        folded = _fold(system)
        keys = folded.class_of
        quotient = folded if fold else _fold(system, discrete=True)
    engine = Engine(
        quotient,
        jitter=None if jitter is None else Factors(jitter),
        jitter_keys=keys,
        overlap_sharing=overlap_sharing,
    )
    return Timeline(quotient, engine.execute(), jitter=engine.jitter)
