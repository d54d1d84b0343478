"""The report: one self-contained HTML page that works offline.

The page carries its data: a JSON object for figures and tables, and the timeline as integer columns
(gzip, base64), which a million operations need about ten megabytes of. `assets/report.js` draws it.
Text only ever reaches the page as text; a content security policy forbids everything but the
page's own script.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulator.reports.columns import awaited_rows, host_waits_apart, templates
from simulator.reports.files import whole_file
from simulator.reports.network import NetworkDrawing
from simulator.reports.palette import MEMORY_COLOURS, colour, ordered, part_label
from simulator.reports.terminal import summary_rows
from simulator.reports.view import MEMORY_PARTS, RunView, memory_over_time, memory_stages
from simulator.units import format_bandwidth, format_bytes

#: Times in a report are whole ticks of the last end over this.
_TICKS = 2**32 - 2
_LONGEST = 60
"""Pieces of the critical path that are listed."""


def write_report(view: RunView, path: str | Path) -> None:
    """Write the report of a run; the file is whole or absent."""
    with whole_file(path) as temporary:
        temporary.write_text(render(view), encoding="utf-8")


def render(view: RunView) -> str:
    """The report of a run as HTML text."""
    if not view.jobs:
        return render_page([(view, "")], title=view.title, figures=summary_rows(view.summary))
    columns = [dict(summary_rows(job.summary)) for job in view.jobs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return render_page(
        [(view, "")],
        title=view.title,
        figures=[[name, *(column.get(name, "") for column in columns)] for name in names],
        figure_head=["", *(job.name for job in view.jobs)],
    )


def render_page(
    runs: Sequence[tuple[RunView, str]],
    *,
    title: str,
    figures: Sequence[Sequence[str]],
    figure_head: Sequence[str] = (),
    tables: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A page with the timelines of one or more runs; each run's rows are headed by its name.

    `figures` are the rows of the summary: as many texts as `figure_head`, else a name and a text.
    `tables` are sections with the keys `id`, `title`, `note`, `head`, `rows` (texts) and `numeric`
    (right-aligned columns). Memory, links, breakdown and critical path are shown of a single run.
    """
    single = runs[0][0] if len(runs) == 1 else None
    frame, labels = _joined(runs)
    length = max([float(frame["end"].max()) if len(frame) else 0.0, 1e-12]
                 + [view.step_time for view, _ in runs])  # fmt: skip
    kinds = templates(frame)
    columns, tracks = _columns(frame, kinds.code, labels, length)
    data: dict[str, Any] = {
        "title": title,
        "subtitle": _subtitle([view for view, _ in runs]),
        "figures": [list(row) for row in figures],
        "figure_head": list(figure_head),
        "jobs": len(single.jobs) if single else 0,
        "fits": single.fits if single else True,
        "step_time": single.step_time if single else length,
        "length": length,
        "tick": length / _TICKS,
        "tracks": tracks,
        "templates": {
            "operation": [str(v) for v in kinds.rows["operation"]],
            "kind": [str(v) for v in kinds.rows["kind"]],
            "phase": [str(v) for v in kinds.rows["phase"]],
            "layer": [int(v) for v in kinds.rows["layer"]],
            "stage": [int(v) for v in kinds.rows["stage"]],
            "flops": [float(v) for v in kinds.rows["flops"]],
            "bytes": [float(v) for v in kinds.rows["bytes"]],
        },
        "colours": {str(kind): colour(str(kind)) for kind in kinds.rows["kind"].unique()},
        "breakdowns": _breakdowns(single) if single else [],
        "rank_breakdown": _rank_breakdown(single) if single else [],
        "memory": _memory(single) if single else None,
        "network": _network(single.network) if single and single.network else None,
        "tables": [dict(table) for table in tables],
        "experiment": single.experiment if single else "",
        **(_critical(single, length) if single else {"critical": None, "critical_rows": []}),
    }
    return _page(title, data, columns)


# ----------------------------------------------------------------------------- the page


def _page(title: str, data: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    assets = resources.files("simulator.reports") / "assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    page = Template((assets / "report.html").read_text(encoding="utf-8"))
    # of an inline script only "</" and "<!--" are special; none is left in the JSON
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    packed = "\n".join(
        f'<script type="application/gzip" id="column-{name}">{value}</script>'
        for name, value in columns.items()
    )
    return page.substitute(
        title=html.escape(title),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"'sha256-{digest}'",
        data=text.encode("utf-8", "replace").decode("utf-8"),
        columns=packed,
    )


def _subtitle(views: Sequence[RunView]) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("cluster-simulator")
    except PackageNotFoundError:
        release = "unreleased"
    parts = [f"simulated training step, cluster-simulator {release}"]
    omitted = sum(view.omitted for view in views)
    if omitted:
        parts.append(f"{omitted:,} further kinds of ranks are not shown")
    return "; ".join(parts)


def _joined(
    runs: Sequence[tuple[RunView, str]],
) -> tuple[pd.DataFrame, dict[int, tuple[int, str]]]:
    """All rows with column `group`, a number per (run, rank), and the label of each group.

    The ranks of several runs take turns, so that what belongs together lies together.
    """
    frames: list[pd.DataFrame] = []
    labels: dict[int, tuple[int, str]] = {}
    offset = 0
    wanted = ["rank", "stage", "stream", "operation", "kind", "phase", "layer", "microbatch",
              "start", "end", "flops", "bytes"]  # fmt: skip
    texts = ("stream", "operation", "kind", "phase")
    for number, (view, name) in enumerate(runs):
        rows = view.frame[wanted]
        ranks, inverse = np.unique(rows["rank"].to_numpy(), return_inverse=True)
        source = awaited_rows(view.frame)
        awaited = np.where(source >= 0, source + offset, -1)
        plain = {column: rows[column].astype(str).astype(object) for column in texts}
        frames.append(rows.assign(group=inverse * len(runs) + number, awaited=awaited, **plain))
        prefix = f"{name}: " if name else ""
        for index, rank in enumerate(ranks.tolist()):
            label = view.rank_labels.get(int(rank), f"rank {rank}")
            labels[index * len(runs) + number] = (int(rank), prefix + label)
        offset += len(rows)
    frame = pd.concat(frames, ignore_index=True)
    if len(runs) > 1:
        order = np.argsort(frame["group"].to_numpy(), kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        awaited = frame["awaited"].to_numpy()
        frame["awaited"] = np.where(awaited >= 0, place[awaited], -1)
        frame = frame.iloc[order].reset_index(drop=True)
    return frame, labels


def _columns(
    frame: pd.DataFrame,
    code: NDArray[np.int64],
    labels: Mapping[int, tuple[int, str]],
    length: float,
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The packed columns, and the rows of the drawing: which operations lie on which."""
    rows = len(frame)
    scale = _TICKS / length
    start = np.rint(frame["start"].to_numpy(np.float64) * scale).astype(np.int64)
    end = np.rint(frame["end"].to_numpy(np.float64) * scale).astype(np.int64)
    stream, names = pd.factorize(frame["stream"])
    track = frame["group"].to_numpy() * max(1, len(names)) + stream
    first = np.flatnonzero(np.append(True, track[1:] != track[:-1])) if rows else np.zeros(0, int)
    is_first = np.zeros(rows, dtype=bool)
    is_first[first] = True
    start, end = _apart(start, end, is_first)
    previous = np.where(is_first, 0, np.roll(end, 1))
    waited = frame["awaited"].to_numpy()
    packed = {
        "gap": _pack((start - previous).astype(np.uint32)),
        "duration": _pack((end - start).astype(np.uint32)),
        "code": _pack(code.astype(np.uint32)),
        "microbatch": _pack(frame["microbatch"].to_numpy().astype(np.int32)),
        "waited": _pack(np.where(waited >= 0, np.arange(rows) - waited, 0).astype(np.int32)),
    }
    last = np.append(first[1:], rows)[: len(first)]
    tracks = [
        {
            "group": labels[int(frame["group"].iloc[a])][1],
            "stream": str(frame["stream"].iloc[a]),
            "first": int(a),
            "last": int(b),
        }
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    ]
    return packed, tracks


def _apart(
    start: NDArray[np.int64], end: NDArray[np.int64], is_first: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of one track made disjoint; only measured traces ever overlap on a stream."""
    overlap = ~is_first & (start < np.roll(end, 1))
    if overlap.any():
        track = np.cumsum(is_first)
        shift = track * (int(end.max()) + 1)
        latest = np.maximum.accumulate(end + shift) - shift
        before = np.where(is_first, 0, np.roll(latest, 1))
        start = np.maximum(start, before)
        end = np.maximum(end, start)
    return start, end


def _pack(values: NDArray[Any]) -> str:
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(gzip.compress(little.tobytes(), 6, mtime=0)).decode("ascii")


# --------------------------------------------------------------------------- the figures


def _breakdowns(view: RunView) -> list[dict[str, Any]]:
    """Where the mean rank's step goes, a bar per job."""
    bars = []
    for job in view.parts:
        given = job.summary.get("breakdown_s") or {}
        parts = {name: float(seconds) for name, seconds in given.items() if seconds > 0.0}
        exposed = set(job.summary.get("exposed_communication_s") or {})
        if parts:
            bars.append(
                {
                    "job": job.name,
                    "step_time": job.step_time,
                    "parts": [
                        {
                            "name": part_label(name, exposed),
                            "value": parts[name],
                            "colour": _fill(name),
                        }
                        for name in ordered(parts)
                    ],
                }
            )
    return bars


def rank_breakdown(view: RunView) -> pd.DataFrame:
    """Seconds per kind of operation on the compute stream, one row per rank, those that it waits
    for the host (`host`), and `waiting` for anything else.

    Rows add up to the step time of the rank's job.
    """
    rows = host_waits_apart(view.frame[view.frame["stream"] == "compute"])
    seconds = (rows["end"] - rows["start"]).groupby(
        [rows["rank"], rows["kind"].astype(str)], observed=True
    )
    table = seconds.sum().unstack().fillna(0.0)
    table = table[ordered(str(c) for c in table.columns)]
    step = np.array([view.step_of(int(rank)) for rank in table.index])
    return table.assign(waiting=np.maximum(0.0, step - table.sum(axis=1)))


def _fill(name: str) -> str:
    """The colour of a part of a bar; idle time has that of the page's background."""
    return "var(--idle)" if name in ("waiting", "bubble", "idle") else colour(name)


def _rank_breakdown(view: RunView) -> list[dict[str, Any]]:
    if not len(view.frame):
        return []
    table = rank_breakdown(view)
    return [
        {
            "label": view.rank_labels.get(int(rank), f"rank {rank}"),
            "step_time": view.step_of(int(rank)),
            "parts": [
                {
                    "name": str(kind).replace("_", " "),
                    "value": float(value),
                    "colour": _fill(str(kind)),
                }
                for kind, value in row.items()
                if value > 0.0
            ],
        }
        for rank, row in zip(table.index.tolist(), table.to_dict("records"), strict=True)
    ]


def _memory(view: RunView) -> dict[str, Any] | None:
    stages = memory_stages(view)
    if not stages:
        return None
    capacities = [stage.capacity for stage in stages]
    return {
        "capacity": max(capacities),
        "capacities": sorted(set(capacities)),
        "note": "Memory of every pipeline rank at its peak, against the accelerator's capacity.",
        "legend": [[name, MEMORY_COLOURS[name]] for name in MEMORY_PARTS],
        "stages": [
            {
                "label": stage.label,
                "total": stage.total,
                "capacity": stage.capacity,
                "parts": [
                    {
                        "name": name,
                        "value": stage.parts[name],
                        "colour": MEMORY_COLOURS[name],
                    }
                    for name in MEMORY_PARTS
                ],
            }
            for stage in stages
        ],
        "curves": [
            {
                "label": label,
                "times": [float(f"{t:.7g}") for t in curve.times],
                "bytes": [round(float(b)) for b in curve.bytes],
            }
            for label, curve in memory_over_time(view)
        ],
    }


def _network(drawing: NetworkDrawing) -> dict[str, Any]:
    note = (
        "Links coloured by the highest use of their directions: the share of the step in which "
        "the step's bytes keep the link busy at full speed."
    )
    if drawing.merged:
        note += f" A box stands for {drawing.merged}."
    widest = max(
        (sum(1 for n in drawing.nodes if n.y == node.y) for node in drawing.nodes), default=1
    )
    room = 1140 / widest
    links = sorted(drawing.links, key=lambda link: -link.highest_use)
    between = {
        link: f"{drawing.nodes[link.start].label} - {drawing.nodes[link.end].label}"
        for link in drawing.links
    }
    return {
        "note": note,
        "height": max(2, drawing.rows),
        "nodes": [
            {
                "label": label,
                "title": node.label,
                "facts": [["type", node.type], ["nodes", f"{node.count:,}"]],
                "x": node.x,
                "y": node.y,
                "width": round(min(room - 3, max(24.0, 7.2 * len(label) + 12)), 1),
                "small": room < 7.2 * len(label) + 8,
            }
            for node in drawing.nodes
            for label in [node.label if room > 6.0 * len(node.label) + 8 else node.short]
        ],
        "links": [
            {
                "from": link.start,
                "to": link.end,
                "max": link.highest_use,
                "label": between[link],
                "facts": [list(fact) for fact in link.facts],
            }
            for link in drawing.links
        ],
        "table": [
            [
                f"{between[link]} ({link.kind})",
                f"{link.count:,}",
                format_bandwidth(link.bandwidth),
                format_bytes(link.work),
                f"{link.mean_use:.1%}",
                f"{link.highest_use:.1%}",
            ]
            for link in links[:200]
        ],
    }


def _critical(view: RunView, length: float) -> dict[str, Any]:
    path = view.critical
    if path is None or not len(path):
        return {"critical": None, "critical_rows": []}
    duration = (path["end"] - path["start"]).to_numpy()
    start = path["start"].to_numpy()
    position = view.frame.index.get_indexer(path.index)
    kinds = pd.Series(duration).groupby(path["kind"].astype(str).to_numpy()).sum()
    busy = float(duration.sum())
    parts = [
        {"name": kind.replace("_", " "), "value": float(kinds[kind]), "colour": colour(kind)}
        for kind in ordered(str(k) for k in kinds.index)
    ]
    if length - busy > 1e-9 * length:
        parts.append({"name": "waiting", "value": length - busy, "colour": _fill("waiting")})
    longest = np.argsort(-duration, kind="stable")[:_LONGEST]
    what = "when the last job's step ends" if view.jobs else "the step time"
    return {
        "critical": {
            "note": f"The chain of {len(path):,} operations that determines {what}: each "
            f"starts when the one before it ends. Ranks on it: {path['rank'].nunique():,}.",
            "total": max(busy, length),
            "kinds": parts,
            "longest": [
                {
                    "operation": str(path["operation"].iloc[i]),
                    "where": f"{view.short_label(int(path['rank'].iloc[i]))}, "
                    f"{path['stream'].iloc[i]}",
                    "start": float(start[i]),
                    "duration": float(duration[i]),
                    "row": int(position[i]),
                }
                for i in longest.tolist()
            ],
        },
        "critical_rows": [int(p) for p in position if p >= 0],
    }
