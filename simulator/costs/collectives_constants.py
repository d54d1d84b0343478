"""Constants of collectives, read from `simulator/catalog/collectives.yaml`.

Two tables: one by scale-up link (NVLink generation, XGMI, ICI, PCIe), one by scale-out fabric.
An entry `inherits` from another, so that an unseen link or fabric takes its family's constants;
shares are relative to the link's own rate and thereby scale with it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simulator.errors import InputError, unknown_name

_FILE = Path(__file__).parent.parent / "catalog" / "collectives.yaml"
_US = 1e-6


@dataclass(frozen=True)
class Protocol:
    """One way of moving bytes: alone, `x` bytes on a link of rate R take
    `start + steps * hop + ramp * sqrt(x) + x / (share * R)` seconds."""

    name: str
    start: float
    """Seconds."""
    hop: float
    """Seconds per step inside the domain."""
    share: float
    """Share of the scale-up link's rate."""
    ramp: float = 0.0
    """Seconds per sqrt(byte): pipelines fill slowly."""
    network_hop: float = 0.0
    """Seconds per step across the network."""
    network_share: float = 1.0
    """Share of the NIC's (already derated) rate."""
    network_ramp: float = 0.0


@dataclass(frozen=True)
class OperationConstants:
    """Protocols of one pattern, and the rate of the local copy of out-of-place calls."""

    protocols: tuple[Protocol, ...]
    copy: float
    """Local copies run at this multiple of the link's rate; infinite: none."""


@dataclass(frozen=True)
class LinkConstants:
    """Constants of one scale-up technology."""

    name: str
    patterns: Mapping[str, OperationConstants]
    """By pattern: `ring`, `all_to_all`, `nvls`, `send_recv`, `tree`, `torus`."""
    channels: float
    """Thread blocks (one per channel) of a large collective."""
    nvls_channels: float
    ring_across: float
    """Share of the link's rate that rings reach as bus bandwidth where they also cross the
    network: NCCL runs fewer channels there."""
    nvls_across: float
    """Share of NVLS's in-domain rate that NVLSTree reaches."""
    source: str


@dataclass(frozen=True)
class FabricConstants:
    """Constants of one scale-out fabric."""

    name: str
    start: float
    """Seconds added once per collective that leaves the domain."""
    hop_ll: float
    hop_ll128: float
    hop_simple: float
    """Seconds per network step and protocol."""
    inner_hop: float
    """Seconds per in-domain Simple step of a ring that also crosses the network."""
    share_ll: float
    share_ll128: float
    """Share of the (derated) NIC that the low-latency protocols reach."""
    ramp: float
    """Seconds per sqrt(byte) on a NIC."""
    efficiency: float
    """Share of the line rate where the topology states none."""
    tree_share: float
    """Share of the NICs that a tree's up and down streams reach."""
    tree_pair: float
    """Factor on that for two domains."""
    nvlstree_share: float
    """The same for NVLSTree beyond two domains."""
    all_to_all_share: float
    """Share of a NIC that an all-to-all with many peers reaches."""
    peer_loss: float
    """What an all-to-all with a single remote peer loses of that (1/peers law)."""
    peer_hop: float
    """Seconds per remote peer of an all-to-all."""
    p2p_start: float
    """Seconds of a point-to-point message of no bytes."""
    p2p_share: float
    """Share of a NIC that one point-to-point stream reaches over two channels."""
    p2p_channel_rate: float
    """byte/s of one point-to-point channel; NCCL leaves one per peer at scale."""
    p2p_cross_rail: float
    """What single streams keep of that where they cross the spine: static routes collide."""
    channels: float
    p2p_channels: float
    source: str


@functools.cache
def _raw() -> dict[str, Any]:
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _entry(table: str, name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    entries: dict[str, Any] = _raw()[table]
    if name not in entries:
        raise unknown_name(f"{table} entry", name, entries)
    entry = dict(entries[name])
    parent = entry.pop("inherits", None)
    if parent is None:
        return entry
    if parent in seen:
        raise InputError(f"{table} entry {name!r} inherits from itself")
    merged = _entry(table, parent, (*seen, name))
    for key, value in entry.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _pattern(entry: Mapping[str, float]) -> OperationConstants:
    """Protocols of one pattern's entry of the file."""
    base = entry["base"] * _US
    ramp = entry.get("ramp", 0.0) * _US / 1e3  # us per sqrt(MB) -> s per sqrt(byte)
    default_hop = entry.get("hop", 0.0)
    protocols = [
        Protocol(
            "Simple",
            base + entry.get("start_simple", 0.0) * _US,
            entry.get("hop_simple", default_hop) * _US,
            entry["share_simple"],
            ramp,
        )
    ]
    for name, key in (("LL128", "ll128"), ("LL", "ll")):
        if f"share_{key}" in entry:
            protocols.append(
                Protocol(
                    name,
                    base + entry.get(f"start_{key}", 0.0) * _US,
                    entry.get(f"hop_{key}", default_hop) * _US,
                    entry[f"share_{key}"],
                )
            )
    return OperationConstants(tuple(protocols), entry.get("copy", float("inf")))


@functools.cache
def link_constants(name: str) -> LinkConstants:
    """Constants of a scale-up link by name (`NVLink4`); unknown generations take their kind's."""
    entries = _raw()["scale_up"]
    if name not in entries:
        kind = next((k for k in entries if name.lower().startswith(k.lower())), None)
        alias = next(
            (
                k
                for k in entries
                if k.rstrip("0123456789").lower() == name.rstrip("0123456789").lower()
            ),
            None,
        )
        name = kind or alias or "default"
    entry = _entry("scale_up", name)
    patterns = {
        key: _pattern(value)
        for key, value in entry.items()
        if isinstance(value, Mapping) and "base" in value
    }
    return LinkConstants(
        name=name,
        patterns=patterns,
        channels=float(entry.get("channels", 16)),
        nvls_channels=float(entry.get("nvls_channels", entry.get("channels", 16))),
        ring_across=float(entry.get("ring_across", 1.0)),
        nvls_across=float(entry.get("nvls_across", 1.0)),
        source=str(entry.get("source", "")),
    )


@functools.cache
def fabric_constants(name: str) -> FabricConstants:
    """Constants of a scale-out fabric by name; an unknown name takes the default's."""
    entries = _raw()["fabrics"]
    if name not in entries:
        name = next((k for k in sorted(entries) if name.lower().startswith(k.lower())), "default")
    entry = _entry("fabrics", name)
    seconds = {
        key: entry[key] * _US
        for key in (
            "start", "hop_ll", "hop_ll128", "hop_simple", "inner_hop", "peer_hop", "p2p_start",
        )
    }  # fmt: skip
    shares = {
        key: float(entry[key])
        for key in (
            "share_ll", "share_ll128", "efficiency", "tree_share", "tree_pair", "nvlstree_share",
            "all_to_all_share", "peer_loss", "p2p_share", "p2p_cross_rail", "channels",
            "p2p_channels",
        )
    }  # fmt: skip
    return FabricConstants(
        name=name,
        ramp=entry["ramp"] * _US / 1e3,
        p2p_channel_rate=entry["p2p_channel_rate"] * 1e9,
        source=str(entry.get("source", "")),
        **seconds,
        **shares,
    )
