"""Baselines: what is kept of a result, as a file that reads well in a diff."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from simulator.errors import InputError
from simulator.experiment import read_yaml, to_mapping
from simulator.testing.order import Pass, order_of, order_text
from simulator.units import no_bool

if TYPE_CHECKING:
    from simulator.simulation import Result

FORMAT = 1
#: Significant digits that are written: ten times finer than the finest sensible tolerance.
DIGITS = 6
#: Runs of micro-batches per stage and pass; more are merged into as many equal parts.
RUNS = 12
#: Names of unusual links or accelerators are written up to this number.
NAMED = 8
#: Neighbouring stages and micro-batches whose durations differ by less (relative) share a line:
#: ripples of contention would otherwise fill pages of every diff. Finer changes of a single
#: operation are not seen.
SAME = 2e-3

_HEADER = """\
# Baseline of a simulated training step. SI units: seconds, bytes.
# Written by `pytest --simulator-update`; review a change of it as you review code.
"""


@dataclass(frozen=True)
class OperationFigures:
    """One operation on one global pipeline stage, per rank and step."""

    operation: str
    kind: str
    stream: str
    phase: str
    stage: int
    """-1: belongs to no stage."""
    count: float
    """Times per step; the mean over ranks."""
    seconds: float
    """Duration of one; the mean over ranks and times."""
    slowest: float
    """Duration of one on the rank where it takes longest in all."""
    bytes: float
    """Of one: read and written, or communicated."""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What identifies the operation in two baselines."""
        return (self.stream, self.kind, self.operation, self.phase, self.stage)

    @property
    def total(self) -> float:
        """Seconds per step of the slowest rank."""
        return self.count * self.slowest


@dataclass(frozen=True)
class Baseline:
    """What a baseline keeps of one result; all times in seconds, sizes in bytes."""

    figures: Mapping[str, float]
    """Step time, bubble, breakdown, exposed communication, peak memory: dotted names."""
    memory: tuple[Mapping[str, float], ...]
    """Per pipeline rank: parameters, gradients, ... total."""
    operations: tuple[OperationFigures, ...]
    microbatches: Mapping[tuple[int, str], np.ndarray]
    """(stage, phase) -> seconds of each micro-batch's pass on the slowest rank."""
    orders: Mapping[int, list[Pass]]
    """Pipeline rank -> its passes in order."""
    experiment: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Kind of link -> `rate latency` -> how many, and the names of a few unusual ones."""
    accelerators: Mapping[str, Any] = field(default_factory=dict)
    """Type -> how many; `slow`: index -> slowdown."""

    # --------------------------------------------------------------------------- from results

    @classmethod
    def of(cls, result: Result) -> Baseline:
        """The baseline of a simulated step."""
        summary = result.summary
        figures: dict[str, float] = {
            "step_time_s": summary.step_time_s,
            "bubble_fraction": summary.bubble_fraction,
            "peak_memory_bytes": summary.peak_memory_bytes,
        }
        for name, value in summary.breakdown_s.items():
            figures[f"breakdown_s.{name}"] = value
        for name, value in summary.exposed_communication_s.items():
            figures[f"exposed_communication_s.{name}"] = value
        operations, microbatches, orders = _from_timeline(result.timeline)
        return cls(
            figures={name: float(value) for name, value in figures.items()},
            memory=tuple({k: float(v) for k, v in rank.items()} for rank in summary.memory),
            operations=operations,
            microbatches=microbatches,
            orders=orders,
            experiment=_flat(to_mapping(result.experiment)),
            links=_links(result.cluster),
            accelerators=_accelerators(result.cluster),
        )

    # ------------------------------------------------------------------------------- as text

    def to_yaml(self) -> str:
        """The baseline as the text of a file."""
        summary: dict[str, Any] = {}
        for name, value in self.figures.items():
            head, dot, tail = name.partition(".")
            if dot:
                summary.setdefault(head, {})[tail] = _rounded(value)
            else:
                summary[head] = _rounded(value)
        document = {
            "format": FORMAT,
            "summary": summary,
            "memory_bytes": [
                _Flow({name: _rounded(value) for name, value in rank.items()})
                for rank in self.memory
            ],
            "order": {rank: order_text(passes) for rank, passes in self.orders.items()},
            "operations": self._operations_document(),
            "microbatches": self._microbatches_document(),
            "given": {
                "experiment": dict(self.experiment),
                "accelerators": dict(self.accelerators),
                "links": {
                    kind: {rate: _Flow(entry) if isinstance(entry, dict) else entry
                           for rate, entry in rates.items()}
                    for kind, rates in self.links.items()
                },
            },
        }  # fmt: skip
        return _HEADER + yaml.dump(
            document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True
        )

    def _operations_document(self) -> dict[str, Any]:
        """stream -> kind -> `operation phase` -> stages -> figures; equal stages in one line."""
        document: dict[str, Any] = {}
        groups: dict[tuple[str, str, str, str], list[OperationFigures]] = {}
        for item in self.operations:
            groups.setdefault(item.key[:4], []).append(item)
        for (stream, kind, operation, phase), items in groups.items():
            lines: dict[str, Any] = {}
            for stages, item in _equal_neighbours(items):
                figures = {
                    "count": _rounded(item.count),
                    "seconds": _rounded(item.seconds),
                }
                if not _close(item.slowest, item.seconds):
                    figures["slowest"] = _rounded(item.slowest)
                if item.bytes:
                    figures["bytes"] = _rounded(item.bytes)
                lines[stages] = _Flow(figures)
            document.setdefault(stream, {}).setdefault(kind, {})[f"{operation} {phase}"] = lines
        return document

    def _microbatches_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for (stage, phase), seconds in self.microbatches.items():
            runs = _runs(seconds)
            document.setdefault(f"stage {stage}", {})[phase] = _Flow(
                {_span(first, last): _rounded(value) for first, last, value in runs}
            )
        return document

    @classmethod
    def from_yaml(cls, text: Any, *, place: str | None = None) -> Baseline:
        """The inverse of `to_yaml`, up to rounding; raises `InputError`."""
        try:
            document = yaml.safe_load(text) if isinstance(text, str) else text
        except yaml.YAMLError as error:
            raise InputError(f"not valid YAML: {error}", place=place) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise InputError(f"not a baseline of format {FORMAT}", place=place)
        try:
            checked = _Document.model_validate(document)
        except ValidationError as error:
            problems: dict[str, Mapping[str, Any]] = {}  # the branches of a union are one
            for item in error.errors(include_url=False):
                location = [str(part) for part in item["loc"] if not _is_type_tag(part)]
                problems.setdefault(" > ".join(location), item)
            (where, first), *more = problems.items()
            message = first["msg"].replace("Value error, ", "").replace("Input should", "should")
            others = f"; {len(more)} more of its entries are wrong" if more else ""
            raise InputError(
                f"{where}: {message}, got {_short(first['input'])}{others}", place=place
            ) from None
        return cls(
            figures={k: v for k, v in _flat(checked.summary).items() if v != {}},
            memory=tuple(checked.memory_bytes),
            operations=tuple(_read_operations(checked.operations or {})),
            microbatches=dict(_read_microbatches(checked.microbatches or {})),
            orders=checked.order or {},
            experiment=checked.given.experiment or {},
            links=checked.given.links or {},
            accelerators=checked.given.accelerators or {},
        )

    @classmethod
    def read(cls, path: str | Path) -> Baseline:
        """Read a baseline file; raises `InputError`."""
        document, _ = read_yaml(path)
        return cls.from_yaml(document, place=str(path))

    def write(self, path: str | Path) -> None:
        """Write the baseline file, at once or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".new")
        aside.write_text(self.to_yaml(), encoding="utf-8")
        aside.replace(path)


# ------------------------------------------------------------------------------- collecting


def _from_timeline(
    timeline: Any,
) -> tuple[tuple[OperationFigures, ...], dict[tuple[int, str], np.ndarray], dict[int, list[Pass]]]:
    sums: dict[tuple[str, str, str, str, int], list[float]] = {}
    passes: dict[tuple[int, str], dict[int, float]] = {}
    orders: dict[int, list[Pass]] = {}
    for rank_class, frame in enumerate(timeline.iter_frames("representatives")):
        if frame.empty:
            continue
        members = float(len(timeline.members(rank_class)))
        names = frame["operation"].astype("category")
        frame = frame.assign(
            seconds=frame["end"] - frame["start"],
            operation=names.map({name: _unnumbered(str(name)) for name in names.cat.categories}),
        )
        by = ["stream", "kind", "operation", "phase", "stage"]
        grouped = frame.groupby(by, observed=True, sort=False)
        table = grouped.agg(
            count=("seconds", "size"), seconds=("seconds", "sum"), bytes=("bytes", "sum")
        )
        for key, count, seconds, size in table.itertuples():
            entry = sums.setdefault(key, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
            entry[0] += members
            entry[1] += members * count
            entry[2] += members * seconds
            entry[3] += members * size
            if seconds / count > entry[4]:
                entry[4] = seconds / count
        busy = frame[
            (frame["stream"] == "compute") & (frame["microbatch"] >= 0) & (frame["stage"] >= 0)
        ]
        spans = busy.groupby(["stage", "phase", "microbatch"], observed=True, sort=True)["seconds"]
        for (stage, phase, microbatch), seconds in spans.sum().items():
            found = passes.setdefault((int(stage), str(phase)), {})
            found[int(microbatch)] = max(found.get(int(microbatch), 0.0), float(seconds))
        pipeline = int(frame["pipeline"].iloc[0]) if "pipeline" in frame else 0
        if pipeline not in orders:
            orders[pipeline] = _order(busy)
    operations = tuple(
        OperationFigures(
            operation=key[2], kind=key[1], stream=key[0], phase=key[3], stage=int(key[4]),
            count=entry[1] / entry[0],
            seconds=entry[2] / entry[1],
            slowest=entry[4],
            bytes=entry[3] / entry[1],
        )
        for key, entry in sums.items()
    )  # fmt: skip
    return (
        operations,
        {key: _series(found) for key, found in sorted(passes.items())},
        dict(sorted(orders.items())),
    )


def _unnumbered(name: str) -> str:
    """`grad_reduce.3.0.dense` is `grad_reduce.dense`: the buckets of a stage are one operation."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def _series(found: Mapping[int, float]) -> np.ndarray:
    series = np.full(max(found) + 1, np.nan)
    for index, value in found.items():
        series[index] = value
    return series


def _order(busy: pd.DataFrame) -> list[Pass]:
    """Passes of a rank in the order of its compute stream: F, B (input and weight gradient of
    one micro-batch in one block) or I and W where they run apart."""
    if busy.empty:
        return []
    stage, microbatch = busy["stage"].to_numpy(), busy["microbatch"].to_numpy()
    # in the forward or not: recomputation in the backward keeps the phase of what it repeats
    phase = busy["phase"].astype(str).to_numpy()
    change = (np.diff(stage) != 0) | (np.diff(microbatch) != 0)
    first = np.flatnonzero(np.r_[True, change])
    last = np.r_[first[1:], len(busy)]
    passes: list[Pass] = []
    forwards: set[tuple[int, int]] = set()
    for begin, end in zip(first, last, strict=True):
        own = phase[begin:end]
        where, mb = int(stage[begin]), int(microbatch[begin])
        leading = int(np.argmax(own != "F")) if (own != "F").any() else len(own)
        if leading and (where, mb) not in forwards:
            forwards.add((where, mb))
            passes.append(("F", where, mb))
        rest = set(own[leading:])
        if rest >= {"I", "W"}:
            passes.append(("B", where, mb))
        elif "I" in rest:
            passes.append(("I", where, mb))
        elif "W" in rest:
            passes.append(("W", where, mb))
    return passes


def _links(cluster: Any) -> dict[str, dict[str, Any]]:
    """How many links of each kind have which rate and latency; a few unusual ones by name."""
    kinds = np.asarray(cluster.link_kind)
    rates = np.asarray(cluster.link_capacity) * np.asarray(cluster.link_efficiency)
    found: dict[str, dict[str, Any]] = {}
    for kind in np.unique(kinds):
        links = np.flatnonzero(kinds == kind)
        values = np.stack([rates[links], np.asarray(cluster.link_latency)[links]])
        unique, inverse, counts = np.unique(values, axis=1, return_inverse=True, return_counts=True)
        entries: dict[str, Any] = {}
        for index in np.argsort(-counts, kind="stable"):
            label = f"{_rate(unique[0, index])} {_rounded(unique[1, index] * 1e6)} us"
            count = int(counts[index])
            if count <= NAMED and count < len(links):
                chosen = links[np.flatnonzero(inverse.reshape(-1) == index)]
                names = [cluster.link_name(int(link)) for link in chosen]
                entries[label] = {"count": count, "links": names}
            else:
                entries[label] = count
        found[cluster.link_kind_name(int(links[0]))] = entries
    return found


def _rate(rate: float) -> str:
    return f"{_rounded(rate / 1e9)} GB/s"


def _accelerators(cluster: Any) -> dict[str, Any]:
    names = cluster.accelerator_type_names
    counts = np.bincount(np.asarray(cluster.accelerator_type_of), minlength=len(names))
    found: dict[str, Any] = {name: int(n) for name, n in zip(names, counts, strict=True)}
    slowdown = np.asarray(cluster.slowdown)
    slow = np.flatnonzero(slowdown != 1.0)
    if slow.size:
        found["slow"] = {int(i): _rounded(float(slowdown[i])) for i in slow[:NAMED]}
        if slow.size > NAMED:
            found["slow accelerators"] = int(slow.size)
    if cluster.memory_share is not None:
        found["slow memory"] = int(np.count_nonzero(cluster.memory_share != 1.0))
    return found


# ---------------------------------------------------------------------------------- writing


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, True)
)
_Dumper.add_representer(
    float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", _number(value))
)


def _number(value: float) -> str:
    """A float as YAML 1.1 reads back as one (`1e-05` would be read as text)."""
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        sign = exponent[0] if exponent[0] in "+-" else "+"
        text = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent.lstrip('+-')}"
    return text


def _rounded(value: float) -> float | int:
    """`value` with `DIGITS` significant digits; whole numbers as integers."""
    value = float(value)
    if not math.isfinite(value) or value == 0.0:
        return 0 if value == 0.0 else value
    rounded = float(f"{value:.{DIGITS - 1}e}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _close(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= SAME * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b))


def _equal_neighbours(
    items: Sequence[OperationFigures],
) -> Iterable[tuple[str, OperationFigures]]:
    """Stages next to each other with the same figures, as `stage a-b`."""
    items = sorted(items, key=lambda item: item.stage)
    at = 0
    while at < len(items):
        first = items[at]
        last = at
        while last + 1 < len(items) and (
            items[last + 1].stage == items[last].stage + 1
            and _close(items[last + 1].count, first.count)
            and _close(items[last + 1].seconds, first.seconds)
            and _close(items[last + 1].slowest, first.slowest)
            and _close(items[last + 1].bytes, first.bytes)
        ):
            last += 1
        span = _span(first.stage, items[last].stage)
        yield ("no stage" if first.stage < 0 else f"stage {span}"), first
        at = last + 1


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _runs(seconds: np.ndarray) -> list[tuple[int, int, float]]:
    """Runs of equal values as (first, last, value); if there are too many, means of equal parts."""
    runs: list[tuple[int, int, float]] = []
    for index, value in enumerate(seconds.tolist()):
        if runs and _close(runs[-1][2], value):
            runs[-1] = (runs[-1][0], index, runs[-1][2])
        else:
            runs.append((index, index, value))
    if len(runs) <= RUNS:
        return runs
    edges = np.linspace(0, len(seconds), RUNS + 1).astype(int).tolist()
    return [
        (first, last - 1, float(np.mean(seconds[first:last])))
        for first, last in itertools.pairwise(edges)
        if last > first
    ]


# ---------------------------------------------------------------------------------- reading


#: Most stages, micro-batches and passes of a baseline: more is a slip of whoever edited it.
_MOST = 2_000_000


def _parse_span(text: Any) -> tuple[int, int]:
    """(first, last) of `3`, `3-5`, `stage 3-5`; (-1, -1) of `no stage`."""
    if text == "no stage":
        return -1, -1
    match = re.fullmatch(r"(?:stage )?(\d{1,7})(?:-(\d{1,7}))?", str(text))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, _MOST)
    if not first <= last < _MOST:
        raise ValueError("should be a number or a range such as 3-5")
    return first, last


def _parse_order(text: Any) -> list[Pass]:
    if not isinstance(text, str):
        raise ValueError("should be the passes as text")
    return order_of(text, most=_MOST)


_Seconds = Annotated[float, BeforeValidator(no_bool)]
"""Of a micro-batch: NaN where it has no such pass."""
_Number = Annotated[_Seconds, Field(allow_inf_nan=False)]
_Span = Annotated[tuple[int, int], BeforeValidator(_parse_span)]


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: _Number
    seconds: _Number
    slowest: _Number | None = None
    bytes: _Number = 0.0


class _Given(BaseModel):
    experiment: dict[str, Any] | None
    accelerators: dict[str, Any] | None
    links: dict[str, dict[str, Any]] | None


class _Document(BaseModel):
    """The content of a baseline file, see `Baseline.to_yaml`."""

    summary: dict[str, _Number | dict[str, _Number]]
    memory_bytes: list[dict[str, _Number]]
    order: dict[int, Annotated[list[Pass], BeforeValidator(_parse_order)]] | None
    operations: dict[str, dict[str, dict[str, dict[_Span, _Figures]]]] | None
    microbatches: dict[_Span, dict[str, dict[_Span, _Seconds]]] | None
    given: _Given


def _is_type_tag(part: str | int) -> bool:
    """pydantic names the tried branch of a union in the location."""
    return isinstance(part, str) and part.startswith(("function-", "dict["))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_operations(
    document: Mapping[str, Mapping[str, Mapping[str, Mapping[tuple[int, int], _Figures]]]],
) -> Iterable[OperationFigures]:
    for stream, kinds in document.items():
        for kind, names in kinds.items():
            for name, lines in names.items():
                operation, _, phase = name.rpartition(" ")
                for (first, last), figures in lines.items():
                    slowest = figures.seconds if figures.slowest is None else figures.slowest
                    for stage in range(first, last + 1):
                        yield OperationFigures(
                            operation,
                            kind,
                            stream,
                            phase,
                            stage,
                            figures.count,
                            figures.seconds,
                            slowest,
                            figures.bytes,
                        )


def _read_microbatches(
    document: Mapping[tuple[int, int], Mapping[str, Mapping[tuple[int, int], float]]],
) -> Iterable[tuple[tuple[int, str], np.ndarray]]:
    for (stage, _), phases in document.items():
        for phase, runs in phases.items():
            series = np.full(max((last for _, last in runs), default=-1) + 1, np.nan)
            for (first, last), value in runs.items():
                series[first : last + 1] = value
            yield (stage, phase), series


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
