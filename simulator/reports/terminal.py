"""A result as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from simulator.reports.palette import colour, ordered, part_label
from simulator.units import format_bytes, format_count, format_time

if TYPE_CHECKING:
    from simulator.plan.memory import MemoryReport
    from simulator.simulation import Result
    from simulator.summary import Summary

_BAR = 20
"""Characters of a full bar."""
_GIB = 2.0**30
_HEADS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
}
_MEMORY = ("parameters", "gradients", "optimizer", "activations", "buffers")


def print_result(result: Result, console: Console | None = None) -> None:
    """Print what one run gave: the figures, where the step's time goes, memory per stage."""
    title = result.experiment.name or _model_name(result.experiment.model)
    console = console or Console()
    print_summary(result.summary, console, title=title)
    if result.jobs:
        console.print(_jobs({title: result.summary, **result.jobs}))


def print_summary(
    summary: Summary | Mapping[str, Any], console: Console | None = None, *, title: str = ""
) -> None:
    """The same from a summary, or from the mapping that `summary.json` holds."""
    console = console or Console()
    values = summary if isinstance(summary, Mapping) else summary.to_dict()
    for part in render_summary(values, title=title):
        console.print(part)


def render_summary(values: Mapping[str, Any], *, title: str = "") -> list[RenderableType]:
    """The tables that `print_summary` prints."""
    parts: list[RenderableType] = [_figures(values, title)]
    if values.get("breakdown_s"):
        parts.append(_breakdown(values))
    if values.get("memory"):
        parts.append(_memory(values))
    return parts


def summary_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a summary as (name, text) pairs in the order in which reports show them."""
    rows: list[tuple[str, str]] = []

    def add(name: str, text: str | None) -> None:
        if text is not None:
            rows.append((name, text))

    def number(key: str) -> float | None:
        value = values.get(key)
        return None if value is None else float(value)

    step = number("step_time_s")
    low, high = number("step_time_low_s"), number("step_time_high_s")
    band = f"  ({format_time(low)} to {format_time(high)})" if low and high else ""
    add("step time", None if step is None else format_time(step) + band)
    rate, each = number("tokens_per_s"), number("tokens_per_s_per_accelerator")
    if rate is not None and each is not None:
        add("tokens/s", f"{_grouped(rate)}  ({_grouped(each)} per accelerator)")
    tflops = number("model_tflops_per_accelerator")
    add("model TFLOP/s", None if tflops is None else f"{tflops:.1f} per accelerator")
    mfu, hfu = number("mfu"), number("hfu")
    if mfu is not None and hfu is not None:
        add("MFU / HFU", f"{mfu:.1%} / {hfu:.1%}")
    bubble = number("bubble_fraction")
    add("pipeline bubble", None if bubble is None else f"{bubble:.1%}")
    exposed = values.get("exposed_communication_s") or {}
    if exposed and step:
        total = sum(float(v) for v in exposed.values())
        add("exposed communication", f"{format_time(total)}  ({total / step:.1%} of the step)")
    peak, capacity = number("peak_memory_bytes"), number("memory_capacity_bytes")
    if peak is not None and capacity:
        verdict = "fits" if values.get("fits", True) else "DOES NOT FIT"
        add(
            "peak memory",
            f"{format_bytes(peak)} of {format_bytes(capacity)}  ({peak / capacity:.0%}, {verdict})",
        )
    cost = number("cost_usd_per_step")
    if cost is not None:
        tokens = number("tokens_per_step")
        per_million = f"  ({cost / tokens * 1e6:.3g} USD per million tokens)" if tokens else ""
        add("cost", f"{cost:.4g} USD per step{per_million}")
    energy = number("energy_j_per_step")
    if energy is not None:
        add("energy", f"{energy / 3.6e6:.4g} kWh per step")
    count = number("accelerators")
    if count is not None:
        name = str(values.get("accelerator") or "accelerators")
        add("accelerators", f"{int(count):,} x {name}")
    classes, events = number("classes"), number("events")
    if classes is not None and events is not None:
        ranks = "rank" if classes == 1 else "ranks"
        add("simulated", f"{int(classes):,} distinct {ranks}, {int(events):,} events")
    return rows


def _figures(values: Mapping[str, Any], title: str) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    fits = bool(values.get("fits", True))
    for name, text in summary_rows(values):
        style = "bold red" if name == "peak memory" and not fits else ""
        table.add_row(name, Text(text, style=style))
    body: RenderableType = table
    if not fits:
        note = Text("The plan does not fit into the accelerators' memory.", style="bold red")
        body = Group(table, note)
    return Panel(
        body,
        title=escape(title) or None,
        title_align="left",
        expand=False,
        border_style="red" if not fits else "none",
    )


def _jobs(jobs: Mapping[str, Summary]) -> Table:
    table = Table(title="Jobs that share the cluster", title_justify="left")
    table.add_column("job")
    heads = ("ranks", "step time", "tokens/s", "MFU", "exposed", "peak GiB")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for name, job in jobs.items():
        exposed = sum(job.exposed_communication_s.values())
        fits = "" if job.fits else "bold red"
        table.add_row(
            escape(name),
            str(job.accelerators),
            format_time(job.step_time_s),
            _grouped(job.tokens_per_s),
            f"{job.mfu:.1%}",
            format_time(exposed),
            Text(f"{job.peak_memory_bytes / _GIB:.1f}", style=fits),
        )
    return table


def _breakdown(values: Mapping[str, Any]) -> Table:
    step = float(values.get("step_time_s") or 0.0)
    table = Table(title="Where the step's time goes (mean rank)", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    exposed = set(values.get("exposed_communication_s") or {})
    breakdown = {k: float(v) for k, v in values["breakdown_s"].items() if float(v) > 0.0}
    for name in ordered(breakdown):
        seconds = breakdown[name]
        share = seconds / step if step else 0.0
        table.add_row(
            escape(part_label(name, exposed)),
            format_time(seconds),
            f"{share:.1%}",
            Text(_bar(share), style=colour(name)),
        )
    return table


def _memory(values: Mapping[str, Any]) -> Table:
    return memory_table(values["memory"], float(values.get("memory_capacity_bytes") or 0.0))


def memory_table(stages: Sequence[Mapping[str, float]], capacity: float | None) -> Table:
    """Memory of the pipeline ranks in GiB; what does not fit is red and says by how much."""
    limit = f", capacity {format_bytes(capacity)}" if capacity else ""
    table = Table(title=f"Memory per pipeline rank in GiB{limit}", title_justify="left")
    table.add_column("rank", justify="right", no_wrap=True)
    columns = [name for name in _MEMORY if any(name in stage for stage in stages)]
    for name in columns:
        table.add_column(_HEADS.get(name, name), justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("of capacity" if capacity else "", no_wrap=True)
    # at most six characters a number, so that the table fits in 80 columns
    largest = max((_total(stage) for stage in stages), default=0.0) / _GIB
    decimals = 2 if largest < 999.0 else 1 if largest < 9999.0 else 0
    for first, last, stage in _runs(stages):
        total = _total(stage)
        fits = not capacity or total <= capacity
        note = ""
        if capacity:
            note = "█" * min(10, round(total / capacity * 10)) + f" {total / capacity:.0%}"
            if not fits:
                over = (total - capacity) / _GIB
                note = f"{over:.{1 if over < 99.0 else 0}f} too much"
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            *(f"{float(stage.get(name, 0.0)) / _GIB:.{decimals}f}" for name in columns),
            f"{total / _GIB:.{decimals}f}",
            Text(note, style="green" if fits else "bold red"),
            style="" if fits else "red",
        )
    return table


def print_memory(report: MemoryReport, console: Console | None = None) -> None:
    """Print the memory of every pipeline rank of a plan, simulated or not."""
    console = console or Console()
    console.print(memory_table([stage.as_dict() for stage in report.stages], report.capacity))


def _runs(
    stages: Sequence[Mapping[str, float]],
) -> list[tuple[int, int, Mapping[str, float]]]:
    """Neighbouring stages with the same memory as (first, last, memory)."""
    runs: list[tuple[int, int, Mapping[str, float]]] = []
    for index, stage in enumerate(stages):
        if runs and dict(runs[-1][2]) == dict(stage):
            runs[-1] = (runs[-1][0], index, stage)
        else:
            runs.append((index, index, stage))
    return runs


def _total(stage: Mapping[str, float]) -> float:
    given = stage.get("total")
    return float(given) if given is not None else sum(float(stage.get(n, 0.0)) for n in _MEMORY)


def _bar(share: float) -> str:
    return "█" * min(_BAR, max(0, round(share * _BAR)))


def _grouped(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else format_count(value)


def _model_name(model: object) -> str:
    if isinstance(model, Mapping):
        if "base" in model:
            base = str(model["base"])
            changed = ", ".join(f"{key} {value}" for key, value in model.items() if key != "base")
            return f"{base} with {changed}" if 0 < len(changed) <= 50 else base
        return str(model.get("name") or model.get("model_type") or "model")
    return str(model)
