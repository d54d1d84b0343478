"""Replaying a recorded trace on a cluster: measured compute, simulated communication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from simulator.errors import InputError
from simulator.importers.trace import Trace

if TYPE_CHECKING:
    from simulator.timeline import Timeline
    from simulator.topology import Cluster


def replay(
    trace: Trace,
    cluster: Cluster,
    *,
    communication: Literal["simulated", "measured"] = "simulated",
    keep_gaps: bool = True,
    world_size: int | None = None,
) -> Timeline:
    """The timeline of `trace` on `cluster`, rank i on accelerator i.

    Parameters
    ----------
    trace:
        From `read_kineto` or `read_chakra`; the trace of a single rank stands for all (see
        `Trace.spread`).
    communication, keep_gaps:
        See `Trace.workload`.
    world_size:
        Number of ranks to spread a single rank's trace over; the job's own when left out.

    Raises
    ------
    InputError
        If the cluster has fewer accelerators than the trace has ranks, or the trace cannot be
        replayed (see `Trace.workload`).
    """
    from simulator.costs.collectives import collective_traffic
    from simulator.engine import simulate

    ranks = world_size or trace.world_size
    available = len(cluster.accelerators)
    if ranks > available:
        raise InputError(
            f"the trace has {ranks} ranks, but the cluster {available} accelerators",
            place=trace.name or None,
        )
    types = np.asarray(cluster.accelerator_type_of)[:ranks]
    if len(np.unique(types)) > 1:
        raise InputError("replay needs accelerators of one type", place=trace.name or None)
    workload = trace.workload(
        world_size=ranks,
        communication=communication,
        keep_gaps=keep_gaps,
        accelerator=cluster.accelerator_types[int(types[0])],
    )
    return simulate(workload, cluster, traffic=collective_traffic)
