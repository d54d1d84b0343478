"""`simulator validate-kernels`: compare the cost model with measured kernels and collectives."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from simulator.errors import InputError
from simulator.studies.kernel_validation import (
    shipped_files,
    summarise,
    validate_file,
    write_predictions,
)
from simulator.units import format_spans

#: Of more separate runs of rows that a model does not predict, only the number is printed.
_MOST_SPANS = 12


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


@click.command("validate-kernels")
@click.option(
    "--data", "paths", multiple=True, metavar="FILE.csv",
    help="Measured file; repeat for several. Without it: the samples that the package carries.",
)  # fmt: skip
@click.option("--accelerator", "name", help="Accelerator of all rows, whatever the files say.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", metavar="FILE.csv", help="Write the input with a predicted_us column.")
def command(paths: tuple[str, ...], name: str | None, as_json: bool, out: str | None) -> None:
    """Compare the cost model with measured kernels and collectives.

    What a file measures is told by its columns, the accelerator by its gpu column or its name.
    Rows that cannot be predicted are listed with the reason; the header is row 1, comment lines do
    not count.
    """
    if out is not None and len(paths) != 1:
        raise InputError(f"expected exactly one --data FILE.csv, got {len(paths)}", place="--out")
    chosen = [*paths] or [str(path) for path in shipped_files()]
    results = [validate_file(path, accelerator_name=name) for path in chosen]
    if out is not None:
        write_predictions(results[0], out)
    summary = summarise(results)
    if as_json:
        click.echo(json.dumps(summary))
        return
    table = Table(title="Measured against predicted kernels")
    table.add_column("group", overflow="fold")
    for column in ("rows", "predicted", "median |error|", "p90 |error|", "median error"):
        table.add_column(column, justify="right")
    entries = [*summary["groups"].items(), ("all rows", summary)]
    for group, entry in entries:
        if group == "all rows":
            table.add_section()
        table.add_row(
            group, str(entry["rows"]), str(entry["predicted"]),
            _percent(entry["median_abs_error"]), _percent(entry["p90_abs_error"]),
            _percent(entry["signed_median_error"]),
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # in files nothing is cut off
    console.print(table)
    for result in results:
        for what, found in (("not predicted", result.unpredicted()), ("note", result.assumed())):
            for reason, rows in found.items():
                where = f"{'row' if len(rows) == 1 else 'rows'} {format_spans(rows, _MOST_SPANS)}"
                click.echo(f"{what}: {result.path}: {where}: {reason}")
