"""The fused MoE expert layer of serving stacks, as measured files have it.

Training's grouped GEMMs are `GroupedGemm` operations (`simulator.costs.kernels`): the GEMM model
with one group of tiles per expert. A fused layer is two of them with an activation between and
gather and combine around.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.accelerators import Accelerator
from simulator.costs.gemm import gemm_body_seconds, gemm_rates
from simulator.costs.memory_bound import memory_rate

#: Launches around the two products: sort, align, activation, combine.
_LAUNCHES = 7
#: Fitted on moe_grouped_gemm_a100.csv (power_law_1.01).
_SKEW = 0.35


def moe_layer_seconds(
    tokens: Any, hidden: Any, inter: Any, top_k: Any, experts: Any,
    tensor: Any, expert: Any, accelerator: Accelerator, *, skewed: bool = False,
) -> NDArray[np.float64]:  # fmt: skip
    """Seconds of one fused expert layer's forward (bf16) on one of `tensor * expert` accelerators.

    `tokens` enter the layer. Experts are equally loaded, or (`skewed`) by a power law with exponent
    about 1, of which the busiest rank is timed; it has `expert ** 0.35` times the mean. The
    elementwise kernels of the fused layer run over the pairs of all experts, also those of other
    ranks (vLLM fused_experts). Arrays broadcast.
    """
    tokens, hidden, inter, top_k, experts, tensor, expert = (
        np.asarray(x, dtype=float) for x in (tokens, hidden, inter, top_k, experts, tensor, expert)
    )
    share = accelerator.constants["moe_triton_share"]
    rates = gemm_rates(accelerator, "bf16")
    rates = dataclasses.replace(rates, tile=rates.tile / share)
    pairs = tokens * top_k
    own = pairs / expert
    if skewed:
        own = np.minimum(own * expert**_SKEW, pairs)
    active = np.minimum(experts / expert, np.maximum(own, 1.0))
    rows = np.maximum(own / active, 1.0)
    width = inter / tensor
    products = gemm_body_seconds(rows, 2.0 * width, hidden, rates, batch=active)
    products = products + gemm_body_seconds(rows, hidden, width, rates, batch=active)
    moved = 2.0 * (pairs * 3.0 * width + pairs * hidden + tokens * hidden)
    launches = _LAUNCHES * accelerator.constants["launch_latency_s"]
    seconds: NDArray[np.float64] = (
        products + moved / memory_rate("activation_narrow", accelerator) + launches
    )
    return seconds
