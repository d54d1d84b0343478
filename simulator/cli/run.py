"""`simulator run`: one training step of an experiment file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from simulator.errors import InputError
from simulator.units import format_time


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key, e.g. parallel.tensor=4; repeatable.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for summary, timeline, trace and report."
)
@click.option(
    "--ranks",
    default="representatives",
    type=click.Choice(["representatives", "all"]),
    help="Whose operations --out writes into timeline and traces: one rank per class of equals, "
    "or every rank. The report shows the former.",
)
@click.option("--csv", is_flag=True, help="With --out: the timeline as CSV as well.")
@click.option("--hta", is_flag=True, help="With --out: one trace per rank, for HTA.")
@click.option("--flows", is_flag=True, help="With --out: arrows in the trace.")
@click.option(
    "--figures",
    multiple=True,
    type=click.Choice(["png", "svg"]),
    help="With --out: static figures in this format.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--allow-oom", is_flag=True, help="Simulate a plan that does not fit in memory.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 100_000),
    help="Percentiles over jitter seeds (needs `jitter`).",
)
def command(
    file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    ranks: str,
    csv: bool,
    hta: bool,
    flows: bool,
    figures: tuple[str, ...],
    as_json: bool,
    allow_oom: bool,
    seeds: int | None,
) -> None:
    """Simulate one training step of the experiment in FILE.

    \b
    simulator run experiments/llama3_70b_64xh100.yaml --out run
    simulator run experiments/llama3_70b_64xh100.yaml --set parallel.tensor=8 --json
    """
    from simulator.experiment import errors_of_file, load_experiment
    from simulator.simulation import OutOfMemoryError, run

    for option, given in (("csv", csv), ("hta", hta), ("flows", flows), ("figures", figures)):
        if given and out is None:
            raise InputError("is written only with --out", place=f"--{option}")
    experiment = load_experiment(file, overrides)
    console = Console(stderr=True)
    try:
        with errors_of_file(file, overrides), console.status("simulating", spinner="dots"):
            if seeds:
                from simulator.studies.monte_carlo import step_time_percentiles

                percentiles = step_time_percentiles(experiment, seeds)
            else:
                result = run(experiment, allow_oom=allow_oom)
    except OutOfMemoryError as error:
        if as_json:
            job = {"job": error.job} if error.job else {}
            values = {"fits": False, **job, "memory": error.report.to_dict()}
            click.echo(json.dumps(values, indent=1))
        else:
            from simulator.reports.terminal import print_memory

            print_memory(error.report, Console())
        what = f"job {error.job!r}" if error.job else "the plan"
        raise InputError(
            f"{what} does not fit in memory; --allow-oom simulates it all the same",
            place=str(file),
        ) from None
    if seeds:
        if as_json:
            click.echo(json.dumps(percentiles, indent=1))
        else:
            for name, value in percentiles.items():
                text = format_time(value) if name.endswith("_s") else f"{value:g}"
                click.echo(f"{name.removesuffix('_s'):>8}  {text}")
        return
    if out is not None:
        from simulator.reports import write_run

        write_run(result, out, ranks=ranks, csv=csv, hta=hta, flows=flows, figures=figures)
    if as_json:
        values = result.summary.to_dict()
        if result.jobs:
            values["jobs"] = {name: job.to_dict() for name, job in result.jobs.items()}
        click.echo(json.dumps(values, indent=2))
    else:
        from simulator.reports.terminal import print_result

        print_result(result, Console(file=sys.stdout))
        if out is not None:
            click.echo(f"written to {out}")
