"""`simulator calibrate`: measure this machine, or fit measured files; write an accelerator file."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from simulator.catalog.accelerators import accelerator
from simulator.errors import InputError
from simulator.studies.calibration import (
    accelerator_file,
    calibrate,
    cpu_note,
    fit_files,
    measure_machine,
    write_accelerator,
)


def _print(mapping: dict[str, Any], path: str | None) -> None:
    console = Console()
    table = Table(title=f"Constants of {mapping['name']}")
    table.add_column("constant")
    table.add_column("value", justify="right")
    for name, value in mapping["constants"].items():
        table.add_row(name, f"{value:.4g}")
    for kernel, values in mapping["calibration"].get("kernels", {}).items():
        table.add_section()
        for name, value in values.items():
            table.add_row(f"{kernel}: {name}", f"{value:.4g}")
    console.print(table)
    residuals = Table(title="Residuals")
    for column in ("kind", "rows of", "rows", "median |error|", "p90 |error|"):
        residuals.add_column(column)
    for kind, report in mapping["calibration"]["residuals"].items():
        for part, entry in report.items():
            if isinstance(entry, dict) and entry.get("rows"):
                residuals.add_row(
                    kind, part, str(entry["rows"]),
                    f"{100 * entry['median_abs_error']:.1f} %",
                    f"{100 * entry['p90_abs_error']:.1f} %",
                )  # fmt: skip
    console.print(residuals)
    if path:
        console.print(f"wrote {path}", markup=False, highlight=False)


@click.command("calibrate")
@click.option("--out", metavar="FILE.yaml", help="File to write; default: after the device.")
@click.option("--quick", is_flag=True, help="A few small shapes: seconds instead of minutes.")
@click.option(
    "--backend", type=click.Choice(["auto", "torch", "numpy"]), default="auto", show_default=True
)
@click.option(
    "--fit", "files", multiple=True, metavar="FILE.csv",
    help="Fit these measured files instead of measuring; needs --accelerator. Repeatable.",
)  # fmt: skip
@click.option("--accelerator", "base", help="Catalogue entry to start from; default: the device.")
@click.option("--name", help="Name of the calibrated accelerator.")
@click.option("--json", "as_json", is_flag=True, help="Print the file's content as JSON.")
def command(
    out: str | None,
    quick: bool,
    backend: str,
    files: tuple[str, ...],
    base: str | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Measure this machine and write an accelerator file.

    Times matrix products, attention, memory bandwidth and, with several GPUs, all-reduces; fits
    the cost model's constants; writes them with date, software and residuals. The file can be used
    wherever an accelerator's name can. Without PyTorch or without a GPU it measures the CPU, and
    says so, also in the file.
    """
    if files:
        if base is None:
            raise InputError("--fit needs the accelerator that was measured", place="--accelerator")
        item = accelerator(base)
        fits = fit_files(files, item)
        mapping = accelerator_file(
            {"base": item.name}, fits, name or f"{item.name}-fitted",
            extra={"method": "fitted to measured files", "rows_of": [str(f) for f in files]},
        )  # fmt: skip
    else:
        if note := cpu_note(backend):
            click.echo(note, err=True)
        measured = measure_machine(quick=quick, backend=backend)
        mapping = calibrate(measured, base=base, name=name)
    path = out or f"{mapping['name']}.yaml"
    write_accelerator(mapping, path)
    if as_json:
        click.echo(json.dumps(mapping))
    else:
        _print(mapping, path)
