"""Matrix products: tiles, waves, split-K, the memory limit and the power limit.

The kernel that a library would choose is the cheapest of a few tile shapes and split-K factors.
A tile's time is the larger of its arithmetic at the achieved share of one SM's peak and of its
operand loads from L2; tiles run in waves of one per SM, each wave with a fixed cost (pipeline fill
and epilogue). The whole is at least the traffic to HBM. See docs/kernels.md.

Everything is vectorised over shapes, so that fits and single look-ups share one implementation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.catalog.accelerators import Accelerator
from simulator.model.operations import BYTES_PER_ELEMENT

_TILES = np.array(
    [(256, 128), (128, 256), (128, 128), (256, 64), (64, 256),
     (128, 64), (64, 128), (64, 64), (64, 32), (32, 64)], dtype=float,
)  # fmt: skip
_SPLITS = np.array([1, 2, 4, 8, 16, 32], dtype=float)
# one candidate = (tile rows, tile columns, split)
_BM = np.repeat(_TILES[:, 0], len(_SPLITS))
_BN = np.repeat(_TILES[:, 1], len(_SPLITS))
_SPLIT = np.tile(_SPLITS, len(_TILES))
_BK = 64.0
_SINGLE = _SPLIT == 1


@dataclass(frozen=True)
class GemmRates:
    """What the GEMM formula needs of an accelerator and a precision; SI units."""

    tile_flops: float
    """FLOP/s of one SM on a resident tile: efficiency * peak / SMs."""
    cores: int
    l2_rate: float
    """Operand bytes/s that one SM loads from L2."""
    wave: float
    latency: float
    hbm_rate: float
    """byte/s that a GEMM reaches from HBM."""
    power: float
    """Exponent p of (compute^p + memory^p)^(1/p)."""
    throttle: float
    throttle_flop: float


@functools.cache
def gemm_rates(accelerator: Accelerator, precision: str) -> GemmRates:
    """The rates of one accelerator and precision, from its constants and datasheet."""
    c = accelerator.constants
    compute = accelerator.compute_precision(precision)
    peak = accelerator.peak_flops[compute]
    reference = accelerator.peak("bf16")
    eff = c["gemm_efficiency"]
    if compute in ("fp8", "mxfp8", "nvfp4", "int8"):
        eff = c["gemm_fp8_efficiency"]
    per_core = peak / accelerator.core_count
    return GemmRates(
        tile_flops=eff * per_core,
        cores=accelerator.core_count,
        # L2 delivers bytes, not elements: its rate follows the 16-bit peak it was built for
        l2_rate=c["gemm_l2_bytes_per_flop"] * reference / accelerator.core_count,
        wave=c["gemm_wave_s"],
        latency=c["gemm_latency_s"],
        hbm_rate=c["gemm_bandwidth_fraction"] * accelerator.memory_bandwidth,
        power=c["gemm_p"],
        throttle=c["gemm_throttle"],
        throttle_flop=c["gemm_throttle_flop"],
    )


def gemm_traffic(
    m: ArrayLike, n: ArrayLike, k: ArrayLike, e_in: ArrayLike, e_out: ArrayLike,
    batch: ArrayLike = 1.0, accumulate: ArrayLike = False,
) -> NDArray[np.float64]:  # fmt: skip
    """Least bytes to and from HBM: both operands once, the result once (twice if accumulated)."""
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    writes = np.asarray(e_out) * (1.0 + np.asarray(accumulate, dtype=float))
    traffic: NDArray[np.float64] = np.asarray(batch) * (
        np.asarray(e_in) * (m * k + n * k) + writes * m * n
    )
    return traffic


def gemm_body_seconds(
    m: ArrayLike, n: ArrayLike, k: ArrayLike, rates: GemmRates,
    e_in: ArrayLike = 2.0, e_out: ArrayLike = 2.0,
    batch: ArrayLike = 1.0, accumulate: ArrayLike = False,
) -> NDArray[np.float64]:  # fmt: skip
    """Seconds of D[m,n] = A[m,k] B[k,n] without the fixed latency; arrays broadcast."""
    m, n, k, b = (np.asarray(x, dtype=float)[..., None] for x in (m, n, k, batch))
    e = np.asarray(e_in, dtype=float)[..., None]
    waves = np.ceil(b * np.ceil(m / _BM) * np.ceil(n / _BN) * _SPLIT / rates.cores)
    depth = _BK * np.ceil(k / (_BK * _SPLIT))
    tile = np.maximum(
        2.0 * _BM * _BN * depth / rates.tile_flops, e * (_BM + _BN) * depth / rates.l2_rate
    )
    cost = waves * (tile + rates.wave)
    # split-K: fp32 partial sums written and read once per slice
    cost = cost + np.where(_SINGLE, 0.0, 8.0 * _SPLIT * b * m * n / rates.hbm_rate)
    cost = np.where(_SINGLE | (k / _SPLIT >= _BK), cost, np.inf)
    compute = cost.min(axis=-1)
    flops = (2.0 * b * m * n * k)[..., 0]
    compute = compute * (1.0 + rates.throttle * flops / (flops + rates.throttle_flop))
    memory = gemm_traffic(m[..., 0], n[..., 0], k[..., 0], e_in, e_out, batch, accumulate)
    memory = memory / rates.hbm_rate
    body: NDArray[np.float64] = (compute**rates.power + memory**rates.power) ** (1 / rates.power)
    return body


def element_bytes(precision: str) -> float:
    """Storage bytes per element of `precision`, block scales included."""
    return BYTES_PER_ELEMENT[precision]
