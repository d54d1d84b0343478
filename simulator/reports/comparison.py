"""A comparison as terminal tables and as an HTML page with both timelines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from simulator.reports.files import whole_file
from simulator.reports.html import render_page
from simulator.reports.view import trimmed
from simulator.units import format_bytes, format_time

if TYPE_CHECKING:
    from simulator.studies.comparison import Comparison

#: Rows of the tables by layer and by operation in the terminal and in the page.
_SHORT, _LONG = 15, 500


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what differs: figures, then kinds, stages and single operations, largest first."""
    console = console or Console()
    console.print(f"A  {escape(comparison.a.title)}\nB  {escape(comparison.b.title)}")
    figures = Table(title="Figures", title_justify="left")
    for name in ("figure", "A", "B", "change"):
        figures.add_column(name, justify="left" if name == "figure" else "right")
    for row in _figure_rows(comparison):
        figures.add_row(*row)
    console.print(figures)
    for line in _not_aligned(comparison):
        console.print(line, highlight=False)
    for title, table in _tables(comparison).items():
        if not len(table):
            continue
        shown = table if title == "By kind" else table.head(_SHORT)
        console.print(_rich(title, shown, len(table) - len(shown)))


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the comparison as one offline page with both timelines; the file is whole or absent."""
    page = render_page(
        [(trimmed(comparison.a), "A"), (trimmed(comparison.b), "B")],
        title=f"A: {comparison.a.title}, B: {comparison.b.title}",
        figures=_figure_rows(comparison),
        figure_head=("", "A", "B", "change"),
        tables=[
            {
                "id": title.lower().replace(" ", "-"),
                "title": title,
                "note": _note(title, comparison),
                "head": _head(table),
                "rows": _rows(table.head(_LONG)),
                "numeric": list(range(len(_head(table)) - 4, len(_head(table)))),
            }
            for title, table in _tables(comparison).items()
            if len(table)
        ],
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    return {
        "By kind": comparison.by_kind,
        "By stage": comparison.by_stage,
        "By layer": comparison.by_layer,
        "By operation": comparison.by_operation,
    }


def _not_aligned(comparison: Comparison) -> list[str]:
    """What the runs have different numbers of, a sentence each."""
    return [
        f"A has {a} {name}{'s' * (a != 1)}, B has {b}: they are not compared {name} by {name}."
        for name, (a, b) in comparison.unaligned.items()
    ]


def _note(title: str, comparison: Comparison) -> str:
    if title == "By kind":
        note = (
            "Seconds of the mean rank. Computation, exposed communication and waiting add up to "
            "the step time; what is marked overlapped goes on while the rank computes."
        )
        return " ".join([note, *_not_aligned(comparison)])
    return "Seconds of the mean rank, largest difference first."


def _figure_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    rows = []
    for row in comparison.figures.to_dict("records"):
        left, right = (_figure(str(row["key"]), float(row[side])) for side in ("a", "b"))
        rows.append((str(row["figure"]), left, right, _percent(float(row["change"]))))
    return rows


def _figure(key: str, value: float) -> str:
    if key == "step_time_s":
        return format_time(value)
    if key == "peak_memory_bytes":
        return format_bytes(value)
    if key == "energy_j_per_step":
        return f"{value / 3.6e6:.4g} kWh"
    if key == "cost_usd_per_step":
        return f"{value:.4g} USD"
    if key in ("mfu", "hfu", "bubble_fraction"):
        return f"{value:.1%}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _percent(change: float) -> str:
    return f"{change:+.1%}" if change and math.isfinite(change) else ""


def _head(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if not _is_number(name)] + [
        "A", "B", "difference", "change",
    ]  # fmt: skip


def _is_number(name: str) -> bool:
    return name in ("a_s", "b_s", "difference_s", "ratio", "a_count", "b_count")


def _rows(table: pd.DataFrame) -> list[list[str]]:
    keys = [name for name in table.columns if not _is_number(name)]
    rows = []
    for record in table.to_dict("records"):
        difference = float(record["difference_s"])
        ratio = float(record["ratio"])
        same = abs(difference) <= 1e-9 * max(float(record["a_s"]), float(record["b_s"]))
        rows.append(
            [
                *(_key(name, record[name]) for name in keys),
                format_time(float(record["a_s"])) if record["a_s"] else "-",
                format_time(float(record["b_s"])) if record["b_s"] else "-",
                "=" if same else ("+" if difference > 0 else "") + format_time(difference),
                "" if same else _percent(ratio - 1.0) if math.isfinite(ratio) else "only B",
            ]
        )
    return rows


def _key(name: str, value: Any) -> str:
    if name == "overlapped":
        return "overlapped" if value else ""
    if name in ("stage", "layer"):
        return str(int(value)) if value >= 0 else ""
    return str(value).replace("_", " ") if name == "kind" else str(value)


def _rich(title: str, table: pd.DataFrame, more: int) -> Table:
    if "operation" in table.columns:
        # the operation's name tells its kind, and the terminal is narrow
        table = table.drop(columns=["kind"])
        table = table.rename(columns={"phase": ""})
    head = _head(table)
    drawn = Table(
        title=f"{title}, mean rank, largest difference first",
        title_justify="left",
        caption=f"and {more:,} more" if more > 0 else None,
    )
    for index, name in enumerate(head):
        numeric = index >= len(head) - 4
        label = "" if name == "overlapped" else name
        wide = 18 if name == "operation" else None
        drawn.add_column(
            label, justify="right" if numeric else "left", no_wrap=numeric, min_width=wide
        )
    for row, difference in zip(_rows(table), table["difference_s"], strict=True):
        style = "red" if difference > 0 else "green" if difference < 0 else ""
        cells = [Text(text) for text in row]
        cells[-2].stylize(style)
        cells[-1].stylize(style)
        drawn.add_row(*cells)
    return drawn
