"""The report's figures as static PNG, SVG or PDF, drawn with matplotlib.

Every function takes a `RunView` (`simulator.reports.view.view_of(result)`) and returns a matplotlib
`Figure` of its own, outside pyplot's state, so that they can be used in notebooks and servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, unknown_name
from simulator.reports.columns import stream_order
from simulator.reports.files import whole_file
from simulator.reports.html import rank_breakdown
from simulator.reports.palette import MEMORY_COLOURS, colour, ordered
from simulator.reports.view import MEMORY_PARTS, RunView, memory_over_time, memory_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
_PIXELS, _MOST_RANKS = 2400, 24
"""Columns of the timeline's image, and ranks in it when none are named."""
_GIB = 2.0**30


def timeline(
    view: RunView,
    *,
    start: float = 0.0,
    end: float | None = None,
    streams: Iterable[str] = (),
    ranks: Iterable[int] = (),
) -> Figure:
    """Operations per stream between two times [s], coloured by kind.

    `streams` and `ranks` choose rows; without `ranks`, the view's first 24.

    Every column of a row shows the kind that takes most of that column's time, as opaque as the
    stream is busy, so that a million operations are as quick to draw as a few.
    """
    stop = view.step_time if end is None else end
    if not stop > start:
        raise InputError(f"a timeline from {start} s to {stop} s is empty", place="timeline")
    frame = view.frame
    present = np.unique(frame["rank"]).tolist()
    rows = [
        (rank, stream, part)
        for rank in (sorted(set(ranks) & set(present)) or present[:_MOST_RANKS])
        for mine in [frame[frame["rank"] == rank]]
        for stream in stream_order(mine["stream"].unique())
        if not streams or stream in set(streams)
        for part in [mine[mine["stream"] == stream]]
    ]
    figure, axes = _figure(12, 0.9 + 0.17 * len(rows))
    edges = np.linspace(start, stop, _PIXELS + 1)
    image = np.ones((max(1, len(rows)), _PIXELS, 4))
    kinds: dict[str, None] = {}
    for index, (_, _, part) in enumerate(rows):
        names = part["kind"].astype(str).to_numpy()
        begin, finish = part["start"].to_numpy(), part["end"].to_numpy()
        found = ordered(names.tolist())
        busy = np.stack(
            [_busy(begin[names == name], finish[names == name], edges) for name in found]
        )
        kinds |= dict.fromkeys(name for name, row in zip(found, busy, strict=True) if row.any())
        palette = np.array([_rgb(colour(name)) for name in found])
        share = np.clip(busy.sum(axis=0) / np.diff(edges), 0.0, 1.0)
        alpha = np.where(share > 0.0, 0.25 + 0.75 * share, 0.0)[:, None]
        ground = np.array([0.91, 0.92, 0.94])
        image[index, :, :3] = alpha * palette[busy.argmax(axis=0)] + (1.0 - alpha) * ground
    axes.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        extent=(start, stop, len(rows) - 0.5, -0.5),
    )
    for index in range(1, len(rows)):
        between = 2.0 if rows[index][0] != rows[index - 1][0] else 0.6
        axes.axhline(index - 0.5, color="white", linewidth=between)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels(
        [_plain_text(f"{view.short_label(rank)} {stream}") for rank, stream, _ in rows], fontsize=7
    )
    axes.set_xlabel("time [s]")
    _legend(axes, [(name.replace("_", " "), colour(name)) for name in ordered(kinds)])
    return figure


def breakdown(view: RunView) -> Figure:
    """What the compute stream of each representative rank does during the step."""
    table = rank_breakdown(view)
    figure, axes = _figure(11, 1.3 + 0.32 * len(table))
    left = np.zeros(len(table))
    for name in table.columns:
        values = table[name].to_numpy()
        fill = colour("idle" if name == "waiting" else str(name))
        axes.barh(range(len(table)), values, left=left, color=fill, height=0.72)
        left += values
    axes.set_yticks(range(len(table)))
    axes.set_yticklabels(
        [_plain_text(view.short_label(int(rank))) for rank in table.index], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlim(0.0, view.step_time)
    axes.set_xlabel("time [s]")
    _legend(
        axes,
        [
            (str(name).replace("_", " "), colour("idle" if name == "waiting" else str(name)))
            for name in table.columns
        ],
    )
    return figure


def memory(view: RunView) -> Figure:
    """Memory of every pipeline rank at its peak, and over the step, against the capacity."""
    stages = memory_stages(view)
    if not stages:
        raise InputError("the run has no memory report", place="memory")
    capacities = sorted({stage.capacity / _GIB for stage in stages})
    figure, axes = _figure(12, 4.0, columns=2)
    bars, curves = axes
    bottom = np.zeros(len(stages))
    for name in MEMORY_PARTS:
        values = np.array([stage.parts[name] for stage in stages]) / _GIB
        bars.bar(range(len(stages)), values, bottom=bottom, color=MEMORY_COLOURS[name], label=name)
        bottom += values
    bars.set_xticks(range(len(stages)))
    if view.jobs:
        names = [_plain_text(stage.label) for stage in stages]
        bars.set_xticklabels(names, rotation=40, ha="right", fontsize=7)
    else:
        bars.set_xlabel("pipeline rank")
    over_time = memory_over_time(view)
    tones = np.linspace(0.0, 0.9, len(over_time))
    from matplotlib import colormaps

    for tone, (label, curve) in zip(tones, over_time, strict=True):
        times = np.append(curve.times, view.step_time)
        held = np.append(curve.bytes, curve.bytes[-1]) / _GIB
        curves.step(
            times,
            held,
            where="post",
            label=_plain_text(label),
            color=colormaps["viridis"](tone),
        )
    curves.set_xlabel("time [s]")
    for part in axes:
        part.set_ylabel("memory [GiB]")
        part.set_ylim(0.0, max(*capacities, float(bottom.max(initial=0.0))) * 1.08)
        for capacity in filter(None, capacities):
            part.axhline(capacity, color="#b3261e", linestyle="--", linewidth=1.2)
    bars.legend(fontsize=7, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    if 0 < len(over_time) <= 16:
        curves.legend(
            fontsize=7, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )
    return figure


def network(view: RunView) -> Figure:
    """The topology with its links coloured and widened by their highest use."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    drawing = view.network
    if drawing is None:
        raise InputError("the run has no links", place="network")
    figure, axes = _figure(12, 0.8 + 0.85 * max(2, drawing.rows))
    place = np.array([(node.x, -node.y * max(1, drawing.rows - 1)) for node in drawing.nodes])
    links = sorted(
        (link for link in drawing.links if link.start != link.end), key=lambda k: k.highest_use
    )
    use = np.array([link.highest_use for link in links])
    scale = Normalize(0.0, max(0.01, float(use.max(initial=0.0))))
    shades = LinearSegmentedColormap.from_list("use", ["#c9cdd4", "#6292d0", "#e2a038", "#be1e24"])
    curves = [_curve(place[link.start], place[link.end]) for link in links]
    axes.add_collection(
        LineCollection(curves, colors=shades(scale(use)), linewidths=0.8 + 3.0 * scale(use))
    )
    for node, (x, y) in zip(drawing.nodes, place, strict=True):
        axes.annotate(
            _plain_text(node.label), (x, y), ha="center", va="center", fontsize=6,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "#f6f7f9", "edgecolor": "#5c6470",
                  "linewidth": 0.6},
        )  # fmt: skip
    bar = figure.colorbar(
        ScalarMappable(norm=scale, cmap=shades), ax=axes, fraction=0.025, pad=0.01
    )
    bar.set_label("share of the step that the link is busy", fontsize=8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(float(place[:, 1].min()) - 0.4, 0.4)
    axes.axis("off")
    return figure


def critical_path(view: RunView) -> Figure:
    """The critical path's time per kind of operation."""
    path = view.critical
    if path is None or not len(path):
        raise InputError("the run has no critical path", place="critical_path")
    seconds = (path["end"] - path["start"]).groupby(path["kind"].astype(str).to_numpy()).sum()
    kinds = ordered(str(kind) for kind in seconds.index)
    figure, axes = _figure(8, 1.0 + 0.3 * len(kinds))
    values = [float(seconds[kind]) for kind in kinds]
    axes.barh(range(len(kinds)), values, color=[colour(kind) for kind in kinds])
    for index, value in enumerate(values):
        axes.annotate(
            f" {value / view.step_time:.1%}" if view.step_time else "",
            (value, index), va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(kinds)))
    axes.set_yticklabels([_plain_text(kind.replace("_", " ")) for kind in kinds], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time on the critical path [s]")
    return figure


#: Figures by name, as `save_figures` writes them.
FIGURES: dict[str, Callable[[RunView], Figure]] = {
    "timeline": timeline,
    "breakdown": breakdown,
    "memory": memory,
    "network": network,
    "critical_path": critical_path,
}


def save_figures(
    view: RunView,
    directory: str | Path,
    *,
    names: Iterable[str] = (),
    formats: Iterable[str] = ("png",),
    dpi: int = 150,
) -> list[Path]:
    """Write figures as `directory/NAME.FORMAT`; each file is whole or absent.

    Parameters
    ----------
    names:
        Keys of `FIGURES`; when left out, all for which the view has data.
    formats:
        Among `FORMATS`.

    Raises
    ------
    InputError
        For an unknown name or format, or a named figure for which the view has no data.
    """
    chosen, kinds = list(names), list(formats)
    for name in chosen:
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)
    for kind in kinds:
        if kind not in FORMATS:
            raise unknown_name("figure format", kind, FORMATS)
    written = []
    for name in chosen or FIGURES:
        try:
            figure = FIGURES[name](view)
        except InputError:
            if chosen:
                raise
            continue
        for kind in kinds:
            path = Path(directory) / f"{name}.{kind}"
            # no date in the file: same run, same bytes
            metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(
                kind, {}
            )
            with whole_file(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
            written.append(path)
    return written


# ------------------------------------------------------------------------------- drawing


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, min(height, 40.0)), layout="constrained")
    axes = figure.subplots(1, columns)
    for part in np.ravel(axes):
        part.spines[["top", "right"]].set_visible(False)
        part.tick_params(labelsize=8)
    return figure, axes


def _legend(axes: Any, entries: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=fill, label=_plain_text(name)) for name, fill in entries],
        fontsize=7, frameon=False, ncols=8, loc="lower left", bbox_to_anchor=(0.0, 1.0),
    )  # fmt: skip


def _busy(
    start: NDArray[np.float64], end: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds of each column between `edges` that disjoint, ascending intervals cover."""
    if not len(start):
        return np.zeros(len(edges) - 1)
    knots = np.stack([start, end], axis=1).reshape(-1)
    covered = np.cumsum(np.stack([np.zeros(len(start)), end - start], axis=1).reshape(-1))
    return np.diff(np.interp(edges, np.maximum.accumulate(knots), covered))


def _curve(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """A straight line between tiers, an arc between nodes of one tier."""
    t = np.linspace(0.0, 1.0, 24)[:, None]
    line = (1.0 - t) * a + t * b
    if abs(float(a[1] - b[1])) < 1e-9:
        line[:, 1] -= (0.1 + 0.6 * abs(float(a[0] - b[0]))) * np.sin(np.pi * t[:, 0])
    return line


def _rgb(text: str) -> tuple[float, float, float]:
    red, green, blue = (int(text[i : i + 2], 16) / 255.0 for i in (1, 3, 5))
    return red, green, blue


def _plain_text(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
