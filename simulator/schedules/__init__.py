"""Pipeline schedules: one function per schedule, and reading, checking, timing, synthesising them.

from simulator.schedules import build, simulate, Durations

schedule = build("zb-h1", ranks=8, microbatches=32)
timing = simulate(schedule, Durations(F=1, B=2, I=1, W=1, comm=0.1))
timing.makespan, timing.bubble_fraction
"""

from simulator.schedules import (  # noqa: F401  (imported for their registrations)
    automatic,
    bidirectional,
    synchronous,
    synthesis,
    waves,
    zero_bubble,
)
from simulator.schedules.actions import Action, Overlap, flatten, parse_action, parts
from simulator.schedules.bubbles import IdleTime, attribute
from simulator.schedules.checking import validate
from simulator.schedules.files import read_schedule, to_csv, write_csv
from simulator.schedules.lowering import lower
from simulator.schedules.memory import (
    ActivationMemory,
    MemoryCurve,
    memory_curves,
    peak_in_flight,
)
from simulator.schedules.partition import Layer, Partition, partition
from simulator.schedules.registry import ScheduleKind, build, describe, names, register
from simulator.schedules.schedule import Schedule
from simulator.schedules.synthesis import Synthesis, synthesise
from simulator.schedules.timing import Durations, Timing, simulate, steady_bubble_fraction

__all__ = [
    "Action",
    "ActivationMemory",
    "Durations",
    "IdleTime",
    "Layer",
    "MemoryCurve",
    "Overlap",
    "Partition",
    "Schedule",
    "ScheduleKind",
    "Synthesis",
    "Timing",
    "attribute",
    "build",
    "describe",
    "flatten",
    "lower",
    "memory_curves",
    "names",
    "parse_action",
    "partition",
    "parts",
    "peak_in_flight",
    "read_schedule",
    "register",
    "simulate",
    "steady_bubble_fraction",
    "synthesise",
    "to_csv",
    "validate",
    "write_csv",
]
