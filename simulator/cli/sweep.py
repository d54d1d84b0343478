"""`simulator sweep`: an experiment over lists and ranges of its keys."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click

from simulator.cli.progress import ProgressBar


@click.command("sweep")
@click.argument("file", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Replace a key of the base experiment.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False), default=None,
              help="Folder of the table results.parquet; an interrupted sweep goes on there. "
              "Default: <FILE without its ending>.sweep")  # fmt: skip
@click.option("--jobs", "-j", type=click.IntRange(min=1), default=None,
              help="Processes on this machine; default: all cores.")  # fmt: skip
@click.option("--scheduler", default=None, metavar="tcp://HOST:PORT",
              help="Run on the Dask cluster with this scheduler instead.")  # fmt: skip
@click.option("--allow-oom", is_flag=True, help="Simulate points that do not fit as well.")
@click.option("--fresh", is_flag=True, help="Run points again whose rows are there already.")
@click.option("--dry-run", is_flag=True, help="Only say what would be run.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON list.")
@click.option("--sort", default="step_time_s", metavar="COLUMN", show_default=True,
              help="Column to sort the printed rows by.")  # fmt: skip
@click.option("--rows", default=20, type=click.IntRange(min=0), show_default=True,
              help="Rows to print.")  # fmt: skip
def command(
    file: str,
    overrides: tuple[str, ...],
    out: str | None,
    jobs: int | None,
    scheduler: str | None,
    allow_oom: bool,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    sort: str,
    rows: int,
) -> None:
    """Simulate the experiment in FILE over lists and ranges of its keys.

    Every point becomes a row of one Parquet table; a point that cannot be run is a row with the
    reason. Run the same command again to go on after an interruption.
    """
    import dataclasses
    from pathlib import Path

    from simulator.studies.sweep import describe_points, run_sweep
    from simulator.studies.sweep_file import load_sweep, parse_overrides

    spec = load_sweep(file, values=parse_overrides(overrides))
    if allow_oom:
        spec = dataclasses.replace(spec, allow_oom=True)
    points = spec.points()
    if dry_run:
        if as_json:
            click.echo(json.dumps([dict(point.values) for point in points], default=str))
            return
        for line in describe_points(spec):
            click.echo(line)
        click.echo(f"{len(points)} points of {spec.combinations} combinations")
        return
    folder = Path(out) if out else Path(file).with_suffix(".sweep")
    progress = ProgressBar("sweep", quiet=as_json, remaining=True)

    def report(done: int, total: int, failed: int) -> None:
        progress.update(done, total, f"[red]{failed} without a result[/red]" if failed else "")

    try:
        table = run_sweep(
            spec, out=folder, jobs=jobs, scheduler=scheduler, fresh=fresh, progress=report
        )
    except KeyboardInterrupt:
        progress.stop()
        click.echo(f"stopped; the same command goes on from {folder}", err=True)
        sys.exit(130)
    finally:
        progress.stop()
    if as_json:
        click.echo(json.dumps([_plain(row) for row in table]))
        return
    _print(table, spec.keys, sort, rows)
    click.echo(f"{len(table)} rows in {folder / 'results.parquet'}")


def _plain(row: Any) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _print(table: Any, keys: tuple[str, ...], sort: str, count: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from simulator.errors import unknown_name
    from simulator.studies.sweep import OUT_OF_MEMORY

    columns = list(dict.fromkeys(name for row in table for name in row))
    if sort not in columns and sort != "step_time_s":
        raise unknown_name("column", sort, columns, place="--sort")
    good = [row for row in table if row["status"] == "ok"]
    good.sort(key=lambda row: (row.get(sort) is None, row.get(sort) or 0))
    figures = [
        ("step_time_s", "step [s]", "{:.4g}"),
        ("tokens_per_s_per_accelerator", "tokens/s/acc", "{:.4g}"),
        ("model_tflops_per_accelerator", "TFLOP/s", "{:.4g}"),
        ("mfu", "MFU", "{:.1%}"),
        ("bubble_fraction", "bubble", "{:.1%}"),
        ("peak_memory_bytes", "memory [GiB]", "{:.1f}"),
    ]
    figures = [figure for figure in figures if any(figure[0] in row for row in good)]
    if sort in columns and sort not in keys and all(sort != name for name, _, _ in figures):
        figures.append((sort, sort, "{}"))
    # wide enough for every column where the output is no terminal
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if good and count:
        shown = Table(title=f"{min(count, len(good))} of {len(good)} rows by {sort}")
        for key in keys:
            shown.add_column(Text(key.rpartition(".")[2]), justify="right", overflow="fold")
        for _, title, _ in figures:
            shown.add_column(title, justify="right", no_wrap=True)
        for row in good[:count]:
            cells = [Text(str(row.get(key))) for key in keys]
            for name, _, form in figures:
                value = row.get(name)
                if name == "peak_memory_bytes" and value is not None:
                    value = value / 2**30
                cells.append(Text("" if value is None else form.format(value)))
            shown.add_row(*cells)
        console.print(shown)
    reasons: dict[tuple[str, str], int] = {}
    for row in table:
        if row["status"] != "ok":
            # what a point that does not fit needs is its own; the other reasons repeat
            lines = [] if row["status"] == OUT_OF_MEMORY else str(row.get("reason")).splitlines()
            label = (row["status"], lines[0] if lines else "see the column `reason`")
            reasons[label] = reasons.get(label, 0) + 1
    total = sum(reasons.values())
    if total:
        console.print(Text(f"{total} points have no result:"))
        for (status, reason), number in sorted(reasons.items(), key=lambda item: -item[1])[:10]:
            console.print(Text(f"  {number} x {status}: {reason}"))
