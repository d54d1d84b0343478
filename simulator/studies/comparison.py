"""What differs between two steps, largest first: simulated runs, or a run and a measured trace.

Times are seconds of the mean rank: a rank of a class counts as often as the class has members.
Computation, waiting for the host's launches (kind `host`), exposed communication (in which the rank
computes nothing) and other waiting add up to the step time, so that the differences of
`Comparison.by_kind` with `overlapped == False` add up to the difference of the step times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.reports.columns import complete, host_waits_apart
from simulator.reports.palette import COMMUNICATION_KINDS, COPY_KINDS
from simulator.reports.trace import TraceContext
from simulator.reports.view import RunView, own_job, read_run, view_of
from simulator.timeline import covered_length, merged_intervals

if TYPE_CHECKING:
    from simulator.importers.trace import Trace

#: Figures of the summary that are compared, with what they are called.
FIGURES: dict[str, str] = {
    "step_time_s": "step time",
    "tokens_per_s_per_accelerator": "tokens/s per accelerator",
    "mfu": "MFU",
    "hfu": "HFU",
    "bubble_fraction": "pipeline bubble",
    "peak_memory_bytes": "peak memory",
    "cost_usd_per_step": "cost per step",
    "energy_j_per_step": "energy per step",
    "accelerators": "accelerators",
}
WAITING = "waiting"
_MOST_ROWS = 5_000_000
_ROUNDING = 1e-9
"""A smaller part of an operation is rounding of its times."""
_NUMBERS = ("a_s", "b_s", "difference_s", "ratio", "a_count", "b_count")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What differs between run A and run B.

    Every table has the columns that it is aligned by and `a_s`, `b_s` (seconds of the mean rank),
    `difference_s` (b - a), `ratio` (b / a; NaN where A has none), `a_count`, `b_count` (operations
    of the mean rank), sorted by the size of the difference.
    """

    a: RunView
    b: RunView
    figures: pd.DataFrame
    """One row per figure of both summaries: `figure`, `a`, `b`, `change` (relative)."""
    by_kind: pd.DataFrame
    """Aligned by `kind` and `overlapped`: what goes on while the rank computes, and copies.

    Communication that is partly hidden is in two rows, the seconds of each and the count divided
    likewise. Exposed operations that overlap each other share the time in which they do.
    """
    by_stage: pd.DataFrame
    by_layer: pd.DataFrame
    by_operation: pd.DataFrame
    """Aligned by `kind`, `stage`, `layer`, `phase` and `operation`, where both runs have these;
    measured kernels have other names and no layers, then by `kind` and `operation`."""
    unaligned: Mapping[str, tuple[int, int]]
    """How many stages or layers A and B have, where these are not the same: a stage of eight is
    another part of the model than one of four, so that nothing is aligned by them."""

    @property
    def difference(self) -> float:
        """Step time of B less that of A, seconds."""
        return self.b.step_time - self.a.step_time

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Plain values for JSON; at most `limit` rows of the tables by layer and operation."""

        def rows(table: pd.DataFrame, most: int | None = None) -> list[dict[str, Any]]:
            records = table.head(most).to_dict("records") if most else table.to_dict("records")
            return [{str(k): _plain(v) for k, v in record.items()} for record in records]

        return {
            "a": {"name": self.a.title, "step_time_s": self.a.step_time},
            "b": {"name": self.b.title, "step_time_s": self.b.step_time},
            "difference_s": self.difference,
            "ratio": self.b.step_time / self.a.step_time if self.a.step_time else None,
            "unaligned": {
                name: dict(zip("ab", n, strict=True)) for name, n in self.unaligned.items()
            },
            "figures": rows(self.figures),
            "by_kind": rows(self.by_kind),
            "by_stage": rows(self.by_stage),
            "by_layer": rows(self.by_layer, limit),
            "by_operation": rows(self.by_operation, limit),
        }


def compare(a: RunView, b: RunView) -> Comparison:
    """Align two runs by kind of operation, stage, layer and operation.

    Of a run with several jobs, the experiment's own is compared.
    """
    a, b = own_job(a), own_job(b)
    left, right = _prepared(a), _prepared(b)
    shared = [
        name
        for name in ("stage", "layer", "phase")
        if _informative(left, name) and _informative(right, name)
    ]
    unaligned: dict[str, tuple[int, int]] = {}
    for name in ("stage", "layer"):
        numbers = [set(rows.loc[rows[name] >= 0, name]) for rows in (left, right)]
        if name in shared and numbers[0] != numbers[1]:
            unaligned[name] = len(numbers[0]), len(numbers[1])
            shared.remove(name)
    if "stage" in unaligned:
        left, right = _without_stages(left), _without_stages(right)
    stage = _aligned(left, right, ["stage"]) if "stage" in shared else _empty(["stage"])
    layer = _aligned(left, right, ["layer"]) if "layer" in shared else _empty(["layer"])
    kinds = _aligned(_by_exposure(left), _by_exposure(right), ["kind", "overlapped"])
    return Comparison(
        a,
        b,
        _figures(a, b),
        _sorted(pd.concat([kinds, _waiting(a, b, left, right)], ignore_index=True)),
        stage[stage["stage"] >= 0].reset_index(drop=True) if len(stage) else stage,
        layer[layer["layer"] >= 0].reset_index(drop=True) if len(layer) else layer,
        _aligned(left, right, ["kind", *shared, "operation"]),
        unaligned,
    )


# -------------------------------------------------------------------------------- loading


def load(path: str | Path, *, step: int | None = None, overrides: Sequence[str] = ()) -> RunView:
    """A run to compare: what `simulator run --out` wrote, an experiment file, or a trace.

    Parameters
    ----------
    path:
        A directory with `summary.json`; a YAML experiment, which is run; or a PyTorch profiler
        (Kineto) trace, `.json` or `.json.gz`, or a directory with one per rank.
    step:
        The `ProfilerStep` of a trace that is compared; all of the trace when left out.
    overrides:
        Keys of an experiment that are changed, `parallel.tensor=8`.

    Raises
    ------
    InputError
        If it is none of these, or overrides are given for what is no experiment.
    """
    path = Path(path)
    is_trace = path.is_dir() or path.name.endswith((".json", ".json.gz"))
    if overrides and is_trace:
        raise InputError("keys can only be changed in an experiment file", place=str(path))
    if not path.exists():
        raise InputError(
            "no such file or directory; expected what `simulator run --out` wrote, an experiment "
            "file or a profiler trace",
            place=str(path),
        )
    if path.is_dir() and (path / "summary.json").is_file():
        return read_run(path)
    if is_trace:
        from simulator.importers.kineto import read_kineto

        return view_of_trace(read_kineto(path, step=step))
    from simulator.experiment import load_experiment
    from simulator.simulation import run

    # as many classes of ranks as can be held: the mean is over those that are there
    return view_of(
        run(load_experiment(path, overrides)), most_rows=_MOST_ROWS, most_ranks=_MOST_ROWS
    )


def view_of_trace(trace: Trace) -> RunView:
    """A measured trace as reports show it."""
    frame = complete(trace.frame(), place=trace.name or None)
    ranks = np.unique(frame["rank"]).tolist()
    title = Path(trace.name).name if trace.name else "trace"
    return RunView(
        title=title,
        summary={"step_time_s": float(trace.duration), "accelerators": trace.world_size},
        frame=frame,
        step_time=float(trace.duration),
        rank_labels={int(r): f"rank {r}" for r in ranks},
        trace=TraceContext(world_size=trace.world_size, title=title),
    )


# -------------------------------------------------------------------------------- aligning


def _prepared(view: RunView) -> pd.DataFrame:
    """Rows with `seconds` and `share`, which sum up to those of the mean rank; `exposed` is the
    fraction of a row's seconds that counts towards the step time."""
    frame = host_waits_apart(view.frame)
    ranks, inverse = np.unique(frame["rank"].to_numpy(), return_inverse=True)
    weight = np.array([float(view.trace.stands_for.get(int(r), 1)) for r in ranks])
    share = (weight / max(weight.sum(), 1.0))[inverse] if len(frame) else np.zeros(0)
    stream = frame["stream"].astype(str).to_numpy()
    return pd.DataFrame(
        {
            "kind": frame["kind"].astype(str).to_numpy(),
            "stage": frame["stage"].to_numpy(np.int64),
            "layer": frame["layer"].to_numpy(np.int64),
            "phase": frame["phase"].astype(str).to_numpy(),
            "operation": frame["operation"].astype(str).to_numpy(),
            "exposed": _exposed(frame, stream, inverse),
            "seconds": (frame["end"] - frame["start"]).to_numpy() * share,
            "share": share,
        }
    )


def _exposed(
    frame: pd.DataFrame, stream: NDArray[np.object_], rank: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Fraction of each row's time that belongs to the step time, in [0, 1].

    All of what the compute stream computes; of computation on other streams what that does not
    cover; of communication what no computation covers (`Timeline.exposed_communication`). Rows
    that overlap each other are scaled so that they add up to the time that they cover together,
    as in the summary's breakdown. Copies on streams of their own go on nearly all the time,
    also in a bubble, and count as hidden.
    """
    start, end = frame["start"].to_numpy(np.float64), frame["end"].to_numpy(np.float64)
    kind = frame["kind"].astype(str)
    talks = kind.isin(COMMUNICATION_KINDS).to_numpy()
    first = (stream == _compute_stream(frame, stream)) & ~talks
    other = ~first & ~talks & ~kind.isin(COPY_KINDS).to_numpy()
    fraction = np.zeros(len(frame))
    order = np.argsort(rank, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        cover = merged_intervals(start[:0], end[:0])
        for part in (first, other, talks):
            mine = rows[part[rows]]
            if not mine.size:
                continue
            length = end[mine] - start[mine]
            left = length - covered_length(start[mine], end[mine], cover)
            a, b = merged_intervals(start[mine], end[mine])
            union = float((b - a - covered_length(a, b, cover)).sum())
            total = float(left.sum())
            scale = union / total if total > 0.0 else 0.0
            whole = 0.0 if part is talks else 1.0  # of what takes no time
            divisor = np.where(length > 0.0, length, 1.0)
            fraction[mine] = np.where(length > 0.0, left * scale / divisor, whole)
            cover = merged_intervals(np.r_[cover[0], a], np.r_[cover[1], b])
    return fraction.clip(0.0, 1.0)


def _by_exposure(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` in their exposed (`overlapped` false) and their hidden parts."""
    parts = []
    for overlapped, part in ((False, rows["exposed"]), (True, 1.0 - rows["exposed"])):
        there = part > _ROUNDING
        parts.append(
            rows[there].assign(
                overlapped=overlapped,
                seconds=(rows["seconds"] * part)[there],
                share=(rows["share"] * part)[there],
            )
        )
    return pd.concat(parts, ignore_index=True).astype({"overlapped": bool})


def _compute_stream(frame: pd.DataFrame, stream: np.ndarray) -> str:
    """`compute`, or in measured traces the stream that computes most."""
    if (stream == "compute").any() or not len(frame):
        return "compute"
    kind = frame["kind"].astype(str)
    computes = ~kind.isin(COMMUNICATION_KINDS | COPY_KINDS).to_numpy()
    seconds = (frame["end"] - frame["start"]).to_numpy() * computes
    return str(pd.Series(seconds).groupby(stream).sum().idxmax())


def _without_stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose collectives of the data-parallel ranks no longer name a stage and its bucket."""
    names = rows["operation"]
    named = names.str.startswith(("grad_reduce.", "param_gather."))
    bare = names.str.replace(r"\.\d+", "", regex=True)
    return rows.assign(operation=bare.where(named, names))


def _informative(rows: pd.DataFrame, name: str) -> bool:
    values = rows[name]
    return bool(((values != "") if name == "phase" else (values >= 0)).any())


def _aligned(left: pd.DataFrame, right: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    sides = []
    for side, rows in (("a", left), ("b", right)):
        grouped = rows.groupby(list(keys), observed=True, sort=False)[["seconds", "share"]].sum()
        sides.append(grouped.rename(columns={"seconds": f"{side}_s", "share": f"{side}_count"}))
    table = sides[0].join(sides[1], how="outer").fillna(0.0).reset_index()
    return _sorted(_with_differences(table)[[*keys, *_NUMBERS]])


def _waiting(a: RunView, b: RunView, left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """What is left of the step time besides computation and exposed communication."""
    table = pd.DataFrame(
        {
            "kind": [WAITING],
            "overlapped": [False],
            "a_s": [a.step_time - (left["seconds"] * left["exposed"]).sum()],
            "b_s": [b.step_time - (right["seconds"] * right["exposed"]).sum()],
            "a_count": [0.0],
            "b_count": [0.0],
        }
    )
    return _with_differences(table)[["kind", "overlapped", *_NUMBERS]]


def _with_differences(table: pd.DataFrame) -> pd.DataFrame:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(table["a_s"] > 0.0, table["b_s"] / table["a_s"], np.nan)
    return table.assign(difference_s=table["b_s"] - table["a_s"], ratio=ratio)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    order = np.argsort(-table["difference_s"].abs().to_numpy(), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _empty(keys: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({name: [] for name in (*keys, *_NUMBERS)})


def _figures(a: RunView, b: RunView) -> pd.DataFrame:
    rows = []
    values: list[Mapping[str, Any]] = [
        {**view.summary, "step_time_s": view.step_time} for view in (a, b)
    ]
    for key, name in FIGURES.items():
        left, right = (side.get(key) for side in values)
        if isinstance(left, int | float) and isinstance(right, int | float):
            change = right / left - 1.0 if left else math.nan
            rows.append({"figure": name, "key": key, "a": left, "b": right, "change": change})
    return pd.DataFrame(rows, columns=["figure", "key", "a", "b", "change"])


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
