"""Fused attention: blocks of queries against blocks of keys, balanced over the SMs.

After the kernels of FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608): a work item is one
block of 128 queries of one head; it walks the key blocks that the mask keeps. The kernel ends with
its longest item. See docs/kernels.md.
"""

from __future__ import annotations

import math

from simulator.catalog.accelerators import Accelerator
from simulator.model.operations import BYTES_PER_ELEMENT, Attention, Phase

_BLOCK_Q = 128


def attention_traffic(op: Attention) -> float:
    """Least bytes to and from HBM: forward reads q, k, v and writes o; the backward reads these
    and the output gradient and writes three gradients."""
    e = BYTES_PER_ELEMENT[op.precision]
    q = op.batch * op.heads * op.q_len * op.qk_dim
    o = op.batch * op.heads * op.q_len * op.v_dim
    kv = op.batch * op.kv_heads * op.kv_len * (op.qk_dim + op.v_dim)
    forward = e * (q + o + kv)
    return forward if op.phase is Phase.FORWARD else e * (2 * q + 2 * o + 2 * kv)


def attention_body_seconds(op: Attention, accelerator: Accelerator) -> float:
    """Seconds of the arithmetic, without the fixed latency and the traffic to HBM."""
    c = accelerator.constants
    peak = accelerator.peak(op.precision) / accelerator.core_count
    cores = accelerator.core_count
    dim = op.qk_dim + op.v_dim
    efficiency = c["attention_efficiency"] * min(1.0, (dim / 256.0) ** 0.45)
    blocks = math.ceil(op.q_len / _BLOCK_Q)
    pairs = op.score_pairs
    if op.causal and op.window is None:
        # the diagonal blocks are computed whole
        pairs += op.q_len * c["attention_block_k"] / 2.0
    pair_time = 2.0 * dim / (efficiency * peak)
    work = op.batch * op.heads * pairs * pair_time
    longest = _BLOCK_Q * min(op.kv_len, op.window or op.kv_len) * pair_time
    longest = min(longest, work / max(1, op.batch * op.heads * blocks) * 2.0)
    body = max(work / cores, longest) + 0.125 * longest * min(1.0, work / (cores * longest))
    flop = 2.0 * op.batch * op.heads * op.score_pairs * dim
    body *= 1.0 + c["attention_throttle"] * flop / (flop + 1e12)
    return body if op.phase is Phase.FORWARD else body * c["attention_backward_ratio"]
