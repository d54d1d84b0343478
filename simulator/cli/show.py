"""`simulator show`: one entry of a catalogue in full."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simulator.errors import InputError, unknown_name
from simulator.units import format_bandwidth, format_bytes, format_count, format_flops

Description = dict[str, Any]


def show_model(name: str) -> Description:
    """A model (catalogue name or `config.json`): dimensions, parameters, FLOPs, memory."""
    from simulator.model.flops import flops_per_token
    from simulator.model.lookup import resolve_model
    from simulator.model.spec import count_parameters

    spec = resolve_model(name)
    seq = spec.max_seq if spec.family in ("vit", "mlp") else min(spec.max_seq, 8192)
    blocks: dict[str, int] = {}
    for layer in range(spec.layers):
        kind = "moe blocks" if spec.is_moe(layer) else "dense blocks"
        if spec.encoder_layers:
            kind = "encoder blocks" if layer < spec.encoder_layers else "decoder blocks"
        blocks[kind] = blocks.get(kind, 0) + count_parameters(spec, layer)
    parts = {
        "embedding": count_parameters(spec, "embedding"),
        **blocks,
        "head": count_parameters(spec, "head"),
    }
    if spec.mtp_layers:
        parts["multi-token prediction (not counted)"] = count_parameters(spec, "mtp")
    dimensions = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("name", "source", "published_parameters"):
            continue
        if field.default is dataclasses.MISSING or value != field.default:
            dimensions[field.name] = list(value) if isinstance(value, tuple) else value
    return {
        "name": spec.name,
        "source": spec.source,
        "parameters": spec.parameters,
        "active_parameters": spec.active_parameters,
        "published_parameters": spec.published_parameters,
        "parameters_by_part": parts,
        "dimensions": dimensions,
        "training_flops_per_token": flops_per_token(spec, seq),
        "sequence_length_of_flops": seq,
    }


def show_accelerator(name: str) -> Description:
    """An accelerator: datasheet, constants, sources."""
    from simulator.catalog.accelerators import accelerator

    return _plain(dataclasses.asdict(accelerator(name)))


def show_topology(name: str) -> Description:
    """A topology file, resolved."""
    from simulator.topology import topology_description

    return _plain(topology_description(name))


def show_schedule(name: str) -> Description:
    """A pipeline schedule: what it is, what it needs."""
    from simulator.schedules import describe

    kind = describe(name)
    hidden = ("placement", "builder")
    return _plain(
        {
            field.name: getattr(kind, field.name)
            for field in dataclasses.fields(kind)
            if field.name not in hidden
        }
    )


def show_framework(name: str) -> Description:
    """A framework profile: every behaviour."""
    from simulator.catalog.frameworks import framework

    return _plain(dataclasses.asdict(framework(name)))


KINDS: dict[str, Callable[[str], Description]] = {
    "model": show_model,
    "accelerator": show_accelerator,
    "topology": show_topology,
    "schedule": show_schedule,
    "framework": show_framework,
}

_FORMATS: dict[str, Callable[[float], str]] = {
    "parameters": format_count,
    "active_parameters": format_count,
    "published_parameters": format_count,
    "parameters_by_part": format_count,
    "training_flops_per_token": lambda value: f"{format_count(value)} FLOP",
    "peak_flops": format_flops,
    "memory_bytes": format_bytes,
    "l2_bytes": format_bytes,
    "memory_bandwidth": format_bandwidth,
    "scale_up_bandwidth": format_bandwidth,
    "host_bandwidth": format_bandwidth,
}


def _plain(value: Any) -> Any:
    """JSON-ready copy of a description."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def _text(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in _FORMATS and isinstance(value, int | float):
        exact = f"  ({value:,})" if isinstance(value, int) and value >= 1000 else ""
        return _FORMATS[key](value) + exact
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_text(key, item) for item in value)
    return str(value)


def _rows(description: Description, prefix: str = "", key: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in description.items():
        # options are written as they are given
        label = prefix + (name if key == "options" else name.replace("_", " "))
        if isinstance(value, dict):
            rows.append((label, ""))
            rows += _rows(value, prefix + "  ", key or name)
        else:
            rows.append((label, _text(key or name, value)))
    return rows


def _kind(text: str) -> str | None:
    """The kind of that name, in the singular or the plural."""
    folded = text.casefold()
    singular = {"topologies": "topology"}.get(folded, folded.removesuffix("s"))
    return next((kind for kind in (folded, singular) if kind in KINDS), None)


def _described(kind: str, name: str) -> Description:
    wanted = _kind(kind)
    if wanted is None:
        raise unknown_name("kind", kind, KINDS)
    return KINDS[wanted](name)


def _found(name: str) -> Description:
    """The entry of that name in whichever catalogue has it."""
    if (kind := _kind(name)) is not None:
        plural = {"topology": "topologies"}.get(kind, f"{kind}s")
        raise InputError(f"which {kind}? Its name is missing; simulator list {plural}")
    found: dict[str, Description] = {}
    for kind, show in KINDS.items():
        with contextlib.suppress(InputError):
            found[kind] = show(name)
    if not found:
        raise InputError(
            f"no catalogue has {name!r}; expected a kind ({', '.join(KINDS)}) and a name"
        )
    if len(found) > 1:
        kinds = ", ".join(found)
        raise InputError(f"{name!r} is a name of several kinds; say which: {kinds}")
    ((kind, description),) = found.items()
    return {"catalogue": kind, **description}


@click.command("show")
@click.argument("kind", metavar="|".join(KINDS))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(kind: str, name: str | None, as_json: bool) -> None:
    """Show one model, accelerator, topology, schedule or framework.

    A model may also be the path of a Hugging Face config.json, a topology that of a YAML file. The
    kind may be left out where a name of a catalogue is unambiguous: simulator show H100-SXM.
    """
    description = _found(kind) if name is None else _described(kind, name)
    if as_json:
        click.echo(json.dumps(description, indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in _rows(description):
        table.add_row(escape(label), escape(text))
    Console().print(table)
