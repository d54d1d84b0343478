"""Fuzz everything that reads a file, and print the counts per reader.

    python benchmarks/fuzz.py --mutations 10000 [--reader NAME] [--first N] [--show]

Exit code 1 if anything but a result or a clean error came of a file. A finding names the numbers
of its mutations: `--reader NAME --first N --mutations 1 --show` repeats one with its traceback.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz.harness import fuzz
from tests.fuzz.readers import readers


@click.command()
@click.option("--mutations", default=10_000, show_default=True, help="Of all readers together.")
@click.option("--reader", "only", help="Fuzz this reader alone.")
@click.option("--first", default=0, help="Number of the first mutation.")
@click.option("--show", is_flag=True, help="Print a traceback per finding.")
def main(mutations: int, only: str | None, first: int, show: bool) -> None:
    chosen = [reader for reader in readers() if only in (None, reader.name)]
    weights = sum(reader.weight for reader in chosen)
    table = Table(
        "reader", "mutations", "results", "clean errors", "findings", "slowest", "seconds"
    )
    findings: list[str] = []
    total = 0
    for reader in chosen:
        count = -(-mutations * reader.weight // weights)
        begun = time.perf_counter()
        tally = fuzz(reader, range(first, first + count))
        seconds = time.perf_counter() - begun
        total += tally.total
        bad = sum(map(len, tally.findings.values()))
        table.add_row(
            reader.name, str(tally.total), str(tally.results), str(tally.clean_errors), str(bad),
            f"{1e3 * tally.slowest:.0f} ms", f"{seconds:.1f}",
        )  # fmt: skip
        for what, numbers in tally.findings.items():
            findings.append(f"{reader.name}: {what} ({len(numbers)}x, e.g. {numbers[:5]})")
            if show:
                findings.append(tally.samples[what])
    Console(width=110).print(table)
    print(f"{total} mutations, {sum(': ' in f for f in findings)} distinct findings")
    for line in findings:
        print(line)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
