"""Is a constant that whole steps informed a property of the hardware, or of the rows?

`step_derate` (catalogue, one number per accelerator family) says how much slower matrix kernels
run inside a training step than alone. For each family of published rows it is refitted on the
other families with the same kind of accelerator, and the left-out family's error is compared with
the one under the constant fitted on all. The step time responds through its breakdown: matrix
products, attention and the bubble scale with the factor, everything else does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.studies.validation import RowResult

#: Factors tried on the time of matrix kernels; 1 is the shipped constant.
GRID = np.round(np.arange(0.80, 1.2501, 0.005), 3)
_SCALED = ("gemm", "attention", "bubble")


@dataclass(frozen=True)
class LeftOut:
    """One family left out of the fit of one accelerator family's factor."""

    accelerator_family: str
    family: str
    rows: int
    factor_fitted: float
    """On all families."""
    factor_left_out: float
    """On the others."""
    error_fitted: float
    """Median absolute error of this family, factor fitted on all."""
    error_left_out: float


def _errors(rows: Sequence[RowResult]) -> np.ndarray:
    """Absolute relative errors, shape [rows, factors]."""
    table = []
    for row in rows:
        assert row.simulated_step_time_s is not None
        core = sum(row.breakdown_s.get(name, 0.0) for name in _SCALED)
        table.append(
            np.abs(
                (row.simulated_step_time_s + (GRID - 1.0) * core) / row.measured_step_time_s - 1.0
            )
        )
    return np.array(table)


def _best(errors: dict[str, np.ndarray], without: str | None = None) -> int:
    """Index of the factor with the least mean error, families weighted equally.

    Means rather than medians: they change smoothly with the factor, where the medians of families
    of a few rows jump.
    """
    means = [np.mean(table, axis=0) for name, table in errors.items() if name != without]
    return int(np.argmin(np.mean(means, axis=0)))


def leave_one_out(results: Sequence[RowResult]) -> list[LeftOut]:
    """Refit without each family; accelerator families with rows of one family only are skipped."""
    groups: dict[str, dict[str, list[RowResult]]] = {}
    for row in results:
        if row.error is not None and math.isfinite(row.error):
            groups.setdefault(row.accelerator_family, {}).setdefault(row.family, []).append(row)
    table = []
    for accelerator_family, families in groups.items():
        if len(families) < 2:
            continue
        errors = {name: _errors(rows) for name, rows in families.items()}
        on_all = _best(errors)
        for name, own in errors.items():
            others = _best(errors, without=name)
            medians = np.median(own, axis=0)
            table.append(
                LeftOut(
                    accelerator_family,
                    name,
                    len(own),
                    float(GRID[on_all]),
                    float(GRID[others]),
                    float(medians[on_all]),
                    float(medians[others]),
                )
            )
    return table
