"""Quantities at the border: text with a unit in, SI floats out, and back for people to read.

Inside the simulator everything is seconds, bytes, FLOP, FLOP/s, byte/s, watts and USD. A number
without a unit is taken as SI already. Bits and bytes are told apart by the case of their `b`:
`400 Gb/s` (also `Gbps`, `Gbit/s`) is 50e9 byte/s, `400 GB/s` is 400e9 byte/s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Real
from typing import Any

from simulator.errors import InputError

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_PREFIX = {**_DECIMAL, **_BINARY}
_PREFIX_PATTERN = r"(?P<prefix>[KMGTP]i|[kKMGTPE]?)"
_NUMBER = r"(?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"

_BYTES = re.compile(rf"^{_NUMBER}\s*{_PREFIX_PATTERN}(?P<unit>B|b|byte|bytes|bit|bits)?$")
_BANDWIDTH = re.compile(
    rf"^{_NUMBER}\s*{_PREFIX_PATTERN}(?P<unit>B/s|Bps|byte/s|bytes/s|b/s|bps|bit/s|bits/s)$"
)
_FLOPS = re.compile(rf"^{_NUMBER}\s*{_PREFIX_PATTERN}(?P<unit>FLOP/s|FLOPS|FLOPs/s|flop/s|OP/s)$")
_TIME = re.compile(rf"^{_NUMBER}\s*(?P<unit>ns|us|µs|μs|ms|s|min|h|d)$")
_POWER = re.compile(rf"^{_NUMBER}\s*(?P<prefix>[kM]?)(?P<unit>W)$")
_SECONDS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3,
    "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip


def no_bool(value: Any) -> Any:
    """`value`, unless it is true or false, which Python takes for 1 and 0: raises ValueError.

    For pydantic's `BeforeValidator` on every number that a file states.
    """
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _plain(value: float | int | str) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _checked(number: float, value: object, what: str, place: str | None) -> float:
    if not math.isfinite(number) or number < 0:
        raise InputError(f"{what} must be finite and not negative, got {value!r}", place=place)
    return number


def _parse(
    value: float | int | str,
    pattern: re.Pattern[str],
    what: str,
    example: str,
    place: str | None,
) -> float:
    plain = _plain(value)
    if plain is not None:
        return _checked(plain, value, what, place)
    match = pattern.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise InputError(f"expected {what} such as {example}, got {value!r}", place=place)
    fields = match.groupdict()
    number = float(fields["number"].replace("_", ""))
    unit = fields.get("unit") or "B"
    scale = _SECONDS[unit] if pattern is _TIME else _PREFIX[fields.get("prefix") or ""]
    if pattern in (_BYTES, _BANDWIDTH) and unit.startswith("b") and not unit.startswith("byte"):
        scale /= 8.0
    return _checked(number * scale, value, what, place)


def parse_bytes(value: float | int | str, *, place: str | None = None) -> float:
    """A size in bytes: `parse_bytes("80 GiB") == 80 * 2**30`, `"1Gb"` is 125e6.

    Raises
    ------
    InputError
        If `value` is no size, negative or not finite.
    """
    return _parse(value, _BYTES, "a size", "'80 GiB' or '25 MB'", place)


def parse_bandwidth(value: float | int | str, *, place: str | None = None) -> float:
    """A rate in byte/s: `parse_bandwidth("400 Gb/s") == 50e9`; raises `InputError`."""
    return _parse(value, _BANDWIDTH, "a bandwidth", "'400 Gb/s' or '900 GB/s'", place)


def parse_flops(value: float | int | str, *, place: str | None = None) -> float:
    """A rate in FLOP/s: `parse_flops("989 TFLOP/s") == 989e12`; raises `InputError`."""
    return _parse(value, _FLOPS, "a compute rate", "'989 TFLOP/s'", place)


def parse_time(value: float | int | str, *, place: str | None = None) -> float:
    """A duration in seconds: `parse_time("2 us") == 2e-6`; raises `InputError`."""
    return _parse(value, _TIME, "a duration", "'2 us' or '1.5 ms'", place)


def parse_power(value: float | int | str, *, place: str | None = None) -> float:
    """A power in watts: `parse_power("0.7 kW") == 700`; raises `InputError`."""
    return _parse(value, _POWER, "a power", "'700 W'", place)


def _scaled(value: float, prefixes: tuple[tuple[str, float], ...], unit: str) -> str:
    if not math.isfinite(value):
        return f"{value} {unit}"
    for prefix, scale in prefixes:
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


_UP = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_UP_BINARY = tuple((p, s) for p, s in sorted(_BINARY.items(), key=lambda item: -item[1]))


def format_bytes(value: float) -> str:
    """Bytes with a binary prefix: `format_bytes(80 * 2**30) == "80 GiB"`."""
    return _scaled(value, _UP_BINARY, "B")


def format_bandwidth(value: float) -> str:
    """byte/s with a decimal prefix: `format_bandwidth(50e9) == "50 GB/s"`."""
    return _scaled(value, _UP, "B/s")


def format_flops(value: float) -> str:
    """FLOP/s with a decimal prefix: `format_flops(312e12) == "312 TFLOP/s"`."""
    return _scaled(value, _UP, "FLOP/s")


def format_time(value: float) -> str:
    """Seconds with the prefix that reads best: `format_time(2e-6) == "2 us"`."""
    if value and abs(value) < 1e-6:
        return f"{value * 1e9:.4g} ns"
    if value and abs(value) < 1e-3:
        return f"{value * 1e6:.4g} us"
    if value and abs(value) < 1.0:
        return f"{value * 1e3:.4g} ms"
    return f"{value:.4g} s"


def format_count(value: float) -> str:
    """A plain count with a prefix: `format_count(175e9) == "175B"`."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


def format_spans(numbers: Iterable[int], most: int | None = None) -> str:
    """Whole numbers as `2-57, 63`; of more than `most` spans only how many numbers the rest has."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans[:most])
    rest = sum(b - a + 1 for a, b in spans[len(spans[:most]) :])
    return f"{text} and {rest:,} more" if rest else text
