"""Kernels that move bytes: the rate that each class reaches, and what the L2 cache serves.

A kernel is limited by HBM (a share `fraction` of what a plain stream reaches) or, where its loads
are narrow or it reduces across a block, by what one SM can issue (`per_clock` bytes per clock).
The two limits are joined smoothly. The second is why the same unfused norm runs at a third of HBM
bandwidth on A100 and on H100 but at most of it on an A40. See docs/kernels.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from simulator.catalog.accelerators import Accelerator
from simulator.errors import unknown_name


@dataclass(frozen=True)
class KernelClass:
    """How well a class of kernels uses memory."""

    fraction: float
    """Share of a plain stream's HBM rate."""
    per_clock: float
    """Bytes per clock and SM that its instructions can move, of 4-byte elements; kernels that
    compute on each element move half as much of 2-byte elements."""
    source: str
    waits: bool = False
    """The limit of an SM is its waiting for memory, so that L2 shortens it too."""
    vectorised: bool = False
    """Moves whole vectors with little arithmetic, whatever the width of their elements."""


_STREAM = "vector_fp32_a100: add, mul, relu, gelu at 0.86-0.89 of HBM, the stream rate itself"

#: The classes of `MemoryBound.op_class`, then variants that measured files name.
CLASSES: dict[str, KernelClass] = {
    "copy": KernelClass(1.0, 64.0, _STREAM, vectorised=True),
    "elementwise": KernelClass(1.0, 48.0, _STREAM, vectorised=True),
    "activation": KernelClass(0.97, 32.0, "vectorised gated activations; vector_fp32_a100: gelu"),
    "norm": KernelClass(0.90, 22.0, "vector_fp32_a100: layer_norm 0.58-0.85 of HBM by width"),
    "softmax": KernelClass(0.90, 16.0, "vector_fp32_a100: softmax 0.8 where a row fits an SM"),
    "cross_entropy": KernelClass(0.90, 16.0, "as softmax"),
    "embedding": KernelClass(
        0.80, 16.0, "gathered rows: partial sectors at their ends", vectorised=True
    ),
    "permute": KernelClass(0.80, 16.0, "gathered rows, as embedding", vectorised=True),
    "router": KernelClass(0.60, 8.0, "top-k over short rows: as the narrow norm kernels"),
    "cast": KernelClass(0.92, 32.0, "one stream in, a narrower one out", vectorised=True),
    "optimizer": KernelClass(0.95, 40.0, "multi-tensor Adam: several streams"),
    "layer_norm_fp32": KernelClass(0.95, 7.4, "vector_fp32_a100: eager LayerNorm"),
    "pow": KernelClass(1.0, 6.0, "vector_fp32_a100: pow, limited by its arithmetic"),
    "norm_narrow": KernelClass(
        1.0, 9.2, "elementwise_fp16: early vLLM norms, A100 and H100", waits=True
    ),
    "activation_narrow": KernelClass(1.0, 14.8, "elementwise_fp16: early vLLM activations"),
}

#: Sharpness of the join of the two limits.
_POWER = 4.0
#: Largest share of traffic that L2 keeps from HBM, and up to how many L2 sizes any: the `add`
#: kernels of elementwise_fp16, whose inputs the kernel before has just written.
_L2_SHARE, _L2_REACH = 0.35, 2.0


@functools.lru_cache(maxsize=4096)
def _limits(op_class: str, accelerator: Accelerator, width: float) -> tuple[float, float]:
    """(byte/s from HBM, byte/s that the SMs issue) of a class; raises `InputError` if unknown."""
    kernel = CLASSES.get(op_class)
    if kernel is None:
        raise unknown_name("kernel class", op_class, CLASSES)
    stream = accelerator.constants["stream_fraction"] * accelerator.memory_bandwidth
    if accelerator.kind != "gpu" or not accelerator.clock_hz:
        return stream * kernel.fraction, math.inf
    issued = kernel.per_clock * accelerator.core_count * accelerator.clock_hz
    if not kernel.vectorised:
        issued *= width / 4.0
    return stream * kernel.fraction, issued


def _joined(stream: float, issued: float) -> float:
    return float((stream**-_POWER + issued**-_POWER) ** (-1.0 / _POWER))


def memory_rate(op_class: str, accelerator: Accelerator, width: float = 2.0) -> float:
    """byte/s that a kernel of this class reaches on data in HBM, of elements of `width` bytes;
    raises `InputError`."""
    return _joined(*_limits(op_class, accelerator, width))


def memory_cost(
    op_class: str,
    traffic: float,
    accelerator: Accelerator,
    kernels: int = 1,
    width: float = 2.0,
) -> tuple[float, float]:
    """(bytes to and from HBM, byte/s at which they flow) of `kernels` launches moving `traffic`.

    `width`: bytes per element.

    What L2 serves does not cross HBM, but the SMs issue it all the same. Raises `InputError`.
    """
    stream, issued = _limits(op_class, accelerator, width)
    share = hbm_share(traffic / max(1, kernels), accelerator)
    return traffic * share, _joined(stream, issued if CLASSES[op_class].waits else issued * share)


def hbm_share(traffic: float, accelerator: Accelerator) -> float:
    """Share of a kernel's traffic that reaches HBM; the rest is still in L2."""
    reach = _L2_REACH * accelerator.l2_bytes
    if accelerator.kind != "gpu" or traffic >= reach or reach <= 0.0:
        return 1.0
    return 1.0 - _L2_SHARE * (1.0 - traffic / reach)
