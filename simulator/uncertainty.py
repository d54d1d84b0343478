"""How far a step time can be trusted: a band from a seeded Monte-Carlo run.

The step time of the mean rank is the sum of its breakdown (`Summary.breakdown_s`): matrix products,
attention, memory-bound kernels, exposed communication, the host, bubble. Each part is uncertain by
a known amount; the run draws a log-normal factor for each and adds the parts up. A bubble is idle
time of the same kernels on other stages and takes their factor. The ranges are documented spreads
of measurements, not residuals of the published steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: Relative standard deviation of each part; source of each range in `SOURCES`.
SPREAD: dict[str, float] = {
    "gemm": 0.07,
    "attention": 0.10,
    "memory_bound": 0.15,
    "communication": 0.20,
    "host": 0.25,
    "stack": 0.05,
}
#: Families whose sustained matrix rate is known less well.
GEMM_SPREAD_BY_FAMILY: dict[str, float] = {"blackwell": 0.10, "cdna3": 0.12, "tpu": 0.08}
SOURCES: dict[str, str] = {
    "gemm": "sustained rate inside training 12 % (A100, H100) to 29 % (B200) below the "
    "micro-benchmark, differing by laboratory; a uniform range of +-12 % has this deviation",
    "attention": "kernel versions: 0.67 against 0.59 of peak for the same FlashAttention-2 shapes",
    "memory_bound": "achieved share of HBM bandwidth 0.36-0.68 for norms, 0.85-0.93 for streams",
    "communication": "fabric efficiency 0.75-0.97 of line rate between clusters",
    "host": "4-10 us per kernel launched by eager PyTorch, 1.2-2.1 ms per grouped linear of 64 "
    "experts; a log-uniform range of 1 : 2.4 has this deviation",
    "stack": "the same configuration measured in another software release: median 4 %, so that "
    "one release deviates by about 5 %",
}
_SAMPLES = 4000
_SEED = 20260101


@dataclass(frozen=True)
class Band:
    """Central 90 % of the step time, seconds."""

    low_s: float
    high_s: float


def band(breakdown_s: Mapping[str, float], family: str, *, seed: int = _SEED) -> Band:
    """The central 90 % band of a step time.

    Parameters
    ----------
    breakdown_s:
        Seconds by part, as in `Summary.breakdown_s`.
    family:
        Accelerator family, for the spread of its matrix rate.
    """
    parts = list(breakdown_s.items())
    if not parts:
        return Band(math.nan, math.nan)
    random = np.random.default_rng(seed)
    draws = {name: random.standard_normal(_SAMPLES) for name in SPREAD}
    spread = {**SPREAD, "gemm": GEMM_SPREAD_BY_FAMILY.get(family, SPREAD["gemm"])}
    total = np.zeros(_SAMPLES)
    for name, seconds in parts:
        source = _SOURCE_OF_PART.get(name, "communication")
        total += seconds * np.exp(spread[source] * draws[source])
    total *= np.exp(spread["stack"] * draws["stack"])
    low, high = np.percentile(total, [5.0, 95.0])
    return Band(float(low), float(high))


_SOURCE_OF_PART = {
    "gemm": "gemm",
    "bubble": "gemm",
    "attention": "attention",
    "memory_bound": "memory_bound",
    "optimizer": "memory_bound",
    "other": "memory_bound",
    "host": "host",
}
