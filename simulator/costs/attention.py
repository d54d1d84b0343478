"""Fused attention: blocks of queries against blocks of keys, balanced over the SMs.

After the kernels of FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608): a work item is one
block of 128 queries of one head (backward: of 128 keys) and walks the blocks that the mask keeps.
A query-key pair costs its multiply-adds at the achieved share of the tensor cores, and its
exponential at 16 per clock and SM, the part of it that does not hide. The kernel ends with its
longest items. See docs/kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.catalog.accelerators import Accelerator
from simulator.model.operations import BYTES_PER_ELEMENT, Attention, Phase

_BLOCK = 128.0
#: Exponentials per clock and SM (special function units; CUDA programming guide, throughput of
#: native arithmetic instructions, compute capability 7.0 to 10.0).
_EXPONENTIALS_PER_CLOCK = 16.0


def _narrow(precision: str) -> bool:
    return BYTES_PER_ELEMENT[precision] < 2.0


def executed(op: Attention, rates: AttentionRates) -> tuple[float, int | None]:
    """(query-key pairs per head, window) that the kernel works on: what the mask keeps
    (`Attention.score_pairs`), but a backward in 8 bits ignores windows, on some accelerators causal
    masks too."""
    if not _narrow(op.precision) or op.phase is Phase.FORWARD:
        return op.score_pairs, op.window
    pairs = float(op.q_len) * op.kv_len
    return (pairs / 2.0 if op.causal and rates.narrow_causal else pairs), None


@dataclass(frozen=True)
class AttentionRates:
    """What the attention formula needs of an accelerator and a precision; SI units."""

    core_flops: float
    """Peak FLOP/s of one SM."""
    cores: int
    forward_efficiency: float
    backward_efficiency: float
    wide_share: float
    """Efficiency of head dimensions above 128 relative to 128 (registers, other kernels)."""
    backward_wide_share: float
    exponential: float
    """Seconds of one SM per query-key pair that the softmax adds."""
    tail: float
    """Share of the longest item by which the kernel outlasts perfect balance."""
    backward_tail: float
    idle_boost: float
    """How much faster an item runs, at most, where most SMs have none (clock, shared L2)."""
    throttle: float
    throttle_flop: float
    narrow_causal: bool
    """Does the backward in 8 bits skip what a causal mask drops?"""
    item: float
    """Seconds that a work item takes besides its pairs (first loads, last stores); forward."""
    backward_item: float
    backward_bytes: float
    """Bytes per query element of the kernels around the backward (the products of output and its
    gradient; the query gradient's fp32 accumulator, cleared, read and rounded)."""
    latency: float
    hbm_rate: float
    hbm_exposed: float
    """Share of the traffic to HBM that does not hide behind arithmetic."""


def attention_rates(
    accelerator: Accelerator,
    precision: str,
    overrides: Mapping[str, float] | None = None,
    *,
    sustained: bool = False,
) -> AttentionRates:
    """The rates of one accelerator and precision, from its constants and datasheet; `sustained` as
    for `gemm_rates`."""
    c: Mapping[str, float] = {**accelerator.constants, **(overrides or {})}
    narrow = "narrow_" if _narrow(precision) else ""
    # in 8 bits relative to twice the rate in 16
    forward = c["attention_narrow_forward"] if narrow else 1.0
    backward = c["attention_narrow_backward"] if narrow else 1.0
    peak = accelerator.peak(precision)
    clock = accelerator.clock_hz
    exponential = c["attention_softmax"] / (_EXPONENTIALS_PER_CLOCK * clock) if clock else 0.0
    return AttentionRates(
        core_flops=peak / accelerator.core_count,
        cores=accelerator.core_count,
        forward_efficiency=c["attention_efficiency"] * forward,
        backward_efficiency=c["attention_backward_efficiency"] * backward,
        wide_share=c[f"attention_{narrow}wide_share"],
        backward_wide_share=c[f"attention_{narrow}backward_wide_share"],
        exponential=exponential,
        tail=c["attention_tail"],
        backward_tail=c["attention_backward_tail"],
        idle_boost=c["attention_idle_boost"],
        throttle=c["attention_throttle"],
        throttle_flop=0.0 if sustained else c["gemm_throttle_s"] * peak,
        narrow_causal=bool(c["attention_narrow_causal"]),
        item=c["attention_item_s"],
        backward_item=c["attention_backward_item_s"],
        backward_bytes=c["attention_backward_bytes"],
        latency=c["attention_latency_s"],
        hbm_rate=c["attention_bandwidth_fraction"] * accelerator.memory_bandwidth,
        hbm_exposed=c["attention_exposed"],
    )


cached_attention_rates = functools.lru_cache(maxsize=1024)(attention_rates)


def attention_traffic(op: Attention) -> float:
    """Least bytes to and from HBM: forward reads q, k, v and writes o; the backward reads these
    and the output gradient and writes three gradients."""
    e = BYTES_PER_ELEMENT[op.precision]
    q = op.batch * op.heads * op.q_len * op.qk_dim
    o = op.batch * op.heads * op.q_len * op.v_dim
    kv = op.batch * op.kv_heads * op.kv_len * (op.qk_dim + op.v_dim)
    forward = e * (q + o + kv)
    return forward if op.phase is Phase.FORWARD else e * (2 * q + 2 * o + 2 * kv)


def attention_seconds(
    batch: Any, heads: Any, q_len: Any, kv_len: Any, qk_dim: Any, v_dim: Any,
    pairs: Any, traffic: Any, rates: AttentionRates,
    *, causal: bool = True, window: float | None = None, backward: bool = False,
) -> Any:  # fmt: skip
    """Seconds without the fixed latency; the first arguments may be arrays of one shape.

    `pairs`: query-key pairs per head that are computed (`executed`); `traffic`: bytes to and
    from HBM.
    """
    own, other = (kv_len, q_len) if backward else (q_len, kv_len)
    blocks = np.ceil(own / _BLOCK)
    # whole blocks are computed where the mask or the length cuts one
    cut = 0.5 * (1.0 if window is None else 2.0) if causal or window is not None else 0.0
    computed = pairs * (blocks * _BLOCK / own) + own * _BLOCK * cut
    reach = other if window is None else np.minimum(other, window + _BLOCK)
    products = 3.0 * qk_dim + 2.0 * v_dim if backward else qk_dim + v_dim
    best = rates.backward_efficiency if backward else rates.forward_efficiency
    wide = rates.backward_wide_share if backward else rates.wide_share
    tail = rates.backward_tail if backward else rates.tail
    efficiency = best * np.where(qk_dim > 128, wide, 1.0)
    pair = 2.0 * products / (efficiency * rates.core_flops) + rates.exponential
    item = rates.backward_item if backward else rates.item
    work = batch * heads * (computed * pair + blocks * item)
    longest = np.minimum(_BLOCK * reach * pair + item, work)
    even = work / rates.cores
    busy = np.minimum(1.0, even / longest)
    alone = longest * (1.0 - rates.idle_boost * (1.0 - busy))
    body = np.maximum(even, alone) + tail * longest * busy
    flop = 2.0 * batch * heads * pairs * products
    body = body * (1.0 + rates.throttle * flop / (flop + rates.throttle_flop))
    around = rates.backward_bytes * batch * heads * q_len * qk_dim if backward else 0.0
    return body + (rates.hbm_exposed * traffic + around) / rates.hbm_rate


def attention_body_seconds(
    op: Attention, accelerator: Accelerator, *, sustained: bool = False
) -> float:
    """Seconds of one attention kernel without its fixed latency."""
    rates = cached_attention_rates(accelerator, op.precision, sustained=sustained)
    pairs, window = executed(op, rates)
    return float(
        attention_seconds(
            op.batch, op.heads, op.q_len, op.kv_len, op.qk_dim, op.v_dim,
            pairs, attention_traffic(op), rates,
            causal=op.causal, window=window, backward=op.phase is not Phase.FORWARD,
        )
    )  # fmt: skip
