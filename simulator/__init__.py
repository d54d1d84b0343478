"""A discrete-event simulator of AI-training clusters.

    import simulator

    result = simulator.run("experiments/gpt3_175b_64xa100.yaml")
    print(result.summary.step_time_s, result.summary.mfu)
    result.frame()  # pandas: one row per operation

Names are imported when they are first used, so that `import simulator` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simulator.catalog.accelerators import accelerator
    from simulator.errors import InputError, SimulatorError
    from simulator.experiment import (
        Cluster,
        Experiment,
        Fault,
        Jitter,
        Job,
        Overlap,
        Parallel,
        Training,
        load_experiment,
    )
    from simulator.model.lookup import resolve_model
    from simulator.simulation import OutOfMemoryError, Result, run
    from simulator.studies.sweep import sweep
    from simulator.summary import Summary
    from simulator.topology import load_cluster

_HOMES = {
    "accelerator": "simulator.catalog.accelerators",
    "InputError": "simulator.errors",
    "SimulatorError": "simulator.errors",
    "Cluster": "simulator.experiment",
    "Experiment": "simulator.experiment",
    "Fault": "simulator.experiment",
    "Jitter": "simulator.experiment",
    "Job": "simulator.experiment",
    "Overlap": "simulator.experiment",
    "Parallel": "simulator.experiment",
    "Training": "simulator.experiment",
    "load_experiment": "simulator.experiment",
    "resolve_model": "simulator.model.lookup",
    "OutOfMemoryError": "simulator.simulation",
    "Result": "simulator.simulation",
    "run": "simulator.simulation",
    "sweep": "simulator.studies.sweep",
    "Summary": "simulator.summary",
    "load_cluster": "simulator.topology",
}

__all__ = [
    "Cluster",
    "Experiment",
    "Fault",
    "InputError",
    "Jitter",
    "Job",
    "OutOfMemoryError",
    "Overlap",
    "Parallel",
    "Result",
    "SimulatorError",
    "Summary",
    "Training",
    "__version__",
    "accelerator",
    "load_cluster",
    "load_experiment",
    "resolve_model",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
