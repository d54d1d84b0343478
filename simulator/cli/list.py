"""`simulator list`: what the catalogues and registers hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simulator.errors import unknown_name
from simulator.units import format_bandwidth, format_bytes, format_count, format_flops

Rows = list[dict[str, Any]]


def list_models() -> Rows:
    """One row per model of the catalogue."""
    from simulator.model.library import model, model_names

    rows = []
    for name in model_names():
        spec = model(name)
        rows.append(
            {
                "name": name,
                "family": spec.family,
                "parameters": spec.parameters,
                "active_parameters": spec.active_parameters,
                "layers": spec.layers,
                "hidden": spec.hidden,
                "heads": spec.heads,
                "kv_heads": spec.kv_heads,
                "vocab": spec.vocab,
                "experts": spec.n_experts,
            }
        )
    return rows


def list_accelerators() -> Rows:
    """One row per accelerator of the catalogue."""
    from simulator.catalog.accelerators import accelerators

    return [
        {
            "name": name,
            "vendor": item.vendor,
            "family": item.family,
            "bf16_flops": item.peak_flops.get("bf16", item.peak_flops.get("fp16")),
            "memory_bytes": item.memory_bytes,
            "memory_bandwidth": item.memory_bandwidth,
            "scale_up_bandwidth": item.scale_up_bandwidth,
            "power_w": item.power_w,
            "price_usd_per_hour": item.price_usd_per_hour,
        }
        for name, item in accelerators().items()
    ]


def list_topologies() -> Rows:
    """One row per topology file."""
    from simulator.topology import topology_description, topology_names

    rows = []
    for name in topology_names():
        description = topology_description(name)
        rows.append({"name": name, "description": description.get("description") or ""})
    return rows


def list_schedules() -> Rows:
    """One row per registered pipeline schedule."""
    from simulator.schedules import describe, names

    rows = []
    for name in names():
        kind = describe(name)
        rows.append(
            {
                "name": name,
                "chunks": kind.chunks,
                "constraint": kind.constraint,
                "summary": kind.summary,
                "options": dict(kind.options),
            }
        )
    return rows


def list_frameworks() -> Rows:
    """One row per framework profile."""
    from simulator.catalog.frameworks import frameworks

    return [
        {"name": name, "description": profile.description} for name, profile in frameworks().items()
    ]


KINDS: dict[str, Callable[[], Rows]] = {
    "models": list_models,
    "accelerators": list_accelerators,
    "topologies": list_topologies,
    "schedules": list_schedules,
    "frameworks": list_frameworks,
}

#: How a column is written for people; by its name.
_FORMATS: dict[str, Callable[[float], str]] = {
    "parameters": format_count,
    "active_parameters": format_count,
    "bf16_flops": format_flops,
    "memory_bytes": format_bytes,
    "memory_bandwidth": format_bandwidth,
    "scale_up_bandwidth": format_bandwidth,
    "power_w": lambda value: f"{value:.0f} W",
    "price_usd_per_hour": lambda value: f"{value:.2f} USD/h",
}
_TITLES = {
    "active_parameters": "active",
    "bf16_flops": "16-bit peak",
    "memory_bytes": "memory",
    "memory_bandwidth": "bandwidth",
    "scale_up_bandwidth": "scale-up",
    "power_w": "power",
    "price_usd_per_hour": "price",
}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key in _FORMATS:
        return _FORMATS[key](value)
    if key == "experts" and not value:
        return "–"
    return str(value)


@click.command("list")
@click.argument("kind", metavar="|".join(KINDS))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def command(kind: str, as_json: bool) -> None:
    """List models, accelerators, topologies, schedules or frameworks."""
    wanted = kind.casefold()
    if wanted not in KINDS:
        plural = {"topology": "topologies"}.get(wanted, f"{wanted}s")
        if plural not in KINDS:
            raise unknown_name("kind", kind, KINDS)
        wanted = plural
    rows = KINDS[wanted]()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    numbers = {
        key
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    keys = [key for key in (rows[0] if rows else ()) if key != "options"]
    for key in keys:
        table.add_column(
            _TITLES.get(key, key.replace("_", " ")),
            justify="right" if key in numbers else "left",
            no_wrap=key == "name" or key in numbers,
        )
    for row in rows:
        table.add_row(*(escape(_cell(key, row[key])) for key in keys))
    console = Console()
    if wanted in ("models", "accelerators"):
        # tables of numbers are not squeezed: a narrow terminal wraps the line instead
        console.width = max(console.width, 120)
    console.print(table)
    if wanted == "schedules":
        console.print("\nTheir options, in parallel.schedule_options of an experiment:")
        options = Table(box=None, show_header=False, pad_edge=False)
        for row in rows:
            for key, text in row["options"].items():
                options.add_row(row["name"], key, escape(text))
        console.print(options)
    click.echo(f"{len(rows)} {wanted}; details: simulator show {_singular(wanted)} NAME")


def _singular(kind: str) -> str:
    return "topology" if kind == "topologies" else kind[:-1]
