"""Activation memory of every rank over time, with recomputation and offload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.schedules.actions import flatten, parts
from simulator.schedules.schedule import Schedule
from simulator.schedules.timing import Durations, Timing

FloatArray = NDArray[np.float64]


def peak_in_flight(schedule: Schedule, release: str = "W") -> list[int]:
    """Largest number of chunk activations that each rank holds at once.

    A forward adds one; it is released at the end of B or W (`release="W"`) or of B or I
    (`release="I"`: what remains for W is much smaller). Without any backward pass an activation is
    released at once. Independent of durations, since each rank is serial.
    """
    if release not in ("W", "I"):
        raise InputError(f"activations are released at W or at I, got {release!r}")
    peaks = []
    keeps = schedule.has_backward
    for order in schedule.actions:
        held = peak = 0
        for action in flatten(order):
            if action.kind == "F":
                held += 1
                peak = max(peak, held)
                held -= not keeps
            elif action.kind == "B" or action.kind == release:
                held -= 1
        peaks.append(peak)
    return peaks


@dataclass(frozen=True)
class ActivationMemory:
    """What one micro-batch takes of a rank's memory in one stage.

    Attributes
    ----------
    activation:
        Activations of a forward pass, kept for its backward (bytes, or any unit); one number or
        one per stage.
    kept_for_weights:
        Share of `activation` that is kept between I and W where they are split (M_W / M_B in the
        Zero Bubble paper).
    recompute:
        Share of the forward pass that is repeated in the backward: 0 none, 1 all ("full").
    checkpoint:
        Share of `activation` that is stored where the rest is recomputed (a stage's or layer's
        input). Between forward and backward (1 - recompute) + recompute * checkpoint of
        `activation` is held; while the backward runs, all of it.
    offload:
        Share of what is held that moves to the host after the forward and comes back before the
        backward.
    offload_time:
        Time of one such transfer, one way, in the unit of the durations. Activations whose
        backward comes too early for both transfers stay on the device.
    """

    activation: Any = 1.0
    kept_for_weights: float = 1.0
    recompute: float = 0.0
    checkpoint: float = 0.0
    offload: float = 0.0
    offload_time: float = 0.0

    def __post_init__(self) -> None:
        for key in ("kept_for_weights", "recompute", "checkpoint", "offload"):
            if not 0 <= getattr(self, key) <= 1:
                raise InputError(f"{key} is a share from 0 to 1, got {getattr(self, key)!r}")
        if self.offload_time < 0:
            raise InputError(f"offload_time must not be negative, got {self.offload_time!r}")

    def per_stage(self, stages: int) -> list[float]:
        """`activation` of every stage."""
        if isinstance(self.activation, Sequence):
            if len(self.activation) != stages:
                raise InputError(
                    f"activation: expected one number or {stages}, got {len(self.activation)}"
                )
            return [float(value) for value in self.activation]
        return [float(self.activation)] * stages

    def durations(self, durations: Durations) -> Durations:
        """The durations with the recomputation in the backward passes."""
        return durations.with_recomputation(self.recompute) if self.recompute else durations


@dataclass(frozen=True)
class MemoryCurve:
    """Activation memory of one rank as a step function.

    Attributes
    ----------
    times, values:
        `values[i]` is held from `times[i]` to `times[i + 1]`; times ascend, without duplicates.
    peak, peak_time:
        The largest value and when it is first reached.
    host_busy:
        Time that the link to the host is busy with offload transfers, both directions.
    """

    times: FloatArray
    values: FloatArray
    host_busy: float = 0.0

    @property
    def peak(self) -> float:
        """The largest value."""
        return float(self.values.max()) if self.values.size else 0.0

    @property
    def peak_time(self) -> float:
        """When the peak is first reached."""
        return float(self.times[int(self.values.argmax())]) if self.values.size else 0.0


def memory_curves(timing: Timing, memory: ActivationMemory | None = None) -> list[MemoryCurve]:
    """Activation memory of every rank over time.

    A forward takes its activation at its start. What the backward does not need of it is dropped at
    the forward's end; the rest is released at the end of B or W, or in part at the end of I.
    Recomputed activations exist while B runs (or from I to W, less what I releases).

    Parameters
    ----------
    timing:
        From `simulate`; with recomputation, simulated with `memory.durations(...)`.
    memory:
        The default counts whole activations that are released at B or W.
    """
    memory = memory or ActivationMemory()
    schedule = timing.schedule
    size = memory.per_stage(schedule.stages)
    stored = (1 - memory.recompute) + memory.recompute * memory.checkpoint
    keeps = schedule.has_backward
    curves = []
    for rank, order in enumerate(schedule.actions):
        events: list[tuple[float, float]] = []
        ready: dict[tuple[int, int | None], float] = {}
        host_busy = 0.0
        for index, entry in enumerate(order):
            begin = float(timing.start[rank][index])
            end = float(timing.end[rank][index])
            for stage, kind, k in parts(entry):
                whole = size[stage]
                held = whole * stored
                if kind == "F":
                    events.append((begin, whole))
                    events.append((end, (held if keeps else 0.0) - whole))
                    ready[stage, k] = end
                    continue
                if kind in ("B", "I"):
                    events.append((begin, whole - held))
                    away = memory.offload * held
                    moved = ready[stage, k] + memory.offload_time
                    back = begin - memory.offload_time
                    if away and moved < back:
                        events += [(moved, -away), (back, away)]
                        host_busy += 2 * memory.offload_time
                if kind == "B":
                    events.append((end, -whole))
                elif kind == "I":
                    events.append((end, -whole * (1 - memory.kept_for_weights)))
                else:
                    events.append((end, -whole * memory.kept_for_weights))
        curves.append(_curve(events, host_busy))
    return curves


def _curve(events: list[tuple[float, float]], host_busy: float) -> MemoryCurve:
    if not events:
        return MemoryCurve(np.zeros(1), np.zeros(1), host_busy)
    table = np.asarray(events, dtype=np.float64)
    times, place = np.unique(table[:, 0], return_inverse=True)
    steps = np.bincount(place.ravel(), weights=table[:, 1], minlength=times.size)
    values: FloatArray = np.cumsum(steps, dtype=np.float64)
    # Rounding leaves crumbs where everything has been released.
    scale = float(np.abs(values).max()) or 1.0
    values[np.abs(values) < 1e-12 * scale] = 0.0
    return MemoryCurve(times, values, host_busy)
