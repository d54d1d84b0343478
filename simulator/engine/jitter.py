"""Per-operation jitter: seeded random factors on the duration of what ranks compute.

Factors are drawn by counter: each is a function of (seed, key of the rank, stream, entry, task)
alone, so that they depend neither on the order of the simulation nor on what else is simulated, and
two runs that differ in one operation draw the same factors for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from simulator.errors import InputError, unknown_name

DISTRIBUTIONS = ("gamma", "lognormal", "normal", "uniform")
PER = ("class", "rank")


class JitterSpec(Protocol):
    """What `simulate` needs to know; `simulator.experiment.Jitter` is one."""

    @property
    def distribution(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def per(self) -> str: ...


@dataclass(frozen=True)
class Jitter:
    """Random factors with mean 1 and relative standard deviation `scale`.

    `per="rank"`: every rank draws its own (nothing folds); `per="class"`: ranks that are
    indistinguishable without jitter share theirs, so that the run stays folded.
    """

    distribution: str = "lognormal"
    scale: float = 0.02
    seed: int = 0
    per: str = "rank"


class Factors:
    """Draws the factors of a `JitterSpec`.

    Raises
    ------
    InputError
        For an unknown distribution, or a scale that is negative or (uniform) above 1/sqrt(3).
    """

    def __init__(self, spec: JitterSpec) -> None:
        if spec.distribution not in DISTRIBUTIONS:
            raise unknown_name("jitter distribution", spec.distribution, DISTRIBUTIONS)
        if spec.per not in PER:
            raise unknown_name("jitter 'per'", spec.per, PER)
        if not spec.scale >= 0.0:
            raise InputError(f"must not be negative, got {spec.scale!r}", place="jitter.scale")
        if spec.distribution == "uniform" and spec.scale > 3.0**-0.5:
            raise InputError(
                f"uniform jitter with mean 1 has a scale of at most 0.577, got {spec.scale!r}",
                place="jitter.scale",
            )
        self.spec = spec
        self._seed = _hash(np.uint64(spec.seed & (2**64 - 1)), 0x6A09E667F3BCC908)

    def factors(self, key: int, stream: int, entry: int, count: int) -> np.ndarray:
        """Factors [count] >= 0 of tasks 0..count-1 of an entry of a rank with key `key`."""
        scale = float(self.spec.scale)
        if scale == 0.0:
            return np.ones(count)
        state = self._seed
        for word in (key, stream, entry):
            state = _hash(state, word)
        with np.errstate(over="ignore"):
            bits = _hash(np.full(count, state, dtype=np.uint64), np.arange(count))
        u = ((bits >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
        if self.spec.distribution == "uniform":
            return 1.0 + scale * 12.0**0.5 * (u - 0.5)
        if self.spec.distribution == "gamma":
            shape = scale**-2
            return special.gammaincinv(shape, u) / shape
        normal = special.ndtri(u)
        if self.spec.distribution == "normal":
            # Cut off at 0, the mean is Phi(1/s) + s phi(1/s) (Tobin's censored normal).
            density = np.exp(-0.5 / scale**2) / np.sqrt(2.0 * np.pi)
            return np.maximum(0.0, 1.0 + scale * normal) / (
                special.ndtr(1.0 / scale) + scale * density
            )
        sigma = np.sqrt(np.log1p(scale * scale))
        return np.exp(sigma * normal - sigma * sigma / 2.0)


def _hash(state: np.ndarray | np.uint64, word: np.ndarray | int) -> np.ndarray | np.uint64:
    """One round of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over state and word."""
    with np.errstate(over="ignore"):
        x = state * np.uint64(0x2545F4914F6CDD1D) + np.asarray(word).astype(np.uint64)
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
