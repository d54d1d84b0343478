"""What differs between a baseline and a result, and what is to blame.

Nothing but two baselines goes in, so that a stored file and a fresh result, or two files, are
compared alike. The differences are ordered from cause to effect: what the run was given, the
order of the passes, single operations, then stages and micro-batches, then the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.errors import InputError, nearest
from simulator.testing.baseline import Baseline, OperationFigures
from simulator.testing.order import first_difference
from simulator.units import format_bytes, format_spans, format_time

#: Relative tolerances. The simulation is deterministic, so they only need to let through changes
#: that nobody cares about.
TOLERANCES: Mapping[str, float] = {
    "step_time": 0.01,
    "bubble": 0.02,
    "memory": 0.01,
    "communication": 0.02,
    "breakdown": 0.02,
    "operations": 0.02,
    "microbatches": 0.02,
}
#: A time counts as changed if it also moved by this share of the step: a microsecond that became
#: two is nothing in a second.
OF_STEP = 1e-4
#: A share (of the step) counts as changed if it also moved by this much.
OF_ONE = 1e-3
#: Entries shown of each kind.
SHOWN = 8

_COMMUNICATION = frozenset(
    {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"}
)


@dataclass(frozen=True)
class Comparison:
    """The differences beyond the tolerances; empty if there are none."""

    given: tuple[str, ...]
    """What the runs were given that is not the same (a cause, never a failure by itself)."""
    order: tuple[str, ...]
    operations: tuple[str, ...]
    stages: tuple[str, ...]
    microbatches: tuple[str, ...]
    figures: tuple[str, ...]
    culprits: tuple[str, ...] = field(default=())
    """One sentence per likely cause, the most likely first."""

    @property
    def equal(self) -> bool:
        """True if nothing is beyond its tolerance."""
        return not (
            self.order or self.operations or self.stages or self.microbatches or self.figures
        )

    def message(self) -> str:
        """The differences as text, the likely causes first."""
        lines: list[str] = []
        for title, entries in (
            ("Likely cause", self.culprits),
            ("Changed figures", self.figures),
            ("The runs were given different things", self.given),
            ("Order of passes", self.order),
            ("Operations", self.operations),
            ("Stages", self.stages),
            ("Micro-batches", self.microbatches),
        ):
            if entries:
                lines.append(f"{title}:")
                lines += [f"  {entry}" for entry in entries[:SHOWN]]
                if len(entries) > SHOWN:
                    lines.append(f"  … and {len(entries) - SHOWN} more")
        return "\n".join(lines)


def tolerances(given: float | Mapping[str, float] | None) -> dict[str, float]:
    """`TOLERANCES` with single values, or all of them, replaced; raises `InputError`."""
    result = dict(TOLERANCES)
    if given is None:
        return result
    if not isinstance(given, Mapping):
        given = dict.fromkeys(result, given)
    for name, value in given.items():
        if name not in result:
            guess = nearest(str(name), result)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise InputError(f"unknown tolerance {name!r}{hint} (known: {', '.join(result)})")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise InputError(f"tolerance {name} must be a number >= 0, got {value!r}")
        result[name] = float(value)
    return result


def compare(
    old: Baseline, new: Baseline, tolerance: float | Mapping[str, float] | None = None
) -> Comparison:
    """Differences of `new` from `old` beyond the relative tolerances.

    Parameters
    ----------
    tolerance:
        One number for all, or numbers for some of `step_time`, `bubble`, `memory`,
        `communication`, `breakdown`, `operations`, `microbatches`; see `TOLERANCES`.
    """
    limits = tolerances(tolerance)
    step = max(old.figures.get("step_time_s", 0.0), new.figures.get("step_time_s", 0.0))
    figures = [*_figures(old, new, limits, step), *_memory(old, new, limits)]
    given = _given(old, new)
    order = _orders(old, new)
    changed = _operations(old, new, limits["operations"], step)
    operations = [item.text for item in changed]
    stages = _stages(old, new, limits["microbatches"], step)
    microbatches = _microbatches(old, new, limits["microbatches"], step)
    return Comparison(
        given=tuple(given),
        order=tuple(order),
        operations=tuple(operations),
        stages=tuple(stages),
        microbatches=tuple(microbatches),
        figures=tuple(figures),
        culprits=tuple(_culprits(given, order, changed, step)),
    )


# ------------------------------------------------------------------------------------ parts


def _beyond(old: float, new: float, limit: float, floor: float = 0.0) -> bool:
    if math.isnan(old) or math.isnan(new):
        return math.isnan(old) != math.isnan(new)
    if math.isinf(old) or math.isinf(new):
        return old != new
    return abs(new - old) > max(limit * abs(old), floor)


def _change(old: float, new: float) -> str:
    """`+12.0 %`, or how many times where that says more."""
    if old == 0.0:
        return "new" if new else "unchanged"
    ratio = new / old
    if ratio >= 2.0:
        return f"{ratio:.3g} times as long"
    return f"{100 * (ratio - 1):+.1f} %"


def _figures(
    old: Baseline, new: Baseline, limits: Mapping[str, float], step: float
) -> Iterable[str]:
    names = list(dict.fromkeys([*old.figures, *new.figures]))
    for name in names:
        before, after = old.figures.get(name, 0.0), new.figures.get(name, 0.0)
        head, _, tail = name.partition(".")
        if head == "step_time_s":
            limit, floor, text, label = limits["step_time"], 0.0, format_time, "step time"
        elif head == "bubble_fraction":
            limit, floor, text, label = limits["bubble"], OF_ONE, _percent, "bubble fraction"
        elif head == "peak_memory_bytes":
            limit, floor, text, label = limits["memory"], 0.0, format_bytes, "peak memory"
        elif head == "exposed_communication_s":
            limit, floor, text = limits["communication"], OF_STEP * step, format_time
            label = f"exposed communication, {tail}"
        elif head == "breakdown_s":
            limit, floor, text = limits["breakdown"], OF_STEP * step, format_time
            label = f"time in {tail.replace('_', ' ')} per rank"
        else:
            continue
        if _beyond(before, after, limit, floor):
            change = _change(before, after)
            if text is not format_time:
                change = change.replace("times as long", "times")
            allowed = f"tolerance {100 * limit:.3g} %"
            yield f"{label}: {text(before)} -> {text(after)} ({change}, {allowed})"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _memory(old: Baseline, new: Baseline, limits: Mapping[str, float]) -> Iterable[str]:
    if len(old.memory) != len(new.memory):
        yield f"pipeline ranks: {len(old.memory)} -> {len(new.memory)}"
        return
    for rank, (before, after) in enumerate(zip(old.memory, new.memory, strict=True)):
        total = before.get("total", 0.0)
        for part in dict.fromkeys([*before, *after]):
            if part == "total":
                continue
            a, b = before.get(part, 0.0), after.get(part, 0.0)
            if isinstance(a, float | int) and _beyond(a, b, limits["memory"], 1e-3 * total):
                yield (
                    f"memory of pipeline rank {rank}, {part}: "
                    f"{format_bytes(a)} -> {format_bytes(b)}"
                )


def _given(old: Baseline, new: Baseline) -> list[str]:
    found = []
    for name in dict.fromkeys([*old.experiment, *new.experiment]):
        before, after = old.experiment.get(name), new.experiment.get(name)
        if name != "name" and _plain(before) != _plain(after):
            found.append(f"experiment, {name}: {_or_default(before)} -> {_or_default(after)}")
    for name in dict.fromkeys([*old.accelerators, *new.accelerators]):
        before, after = old.accelerators.get(name), new.accelerators.get(name)
        if _plain(before) != _plain(after):
            label = "slow accelerators (index: factor)" if name == "slow" else name
            found.append(f"accelerators, {label}: {before or 'none'} -> {after or 'none'}")
    for kind in dict.fromkeys([*old.links, *new.links]):
        before, after = old.links.get(kind, {}), new.links.get(kind, {})
        gone = [rate for rate in before if _plain(before[rate]) != _plain(after.get(rate))]
        come = [rate for rate in after if _plain(after[rate]) != _plain(before.get(rate))]
        if gone or come:
            found.append(
                f"{kind} links: {_rates(before, gone) or 'none'} -> {_rates(after, come) or 'none'}"
            )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _or_default(value: Any) -> str:
    return "(not given)" if value is None else str(value)


def _rates(rates: Mapping[str, Any], chosen: Sequence[str]) -> str:
    parts = []
    for rate in chosen:
        entry = rates[rate]
        if isinstance(entry, Mapping):
            names = ", ".join(map(str, entry.get("links", ())))
            parts.append(f"{entry.get('count')} with {rate} ({names})")
        else:
            parts.append(f"{entry} with {rate}")
    return "; ".join(parts)


def _orders(old: Baseline, new: Baseline) -> list[str]:
    found = []
    for rank in dict.fromkeys([*old.orders, *new.orders]):
        difference = first_difference(old.orders.get(rank, []), new.orders.get(rank, []))
        if difference:
            at, before, after = difference
            found.append(f"pipeline rank {rank}, from pass {at} on: {before} -> {after}")
    return found


@dataclass(frozen=True)
class _Changed:
    """An operation that changed, on the stages where it changed alike."""

    name: str
    kind: str
    stream: str
    stages: tuple[int, ...]
    old: OperationFigures | None
    new: OperationFigures | None
    delta: float
    """Seconds more per step, on the slowest rank of the stage where it changed most."""

    @property
    def where(self) -> str:
        if self.stages == (-1,):
            return ""
        spans = format_spans(self.stages)
        return f" on stage{'' if len(self.stages) == 1 else 's'} {spans}"

    @property
    def text(self) -> str:
        label = f"{self.name} ({self.kind}, {self.stream} stream){self.where}"
        if self.old is None:
            assert self.new is not None
            return (
                f"{label}: new, {self.new.count:g} times {format_time(self.new.slowest)} per rank"
            )
        if self.new is None:
            return (
                f"{label}: gone, was {self.old.count:g} times "
                f"{format_time(self.old.slowest)} per rank"
            )
        parts = [
            f"{format_time(self.old.slowest)} -> {format_time(self.new.slowest)} each "
            f"({_change(self.old.slowest, self.new.slowest)})"
        ]
        if self.old.count != self.new.count:
            parts.append(f"{self.old.count:g} -> {self.new.count:g} times per rank")
        if _beyond(self.old.bytes, self.new.bytes, 1e-3):
            parts.append(f"{format_bytes(self.old.bytes)} -> {format_bytes(self.new.bytes)} each")
        elif self.kind in _COMMUNICATION and self.old.slowest and self.new.slowest:
            parts.append(f"the same {format_bytes(self.old.bytes)}: latency or link bandwidth")
        if not _beyond(self.old.seconds, self.new.seconds, 0.75 * _ratio(self)):
            parts.append("only on some of the ranks")
        sign = "+" if self.delta >= 0 else "-"
        parts.append(f"{sign}{format_time(abs(self.delta))} per step and rank")
        return f"{label}: {', '.join(parts)}"


def _ratio(item: _Changed) -> float:
    assert item.old is not None
    assert item.new is not None
    if not item.old.slowest:
        return 0.0
    return abs(item.new.slowest / item.old.slowest - 1.0)


def _operations(old: Baseline, new: Baseline, limit: float, step: float) -> list[_Changed]:
    before = {item.key: item for item in old.operations}
    after = {item.key: item for item in new.operations}
    groups: dict[
        tuple[Any, ...], list[tuple[int, OperationFigures | None, OperationFigures | None]]
    ]
    groups = {}
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if a is not None and b is not None:
            changed = _beyond(a.slowest, b.slowest, limit) or _beyond(a.seconds, b.seconds, limit)
            changed = changed or a.count != b.count
            if not changed or abs(b.total - a.total) <= 0.1 * OF_STEP * step:
                continue
            kind: Any = round(math.log(max(b.slowest, 1e-12) / max(a.slowest, 1e-12)), 2)
        else:
            kind = "new" if a is None else "gone"
        groups.setdefault((*key[:4], kind), []).append((key[4], a, b))
    found = []
    for (stream, kind_name, operation, phase, _), members in groups.items():
        # a rank has one of the stages (or its share of them): not the sum over the pipeline
        _, old_worst, new_worst = max(members, key=lambda member: abs(_delta(*member[1:])))
        found.append(
            _Changed(
                f"{operation} {_phase(phase)}".strip(),
                kind_name,
                stream,
                tuple(sorted(stage for stage, _, _ in members)),
                old_worst,
                new_worst,
                _delta(old_worst, new_worst),
            )
        )
    # what grew most first; what shrank last
    return sorted(found, key=lambda item: (item.delta < 0, -abs(item.delta), item.name))


def _delta(old: OperationFigures | None, new: OperationFigures | None) -> float:
    """Seconds more per step on the slowest rank."""
    return (new.total if new else 0.0) - (old.total if old else 0.0)


def _phase(phase: str) -> str:
    names = {"F": "forward", "I": "input gradient", "W": "weight gradient", "O": "optimizer"}
    return names.get(phase, phase)


def _totals(baseline: Baseline) -> dict[tuple[int, str], float]:
    return {key: float(np.nansum(series)) for key, series in baseline.microbatches.items()}


def _stages(old: Baseline, new: Baseline, limit: float, step: float) -> list[str]:
    before, after = _totals(old), _totals(new)
    rows = []
    for stage, phase in dict.fromkeys([*before, *after]):
        a, b = before.get((stage, phase), 0.0), after.get((stage, phase), 0.0)
        if _beyond(a, b, limit, OF_STEP * step):
            rows.append((b - a, stage, phase, a, b))
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    return [
        f"stage {stage}, {_phase(phase)}: {format_time(a)} -> {format_time(b)} per step "
        f"({_change(a, b)})"
        for _, stage, phase, a, b in rows
    ]


def _microbatches(old: Baseline, new: Baseline, limit: float, step: float) -> list[str]:
    found: list[tuple[float, str]] = []
    for key in dict.fromkeys([*old.microbatches, *new.microbatches]):
        a, b = old.microbatches.get(key), new.microbatches.get(key)
        if a is None or b is None:
            continue
        if len(a) != len(b):
            found.append((math.inf, f"stage {key[0]}: {len(a)} -> {len(b)} micro-batches"))
            continue
        delta = b - a
        floor = OF_STEP * step / max(1, len(a))
        changed = np.flatnonzero(np.abs(delta) > np.maximum(limit * np.abs(a), floor))
        if not changed.size:
            continue
        worst = changed[np.argmax(delta[changed])] if (delta[changed] > 0).any() else changed[0]
        which = "all" if changed.size == len(a) else format_spans(changed.tolist())
        found.append(
            (
                float(delta[changed].sum()),
                f"stage {key[0]}, {_phase(key[1])}: micro-batches {which} changed, most of all "
                f"{worst}: {format_time(float(a[worst]))} -> {format_time(float(b[worst]))} "
                f"({_change(float(a[worst]), float(b[worst]))})",
            )
        )
    return [text for _, text in sorted(found, key=lambda row: -row[0])]


def _culprits(
    given: Sequence[str], order: Sequence[str], changed: Sequence[_Changed], step: float
) -> list[str]:
    """Causes rather than effects, in the order in which they explain the most."""
    found = []
    # another order moves operations between stages and changes what overlaps with them: only
    # their durations tell something then, and small changes are effects of the order
    slower = [
        item
        for item in changed
        if item.delta > (OF_STEP if not order else 0.01) * step
        and (not order or (item.old and item.new and item.new.slowest > 1.01 * item.old.slowest))
    ]
    for text in given:
        if " links: " in text or text.startswith("accelerators"):
            found.append(f"the cluster changed; {text}")
    for text in given:
        if text.startswith("experiment"):
            found.append(f"the {text.replace(', ', ' changed, ', 1)}")
    if order:
        found.append(
            f"the schedule changed: {len(order)} pipeline rank(s) execute their passes in another "
            f"order; {order[0]}"
        )
    if slower:
        top = slower[0]
        others = list(dict.fromkeys(item.name for item in slower[1:] if item.name != top.name))
        more = f"; then {', '.join(others[:3])}" if others else ""
        found.append(f"slower operation: {top.text}{more}")
    return found
