"""`simulator collective`: time one collective on a cluster, as nccl-tests prints it."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from simulator.costs.collectives import (
    ALGORITHMS,
    OPERATIONS,
    PROTOCOLS,
    bus_factor,
    collective_traffic,
    operation_name,
)
from simulator.errors import InputError
from simulator.topology import load_cluster
from simulator.units import parse_bytes

_MAX_SIZES = 10_000


def parse_sizes(text: str) -> list[int]:
    """Sizes in bytes: `1GiB`, `1MiB,8MiB`, or a range `1MiB:1GiB:x2` / `1MiB:8MiB:+1MiB`.

    Raises
    ------
    InputError
        For anything else, empty or endless ranges.
    """
    place = "--bytes"
    sizes: list[int] = []
    for item in text.split(","):
        parts = [part.strip() for part in item.split(":")]
        if len(parts) == 1:
            sizes.append(round(parse_bytes(parts[0], place=place)))
            continue
        if len(parts) != 3:
            raise InputError(
                "expected a size, sizes with commas, or FROM:TO:STEP such as 1MiB:1GiB:x2, "
                f"got {item!r}",
                place=place,
            )
        low, high = (parse_bytes(part, place=place) for part in parts[:2])
        step = parts[2]
        if not 0 < low <= high:
            raise InputError(f"expected 0 < FROM <= TO, got {item!r}", place=place)
        size = low
        if step.startswith(("x", "X", "*")):
            try:
                factor = float(step[1:])
            except ValueError:
                factor = 0.0
            if factor <= 1 or not np.isfinite(factor):
                raise InputError(
                    f"expected a factor above 1, such as x2, got {step!r}", place=place
                )
            grow, add = factor, 0.0
        else:
            grow, add = 1.0, parse_bytes(step.removeprefix("+"), place=place)
            if add <= 0:
                raise InputError(f"expected a positive step, got {step!r}", place=place)
        while size <= high * (1 + 1e-12):
            sizes.append(round(size))
            size = size * grow + add
            if len(sizes) > _MAX_SIZES:
                raise InputError(f"more than {_MAX_SIZES} sizes", place=place)
    if any(size <= 0 for size in sizes):
        raise InputError("sizes must be positive", place=place)
    return sizes


@click.command("collective")
@click.argument("operation", metavar="OPERATION")
@click.option("--topology", required=True, help="Name of a topology, or a YAML or GraphML file.")
@click.option("--nodes", type=int, default=None, help="Number of nodes (slices of a TPU).")
@click.option("--accelerators", type=int, default=None, help="Number of accelerators.")
@click.option("--bytes", "sizes", required=True, help="Size(s): 1GiB, 1MiB,1GiB or 1MiB:1GiB:x2.")
@click.option(
    "--algorithm", default=None, help=f"One of: {', '.join(ALGORITHMS)}; default: fastest."
)
@click.option("--protocol", default=None, help=f"One of: {', '.join(PROTOCOLS)}; default: fastest.")
@click.option(
    "--network", default=None, help="Scale-out line rate per accelerator, e.g. '400 Gb/s'."
)
@click.option("--fabric-efficiency", type=float, default=None, help="Achieved share of that rate.")
@click.option("--ranks", default=None, help="Accelerator indices that take part, e.g. 0,8,16; all.")
@click.option("--out-of-place", is_flag=True, help="Add the local copy of out-of-place calls.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def command(
    operation: str,
    topology: str,
    nodes: int | None,
    accelerators: int | None,
    sizes: str,
    algorithm: str | None,
    protocol: str | None,
    network: str | None,
    fabric_efficiency: float | None,
    ranks: str | None,
    out_of_place: bool,
    as_json: bool,
) -> None:
    """Time a collective (all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send-recv)
    over the accelerators of a cluster, with nothing else running; reduce is timed as a broadcast,
    its reverse."""
    op = operation_name(operation)
    byte_sizes = parse_sizes(sizes)
    if fabric_efficiency is not None and not 0 < fabric_efficiency <= 1:
        raise InputError("expected a share in (0, 1]", place="--fabric-efficiency")
    cluster = load_cluster(
        topology, nodes=nodes, accelerators=accelerators, network=network,
        fabric_efficiency=fabric_efficiency,
    )  # fmt: skip
    members = _members(ranks, len(cluster))
    n = len(members)
    rows: list[dict[str, Any]] = []
    for size in byte_sizes:
        traffic = collective_traffic(
            cluster, op, members, size, algorithm=algorithm, protocol=protocol,
            in_place=not out_of_place,
        )  # fmt: skip
        seconds = float(traffic.duration(cluster)[0])
        algbw = size / seconds if seconds else 0.0
        rows.append(
            {
                "operation": op,
                "bytes": size,
                "algorithm": traffic.algorithm,
                "protocol": traffic.protocol,
                "time_s": seconds,
                "algbw_bytes_per_s": algbw,
                "busbw_bytes_per_s": algbw * bus_factor(op, n),
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    as_reversed = operation.casefold() == "reduce"
    table = Table(
        title=f"{'reduce' if as_reversed else op} on {n} accelerators of {cluster.name}",
        title_justify="left",
    )
    for heading in ("size (B)", "time (us)", "algbw (GB/s)", "busbw (GB/s)"):
        table.add_column(heading, justify="right")
    table.add_column("algorithm")
    table.add_column("protocol")
    for row in rows:
        table.add_row(
            str(row["bytes"]),
            f"{row['time_s'] * 1e6:.2f}",
            f"{row['algbw_bytes_per_s'] / 1e9:.2f}",
            f"{row['busbw_bytes_per_s'] / 1e9:.2f}",
            str(row["algorithm"]),
            str(row["protocol"]),
        )
    Console().print(table)
    if as_reversed:
        click.echo("timed as a broadcast, its reverse")


def _members(text: str | None, count: int) -> np.ndarray:
    if text is None:
        return np.arange(count)
    try:
        members = [int(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"expected indices with commas, got {text!r}", place="--ranks") from None
    if len(set(members)) != len(members):
        raise InputError("an accelerator appears twice", place="--ranks")
    return np.array(members)


__all__ = ["OPERATIONS", "command", "parse_sizes"]
