"""Pictures of pipeline schedules: one self-contained HTML file, or PNG, SVG and PDF.

One row per rank, colours by kind (F, B, I, W) and shades by chunk, micro-batch numbers in the boxes
where they fit, idle left white, the activation memory of every rank below. Several schedules are
laid one above the other on the same time axis.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.memory import ActivationMemory, MemoryCurve, memory_curves
from simulator.schedules.timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Fill colours by kind; the shade is the chunk of the rank, the first is the darkest. Hues follow
#: PyTorch's schedule visualiser (F blue, I teal, W green, B orange, overlap purple).
COLOURS: dict[str, tuple[str, ...]] = {
    "F": ("#2f6fb7", "#7fb0e6", "#a9cbf0", "#cfe2f7"),
    "B": ("#d9731a", "#f6ad6a", "#f9c899", "#fce0c6"),
    "I": ("#138a8a", "#62c4c0", "#96d9d6", "#c3ebe9"),
    "W": ("#4b8f2f", "#97cc7c", "#b8dea5", "#d9eecf"),
    "O": ("#6a2fb0",),
}
STATIC_SUFFIXES = (".png", ".svg", ".pdf")
SUFFIXES = (".html", *STATIC_SUFFIXES)

#: What the memory curve counts if nothing else is said.
DEFAULT_UNIT = "micro-batches"

_LABELS = {
    "F": "F forward",
    "B": "B backward",
    "I": "I input gradient",
    "W": "W weight gradient",
    "O": "F and B overlapped",
}


@dataclass(frozen=True)
class Box:
    """One drawn action.

    Attributes
    ----------
    start, end:
        In the unit of the durations.
    kind:
        F, B, I or W.
    chunk:
        Which of the rank's stages, from 0.
    microbatch, stage:
        Of the action.
    """

    start: float
    end: float
    kind: str
    chunk: int
    microbatch: int
    stage: int


def write_plot(
    timings: Sequence[Timing],
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    memory: ActivationMemory | None = None,
    memory_unit: str = DEFAULT_UNIT,
    arrows: bool = False,
) -> None:
    """Draw schedules one above the other into `path`; its suffix says how.

    Parameters
    ----------
    timings:
        From `simulate`; at least one.
    path:
        `.html` (interactive, offline), `.png`, `.svg` or `.pdf`.
    titles:
        One per schedule; the default is the schedule's name.
    memory, memory_unit:
        What a micro-batch takes of memory in a stage; the default counts micro-batches, where a
        chunk of a rank with v chunks is 1/v (so that schedules with different v compare).
    arrows:
        Draw the transfers between ranks (in the HTML file: switched on at first).

    Raises
    ------
    InputError
        If the suffix is none of these or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"expected a file name that ends with {', '.join(SUFFIXES)}, got {path.name!r}"
        )
    names = list(titles) if titles is not None else [t.schedule.name for t in timings]
    try:
        if path.suffix.lower() == ".html":
            text = to_html(
                timings, titles=names, memory=memory, memory_unit=memory_unit, arrows=arrows
            )
            path.write_text(text, encoding="utf-8")
        else:
            figure = to_figure(
                timings, titles=names, memory=memory, memory_unit=memory_unit, arrows=arrows
            )
            from matplotlib import rc_context

            # Without a date and with fixed identifiers the same picture is the same file.
            key = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix.lower())
            with rc_context({"svg.hashsalt": "pipeline"}):
                figure.savefig(path, dpi=150, metadata={key: None} if key else None)
    except OSError as error:
        raise InputError(f"cannot write the plot: {error.strerror}", place=str(path)) from error


def subtitle(timing: Timing) -> str:
    """The figures of a schedule in one line."""
    schedule = timing.schedule
    chunks = "" if schedule.virtual == 1 else f" x {schedule.virtual} chunks"
    return (
        f"{schedule.ranks} ranks{chunks}, {schedule.microbatches} micro-batches; "
        f"makespan {timing.makespan:g}, bubble {timing.bubble_fraction:.2%} "
        f"(window {timing.window_bubble_fraction:.2%})"
    )


def boxes_of(timing: Timing, rank: int) -> list[tuple[Box, ...]]:
    """The boxes of a rank in order: one per action, two for an overlapped pair."""
    schedule = timing.schedule
    chunk_of = {stage: chunk for chunk, stage in enumerate(schedule.rank_to_stages[rank])}
    rows = []
    for index, entry in enumerate(schedule.actions[rank]):
        start, end = float(timing.start[rank][index]), float(timing.end[rank][index])
        actions: tuple[Action, ...] = (
            (entry.forward, entry.backward) if isinstance(entry, Overlap) else (entry,)
        )
        rows.append(
            tuple(
                Box(start, end, a.kind, chunk_of[a.stage], a.microbatch or 0, a.stage)
                for a in actions
            )
        )
    return rows


def transfers(timing: Timing) -> list[tuple[float, int, float, int, bool]]:
    """(start, sending rank, arrival, receiving rank, is an activation) of every transfer."""
    schedule = timing.schedule
    comm = timing.durations.per_stage("comm", schedule.stages)
    holder = schedule.stage_to_rank
    result = []
    for rank in range(schedule.ranks):
        for boxes in boxes_of(timing, rank):
            for box in boxes:
                if box.kind == "F" and not schedule.is_last(box.stage):
                    target, delay = box.stage + 1, comm[box.stage]
                elif box.kind in ("B", "I") and not schedule.is_first(box.stage):
                    target, delay = box.stage - 1, comm[box.stage - 1]
                else:
                    continue
                if holder[target] != rank:
                    arrival = box.end + float(delay)
                    result.append((box.end, rank, arrival, holder[target], box.kind == "F"))
    return result


def _kinds(timings: Sequence[Timing]) -> list[str]:
    found = set()
    for timing in timings:
        for order in timing.schedule.actions:
            for entry in order:
                if isinstance(entry, Overlap):
                    found |= {"O", entry.forward.kind, entry.backward.kind}
                else:
                    found.add(entry.kind)
    return [kind for kind in COLOURS if kind in found]


def _curves(timing: Timing, memory: ActivationMemory | None) -> list[MemoryCurve]:
    if memory is None:
        chunks = timing.schedule.virtual // timing.schedule.replicas
        memory = ActivationMemory(activation=1 / chunks)
    return memory_curves(timing, memory)


def _origin(timing: Timing) -> float:
    return float(min(times[0] for times in timing.start if times))


# -- HTML ------------------------------------------------------------------------------------------


def to_html(
    timings: Sequence[Timing],
    *,
    titles: Sequence[str],
    memory: ActivationMemory | None = None,
    memory_unit: str = DEFAULT_UNIT,
    arrows: bool = False,
) -> str:
    """The interactive page as text; it loads nothing from anywhere."""
    panels = []
    peak = 0.0
    for timing, title in zip(timings, titles, strict=True):
        curves = _curves(timing, memory)
        peaks = [curve.peak for curve in curves]
        worst = peaks.index(max(peaks))
        peak = max(peak, peaks[worst])
        panels.append(
            {
                "title": title,
                "subtitle": subtitle(timing),
                "chunks": timing.schedule.virtual,
                "rows": [_row(timing, rank) for rank in range(timing.schedule.ranks)],
                "memory": [
                    {"t": _numbers(curve.times), "v": _numbers(curve.values)} for curve in curves
                ],
                "peak": peaks[worst],
                "peakRank": worst,
                "peakTime": curves[worst].peak_time,
                "arrows": [
                    [_short(t0), r0, _short(t1), r1, int(forward)]
                    for t0, r0, t1, r1, forward in transfers(timing)
                ],
            }
        )
    ranks = max(timing.schedule.ranks for timing in timings)
    data = {
        "span": max(_origin(t) + float(t.makespan) for t in timings) or 1.0,
        "rowHeight": _row_height(ranks, "O" in _kinds(timings)),
        "colours": COLOURS,
        "kinds": _kinds(timings),
        "chunks": max(timing.schedule.virtual for timing in timings),
        "memoryUnit": memory_unit,
        "memoryPeak": peak,
        "showArrows": arrows,
        "panels": panels,
    }
    template = (Path(__file__).parent / "pipeline_plot.html").read_text(encoding="utf-8")
    # "<" only occurs inside strings; escaped, no title can end the script element.
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(" and ".join(titles))
    return template.replace("__TITLE__", title).replace("__DATA__", encoded)


def _row_height(ranks: int, overlapped: bool) -> int:
    """Height of a rank's row in pixels at first; overlapped pairs show two numbers in it."""
    height = 24 if ranks <= 16 else 16 if ranks <= 32 else 12
    return height + 8 if overlapped else height


def _short(value: float) -> float:
    """Ten significant digits: enough for a picture, and half the size of the file."""
    return float(f"{value:.10g}")


def _numbers(values: Any) -> list[float]:
    return [_short(float(value)) for value in values]


def _row(timing: Timing, rank: int) -> dict[str, Any]:
    row: dict[str, Any] = {"s": [], "e": [], "k": [], "c": [], "m": [], "g": [], "o": {}}
    for index, boxes in enumerate(boxes_of(timing, rank)):
        first, last = boxes[0], boxes[-1]
        row["s"].append(_short(first.start))
        row["e"].append(_short(first.end))
        row["k"].append(first.kind if len(boxes) == 1 else "O")
        row["c"].append(first.chunk)
        row["m"].append(first.microbatch)
        row["g"].append(first.stage)
        if len(boxes) == 2:
            row["o"][index] = [
                first.kind, first.chunk, first.microbatch,
                last.kind, last.chunk, last.microbatch,
                first.stage, last.stage,
            ]  # fmt: skip
    return row


# -- static figures --------------------------------------------------------------------------------


def to_figure(
    timings: Sequence[Timing],
    *,
    titles: Sequence[str],
    memory: ActivationMemory | None = None,
    memory_unit: str = DEFAULT_UNIT,
    arrows: bool = False,
) -> Figure:
    """A matplotlib figure: per schedule the timeline and below it the memory of the ranks."""
    from matplotlib.figure import Figure as NewFigure

    longest = max(float(t.makespan) for t in timings)
    shortest = min(float(_shortest(timing)) for timing in timings)
    # As wide as legible numbers need, within reason.
    width = min(28.0, max(9.0, 1.4 + 0.17 * longest / shortest))
    heights: list[float] = []
    for timing in timings:
        ranks = timing.schedule.ranks
        heights += [max(1.2, ranks * (0.26 if ranks <= 16 else 0.17)), 1.3]
    gaps = 0.46 * len(heights) + 1.2
    total = sum(heights) + gaps
    figure = NewFigure(figsize=(width, total))
    grid = figure.add_gridspec(
        len(heights),
        1,
        height_ratios=heights,
        left=0.75 / width,
        right=1 - 0.25 / width,
        top=1 - 0.85 / total,
        bottom=0.5 / total,
        hspace=0.46 * len(heights) / sum(heights),
    )
    span = max(_origin(t) + float(t.makespan) for t in timings)
    curves = [_curves(timing, memory) for timing in timings]
    peak = max(curve.peak for group in curves for curve in group) or 1.0
    shared: Axes | None = None
    for index, (timing, title) in enumerate(zip(timings, titles, strict=True)):
        lanes = figure.add_subplot(grid[2 * index], sharex=shared)
        shared = shared or lanes
        lanes.set_xlim(0, span)
        _draw_lanes(lanes, timing, width, heights[2 * index], span, arrows)
        lanes.set_title(f"{title}: {subtitle(timing)}", fontsize=9.5, loc="left")
        below = figure.add_subplot(grid[2 * index + 1], sharex=lanes)
        _draw_memory(below, curves[index], span, peak, memory_unit)
        if index == len(timings) - 1:
            below.set_xlabel("time", fontsize=8.5)
    _draw_legend(figure, timings, total)
    return figure


def _draw_lanes(
    axes: Axes, timing: Timing, width: float, height: float, span: float, arrows: bool
) -> None:
    from matplotlib.collections import PolyCollection

    ranks = timing.schedule.ranks
    inches = (width - 1.0) / span  # of one unit of time
    lane = height / ranks * 72  # points
    # One size for all numbers of a panel: the largest number fits into the narrowest box.
    digits = len(str(timing.schedule.microbatches - 1))
    narrowest = float(_shortest(timing)) * inches * 72
    size = min(8.0, lane * 0.62, (narrowest - 1) / (digits * 0.62))
    corners: list[list[tuple[float, float]]] = []
    fills: list[str] = []
    frames: list[list[tuple[float, float]]] = []
    for rank in range(ranks):
        for boxes in boxes_of(timing, rank):
            for part, box in enumerate(boxes):
                tall = 0.86 / len(boxes)
                top = rank - 0.43 + part * tall
                corners.append(_rectangle(box.start, box.end, top, top + tall))
                fill = COLOURS[box.kind][box.chunk % len(COLOURS[box.kind])]
                fills.append(fill)
                text = str(box.microbatch)
                font = size if len(boxes) == 1 else min(size, lane * tall * 0.9)
                if font >= 3.8:
                    axes.text(
                        (box.start + box.end) / 2,
                        top + tall / 2,
                        text,
                        ha="center",
                        va="center_baseline" if len(boxes) == 1 else "center",
                        fontsize=font,
                        color="white" if _is_dark(fill) else "#111111",
                        clip_on=True,
                    )
            if len(boxes) == 2:
                one = boxes[0]
                frames.append(_rectangle(one.start, one.end, rank - 0.43, rank + 0.43))
    thin = 0.4 if narrowest > 4 else 0.0
    axes.add_collection(
        PolyCollection(corners, facecolors=fills, edgecolors="white", linewidths=thin)
    )
    if frames:
        axes.add_collection(
            PolyCollection(
                frames, facecolors="none", edgecolors=COLOURS["O"][0], linewidths=1.1 if thin else 0
            )
        )
    if arrows:
        for t0, r0, t1, r1, forward in transfers(timing):
            down = 0.3 if r1 > r0 else -0.3
            axes.annotate(
                "",
                xy=(t1, r1 - down),
                xytext=(t0, r0 + down),
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.12,head_length=0.25",
                    "color": "#123a7a" if forward else "#8a3a00",
                    "linewidth": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    axes.set_ylim(ranks - 0.5, -0.5)
    step = max(1, round(11 / lane)) if lane < 11 else 1
    axes.set_yticks(range(0, ranks, step), [f"rank {rank}" for rank in range(0, ranks, step)])
    axes.tick_params(labelsize=7.5, length=2)
    axes.tick_params(labelbottom=False)


def _shortest(timing: Timing) -> Any:
    """The shortest action of a schedule that takes any time."""
    return min(
        (
            end - start
            for starts, ends in zip(timing.start, timing.end, strict=True)
            for start, end in zip(starts, ends, strict=True)
            if end > start
        ),
        default=1,
    )


def _rectangle(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 150


def _draw_memory(
    axes: Axes, curves: Sequence[MemoryCurve], span: float, peak: float, unit: str
) -> None:
    from matplotlib import colormaps

    ramp = colormaps["viridis"]
    for rank, curve in enumerate(curves):
        times = [*curve.times, span]
        values = [*curve.values, curve.values[-1]]
        label = f"rank {rank}" if rank in (0, len(curves) - 1) else None
        shade = ramp(0.9 * rank / max(1, len(curves) - 1))
        axes.step(times, values, where="post", color=shade, linewidth=0.9, label=label)
    peaks = [curve.peak for curve in curves]
    worst = peaks.index(max(peaks))
    axes.set_ylim(0, peak * 1.12)
    axes.set_ylabel(unit, fontsize=7.5)
    axes.tick_params(labelsize=7.5, length=2)
    axes.set_title(
        f"activation memory by rank (dark: first, bright: last), peak {peaks[worst]:g} "
        f"on rank {worst} at {curves[worst].peak_time:g}",
        fontsize=8,
        loc="left",
        color="#444444",
        pad=3,
    )


def _draw_legend(figure: Figure, timings: Sequence[Timing], total: float) -> None:
    from matplotlib.patches import Patch

    handles = []
    for kind in _kinds(timings):
        if kind == "O":
            handles.append(Patch(facecolor="none", edgecolor=COLOURS["O"][0], label=_LABELS[kind]))
        else:
            handles.append(Patch(facecolor=COLOURS[kind][0], label=_LABELS[kind]))
    chunks = max(timing.schedule.virtual for timing in timings)
    if chunks > 1:
        handles.append(
            Patch(facecolor=COLOURS["F"][1], label=f"lighter: later of the {chunks} chunks")
        )
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(0.5, 1 - 0.08 / total),
    )
