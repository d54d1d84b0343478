"""Is a constant that whole steps informed a property of the hardware, or of the rows?

`step_derate` (catalogue, one number per accelerator family) says how much slower matrix kernels
run inside a training step than alone. For each family of published rows it is refitted on the
other families with the same kind of accelerator, and the left-out family's error is compared with
the one under the constant fitted on all. The step time responds through its breakdown: matrix
products, attention and the bubble scale with the factor, everything else does not.

`host_time_per_expert_operation` (framework profiles) is the host's time for an operation of a
mixture-of-experts layer. It is refitted likewise, by simulating its rows again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simulator.catalog.frameworks import framework_from_mapping
from simulator.studies.validation import RowResult, framework_of_row, validate

#: Factors tried on the time of matrix kernels; 1 is the shipped constant.
GRID = np.round(np.arange(0.80, 1.2501, 0.005), 3)
_SCALED = ("gemm", "attention", "bubble")
#: The constant of frameworks that is refitted, and the factors tried on it.
HOST_CONSTANT = "host_time_per_expert_operation"
HOST_GRID = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


@dataclass(frozen=True)
class LeftOut:
    """One family left out of the fit of one constant's factor."""

    constant: str
    """`step_derate` of an accelerator family, or the name of a framework's constant."""
    family: str
    rows: int
    factor_fitted: float
    """On all families."""
    factor_left_out: float
    """On the others."""
    error_shipped: float
    """Median absolute error of this family, constant as shipped."""
    error_fitted: float
    """... factor fitted on all."""
    error_left_out: float
    """... on the others."""


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


def _best(errors: Mapping[str, np.ndarray], without: str | None = None) -> int:
    """Index of the factor with the least mean error, families weighted equally.

    Means rather than medians: they change smoothly with the factor, where the medians of families
    of a few rows jump.
    """
    means = [np.mean(table, axis=0) for name, table in errors.items() if name != without]
    return int(np.argmin(np.mean(means, axis=0)))


def _left_out(
    constant: str, errors: Mapping[str, np.ndarray], grid: Sequence[float]
) -> list[LeftOut]:
    """Refit without each family, from errors of shape [rows, factors] by family."""
    if len(errors) < 2:
        return []
    on_all, shipped = _best(errors), int(np.argmin(np.abs(np.asarray(grid) - 1.0)))
    table = []
    for name, own in errors.items():
        others = _best(errors, without=name)
        medians = np.median(own, axis=0)
        table.append(
            LeftOut(
                constant,
                name,
                len(own),
                float(grid[on_all]),
                float(grid[others]),
                float(medians[shipped]),
                float(medians[on_all]),
                float(medians[others]),
            )
        )
    return table


def leave_one_out(results: Sequence[RowResult]) -> list[LeftOut]:
    """`step_derate` refitted without each family; accelerator families with rows of one family only
    are skipped."""
    groups: dict[str, dict[str, list[RowResult]]] = {}
    for row in results:
        if row.error is not None and math.isfinite(row.error):
            groups.setdefault(row.accelerator_family, {}).setdefault(row.family, []).append(row)
    table = []
    for accelerator_family, families in groups.items():
        errors = {name: _errors(rows) for name, rows in families.items()}
        table += _left_out(f"step_derate, {accelerator_family}", errors, GRID.tolist())
    return table


def leave_one_out_host(
    rows: Sequence[Mapping[str, str]], shipped: Sequence[RowResult], *, jobs: int = 1
) -> list[LeftOut]:
    """`HOST_CONSTANT` refitted without each family, on the rows that it bears on; `shipped` are
    all rows' results with the constant as it is."""
    constants: dict[float, list[int]] = {}
    for index, row in enumerate(rows):
        profile = framework_from_mapping(framework_of_row(row))
        if profile.host_time_per_expert_operation > 0.0 and float(row.get("n_experts") or 0) > 1:
            constants.setdefault(profile.host_time_per_expert_operation, []).append(index)
    families: dict[str, list[np.ndarray]] = {}
    for seconds, indices in constants.items():
        chosen = [rows[index] for index in indices]
        runs = [
            [shipped[index] for index in indices]
            if factor == 1.0
            else validate(chosen, jobs=jobs, behaviours={HOST_CONSTANT: factor * seconds})
            for factor in HOST_GRID
        ]
        for results in zip(*runs, strict=True):
            errors = [result.error for result in results if result.error is not None]
            if len(errors) == len(HOST_GRID):
                families.setdefault(results[0].family, []).append(np.abs(errors))
    return _left_out(HOST_CONSTANT, {k: np.array(v) for k, v in families.items()}, HOST_GRID)
