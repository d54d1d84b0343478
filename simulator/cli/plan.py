"""`simulator plan`: the best parallel plan of a model on a cluster."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click

from simulator.cli.progress import ProgressBar


@click.command("plan")
@click.argument("file", type=click.Path())
@click.option("--accelerators", "-n", type=click.IntRange(min=1), default=None,
              help="Number of accelerators; default: the experiment's own.")  # fmt: skip
@click.option("--objective", type=click.Choice(["time", "cost", "energy"]), default="time",
              show_default=True, help="What to make least, per step.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Replace a key of the experiment.")  # fmt: skip
@click.option("--space", "space", multiple=True, metavar="DIMENSION=VALUES",
              help="Values to try, e.g. tensor=[4,8] or schedule=1f1b.")  # fmt: skip
@click.option("--top", default=10, type=click.IntRange(min=1), show_default=True,
              help="Plans to print.")  # fmt: skip
@click.option("--gap", default=0.05, type=click.FloatRange(0.0, 1.0, max_open=True),
              show_default=True, help="A plan may be missing below the first if it is better than "
              "the last by less than this share.")  # fmt: skip
@click.option("--jobs", "-j", type=click.IntRange(min=1), default=None,
              help="Processes; default: all cores.")  # fmt: skip
@click.option("--exhaustive", is_flag=True, help="Simulate every plan that fits.")
@click.option("--out", type=click.Path(dir_okay=False), default=None,
              help="Write the best plan as an experiment file.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    file: str,
    accelerators: int | None,
    objective: str,
    overrides: tuple[str, ...],
    space: tuple[str, ...],
    top: int,
    gap: float,
    jobs: int | None,
    exhaustive: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Find the best parallel plan for the model, cluster and batch of FILE.

    FILE is an experiment file; its parallel sizes, micro-batch size, sharding, recomputation and
    schedule are replaced by what is tried.
    """
    from simulator.experiment import load_experiment
    from simulator.studies.planner import plan
    from simulator.studies.sweep_file import parse_overrides

    experiment = load_experiment(file, overrides)
    progress = ProgressBar("plan", quiet=as_json)

    def report(settled: int, total: int, simulated: int, best: float | None) -> None:
        found = f", best {best:.4g}" if best is not None else ""
        progress.update(settled, total, f"{simulated} simulated{found}")

    try:
        result = plan(
            experiment,
            accelerators,
            objective=objective,  # type: ignore[arg-type]
            space=parse_overrides(space),
            top=top,
            gap=gap,
            jobs=jobs,
            exhaustive=exhaustive,
            progress=report,
        )
    except KeyboardInterrupt:
        progress.stop()
        sys.exit(130)
    finally:
        progress.stop()
    if out:
        _write(out, result.experiment(experiment))
    if as_json:
        click.echo(json.dumps(_plain(result.to_dict())))
        return
    _print(result)
    if out:
        click.echo(f"the best plan is in {out}")


def _write(path: str, experiment: Any) -> None:
    from simulator.reports.files import whole_file
    from simulator.reports.view import experiment_text

    with whole_file(path) as file:
        file.write_text(experiment_text(experiment), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_HEADS = {"time": "step [s]", "cost": "USD/step", "energy": "MJ/step"}


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # wide enough for every column where the output is no terminal
    console = Console() if sys.stdout.isatty() else Console(width=160)
    moe = any(ranked.choice.expert > 1 for ranked in result.best)
    columns = ["dp", "cp", "tp", "pp", "vpp", *(["ep"] if moe else []), "mb", "sharding",
               "recompute", "schedule"]  # fmt: skip
    table = Table(title=f"Best plans on {result.accelerators} accelerators by {result.objective}")
    table.add_column("#", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column(_HEADS[result.objective], justify="right")
    table.add_column("MFU", justify="right")
    table.add_column("GiB", justify="right")
    table.add_column("limited by")
    for number, ranked in enumerate(result.best, start=1):
        choice, summary = ranked.choice, ranked.summary
        cells: list[Any] = [
            choice.data,
            choice.context,
            choice.tensor,
            choice.pipeline,
            choice.virtual_stages,
            *([choice.expert] if moe else []),
            choice.micro_batch_size,
            choice.sharding,
            choice.recompute,
            choice.schedule,
        ]
        scale = 1e-6 if result.objective == "energy" else 1.0
        limits = ", ".join(
            f"{name.replace('_', ' ')} {share:.1%}" for name, share in ranked.limited_by[:3]
        )
        table.add_row(
            str(number),
            *(Text(str(cell)) for cell in cells),
            f"{ranked.objective * scale:.5g}",
            f"{float(summary['mfu']):.1%}",
            f"{float(summary['peak_memory_bytes']) / 2**30:.1f}",
            Text(limits),
        )
    console.print(table)
    console.print(Text(f"{result.valid} valid plans: {result.simulated} simulated"))
    for reason, count in result.dropped.items():
        console.print(Text(f"  {count} dropped: {reason}"))
    if result.invalid:
        console.print(Text("combinations that are no plan:"))
        for reason, count in result.invalid.items():
            console.print(Text(f"  {count}: {reason}"))
