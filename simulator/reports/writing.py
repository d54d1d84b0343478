"""What `simulator run --out DIR` writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.reports.figures import save_figures
from simulator.reports.files import whole_directory
from simulator.reports.html import write_report
from simulator.reports.trace import write_hta, write_rank_traces, write_trace
from simulator.reports.view import RunView, rank_frames, view_of

if TYPE_CHECKING:
    from simulator.simulation import Result


def write_run(
    result: Result,
    directory: str | Path,
    *,
    ranks: Any = "representatives",
    csv: bool = False,
    hta: bool = False,
    flows: bool = False,
    figures: Sequence[str] = (),
) -> None:
    """Write a run into `directory`, which is created; nothing is ever half-written.

    Files: `summary.json`, `experiment.yaml`, `timeline.parquet`, `trace.json.gz` (Perfetto) and
    `report.html` (one page, works offline).

    Parameters
    ----------
    ranks:
        Ranks of `timeline.parquet`, `trace.json.gz`, `timeline.csv` and `hta/`, see
        `Timeline.frame`: `"all"` or a list; only one rank's rows are ever held in memory. When left
        out, one of every class, in the traces as many of them as `report.html` shows (`view_of`).
    csv:
        Write `timeline.csv` as well.
    hta:
        Write `hta/rank-N.json.gz`, one trace per rank, for HolisticTraceAnalysis.
    flows:
        Draw arrows in `trace.json.gz` from what operations waited for; with `ranks` given, from
        other streams of the same rank only.
    figures:
        Formats (`png`, `svg`, `pdf`) in which every figure is written to `figures/`.

    Raises
    ------
    InputError
        If the directory cannot be written.
    """
    view = view_of(result)
    with whole_directory(directory) as folder:
        summary = {**view.summary, "run": _run(view)}
        if view.jobs:
            summary["jobs"] = {job.name: job.summary for job in view.jobs[1:]}
        (folder / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / "experiment.yaml").write_text(view.experiment, encoding="utf-8")
        result.timeline.write_parquet(folder / "timeline.parquet", ranks)
        if csv:
            result.timeline.write_csv(folder / "timeline.csv", ranks)
        if hta:
            (folder / "hta").mkdir()
        if isinstance(ranks, str) and ranks == "representatives":
            write_trace(view.frame, folder / "trace.json.gz", view.trace, flows=flows)
            if hta:
                write_hta(view.frame, folder / "hta", view.trace)
        else:
            _write_given(result, view, folder, ranks, hta=hta, flows=flows)
        if figures:
            save_figures(view, folder / "figures", formats=figures)
        write_report(view, folder / "report.html")


def _write_given(
    result: Result, view: RunView, folder: Path, ranks: Any, *, hta: bool, flows: bool
) -> None:
    """The traces of the ranks that were asked for, each in its own name only."""
    timeline = result.timeline
    context = dataclasses.replace(view.trace, stands_for={})
    chosen = range(timeline.workload.ranks) if isinstance(ranks, str) else [int(r) for r in ranks]
    streams = {
        stream: None
        for c in range(timeline.classes)
        for stream in timeline.program_table(c).shown_streams[1]
    }
    write_rank_traces(
        rank_frames(timeline, ranks),
        folder / "trace.json.gz",
        context,
        ranks=chosen,
        streams=streams,
        flows=flows,
    )
    if hta:
        write_hta(rank_frames(timeline, ranks), folder / "hta", context)


def _run(view: RunView) -> dict[str, Any]:
    """What `read_run` needs beside the figures."""
    jobs = {"job_ranks": {job.name: len(job.ranks) for job in view.jobs}} if view.jobs else {}
    return {
        "title": view.title,
        **jobs,
        "rank_labels": {str(rank): label for rank, label in view.rank_labels.items()},
        "stands_for": {str(rank): count for rank, count in view.trace.stands_for.items()},
    }
