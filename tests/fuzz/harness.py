"""Seeded fuzzing of everything that reads a file: a result or an `InputError`, nothing else.

A *reader* has valid files (seeds) and a function that reads one, as far as a user's command would.
A *mutator* breaks a seed: bytes, tokens, or the structure of what it describes. Every input is made
of (reader, number) alone, so that a finding is reproduced by its number.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from simulator.errors import SimulatorError

#: Seconds after which reading a file of a few kilobytes counts as a hang.
LIMIT = 10

#: Texts that would run code, read files or blow up where a reader is careless. CANARY stands for
#: the path of a file that must never appear.
PAYLOADS = (
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/object/new:subprocess.Popen [[touch, CANARY]]",
    "!!python/name:os.system",
    "__import__('os').system('touch CANARY')",
    "().__class__.__bases__[0].__subclasses__()",
    "$(touch CANARY)",
    "`touch CANARY`",
    '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
    "&a;",
    "../../../../etc/passwd",
    "=cmd|'/c calc'!A0",
    "a: &a [*a]",
    "a: &a [1,1]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]",
    "{" * 300,
    "[" * 3000,
    "\x00\ufeff\u202e",
    "%s%n{0}{x!r}",
)

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"),
    2**31, 2**63, 10**30, 10**12, "", " ", "x", "0", "-1", "1e400", "nan", "NaN GB", "1 GB/s",
    "80 GiB", "400 Gb/s", "9" * 400, "é漢🙂", "a" * 5000, [], {}, [[]], [None], {"a": {"b": {}}},
    {"": 0}, [1, "x", None], "~", "1:30", "0x10", "2020-01-01", "!!binary aGk=", "*a", "{",
    "/dev/null",
    "fp8", "zero3", "full", "h100", "dgx-h100", "gpt3-175b", "1f1b",
)  # fmt: skip

TOKENS = (
    "0", "-1", "1e999", "999999999999999999999", "NaN", "inf", "", "null", "true", "'", '"', "{",
    "}", "[", "]", ":", ",", "<", ">", "&", "\t", "\n", "\r", "\x00", "-", "é", "0x", "1_0", "--",
)  # fmt: skip

_WORD = re.compile(r"[A-Za-z_][\w.-]*|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


# ------------------------------------------------------------------------------ mutating


def mutate(seeds: list[bytes], kind: str, rng: random.Random, canary: str) -> bytes:
    """One broken variant of one of `seeds`; `kind`: `yaml`, `json`, `text` or `binary`."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        roll = rng.random()
        if kind in ("yaml", "json") and roll < 0.55:
            data = _structure(data, kind, rng, canary)
        elif kind != "binary" and roll < 0.85:
            data = _tokens(data, rng, canary)
        else:
            data = _bytes(data, seeds, rng)
    return data


def _bytes(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    size = len(data)
    if size == 0:
        return rng.randbytes(rng.randrange(64))
    at = rng.randrange(size)
    length = min(size - at, 1 << rng.randrange(8))
    choice = rng.randrange(8)
    if choice == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if choice == 1:
        return data[:at] + data[at + length :]
    if choice == 2:
        return data[:at] + rng.randbytes(length) + data[at:]
    if choice == 3:
        return data[:at] + data[at : at + length] * rng.randrange(2, 20) + data[at + length :]
    if choice == 4:
        return data[:at]
    if choice == 5:
        other = rng.choice(seeds)
        cut = rng.randrange(len(other) + 1)
        return data[:at] + other[cut:]
    if choice == 6:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    to = rng.randrange(size)
    return data[:to] + data[at : at + length] + data[to:]


def _tokens(data: bytes, rng: random.Random, canary: str) -> bytes:
    text = data.decode("utf-8", errors="replace")
    lines = text.split("\n")
    choice = rng.randrange(8)
    if choice == 0 and len(lines) > 1:
        del lines[rng.randrange(len(lines))]
        return "\n".join(lines).encode()
    if choice == 1:
        at = rng.randrange(len(lines))
        lines.insert(at, lines[rng.randrange(len(lines))])
        return "\n".join(lines).encode()
    if choice == 2:
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(("  ", "\t", "- ", "# ", " ")) + lines[at].lstrip()
        return "\n".join(lines).encode()
    if choice == 3:
        at = rng.randrange(len(text) + 1)
        payload = rng.choice(PAYLOADS).replace("CANARY", canary)
        return (text[:at] + payload + text[at:]).encode()
    words = list(_WORD.finditer(text))
    if not words:
        return text.encode() + rng.choice(TOKENS).encode()
    word = rng.choice(words)
    if choice in (4, 5):
        new = rng.choice(TOKENS)
    elif choice == 6:
        new = rng.choice(words).group()
    else:
        value = rng.choice(VALUES)
        new = value if isinstance(value, str) else json.dumps(value)
    return (text[: word.start()] + new + text[word.end() :]).encode()


def _structure(data: bytes, kind: str, rng: random.Random, canary: str) -> bytes:
    try:
        tree = json.loads(data) if kind == "json" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError, RecursionError, TypeError, AttributeError):
        return _tokens(data, rng, canary)
    spots = list(_spots(tree))
    if not spots:
        return _tokens(data, rng, canary)
    parent, key = rng.choice(spots)
    choice = rng.randrange(8)
    if choice == 0:
        del parent[key]
    elif choice == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif choice == 2 and isinstance(parent, dict):
        parent[rng.choice(("x", "", "family", "base", str(key) * 3))] = rng.choice(VALUES)
    elif choice == 3:
        other, place = rng.choice(spots)
        if other is not parent and not _inside(parent, other[place]):
            parent[key] = other[place]
    elif choice == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        factor = rng.choice((-1, 0, 0.5, 1.5, 3, 1000, 1e9, 1e30))
        parent[key] = parent[key] * factor
    elif choice == 5:
        parent[key] = rng.choice(PAYLOADS).replace("CANARY", canary)
    else:
        parent[key] = rng.choice(VALUES)
    try:
        if kind == "json":
            return json.dumps(tree).encode()
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    except (ValueError, yaml.YAMLError, RecursionError, TypeError):
        return data


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = (
            list(node)
            if isinstance(node, dict)
            else range(len(node))
            if isinstance(node, list)
            else ()
        )
        for key in keys:
            yield node, key
            stack.append(node[key])


def _inside(needle: Any, tree: Any) -> bool:
    return needle is tree or any(parent[key] is needle for parent, key in _spots(tree))


# ------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Reader:
    """Something that reads files: seeds, how they are broken, and what reads one."""

    name: str
    kind: str
    suffix: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    weight: int = 1
    """Share of the mutations that it gets."""


@dataclass
class Tally:
    """Outcomes of one reader."""

    results: int = 0
    clean_errors: int = 0
    slowest: float = 0.0
    findings: dict[str, list[int]] = field(default_factory=dict)
    """What should not happen -> numbers of the mutations that show it."""
    samples: dict[str, str] = field(default_factory=dict)
    """Its traceback."""

    @property
    def total(self) -> int:
        return self.results + self.clean_errors + sum(map(len, self.findings.values()))


class Hang(BaseException):
    """Reading took longer than `LIMIT`."""


def _alarm(_signal: int, _frame: FrameType | None) -> None:
    raise Hang


_ESCAPES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pty.spawn",
            "socket.connect", "ctypes.dlopen", "os.fork")  # fmt: skip
_guarded: list[str] | None = None


def _audit(event: str, _arguments: tuple[object, ...]) -> None:
    if _guarded is not None and event in _ESCAPES:
        _guarded.append(event)
        raise RuntimeError(f"a file made its reader do {event}")


sys.addaudithook(_audit)


def fuzz(reader: Reader, numbers: Iterable[int], *, limit: int = LIMIT) -> Tally:
    """Read mutations `numbers` of the reader's seeds."""
    global _guarded
    tally = Tally()
    # a place without links or home folder in it: no traceback of ours names the machine
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        canary = Path(folder) / "canary"
        before = signal.signal(signal.SIGALRM, _alarm)
        try:
            for number in numbers:
                rng = random.Random(f"{reader.name}/{number}")
                data = mutate(reader.seeds, reader.kind, rng, str(canary))
                path = Path(folder) / f"input{reader.suffix}"
                path.write_bytes(data)
                _guarded = []
                begun = time.perf_counter()
                signal.alarm(limit)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        reader.read(path)
                    tally.results += 1
                except SimulatorError as error:
                    if str(error).strip():
                        tally.clean_errors += 1
                    else:
                        _note(tally, "an error without a message", number)
                except Hang:
                    _note(tally, f"hang: {_where()}", number)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    _note(tally, f"{type(error).__name__} at {_where()}", number)
                finally:
                    signal.alarm(0)
                    escaped, _guarded = _guarded, None
                if escaped or canary.exists():
                    _note(tally, f"code execution: {escaped or 'canary'}", number)
                    canary.unlink(missing_ok=True)
                tally.slowest = max(tally.slowest, time.perf_counter() - begun)
        finally:
            signal.signal(signal.SIGALRM, before)
    return tally


def _note(tally: Tally, what: str, number: int) -> None:
    tally.findings.setdefault(what, []).append(number)
    tally.samples.setdefault(what, traceback.format_exc(limit=-6))


def _where() -> str:
    """The innermost line of the simulator (or else of anything) in the current traceback."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if f"{os.sep}simulator{os.sep}" in f.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
