"""`simulator compare`: what differs between two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--set-a", multiple=True, metavar="KEY=VALUE", help="Change a key of experiment A.")
@click.option("--set-b", multiple=True, metavar="KEY=VALUE", help="Change a key of experiment B.")
@click.option("--out", type=click.Path(path_type=Path), help="Write an HTML report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--step", type=int, help="ProfilerStep of a measured trace; all when left out.")
def command(
    a: Path,
    b: Path,
    set_a: tuple[str, ...],
    set_b: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    step: int | None,
) -> None:
    """Compare the steps A and B, aligned by kind of operation, stage and layer.

    Each is a directory that `simulator run --out` wrote, an experiment file, which is run, or a
    PyTorch profiler trace (a .json or .json.gz file, or a directory with one per rank).
    """
    from simulator.reports.comparison import print_comparison, write_comparison
    from simulator.studies.comparison import compare, load

    with Console(stderr=True).status("reading", spinner="dots"):
        comparison = compare(
            load(a, step=step, overrides=set_a), load(b, step=step, overrides=set_b)
        )
    if out is not None:
        write_comparison(comparison, out)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False))
        return
    print_comparison(comparison, Console(file=sys.stdout))
    if out is not None:
        click.echo(f"written to {out}")
