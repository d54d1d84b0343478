"""Matrix products: tiles, waves, split-K, the memory limit and the power limit.

The kernel that a library would choose is the cheapest of a few tile shapes and split-K factors.
A tile's time is the largest of its arithmetic at the achieved share of one SM's peak, of its
operand loads from L2 and of the latency of its steps along k, plus an epilogue that writes the
tile; tiles run in waves over the SMs. The whole is at least the traffic to HBM, and slows down
where sustained power would exceed the board's limit. docs/kernels.md has the formulas, how the
constants scale from one accelerator to another, and the errors.

Everything is vectorised over shapes, so that fits and single look-ups share one implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.catalog.accelerators import Accelerator
from simulator.model.operations import BYTES_PER_ELEMENT

_TILES = np.array(
    [(256, 128), (128, 256), (128, 128), (256, 64), (64, 256),
     (128, 64), (64, 128), (64, 64), (64, 32), (32, 64)], dtype=float,
)  # fmt: skip
_SPLITS = np.array([1, 2, 3, 4, 6, 8, 16, 32], dtype=float)
# one candidate = (tile rows, tile columns, split)
_BM = np.repeat(_TILES[:, 0], len(_SPLITS))
_BN = np.repeat(_TILES[:, 1], len(_SPLITS))
_SPLIT = np.tile(_SPLITS, len(_TILES))
_AREA = _BM * _BN
_EDGE = _BM + _BN
_INV_BM, _INV_BN, _INV_STEP = 1.0 / _BM, 1.0 / _BN, 1.0 / (32.0 * _SPLIT)
_SINGLE = _SPLIT == 1
_REDUCED = ~_SINGLE
_MIN_K = np.where(_SINGLE, 0.0, 64.0 * _SPLIT)
_LARGE = _AREA >= 32768
#: k is walked in steps of 32 (cuBLAS kernel names: tilesize256x128x32)
_STEP = 32.0

#: Peaks at or below 8 bits have their own achieved share.
_NARROW = frozenset({"fp8", "mxfp8", "nvfp4", "int8"})


@dataclass(frozen=True)
class GemmRates:
    """What the GEMM formula needs of an accelerator and a precision; SI units."""

    e_in: float
    """Bytes per input element."""
    cores: int
    peak: float
    """Achieved FLOP/s of all SMs on resident tiles."""
    tile: NDArray[np.float64]
    """Seconds of one step of 32 along k, by candidate: the largest of arithmetic at the achieved
    share of an SM's peak, operand loads from L2, and the latency of a step."""
    epilogue: NDArray[np.float64]
    """Seconds to write a finished tile, per byte of output element, by candidate."""
    epilogue_wide: float
    """Share of wider outputs' additional bytes that an epilogue pays (the rest overlaps)."""
    split: float
    """Seconds that the reduction of a split-K adds (a second kernel, or a semaphore)."""
    wave_share: float
    """1: a started wave costs a whole one; 0: it costs its share (persistent, stream-K)."""
    large_only: float
    """Below this k, tiles under 128x256 are used for a single wave only."""
    latency: float
    memory_latency: float
    hbm_rate: float
    """byte/s that a GEMM reaches from HBM."""
    power: float
    """Exponent p of (compute^p + memory^p)^(1/p)."""
    throttle: float
    """Slow-down of long products."""
    throttle_flop: float
    """FLOP at which half of `throttle` has set in."""
    clock: float
    """Least slow-down of any product: the clock of a device at its power limit."""
    pace: float
    """Time of the arithmetic over its time in a micro-benchmark, for other reasons."""
    array: float
    """Edge of a systolic array that operands are padded to; 0: an SM-based accelerator."""


def power_share(accelerator: Accelerator, compute: str, efficiency: float) -> float:
    """Share of peak that the power limit leaves, at most the efficiency.

    Dynamic power is energy per FLOP times rate, and energy grows with the square of voltage, which
    follows the clock: P = e F f^1.5 with F = efficiency x peak x f / f_max, so that F goes with
    P^0.4 and efficiency^0.6: units that wait for operands draw less. `e`
    (`gemm_energy_j_per_flop`, at 1 GHz) is a property of the process node and the design.
    """
    c = accelerator.constants
    share = efficiency
    energy = c["gemm_energy_j_per_flop"]
    if energy > 0.0 and accelerator.clock_hz:
        # narrower formats cost less energy in proportion to their higher peak
        peak = accelerator.peak_flops.get("bf16") or accelerator.peak(compute)
        watts = peak * energy * (accelerator.clock_hz / 1e9) ** 1.5
        share = min(share, efficiency**0.6 * (accelerator.power_w / watts) ** 0.4)
    return share


def gemm_rates(
    accelerator: Accelerator, precision: str, *, sustained: bool = False, pace: float = 1.0
) -> GemmRates:
    """The rates of one accelerator and precision, from its constants and datasheet.

    `sustained`: the device has been busy for seconds, as in training, so that its clock has settled
    at the power limit and short products run at it too; else only a long product reaches it.
    `pace` stretches the arithmetic, not the traffic to HBM.
    """
    c: Mapping[str, float] = accelerator.constants
    compute = accelerator.compute_precision(precision)
    peak = accelerator.peak_flops[compute]
    # L2 and epilogues deliver bytes: their rate follows the 16-bit peak that they were built for
    base = accelerator.peak("bf16") / accelerator.core_count
    efficiency = c["gemm_efficiency"]
    if compute in _NARROW:
        efficiency = c["gemm_fp8_efficiency"]
    elif compute == "fp32":
        efficiency = c["gemm_fp32_efficiency"]
    share = np.where(
        _AREA >= 24576,
        1.0,
        np.where(_AREA >= 16384, c["gemm_tile_128_efficiency"], c["gemm_tile_small_efficiency"]),
    )
    power = efficiency / power_share(accelerator, compute, efficiency) - 1.0
    e_in = element_bytes(precision)
    arithmetic = 2.0 * _STEP * _AREA / (efficiency * peak / accelerator.core_count * share)
    loads = e_in * _STEP * _EDGE / (c["gemm_l2_bytes_per_flop"] * base)
    return GemmRates(
        e_in=e_in,
        cores=accelerator.core_count,
        peak=efficiency * peak,
        tile=np.maximum(np.maximum(arithmetic, loads), c["gemm_k_step_s"] / 2.0),
        epilogue=_AREA / (c["gemm_epilogue_bytes_per_flop"] * base),
        epilogue_wide=c["gemm_epilogue_wide"],
        split=c["gemm_split_s"],
        wave_share=c["gemm_wave_share"],
        large_only=c["gemm_large_tile_k"],
        latency=c["gemm_latency_s"],
        memory_latency=c["gemm_memory_latency_s"],
        hbm_rate=c["gemm_bandwidth_fraction"] * accelerator.memory_bandwidth,
        power=c["gemm_p"],
        throttle=max(power, c["gemm_throttle"]),
        throttle_flop=c["gemm_throttle_s"] * peak,
        clock=power if sustained else 0.0,
        pace=pace,
        array=c["mxu_edge"],
    )


cached_gemm_rates = functools.lru_cache(maxsize=1024)(gemm_rates)


def gemm_traffic(
    m: Any, n: Any, k: Any, e_in: Any, e_out: Any, batch: Any = 1.0, accumulate: Any = False
) -> Any:
    """Least bytes to and from HBM: both operands once, the result once (twice if accumulated)."""
    return batch * (e_in * (m * k + n * k) + e_out * (1.0 + accumulate) * m * n)


def _tiled(m: Any, n: Any, k: Any, b: Any, e_out: Any, r: GemmRates) -> Any:
    """Seconds of the cheapest tile and split; the last axis of the operands is the candidates'."""
    tiles = b * np.ceil(m * _INV_BM) * np.ceil(n * _INV_BN)
    occupied = tiles * _SPLIT / r.cores
    waves = np.ceil(occupied)
    if r.wave_share < 1.0:
        smooth = np.maximum(occupied, 1.0)
        waves = smooth + (waves - smooth) * r.wave_share
    epilogue = (2.0 + r.epilogue_wide * (e_out - 2.0)) * r.epilogue
    cost = waves * (r.tile * np.ceil(k * _INV_STEP) + epilogue)
    # split-K: fp32 partial sums written and read once per slice
    cost = cost + _REDUCED * (r.split + (8.0 / r.hbm_rate) * _SPLIT * (b * m * n))
    one_wave = tiles <= r.cores
    allowed = (_SINGLE | one_wave) & (k >= _MIN_K)
    if r.large_only > 0.0:
        allowed = allowed & (_LARGE | one_wave | (k >= r.large_only) | (m <= 64) | (n <= 64))
    return np.where(allowed, cost, np.inf).min(axis=-1)


def _systolic(m: Any, n: Any, k: Any, b: Any, r: GemmRates) -> Any:
    """Seconds on systolic arrays: n and k padded to the array's edge, m to its 8 sublanes; a
    weight tile is held for at least as many rows as loading the next one takes (its edge)."""
    rows = np.maximum(np.ceil(m / 8.0) * 8.0, r.array)
    padded = rows * np.ceil(n / r.array) * np.ceil(k / r.array) * r.array**2
    return 2.0 * b * padded / r.peak


def slow_down(flops: Any, r: GemmRates) -> Any:
    """What a product of so many FLOP loses to the clock, as a share of its time at full clock."""
    return np.maximum(r.throttle * flops / (flops + r.throttle_flop), r.clock)


def _combine(flops: Any, compute: Any, traffic: Any, r: GemmRates) -> Any:
    compute = r.pace * compute * (1.0 + slow_down(flops, r))
    memory = traffic / r.hbm_rate + r.memory_latency
    return (compute**r.power + memory**r.power) ** (1.0 / r.power)


def gemm_body_seconds(
    m: ArrayLike, n: ArrayLike, k: ArrayLike, rates: GemmRates,
    e_out: ArrayLike = 2.0, batch: ArrayLike = 1.0, accumulate: ArrayLike = False,
) -> NDArray[np.float64]:  # fmt: skip
    """Seconds of `batch` products D[m,n] = A[m,k] B[k,n] without the fixed latency.

    Parameters
    ----------
    e_out:
        Bytes per output element.
    accumulate:
        D is read as well as written.

    Arrays broadcast.
    """
    m, n, k, b, e_out = (np.asarray(x, dtype=float) for x in (m, n, k, batch, e_out))
    add = np.asarray(accumulate, dtype=float)
    if rates.array:
        compute = _systolic(m, n, k, b, rates)
    else:
        written = e_out * (1.0 + add)
        m_, n_, k_, b_, out_ = (x[..., None] for x in (m, n, k, b, written))
        compute = _tiled(m_, n_, k_, b_, out_, rates)
    traffic = gemm_traffic(m, n, k, rates.e_in, e_out, b, add)
    body: NDArray[np.float64] = _combine(2.0 * b * m * n * k, compute, traffic, rates)
    return body


def gemm_body(
    m: float, n: float, k: float, rates: GemmRates, e_out: float, batch: float, accumulate: bool
) -> float:
    """`gemm_body_seconds` of one shape, without the overhead of broadcasting."""
    if rates.array:
        compute = float(_systolic(m, n, k, batch, rates))
    else:
        compute = float(_tiled(m, n, k, batch, e_out * (1.0 + accumulate), rates))
    traffic = gemm_traffic(m, n, k, rates.e_in, e_out, batch, accumulate)
    return float(_combine(2.0 * batch * m * n * k, compute, traffic, rates))


def element_bytes(precision: str) -> float:
    """Storage bytes per element of `precision`, block scales included."""
    return BYTES_PER_ELEMENT[precision]
