"""Sweeps: one experiment over lists and ranges of its keys, into one table.

Every point is a row: the swept values, the figures of its summary, or the reason why there are
none. Rows are kept as they come, so that a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.experiment import Experiment, to_mapping
from simulator.studies.pool import WorkerDied, open_pool
from simulator.studies.sweep_file import Point, SweepSpec, load_sweep, make_spec
from simulator.studies.table import RowTable, iterate_flat, table_of

if TYPE_CHECKING:
    import pandas as pd

#: Simulates an experiment and gives the row's figures (flat or nested; nested names are dotted).
Evaluate = Callable[[Experiment, bool], Mapping[str, Any]]
#: Called with (rows there, rows in all, failed rows).
Progress = Callable[[int, int, int], None]

OK, FAILED, OUT_OF_MEMORY = "ok", "failed", "out of memory"


def sweep(
    base: str | Path | Mapping[str, Any] | Experiment | SweepSpec,
    over: Mapping[str, Any] | None = None,
    *,
    filter: str | Sequence[str] = (),
    out: str | Path | None = None,
    jobs: int | None = None,
    scheduler: Any = None,
    allow_oom: bool = False,
    fresh: bool = False,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Simulate an experiment over lists and ranges of its keys.

    Parameters
    ----------
    base:
        An experiment (object, mapping or path) to vary by `over`; without `over`, the path of a
        sweep file.
    over:
        Dotted keys and their values: a list, a range `{"from": 1, "to": 8, "factor": 2}`, and
        under `zip` keys whose lists change together.
    filter:
        Conditions that a point must meet, such as `"tensor * pipeline <= 64"`.
    out:
        Folder that keeps the table; a later call goes on where an earlier one stopped. Without
        it, the rows are only returned.
    jobs:
        Processes; all cores when left out.
    scheduler:
        Address (or `distributed.Client`) of a Dask cluster to run on instead.
    allow_oom:
        Simulate points that do not fit into memory too; otherwise their row says so.
    fresh:
        Run again what `out` already has.
    evaluate:
        Replaces the simulation: a function, importable by name, from an experiment and
        `allow_oom` to figures; e.g. to keep a figure that the summary does not have.
    progress:
        Called after every row.

    Returns
    -------
    pandas.DataFrame
        One row per point in the order of the sweep: the swept keys, `status` (`ok`,
        `out of memory`, `failed`), `reason`, the summary's figures, `key` and `version`.

    Raises
    ------
    InputError
        If the sweep itself is wrong; a point that is wrong is a row.
    """
    if isinstance(base, SweepSpec):
        spec = base
    elif over is None:
        if not isinstance(base, str | Path):
            raise InputError("expected what to vary: `over`, a mapping of keys to lists")
        spec = load_sweep(base)
    else:
        spec = make_spec(base, over, filters=filter, allow_oom=allow_oom)
    rows = run_sweep(
        spec,
        out=out,
        jobs=jobs,
        scheduler=scheduler,
        fresh=fresh,
        evaluate=evaluate,
        progress=progress,
    )
    return table_of(rows, _columns(spec, rows)).to_pandas()


def run_sweep(
    spec: SweepSpec,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    scheduler: Any = None,
    fresh: bool = False,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> list[Mapping[str, Any]]:
    """Rows of all points of `spec`, in order; see `sweep` for the parameters.

    The table in `out` ends with these rows first, in this order; rows of other sweeps that share
    the folder, and of other versions of the simulator, stay after them.
    """
    from simulator import __version__

    points = spec.points(__version__)
    order = [point.key for point in points]
    by_key = {point.key: point for point in points}
    work = functools.partial(_row, evaluate or simulate_point, spec.allow_oom, __version__)
    opened: AbstractContextManager[RowTable | _Rows] = (
        RowTable(out) if out is not None else nullcontext(_Rows())
    )
    with opened as table:
        if fresh:
            table.forget(order)
        missing = [point for point in points if point.key not in table]
        failed = sum(table.row(key)["status"] != OK for key in order if key in table)
        done = len(points) - len(missing)
        if progress:
            progress(done, len(points), failed)
        with open_pool(work, jobs=min(jobs, len(missing)) if jobs and missing else jobs,
                       scheduler=scheduler) as pool:  # fmt: skip
            try:
                # neighbours in the sweep share a cluster; workers keep the last few they built
                for item, row, error in pool.map(missing):
                    point = by_key[item.key]
                    if row is None:
                        row = _failure(point, __version__, error)
                    if table.append(row):
                        done += 1
                        failed += row["status"] != OK
                    if progress:
                        progress(done, len(points), failed)
            finally:
                there = [table.row(key) for key in order if key in table]
                table.fold(order, columns=_columns(spec, there))
        return [table.row(key) for key in order]


def _columns(spec: SweepSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns in an order that does not depend on which row came first."""
    from simulator.summary import Summary

    head = [*spec.keys, "status", "reason", "key", "version"]
    place = {item.name: index for index, item in enumerate(dataclasses.fields(Summary))}
    others = {name for row in rows for name in row} - set(head)
    return [*head, *sorted(others, key=lambda n: (place.get(n.split(".")[0], len(place)), n))]


class _Rows:
    """Rows in memory, where no folder was given."""

    def __init__(self) -> None:
        self._rows: dict[str, Mapping[str, Any]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def row(self, key: str) -> Mapping[str, Any]:
        return self._rows[key]

    def append(self, row: Mapping[str, Any]) -> bool:
        return self._rows.setdefault(row["key"], row) is row

    def forget(self, keys: Sequence[str]) -> None:
        del keys

    def fold(self, order: Sequence[str], *, columns: Sequence[str]) -> None:
        del order, columns


# ------------------------------------------------------------------------------- one point


def _row(evaluate: Evaluate, allow_oom: bool, version: str, point: Point) -> dict[str, Any]:
    """The row of one point; runs in a worker."""
    try:
        figures = evaluate(point.experiment, allow_oom)
    except Exception as error:
        return _failure(point, version, error)
    flat = dict(iterate_flat(figures))
    status = flat.pop("status", OK)
    reason = flat.pop("reason", None)
    return {**_head(point, version, status, reason), **flat}


def _head(point: Point, version: str, status: str, reason: str | None) -> dict[str, Any]:
    return {
        **point.values,
        "status": status,
        "reason": reason,
        "key": point.key,
        "version": version,
    }


def _failure(point: Point, version: str, error: BaseException | None) -> dict[str, Any]:
    if isinstance(error, InputError | WorkerDied):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return _head(point, version, FAILED, reason)


def simulate_point(experiment: Experiment, allow_oom: bool) -> Mapping[str, Any]:
    """Figures of one simulated experiment; one that does not fit gets its memory figures only."""
    from simulator.simulation import OutOfMemoryError, run

    try:
        result = run(experiment, cluster=shared_cluster(experiment), allow_oom=allow_oom)
    except OutOfMemoryError as error:
        return {"status": OUT_OF_MEMORY, "reason": str(error), **memory_figures(error.report)}
    figures = result.summary.to_dict()
    if result.jobs:
        figures["jobs"] = {name: job.to_dict() for name, job in result.jobs.items()}
    return figures


def memory_figures(report: Any) -> dict[str, Any]:
    """`fits`, `peak_memory_bytes` and `memory_capacity_bytes` of a memory report."""
    return {
        "fits": bool(report.fits),
        "peak_memory_bytes": float(report.peak),
        "memory_capacity_bytes": float(report.capacity),
    }


def shared_cluster(experiment: Experiment) -> Any:
    """The experiment's cluster, built once per process for all experiments that have it."""
    mapping = to_mapping(experiment)["cluster"]
    mapping.pop("placement", None)
    return _cluster(_Hashed(repr(sorted(mapping.items())), experiment))


@dataclasses.dataclass(frozen=True)
class _Hashed:
    """An experiment that is equal to every other with the same cluster."""

    cluster: str
    experiment: Experiment = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4)
def _cluster(key: _Hashed) -> Any:
    from simulator.simulation import build_cluster

    return build_cluster(key.experiment)


def describe_points(spec: SweepSpec) -> Iterator[str]:
    """One line per swept key: its values."""
    for axis in spec.axes:
        for index, key in enumerate(axis.keys):
            values = [row[index] for row in axis.values]
            shown = ", ".join(str(value) for value in values[:8])
            yield f"{key}: {shown}{', …' if len(values) > 8 else ''} ({len(values)})"
