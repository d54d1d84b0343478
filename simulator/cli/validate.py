"""`simulator validate`: simulated against published step times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from simulator.errors import InputError, unknown_name
from simulator.studies.validation import (
    CAUSES,
    FURTHER,
    RowResult,
    by_family,
    coverage,
    overall,
    ranking,
    read_rows,
    suspected_causes,
    validate,
)


@click.command("validate")
@click.option("--data", type=click.Path(path_type=Path), help="Table in the published form.")
@click.option(
    "--further",
    is_flag=True,
    help="The shipped table of steps collected after the model was built.",
)
@click.option("--all", "everything", is_flag=True, help="Also rows that are not canonical.")
@click.option("--family", multiple=True, help="Only this family; repeatable.")
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Processes; default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--explain", is_flag=True, help="Show where each row's simulated time goes.")
@click.option(
    "--figure",
    type=click.Path(path_type=Path),
    help="Draw simulated against measured, log-log, as PNG or SVG.",
)
@click.option("--leave-one-out", is_flag=True, help="Refit step constants without each family.")
def command(
    data: Path | None,
    further: bool,
    everything: bool,
    family: tuple[str, ...],
    jobs: int | None,
    as_json: bool,
    explain: bool,
    figure: Path | None,
    leave_one_out: bool,
) -> None:
    """Simulate every row of a table of published training steps and print the errors."""
    import os

    if further and data is not None:
        raise InputError("give --data or --further, not both")
    rows = read_rows(FURTHER if further else data, everything=everything)
    known = dict.fromkeys(row.get("family", "") for row in rows)
    for name in family:
        if name not in known:
            raise unknown_name("family", name, known, place="--family")
    if family:
        rows = [row for row in rows if row.get("family") in family]
    console = Console(stderr=True)
    with Progress(
        "simulating", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=as_json and not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("rows", total=len(rows))
        results = validate(
            rows, jobs=jobs or os.cpu_count() or 1, progress=lambda _: bar.advance(task)
        )
    if as_json:
        click.echo(json.dumps(to_json(results), indent=1))
    else:
        out = Console()
        # piped into a file there is no terminal whose width would have to be kept to
        print_results(results, out if out.is_terminal else Console(width=150), explain=explain)
    if figure is not None:
        from simulator.reports.fidelity import draw

        draw(results, figure)
    if leave_one_out:
        out = Console(stderr=as_json)
        out = out if out.is_terminal else Console(stderr=as_json, width=150)
        print_left_out(results, rows, out, jobs=jobs or os.cpu_count() or 1)


def to_json(results: list[RowResult]) -> dict[str, Any]:
    """The JSON object of `simulator validate --json`."""

    def finite(value: float) -> float | None:
        return None if math.isnan(value) else value

    ranked = ranking(results)
    total = overall(results)
    return {
        "rows": [
            {
                "id": result.id,
                "family": result.family,
                "measured_step_time_s": finite(result.measured_step_time_s),
                "simulated_step_time_s": result.simulated_step_time_s,
                "error": result.error,
                "reason": result.reason,
                "assumed": result.assumed,
                "fits": result.fits,
                "low_s": result.low_s,
                "high_s": result.high_s,
                "breakdown_s": dict(result.breakdown_s),
            }
            for result in results
        ],
        "families": {
            name: {
                "rows": stats.rows,
                "median_abs_error": finite(stats.median_abs_error),
                "p90_abs_error": finite(stats.p90_abs_error),
                "signed_median_error": finite(stats.signed_median_error),
            }
            for name, stats in by_family(results).items()
        },
        "overall": {
            "median_abs_error": finite(total.median_abs_error),
            "p90_abs_error": finite(total.p90_abs_error),
            "signed_median_error": finite(total.signed_median_error),
        },
        "ranking": {
            "sweeps": ranked.sweeps,
            "kendall_tau": finite(ranked.kendall_tau),
            "regret": finite(ranked.regret),
        },
        "band_coverage": finite(coverage(results)),
        "causes": suspected_causes(results),
        "ran": sum(result.error is not None for result in results),
        "total": len(results),
    }


def print_results(results: list[RowResult], console: Console, *, explain: bool) -> None:
    """Rows, families and totals as tables."""
    table = Table(title="published and simulated step times")
    for name in ("row", "family"):
        table.add_column(name, no_wrap=True)
    for name in ("measured s", "simulated s", "error %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where the time goes" if explain else "")
    for result in results:
        table.add_row(
            result.id,
            result.family,
            f"{result.measured_step_time_s:.4g}",
            "-" if result.simulated_step_time_s is None else f"{result.simulated_step_time_s:.4g}",
            "-" if result.error is None else f"{100 * result.error:+.1f}",
            _remark(result, explain=explain),
        )
    console.print(table)
    families = Table(title="absolute step-time error by family, %")
    for name in ("family", "rows", "median", "90th percentile", "signed median"):
        families.add_column(name, justify="left" if name == "family" else "right")
    for name, stats in by_family(results).items():
        families.add_row(
            name, str(stats.rows), *(f"{100 * value:.1f}" for value in (
                stats.median_abs_error, stats.p90_abs_error, stats.signed_median_error)),
        )  # fmt: skip
    total = overall(results)
    families.add_section()
    families.add_row(
        "all, families weighted equally", str(total.rows), *(f"{100 * value:.1f}" for value in (
            total.median_abs_error, total.p90_abs_error, total.signed_median_error)),
    )  # fmt: skip
    console.print(families)
    causes = Table(title="signed error of the mean row by suspected cause, %")
    causes.add_column("family", no_wrap=True)
    for name in CAUSES:
        causes.add_column(name, justify="right")
    for family, blame in suspected_causes(results).items():
        causes.add_row(family, *(f"{100 * value:+.1f}" for value in blame.values()))
    console.print(causes)
    console.print(f"measured time within the simulated 90 % band: {100 * coverage(results):.0f} %")
    ranked = ranking(results)
    if ranked.sweeps:
        console.print(
            f"ranking within {ranked.sweeps} sweeps of layouts: Kendall's tau "
            f"{ranked.kendall_tau:.2f}, plan ranked first {100 * ranked.regret:.1f} % slower than "
            "the measured best on average"
        )
    missing = [result for result in results if result.error is None]
    console.print(f"{len(results) - len(missing)} of {len(results)} rows ran")


def print_left_out(
    results: list[RowResult], rows: list[dict[str, str]], console: Console, *, jobs: int
) -> None:
    """The error of each family under the constants fitted without it."""
    from simulator.studies.leave_one_out import leave_one_out, leave_one_out_host

    table = Table(title="constants that whole steps informed, refitted without each family")
    for name in ("constant", "left out"):
        table.add_column(name, no_wrap=True)
    for name in (
        "rows", "factor, all", "factor, without", "error %, shipped", "error %, all",
        "error %, without",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for item in (*leave_one_out(results), *leave_one_out_host(rows, results, jobs=jobs)):
        table.add_row(
            item.constant,
            item.family,
            str(item.rows),
            f"{item.factor_fitted:.3f}",
            f"{item.factor_left_out:.3f}",
            f"{100 * item.error_shipped:.1f}",
            f"{100 * item.error_fitted:.1f}",
            f"{100 * item.error_left_out:.1f}",
        )
    console.print(table)


def _remark(result: RowResult, *, explain: bool) -> str:
    if result.reason or explain:
        return result.reason or _shares(result)
    remarks = [] if result.fits else ["does not fit"]
    return "; ".join([*remarks, result.assumed] if result.assumed else remarks)


def _shares(result: RowResult) -> str:
    total = sum(result.breakdown_s.values()) or 1.0
    parts = sorted(result.breakdown_s.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{name} {100 * value / total:.0f}%" for name, value in parts if value >= 0.01 * total
    )
