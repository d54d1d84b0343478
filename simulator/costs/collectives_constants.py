"""Constants of collectives, read from `simulator/catalog/collectives.yaml`.

Two tables: one by scale-up link (NVLink generation, XGMI, ICI, PCIe), one by scale-out fabric.
An entry `inherits` from another, so that an unseen link or fabric takes its family's constants.
Those of a link hold `at` a rate and a clock and are carried to others by what they stand for:

- shares of the link's rate (`share_*`, `write`) stay: the link is the limit;
- byte/s of thread blocks (`rate_*`, `channel_rate`) stay where the link's rate differs, and the
  channel's rate follows the clock: the SMs are the limit. A share never exceeds the protocol's
  payload: half of LL's bytes are flags, 8 of LL128's 128;
- seconds of a step (`base`, `start_*`, `hop*`) stay;
- `ramp` goes with 1 / (rate x clock): a chunk's time on the link and the SM's to hand it on.
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
#: Channels (thread blocks) that NCCL gives point-to-point transfers of a communicator, shared by
#: its peers (`p2pnChannels`, NCCL 2.2x: at most 32).
P2P_CHANNELS = 32
#: Where link and thread blocks both limit a transfer, times combine by this norm: nearly the larger
#: one, since only chunks that find the other busy wait for it (4 of 8 H100 show the difference).
LIMITS = 8.0


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


@dataclass(frozen=True)
class OperationConstants:
    """Protocols of one pattern, and what bounds Simple besides the link."""

    protocols: tuple[Protocol, ...]
    write: float = float("inf")
    """Rings: thread blocks write, to the neighbour and to the own buffer together, at this
    multiple of the link's rate."""
    channel_rate: float = float("inf")
    """Point-to-point: byte/s of one channel."""


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
    nvls_hosts: float
    """Share of NVLS's rate in one host that it reaches over the hosts of a rack."""
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
    hop_nvls: float
    """Seconds per network step of a tree between NVLS's in-domain reductions: a chunk each."""
    inner_hop: float
    """Seconds per in-domain Simple step of a ring that also crosses the network."""
    share_ll: float
    share_ll128: float
    """Share of the (derated) NIC that the low-latency protocols reach; 0: not in use there."""
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
    all_to_all_decline: float
    """Exponent by which that share falls with the number of domains beyond two: congestion."""
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


#: Payload of the protocols: LL sends a flag with each 4 bytes, LL128 8 bytes of 128.
_PAYLOAD = {"Simple": 1.0, "LL128": 120 / 128, "LL": 0.5}


def _pattern(
    name: str, entry: Mapping[str, float], link: Mapping[str, Any], rate: float, clock: float
) -> OperationConstants:
    """Protocols of one pattern's entry of the file, at `rate` (byte/s) and `clock` (Hz)."""
    at = link.get("at", {})
    faster = rate / (at["rate"] * 1e9) if "rate" in at and rate > 0 else 1.0
    quicker = clock / (at["clock"] * 1e9) if "clock" in at and clock > 0 else 1.0
    usable = link.get("line_share", 1.0) * (link.get("nvls_share", 1.0) if name == "nvls" else 1.0)
    base = entry["base"] * _US
    ramp = entry.get("ramp", 0.0) * _US / 1e3  # us per sqrt(MB) -> s per sqrt(byte)
    if name != "nvls":
        ramp /= faster * quicker
    default_hop = entry.get("hop", 0.0)
    protocols = []
    for protocol, key in (("Simple", "simple"), ("LL128", "ll128"), ("LL", "ll")):
        if f"rate_{key}" in entry and rate > 0:
            share = min(entry[f"rate_{key}"] * 1e9 / rate, usable * _PAYLOAD[protocol])
        elif f"share_{key}" in entry:
            share = entry[f"share_{key}"] * (usable if key == "simple" else 1.0)
        else:
            continue
        protocols.append(
            Protocol(
                protocol,
                base + entry.get(f"start_{key}", 0.0) * _US,
                entry.get(f"hop_{key}", default_hop) * _US,
                share,
                ramp if key == "simple" else 0.0,
            )
        )
    return OperationConstants(
        tuple(protocols),
        entry.get("write", float("inf")),
        entry.get("channel_rate", float("inf")) * 1e9 * quicker,
    )


@functools.cache
def link_constants(name: str, rate: float = 0.0, clock: float = 0.0) -> LinkConstants:
    """Constants of a scale-up link by name (`NVLink4`); unknown generations take their kind's.

    `rate` is byte/s per direction and accelerator, over all its links, `clock` the accelerator's
    in Hz; 0: those at which the constants were measured.
    """
    entries = _raw()["scale_up"]
    if name not in entries:
        folded = name.lower().rstrip("0123456789.")
        name = next((k for k in entries if k.lower().rstrip("0123456789") == folded), "default")
    entry = _entry("scale_up", name)
    rate = rate or float(entry.get("at", {}).get("rate", 0.0)) * 1e9
    patterns = {
        key: _pattern(key, value, entry, rate, clock)
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
        nvls_hosts=float(entry.get("nvls_hosts", 1.0)),
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
            "start", "hop_ll", "hop_ll128", "hop_simple", "hop_nvls", "inner_hop", "peer_hop",
            "p2p_start",
        )
    }  # fmt: skip
    shares = {
        key: float(entry[key])
        for key in (
            "share_ll", "share_ll128", "efficiency", "tree_share", "tree_pair", "nvlstree_share",
            "all_to_all_share", "all_to_all_decline", "peer_loss", "p2p_share", "p2p_cross_rail",
            "channels", "p2p_channels",
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
