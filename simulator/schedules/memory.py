"""Activations in flight per rank."""

from __future__ import annotations

from simulator.errors import InputError
from simulator.schedules.actions import flatten
from simulator.schedules.schedule import Schedule


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
