"""Cluster graphs as GraphML, in and out (networkx reads and writes; defusedxml checks first)."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import defusedxml.ElementTree as SafeTree
import networkx as nx
from defusedxml.common import DefusedXmlException

from simulator.errors import InputError
from simulator.importers.files import read_bytes, replacing


def read_graphml(path: str | Path) -> nx.Graph:
    """The graph of a GraphML file.

    Raises
    ------
    InputError
        If the file is missing, no GraphML, or uses DTDs or entities.
    """
    return parse_graphml(read_bytes(path, limit=1 << 30), place=str(path))


def parse_graphml(data: bytes, *, place: str = "GraphML") -> nx.Graph:
    """The graph in `data`; see `read_graphml`."""
    try:
        SafeTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        raise InputError(f"DTDs and entities are not allowed: {error}", place=place) from None
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise InputError(f"not valid XML: {error}", place=place) from None
    try:
        return nx.read_graphml(io.BytesIO(data))
    except Exception as error:  # networkx raises many kinds of errors for broken files
        raise InputError(f"no GraphML graph: {str(error) or type(error).__name__}",
                         place=place) from None  # fmt: skip


def write_graphml(graph: nx.Graph, path: str | Path) -> None:
    """Write a cluster graph; attributes that GraphML has no type for become text.

    Raises
    ------
    InputError
        If the file cannot be written, or two nodes are alike when written as text.
    """
    plain = graph.__class__(name=str(graph.graph.get("name", "cluster")))
    names = {node: str(node) for node in graph.nodes}
    if len(set(names.values())) != len(names):
        raise InputError("node names must differ when written as text", place=str(path))
    for node, data in graph.nodes(data=True):
        plain.add_node(names[node], **_scalars(data))
    for a, b, data in graph.edges(data=True):
        plain.add_edge(names[a], names[b], **_scalars(data))
    _one_type_each([data for _, data in plain.nodes(data=True)])
    _one_type_each([data for *_, data in plain.edges(data=True)])
    out = io.BytesIO()
    try:
        nx.write_graphml(plain, out, named_key_ids=True)
    except (ValueError, TypeError, nx.NetworkXError) as error:
        raise InputError(f"cannot be written as GraphML: {error}", place=str(path)) from None
    with replacing(path) as stream:
        stream.write(out.getvalue())


def _one_type_each(mappings: list[dict[str, Any]]) -> None:
    """GraphML declares one type per attribute: numbers beside text become text."""
    kinds: dict[str, set[type]] = {}
    for data in mappings:
        for key, value in data.items():
            kinds.setdefault(key, set()).add(type(value))
    for data in mappings:
        for key, found in kinds.items():
            if len(found) > 1 and key in data:
                numbers = found <= {int, float}
                data[key] = float(data[key]) if numbers else str(data[key])


def _scalars(data: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        if value is None:
            continue
        finite = isinstance(value, float) and math.isfinite(value)
        if finite or isinstance(value, bool | int | str):
            result[str(key)] = value
        else:
            try:
                result[str(key)] = float(value)
            except (TypeError, ValueError):
                result[str(key)] = str(value)
    return result
