"""What reports show of a run: the part of a result that they need, from memory or from disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.reports.columns import complete
from simulator.reports.network import NetworkDrawing, network_drawing
from simulator.reports.trace import TraceContext, TraceJob

if TYPE_CHECKING:
    from simulator.simulation import Result
    from simulator.summary import Summary
    from simulator.timeline import Ranks, Timeline
    from simulator.workload import Workload

#: A report shows at most so many operations and ranks, as long as one rank of every program fits.
MOST_ROWS, MOST_RANKS = 1_000_000, 48
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")
#: Steps of a memory curve that are kept; the highest of what is left out stays.
_CURVE_POINTS = 1500


@dataclass(frozen=True, eq=False)
class MemoryCurve:
    """Memory of one pipeline rank over the step: `bytes[i]` from `times[i]` on."""

    label: str
    times: NDArray[np.float64]
    bytes: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class JobView:
    """One of several jobs that share the cluster."""

    name: str
    ranks: range
    """Its ranks; they are numbered job after job."""
    summary: Mapping[str, Any]
    curves: Sequence[MemoryCurve] = ()

    @property
    def step_time(self) -> float:
        """Seconds of one step of this job."""
        return _number(self.summary, "step_time_s") or 0.0


@dataclass(frozen=True, eq=False)
class RunView:
    """One run as reports show it. `frame` is complete and sorted (`columns.complete`).

    With several `jobs`, `summary` and `curves` are those of the first.
    """

    title: str
    summary: Mapping[str, Any]
    frame: pd.DataFrame
    step_time: float
    """Seconds until the last operation ends: with several jobs, until the last job ends."""
    rank_labels: Mapping[int, str]
    """What each rank of `frame` is, and how many ranks it stands for."""
    trace: TraceContext
    omitted: int = 0
    """Classes of ranks of which the report shows no rank."""
    critical: pd.DataFrame | None = None
    """The critical path, first to last: columns of the timeline, index labels of `frame` or -1."""
    curves: Sequence[MemoryCurve] = ()
    network: NetworkDrawing | None = None
    experiment: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    jobs: tuple[JobView, ...] = ()
    """The jobs that share the cluster, the experiment's own first; empty where it is alone."""

    def job_of(self, rank: int) -> JobView | None:
        """The job that `rank` belongs to; None where there is only one."""
        return next((job for job in self.jobs if rank in job.ranks), None)

    def step_of(self, rank: int) -> float:
        """Seconds of one step of the job that `rank` belongs to."""
        job = self.job_of(rank)
        return self.step_time if job is None else job.step_time

    @property
    def parts(self) -> tuple[JobView, ...]:
        """`jobs`, or the only job under an empty name."""
        ranks = range(max(self.trace.world_size, 1))
        return self.jobs or (JobView("", ranks, self.summary, self.curves),)

    def short_label(self, rank: int) -> str:
        """The rank, with its job's name where there are several."""
        job = self.job_of(rank)
        return f"rank {rank}" if job is None else f"{job.name}, rank {rank}"

    @property
    def fits(self) -> bool:
        """Whether every job fits into memory."""
        return all(bool(job.summary.get("fits", True)) for job in self.parts)


# -------------------------------------------------------------------------- from a result


def view_of(result: Result, *, most_rows: int = MOST_ROWS, most_ranks: int = MOST_RANKS) -> RunView:
    """The view of a simulated step.

    One rank of every class of ranks is shown, as far as `most_rows` and `most_ranks` allow: first
    one of every program (pipeline stage), then of the classes with the most members.
    """
    timeline = result.timeline
    classes = _chosen_classes(timeline, most_rows, most_ranks)
    frame = _frame_with_causes(timeline, classes)
    summary = result.summary.to_dict()
    jobs = _jobs(result)
    counts = timeline.quotient.counts
    representatives = timeline.representatives
    stands_for = {int(representatives[c]): int(counts[c]) for c in classes}
    return RunView(
        title=_title(result),
        summary=summary,
        frame=frame,
        step_time=float(timeline.step_time),
        rank_labels=_rank_labels(result, stands_for, jobs),
        trace=trace_context(result),
        omitted=timeline.classes - len(classes),
        critical=_critical(timeline, frame),
        curves=memory_curves(result),
        jobs=jobs,
        network=network_drawing(
            result.cluster, np.asarray(timeline.link_bytes()), float(timeline.step_time)
        ),
        experiment=experiment_text(result.experiment),
    )


def own_job(view: RunView) -> RunView:
    """The view of the experiment's own job, without the further jobs that ran beside it."""
    if not view.jobs:
        return view
    own = view.jobs[0]
    frame = view.frame[view.frame["rank"].isin(own.ranks)]
    return dataclasses.replace(
        view,
        summary=own.summary,
        frame=frame,
        step_time=own.step_time,
        critical=None,
        curves=own.curves,
        jobs=(),
        trace=dataclasses.replace(view.trace, jobs=view.trace.jobs[:1]),
    )


def trimmed(view: RunView, most_rows: int = MOST_ROWS, most_ranks: int = MOST_RANKS) -> RunView:
    """The view with its first ranks only, as many as a page shows well."""
    ranks, first = np.unique(view.frame["rank"].to_numpy(), return_index=True)
    ends = np.append(first[1:], len(view.frame))
    kept = max(1, min(most_ranks, int(np.searchsorted(ends, most_rows, side="right"))))
    if kept >= len(ranks):
        return view
    rows = view.frame.iloc[: int(ends[kept - 1])]
    return dataclasses.replace(view, frame=rows, omitted=view.omitted + len(ranks) - kept)


def trace_context(result: Result) -> TraceContext:
    """What a trace says beside the rows."""
    timeline, workload = result.timeline, result.workload
    jobs = tuple(
        TraceJob(
            name=name,
            ranks=ranks,
            group_of=_groups(workload, ranks),
            group_size=_group_sizes(workload, ranks),
            precision=precision,
        )
        for (name, ranks), precision in zip(
            _job_ranks(result).items(), _precisions(result), strict=True
        )
    )
    accelerator = result.plan.accelerators[0]
    counts, representatives = timeline.quotient.counts, timeline.representatives
    return TraceContext(
        world_size=workload.ranks,
        accelerator=accelerator.name,
        memory_bytes=float(accelerator.memory_bytes),
        title=_title(result),
        jobs=jobs,
        stands_for={int(r): int(n) for r, n in zip(representatives, counts, strict=True)},
    )


def _job_ranks(result: Result) -> dict[str, range]:
    """Ranks of every job by name, the experiment's own first; one without a name if it is alone."""
    if not result.jobs:
        return {"": range(result.workload.ranks)}
    names = [result.experiment.job_name, *result.jobs]
    ends = np.cumsum(np.bincount(result.workload.labels["job"], minlength=len(names))).tolist()
    return {
        name: range(start, end) for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }


def _precisions(result: Result) -> list[str]:
    training = [result.experiment.training, *(job.training for job in result.experiment.jobs)]
    return [str(each.precision) for each in training]


def _groups(workload: Workload, ranks: range) -> dict[str, str]:
    """Group of the mesh of every collective of these ranks, by the operation's name."""
    group_of: dict[str, str] = {}
    seen: set[int] = set()
    for number in np.unique(workload.program_of[ranks.start : ranks.stop]).tolist():
        for entries in workload.programs[number].streams.values():
            for entry in entries:
                if id(entry.segment) in seen:
                    continue
                seen.add(id(entry.segment))
                for task in entry.segment.tasks:
                    if task.collective is not None:
                        group_of.setdefault(task.name, task.collective.group)
    return group_of


def _group_sizes(workload: Workload, ranks: range) -> dict[str, int]:
    sizes = {}
    for name, labels in workload.groups.items():
        mine = np.asarray(labels)[ranks.start : ranks.stop]
        _, counts = np.unique(mine[mine >= 0], return_counts=True)
        sizes[name] = int(counts.max(initial=0))
    if not sizes.get("pipeline") and "pipeline" in workload.labels:
        # transfers name their peer, so that the workload has no labels of their group
        coordinates = np.asarray(workload.labels["pipeline"])[ranks.start : ranks.stop]
        sizes["pipeline"] = len(np.unique(coordinates))
    return sizes


def _jobs(result: Result) -> tuple[JobView, ...]:
    if not result.jobs:
        return ()
    summaries = [result.summary, *result.jobs.values()]
    return tuple(
        JobView(name, ranks, summary.to_dict(), _curves(result, summary, ranks))
        for (name, ranks), summary in zip(_job_ranks(result).items(), summaries, strict=True)
    )


def experiment_text(experiment: Any) -> str:
    """The experiment as YAML."""
    from simulator.experiment import to_mapping

    return yaml.safe_dump(to_mapping(experiment), sort_keys=False, allow_unicode=True)


def _title(result: Result) -> str:
    experiment = result.experiment
    return experiment.name or f"{result.plan.model.name} on {len(result.cluster)} accelerators"


def _chosen_classes(timeline: Timeline, most_rows: int, most_ranks: int) -> list[int]:
    """Classes to show, ascending."""
    counts = np.asarray(timeline.quotient.counts)
    first_row = np.asarray(timeline.record.first_row)
    programs = np.asarray(timeline.workload.program_of)[timeline.representatives]
    # within its program, the place of each class: the programs take turns
    by_program = np.lexsort((np.arange(timeline.classes), -counts, programs))
    starts = np.flatnonzero(np.append(True, np.diff(programs[by_program]) != 0))
    turn = np.empty(timeline.classes, dtype=np.int64)
    turn[by_program] = np.arange(timeline.classes) - np.repeat(
        starts, np.diff(np.append(starts, timeline.classes))
    )
    order = np.lexsort((np.arange(timeline.classes), -counts, turn))
    chosen: list[int] = []
    rows = 0
    for c in order.tolist():
        size = int(first_row[c + 1] - first_row[c])
        if chosen and (len(chosen) >= most_ranks or rows + size > most_rows):
            break
        chosen.append(c)
        rows += size
    return sorted(chosen)


def rank_frames(timeline: Timeline, ranks: Ranks) -> Iterator[pd.DataFrame]:
    """The complete rows of one rank after the other; only one rank's are held at a time.

    Index and column `cause` are row numbers of the record, as in `RunView.frame`: a cause that is
    no row of the same frame is an operation of another class of ranks.
    """
    first = np.asarray(timeline.record.first_row)
    for frame in timeline.iter_frames(ranks):
        if len(frame):
            c = int(timeline.quotient.class_of[int(frame["rank"].iloc[0])])
            yield _with_causes(timeline, frame, np.arange(first[c], first[c + 1]))


def _frame_with_causes(timeline: Timeline, classes: Sequence[int]) -> pd.DataFrame:
    """The rows of one rank per class; index and column `cause` are row numbers of the record."""
    ranks = [int(timeline.representatives[c]) for c in classes]
    frame = timeline.frame(ranks)
    first = np.asarray(timeline.record.first_row)
    numbers = np.concatenate([np.arange(first[c], first[c + 1]) for c in classes])
    return _with_causes(timeline, frame, numbers)


def _with_causes(
    timeline: Timeline, frame: pd.DataFrame, numbers: NDArray[np.int64]
) -> pd.DataFrame:
    cause = np.asarray(timeline.causes)[numbers]
    # following one's predecessor on the same stream is no news
    waits = frame["waited_for"].astype(str).to_numpy() != ""
    frame = frame.assign(cause=np.where(waits, cause, -1)).set_axis(numbers, axis=0)
    return complete(frame)


def _critical(timeline: Timeline, frame: pd.DataFrame) -> pd.DataFrame:
    causes = np.asarray(timeline.causes)
    row = int(np.argmax(timeline.record.end)) if len(timeline.record.end) else -1
    chain = []
    while row >= 0:
        chain.append(row)
        row = int(causes[row])
    path = timeline.critical_path()
    labels = np.array(chain[::-1], dtype=np.int64)
    labels = np.where(frame.index.get_indexer(pd.Index(labels)) >= 0, labels, -1)
    return path.set_axis(labels, axis=0)


def _rank_labels(
    result: Result, stands_for: Mapping[int, int], jobs: Sequence[JobView]
) -> dict[int, str]:
    pipeline = result.workload.labels.get("pipeline")
    labels = {}
    for rank, count in stands_for.items():
        parts = [f"rank {rank}"]
        job = next((job for job in jobs if rank in job.ranks), None)
        if job is not None:
            parts.insert(0, job.name)
        mine = slice(None) if job is None else slice(job.ranks.start, job.ranks.stop)
        if pipeline is not None and int(np.max(pipeline[mine])) > 0:
            parts.append(f"pipeline {int(pipeline[rank])}")
        if count > 1:
            parts.append(f"stands for {count:,} ranks")
        labels[rank] = ", ".join(parts)
    return labels


# ------------------------------------------------------------------------------- memory


def memory_curves(result: Result) -> list[MemoryCurve]:
    """Memory of one rank per pipeline coordinate over the step.

    Parameters, gradients, optimizer state and buffers stay; a micro-batch's activations of a stage
    are held from the start of its forward pass to the end of its last backward pass. Activations
    are scaled so that the fullest moment holds what the memory report says of the peak. With
    several jobs, the curves of the experiment's own.
    """
    return _curves(result, result.summary, next(iter(_job_ranks(result).values())))


def _curves(result: Result, summary: Summary, ranks: range) -> list[MemoryCurve]:
    timeline = result.timeline
    pipeline = result.workload.labels.get("pipeline")
    if pipeline is None:
        return []
    mine = [int(rank) for rank in timeline.representatives if int(rank) in ranks]
    curves = []
    for number, stage in enumerate(summary.memory):
        rank = next((rank for rank in mine if pipeline[rank] == number), None)
        if rank is None:
            continue
        held = sum(stage[name] for name in MEMORY_PARTS if name != "activations")
        times, counts = in_flight(timeline.frame([rank]))
        peak = counts.max(initial=0.0)
        scale = stage["activations"] / peak if peak else 0.0
        times, values = thinned(times, held + counts * scale, _CURVE_POINTS)
        curves.append(MemoryCurve(f"pipeline rank {number}", times, values))
    return curves


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one pipeline rank at its peak."""

    label: str
    parts: Mapping[str, float]
    """By `MEMORY_PARTS`."""
    total: float
    capacity: float


def memory_stages(view: RunView) -> list[StageMemory]:
    """Memory of every pipeline rank of every job at its peak."""
    stages = []
    for job in view.parts:
        capacity = _number(job.summary, "memory_capacity_bytes") or 0.0
        for index, stage in enumerate(job.summary.get("memory") or ()):
            parts = {name: float(stage.get(name, 0.0)) for name in MEMORY_PARTS}
            total = float(stage.get("total", sum(parts.values())))
            label = _of_job(job, f"pipeline rank {index}")
            stages.append(StageMemory(label, parts, total, capacity))
    return stages


def memory_over_time(view: RunView) -> list[tuple[str, MemoryCurve]]:
    """The memory curves of all jobs, each with its label."""
    return [(_of_job(job, curve.label), curve) for job in view.parts for curve in job.curves]


def _of_job(job: JobView, label: str) -> str:
    return f"{job.name}, {label}" if job.name else label


def in_flight(frame: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(times, micro-batches of any stage that one rank holds from then on)."""
    of_stage = (frame["microbatch"] >= 0) & (frame["stage"] >= 0)
    rows = frame[(frame["stream"] == "compute") & of_stage]
    key = rows["stage"].to_numpy() * (int(rows["microbatch"].max() or 0) + 1 if len(rows) else 1)
    key = key + rows["microbatch"].to_numpy()
    _, inverse = np.unique(key, return_inverse=True)
    size = int(inverse.max()) + 1 if len(inverse) else 0
    begin, end = np.full(size, np.inf), np.zeros(size)
    np.minimum.at(begin, inverse, rows["start"].to_numpy())
    np.maximum.at(end, inverse, rows["end"].to_numpy())
    times = np.concatenate([[0.0], begin, end])
    change = np.concatenate([[0.0], np.ones(size), -np.ones(size)])
    # at the same time one is released before the next is taken
    order = np.lexsort((change, times))
    times, held = times[order], np.cumsum(change[order])
    last = np.append(times[1:] > times[:-1], True)
    return times[last], held[last]


def thinned(
    times: NDArray[np.float64], values: NDArray[np.float64], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A step curve with at most `most` steps: of neighbours the highest stays."""
    if len(times) <= most:
        return times, values
    first = np.linspace(0, len(times), most, endpoint=False).astype(np.int64)
    return times[first], np.maximum.reduceat(values, first)


# ----------------------------------------------------------------------------- from disk


def read_run(directory: str | Path) -> RunView:
    """The view of a run that `write_run` wrote; raises `InputError` if it is none."""
    directory = Path(directory)
    path = directory / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"no run: {error}; expected a directory that `simulator run --out` wrote",
            place=str(path),
        ) from None
    step = _number(summary, "step_time_s") if isinstance(summary, dict) else None
    if step is None:
        raise InputError("expected an object with step_time_s", place=str(path))
    frame = complete(_read_frame(directory), place=str(directory))
    run = summary.pop("run", None)
    run = run if isinstance(run, dict) else {}
    ranks = [int(rank) for rank in np.unique(frame["rank"])]
    labels, counts = (
        found if isinstance(found := run.get(key), dict) else {}
        for key in ("rank_labels", "stands_for")
    )
    stands_for = {rank: _number(counts, str(rank)) for rank in ranks}
    if any(count is None or count < 1 for count in stands_for.values()):
        stands_for = dict.fromkeys(ranks, 1.0)  # all ranks were written: each stands for itself
    title = str(run.get("title") or directory.name)
    jobs = _read_jobs(summary, run)
    experiment = directory / "experiment.yaml"
    return RunView(
        title=title,
        summary=summary,
        frame=frame,
        step_time=max([step, *(job.step_time for job in jobs)]),
        rank_labels={rank: str(labels.get(str(rank), f"rank {rank}")) for rank in ranks},
        trace=TraceContext(
            world_size=int(_number(summary, "accelerators") or len(ranks)),
            accelerator=str(summary.get("accelerator") or ""),
            memory_bytes=_number(summary, "memory_capacity_bytes") or 0.0,
            title=title,
            stands_for={rank: int(count or 1) for rank, count in stands_for.items()},
        ),
        experiment=_read_text(experiment) if experiment.is_file() else "",
        jobs=jobs,
    )


def _read_jobs(summary: dict[str, Any], run: Mapping[str, Any]) -> tuple[JobView, ...]:
    """The jobs of a run from what `write_run` keeps; takes `jobs` out of `summary`."""
    further, ranks = summary.pop("jobs", None), run.get("job_ranks")
    if not isinstance(further, dict) or not isinstance(ranks, dict):
        return ()
    of_job: list[Mapping[str, Any]] = [summary, *further.values()]
    jobs: list[JobView] = []
    for (name, size), figures in zip(ranks.items(), of_job, strict=False):
        start = jobs[-1].ranks.stop if jobs else 0
        count = _number(ranks, name)
        if not isinstance(figures, dict) or count is None or count < 1:
            return ()
        jobs.append(JobView(str(name), range(start, start + int(size)), figures))
    return tuple(jobs) if len(jobs) == len(of_job) else ()


def _number(mapping: Mapping[str, Any], key: str) -> float | None:
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", place=str(path)) from None


def _read_frame(directory: Path) -> pd.DataFrame:
    import pyarrow as pa

    parquet, csv = directory / "timeline.parquet", directory / "timeline.csv"
    try:
        if parquet.is_file():
            return pd.read_parquet(parquet)
        if csv.is_file():
            return pd.read_csv(csv, keep_default_na=False)
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        raise InputError(f"the timeline cannot be read: {error}", place=str(directory)) from None
    raise InputError("there is no timeline.parquet and no timeline.csv", place=str(directory))
