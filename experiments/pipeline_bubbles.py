"""Bubble and memory of every schedule over stages and micro-batches: a table and a figure.

    python experiments/pipeline_bubbles.py
    python experiments/pipeline_bubbles.py --schedules 1f1b,zb-v --stages 8,16 --per-stage 1,2,4,8
    python experiments/pipeline_bubbles.py --durations F=18.5,I=18.1,W=9.3,comm=0.6

Every schedule does the same work per rank: with v chunks a chunk's actions take 1/v of the given
durations. `--per-stage` are micro-batches per stage. Combinations that a schedule does not allow
are left out of the table. Writes `pipeline_bubbles.csv`, `.png` and `.svg` into `--out`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import matplotlib
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulator.cli.schedule import parse_durations
from simulator.errors import InputError
from simulator.schedules import (
    ActivationMemory,
    Durations,
    build,
    describe,
    memory_curves,
    names,
    peak_in_flight,
    simulate,
    steady_bubble_fraction,
)
from simulator.schedules.automatic import DEFAULT_KEPT_FOR_WEIGHTS

LEFT_OUT = ("forward-only", "auto")


def measure(name: str, stages: int, microbatches: int, durations: Durations) -> dict[str, object]:
    """Bubbles and peak of one schedule.

    Returns the makespan, both bubble fractions, the steady bubble of a schedule without a flush,
    and the peak of activation memory in micro-batches of a rank's layers.

    Raises
    ------
    InputError
        If the schedule does not exist for these sizes.
    """
    kind = describe(name)
    virtual = 2 if kind.chunks == "any" and name.startswith(("interleaved", "looped")) else None
    chunks = virtual or kind.default_virtual
    scaled = replace(
        durations,
        **{
            key: value / chunks
            for key in ("F", "B", "I", "W")
            if (value := getattr(durations, key)) is not None
        },
    )
    options = {"durations": scaled} if kind.needs_durations else {}
    schedule = build(name, stages, microbatches, virtual, **options)
    timing = simulate(schedule, scaled)
    peak = float(max(peak_in_flight(schedule)))
    if "kept_for_weights" in kind.options:
        # These count what stays between I and W as the paper does, not as a whole activation.
        memory = ActivationMemory(kept_for_weights=DEFAULT_KEPT_FOR_WEIGHTS)
        peak = max(curve.peak for curve in memory_curves(timing, memory))
    steady = timing.bubble_fraction
    if not schedule.flush:
        # Without a flush, what counts is what one more step takes.
        longer = simulate(build(name, stages, 2 * microbatches, virtual, **options), scaled)
        steady = steady_bubble_fraction(timing, longer)
    return {
        "schedule": name,
        "chunks": chunks,
        "stages": stages,
        "microbatches": microbatches,
        "makespan": float(timing.makespan),
        "bubble": timing.bubble_fraction,
        "window_bubble": timing.window_bubble_fraction,
        "steady_bubble": max(0.0, steady),
        "peak": peak / chunks,
        "weights": schedule.weight_copies,
    }


def sweep(
    schedules: list[str], stages: list[int], per_stage: list[int], durations: Durations
) -> pd.DataFrame:
    """One row per allowed combination, with a progress bar on the terminal."""
    rows = []
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with progress:
        task = progress.add_task("schedules", total=len(schedules) * len(stages) * len(per_stage))
        for name in schedules:
            for p in stages:
                for rounds in per_stage:
                    progress.update(task, description=f"{name} {p}x{p * rounds}")
                    try:
                        rows.append(measure(name, p, p * rounds, durations))
                    except InputError as error:
                        progress.console.print(f"[dim]left out: {error}[/dim]", soft_wrap=True)
                    progress.advance(task)
    return pd.DataFrame(rows)


def to_markdown(table: pd.DataFrame) -> str:
    """The table as docs/schedules.md has it, smallest steady bubble first."""
    lines = [
        "| schedule | chunks | makespan | bubble | window bubble | steady bubble | peak "
        "| weights |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = ["stages", "microbatches", "steady_bubble", "window_bubble", "peak", "schedule"]
    for row in table.sort_values(order, kind="stable").itertuples():
        lines.append(
            f"| `{row.schedule}` | {row.chunks} | {row.makespan:g} | {row.bubble:.2%} "
            f"| {row.window_bubble:.2%} | {row.steady_bubble:.2%} | {row.peak:g} "
            f"| {row.weights}x |"
        )
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Bubble (above) and peak memory (below) over micro-batches, one column per stage count."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = sorted(table["stages"].unique())
    schedules = list(dict.fromkeys(table["schedule"]))
    colours = plt.get_cmap("tab20").colors
    markers = "osD^v<>pPX*h"
    figure, axes = plt.subplots(
        2, len(stages), figsize=(3.4 * len(stages) + 2.6, 7), sharex="col", sharey="row",
        squeeze=False,
    )  # fmt: skip
    for column, p in enumerate(stages):
        for index, name in enumerate(schedules):
            rows = table[(table["schedule"] == name) & (table["stages"] == p)]
            # Earlier curves are thicker, so that equal ones show beneath each other.
            weight = 1 - index / len(schedules)
            style = {
                "color": colours[index % 20],
                "marker": markers[index % len(markers)],
                "markersize": 3.5 + 6 * weight,
                "linewidth": 1 + 5 * weight,
            }
            axes[0][column].plot(rows["microbatches"], 100 * rows["steady_bubble"], **style)
            axes[1][column].plot(rows["microbatches"], rows["peak"] / p, **style, label=name)
        axes[0][column].set_title(f"{p} stages")
        axes[1][column].set_xlabel("micro-batches")
        axes[1][column].set_xscale("log", base=2)
        axes[1][column].set_yscale("log", base=2)
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("bubble, % of the makespan")
    axes[1][0].set_ylabel("peak activations, in units of 1F1B's p")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 1.7 / figure.get_figwidth(), 1))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 4,8,16, got {text!r}") from None


@click.command()
@click.option("--schedules", help="Names, separated by commas; the default is all.")
@click.option("--stages", default="4,8,16", show_default=True, metavar="P,P,...")
@click.option(
    "--per-stage",
    default="1,2,4,8",
    show_default=True,
    metavar="K,K,...",
    help="Micro-batches per stage.",
)
@click.option("--durations", default="F=1,B=2,I=1,W=1,comm=0", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default=True,
    help="Folder for the table and the figures.",
)
@click.option("--markdown", is_flag=True, help="Print the table as Markdown; write no files.")
def main(
    schedules: str | None,
    stages: str,
    per_stage: str,
    durations: str,
    out: Path,
    markdown: bool,
) -> None:
    """Bubble and memory of schedules over stages and micro-batches."""
    chosen = schedules.split(",") if schedules else [n for n in names() if n not in LEFT_OUT]
    try:
        kinds = [describe(name.strip()).name for name in chosen]
        table = sweep(kinds, _integers(stages), _integers(per_stage), parse_durations(durations))
    except InputError as error:
        raise click.ClickException(str(error)) from None
    if table.empty:
        raise click.ClickException("no schedule exists for these sizes")
    if markdown:
        click.echo(to_markdown(table))
        return
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "pipeline_bubbles.csv", index=False)
    draw(table, out / "pipeline_bubbles")
    last = table[table["microbatches"] == table["microbatches"].max()]
    shown = last.sort_values(["stages", "steady_bubble"], kind="stable")
    click.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    click.echo(f"wrote {out / 'pipeline_bubbles.csv'}, .png and .svg")


if __name__ == "__main__":
    main()
