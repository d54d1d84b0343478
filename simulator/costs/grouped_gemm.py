"""The fused MoE expert layer of serving stacks, as measured files have it.

Training's grouped GEMMs are `GroupedGemm` operations (`simulator.costs.kernels`). A fused layer
(vLLM's Triton `fused_moe_kernel`) sorts the (token, expert) pairs by expert, pads each expert's
rows to a block of rows, runs two products over all blocks, and between and after them passes over
the pairs of *all* experts: the activation and the sum over the top-k. docs/kernels.md has the
formulas, the sources and the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.accelerators import Accelerator
from simulator.costs.gemm import GemmRates, gemm_rates, slow_down

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Block:
    """A kernel configuration: rows, columns and depth of a block, and how many row blocks run
    through the columns together (`GROUP_SIZE_M`: they share the weights' columns in L2)."""

    rows: int
    columns: int
    depth: int
    group: int


#: Defaults of vLLM's `get_default_config` for 16-bit weights. `modular` (TritonExperts, 2026):
#: by the number of tokens; grouped rows from 128 tokens per local expert.
_MODULAR = ((32, 16, 64, 128), (64, 32, 64, 128), (96, 32, 128, 64), (512, 64, 128, 64),
            (float("inf"), 128, 128, 64))  # fmt: skip
#: `functional` (`fused_experts` of 2024-2025): small blocks up to as many tokens as local experts.
_FUNCTIONAL = (_Block(16, 32, 64, 1), _Block(64, 64, 32, 8))
#: Tokens per pass of the functional layer (`VLLM_FUSED_MOE_CHUNK_SIZE`).
_CHUNK = 16384
#: What a tuned configuration file chooses from, in essence.
_TUNED_BLOCKS = (
    _Block(16, 32, 64, 1), _Block(16, 64, 128, 1), _Block(16, 128, 128, 1),
    _Block(32, 64, 128, 1), _Block(32, 128, 64, 1), _Block(64, 64, 64, 1),
    _Block(64, 128, 64, 1), _Block(64, 128, 64, 16), _Block(128, 128, 64, 1),
    _Block(128, 128, 64, 16), _Block(64, 256, 64, 16), _Block(128, 256, 64, 16),
)  # fmt: skip

#: (local experts, rank's expert width) that vLLM 0.14 to 0.24 have a tuned 16-bit configuration
#: for: names of the files in vllm/model_executor/layers/fused_moe/configs (Apache-2.0).
_TUNED: dict[str, dict[int, tuple[int, ...]]] = {
    "A100-80GB-SXM": {
        1: (1792, 3584, 7168, 14336), 8: (1792, 2048, 3584, 4096, 7168),
        16: (1344, 1792, 2688, 3584, 7168, 14336), 64: (640, 1280), 128: (192,), 512: (64, 128),
    },
    "H100-80GB-SXM": {
        1: (3072,), 8: (1792, 2048, 3584, 4096, 7168), 16: (1344, 1792, 2688), 32: (1792,),
        62: (256, 512), 64: (320, 640, 1280, 1536), 72: (384, 768),
        128: (192, 352, 384, 512, 928, 1856, 2880), 256: (512,), 512: (128, 256, 512),
    },
    "H200": {
        8: (1792, 2048, 3584, 4096, 7168, 14336), 16: (1024, 2048), 64: (320, 640, 1280, 2560),
        128: (96, 192, 384, 512, 768, 1024), 512: (64, 128, 256, 512),
    },
    "H20": {64: (384, 768, 896, 3072), 128: (96, 192, 384, 768)},
    "B200": {
        16: (1024,), 32: (1408,), 64: (1408,), 128: (512, 768, 1856),
        512: (64, 128, 256, 512, 672, 1344),
    },
    "L40S": {8: (3584,), 128: (928, 1856)},
}  # fmt: skip

#: Sharpness of the join of arithmetic and memory; share of an unfilled last wave that counts;
#: share of L2 that an expert's weights can hold; share of a block's start that one without work
#: (another rank's expert) takes.
_POWER, _WAVE_SHARE, _L2_SHARE, _EMPTY = 2.4, 0.3, 0.25, 0.2
#: vLLM's own sum over the top-k covers 2 to 4 experts; else it is PyTorch's reduction, which
#: takes this many clocks of an SM per output element.
_REDUCE_CLOCKS = 0.34
#: Stages of the software pipeline that shared memory holds (`num_stages`).
_STAGES = 3
#: Draws of a skewed routing that are averaged.
_DRAWS = 8


@dataclass(frozen=True)
class _Load:
    """What the rank's experts receive, by row; means over draws."""

    rows: Array
    """(token, expert) pairs of the rank's experts."""
    active: Array
    """Local experts with at least one row."""
    blocks: dict[int, Array]
    """Row blocks, every expert padded to whole ones, by rows of a block."""
    repeats: dict[int, Array]
    """Row blocks beyond the first of each expert."""
    foreign: dict[int, Array]
    """Row blocks of other ranks' experts."""


@lru_cache(maxsize=8192)
def _expert_rows(
    tokens: int, experts: int, top_k: int, expert: int, skewed: bool
) -> tuple[tuple[float, ...], ...]:
    """Rows of each local expert of the timed rank, by draw.

    Balanced: equal. Skewed: loads follow a power law of exponent 1.01 between 1 and 0.8 `tokens`
    (aiconfigurator's `power_law_logits_v3`), and the busiest rank is timed.
    """
    local = experts // expert
    mean = tokens * top_k / experts
    if not skewed:
        if mean >= 1.0:
            return ((mean,) * local,)
        hit = max(1, round(tokens * top_k / expert))
        return ((1.0,) * min(hit, local) + (0.0,) * (local - min(hit, local)),)
    rng = np.random.default_rng((tokens, experts, top_k, expert))
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    x, y = low**-0.01, high**-0.01
    loads = (rng.random((_DRAWS, experts)) * (y - x) + x) ** -100.0
    loads = np.round(loads / loads.sum(axis=1, keepdims=True) * tokens * top_k)
    # a token chooses an expert once
    ranks = np.minimum(loads, tokens).reshape(_DRAWS, expert, local)
    busiest = ranks.sum(axis=2).argmax(axis=1)
    return tuple(tuple(ranks[i, rank].tolist()) for i, rank in enumerate(busiest))


def _loads(
    tokens: Array, experts: Array, top_k: Array, expert: Array, skewed: bool, written: bool
) -> _Load:
    size = len(tokens)
    rows, active = np.zeros(size), np.zeros(size)
    edges = (16, 32, 64, 128)
    blocks, repeats, foreign = ({edge: np.zeros(size) for edge in edges} for _ in range(3))
    for i in range(size):
        ranks = max(1, min(int(expert[i]), int(experts[i])))
        key = (int(tokens[i]), int(experts[i]), int(top_k[i]), ranks)
        counts = np.array(_expert_rows(*key, skewed))
        rows[i] = counts.sum(axis=1).mean()
        active[i] = (counts > 0).sum(axis=1).mean()
        mean = tokens[i] * top_k[i] / experts[i]
        for edge in edges:
            whole = np.ceil(counts / edge)
            blocks[edge][i] = whole.sum(axis=1).mean()
            repeats[edge][i] = np.maximum(whole - 1.0, 0.0).sum(axis=1).mean()
            if written:
                others = experts[i] * (1.0 - 1.0 / ranks)
                foreign[edge][i] = others * np.ceil(mean / edge)
    return _Load(rows, active, blocks, repeats, foreign)


@dataclass(frozen=True)
class _Layer:
    """The layer's sizes, one array element per layer."""

    tokens: Array
    hidden: Array
    width: Array
    """Expert width of one tensor rank."""
    gate: Array
    """2 where a gate runs beside the up-projection, else 1."""
    load: _Load


def _product(
    layer: _Layer, n: Array, k: Array, block: _Block, accelerator: Accelerator, rates: GemmRates
) -> Array:
    """Seconds of one product [rows, k] x [k, n] over the rank's experts."""
    c = accelerator.constants
    load, cores = layer.load, accelerator.core_count
    per_core = accelerator.peak("bf16") / cores
    area = block.rows * block.columns
    size = "large" if area >= 16384 else "medium" if area >= 8192 else "small"
    weights = 2.0 * n * k
    l2 = accelerator.l2_bytes
    # activations and weights beyond L2: their longer latency is exposed in shallow pipelines
    spilled = np.maximum(0.0, 1.0 - l2 / (2.0 * layer.tokens * layer.hidden))
    cold = spilled * weights / (weights + 0.5 * l2)
    efficiency = c[f"moe_block_efficiency_{size}"] / (1.0 + c["moe_cold"] * cold)
    stage = 2.0 * (block.rows + block.columns) * block.depth
    fits = int(c["moe_shared_memory_bytes"] // (_STAGES * stage))
    most = max(1, min(fits, 2 if area >= 16384 else 8))
    columns = np.ceil(n / block.columns)
    fill = load.blocks[block.rows] * columns / cores
    resident = np.clip(np.ceil(fill), 1.0, most)
    step = np.maximum(
        2.0 * area * block.depth / (efficiency * per_core), c["moe_step_s"] / resident
    )
    # Triton vectorises loads only where sizes and strides are multiples of 16 elements
    aligned = (k % 16 == 0) & (n % 16 == 0)
    step = step * np.where(aligned, 1.0, c["moe_unaligned"])
    epilogue = 2.0 * area / (c["gemm_epilogue_bytes_per_flop"] * per_core)
    time = np.ceil(k / block.depth) * step + epilogue + c["moe_block_s"] / resident
    waves = np.maximum(fill, 1.0)
    waves = waves + _WAVE_SHARE * (np.ceil(fill) - fill) * (fill > 1.0)
    compute = waves * time
    compute = compute + load.foreign[block.rows] * columns / cores * _EMPTY * c["moe_block_s"]
    flops = 2.0 * load.rows * n * k
    compute = compute * (1.0 + slow_down(flops, rates))
    # an expert's weights are read again for its next row blocks, unless those run together or
    # the weights are still in L2
    together = np.maximum(block.group, most * cores / columns)
    again = np.minimum(load.repeats[block.rows] / together, load.repeats[block.rows])
    again = again * (1.0 - np.minimum(1.0, _L2_SHARE * l2 / weights))
    traffic = (load.active + again) * weights + 2.0 * load.rows * (k + n)
    memory = traffic / (c["moe_bandwidth_fraction"] * accelerator.memory_bandwidth)
    seconds: Array = (compute**_POWER + memory**_POWER) ** (1.0 / _POWER)
    return seconds


def _products(layer: _Layer, block: _Block, accelerator: Accelerator, rates: GemmRates) -> Array:
    up = _product(layer, layer.gate * layer.width, layer.hidden, block, accelerator, rates)
    return up + _product(layer, layer.hidden, layer.width, block, accelerator, rates)


def _has_tuned(accelerator: Accelerator, experts: Array, width: Array) -> NDArray[np.bool_]:
    known = _TUNED.get(accelerator.name, {})
    return np.array(
        [int(w) in known.get(int(e), ()) for e, w in zip(experts, width, strict=True)], dtype=bool
    )


def moe_layer_seconds(
    tokens: Any, hidden: Any, inter: Any, top_k: Any, experts: Any,
    tensor: Any, expert: Any, accelerator: Accelerator, *,
    skewed: bool = False, gated: Any = True, stack: str = "modular",
) -> Array:  # fmt: skip
    """Seconds of one fused expert layer's forward (bf16) on one of `tensor * expert` accelerators.

    Parameters
    ----------
    tokens:
        Tokens that enter the layer; each goes to `top_k` of `experts` experts.
    inter:
        Width of an expert, split over `tensor` ranks; `expert` ranks hold `experts / expert` each.
    skewed:
        Loads by a power law of exponent about 1, of which the busiest rank is timed; else equal.
    gated:
        A gate beside the up-projection (SwiGLU); else squared relu in two eager passes.
    stack:
        `modular` (vLLM's TritonExperts: blocks of other ranks' experts write zeros),
        `functional` (its earlier `fused_experts`: smaller default blocks, passes of 16,384
        tokens, the output zeroed before) or `tuned` (the best configuration for every shape).

    Arrays broadcast.
    """
    shape = np.broadcast_shapes(
        *(np.shape(x) for x in (tokens, hidden, inter, top_k, experts, tensor, expert, gated))
    )
    t, h, i, k, e, tp, ep, g = (
        np.broadcast_to(np.asarray(x, dtype=float), shape).ravel()
        for x in (tokens, hidden, inter, top_k, experts, tensor, expert, gated)
    )
    c = accelerator.constants
    functional = stack == "functional"
    rates = gemm_rates(accelerator, "bf16")
    layer = _Layer(t, h, np.ceil(i / tp), 1.0 + g, _loads(t, e, k, ep, skewed, not functional))
    local = np.maximum(1.0, np.floor(e / ep))
    tuned = np.ones(t.shape, dtype=bool) if stack == "tuned" else np.zeros(t.shape, dtype=bool)
    if stack != "tuned":
        tuned = _has_tuned(accelerator, local, layer.width)

    def products(block: _Block) -> Array:
        return _products(layer, block, accelerator, rates)

    seconds = np.zeros(t.shape)
    if functional:
        small = np.minimum(t, _CHUNK) <= local
        seconds = np.where(small, products(_FUNCTIONAL[0]), products(_FUNCTIONAL[1]))
    elif stack != "tuned":
        least = 0.0
        for most, rows, columns, depth in _MODULAR:
            now = (t > least) & (t <= most)
            least = most
            if now.any():
                grouped = np.floor(t / local) > 128
                both = [products(_Block(rows, columns, depth, group)) for group in (1, 16)]
                seconds = np.where(now, np.where(grouped, both[1], both[0]), seconds)
    if tuned.any():
        best = np.minimum.reduce([products(block) for block in _TUNED_BLOCKS])
        seconds = np.where(tuned, best, seconds)

    # passes over the pairs of all experts, also those of other ranks
    pairs = t * k
    spread = ep > 1
    passes = np.where(g > 0.0, 3.0, 4.0) * pairs * layer.width + (pairs + t) * h
    if functional:
        passes = passes + spread * pairs * h
    else:
        others = np.maximum(pairs - layer.load.rows, 0.0)
        passes = passes + spread * others * (layer.gate * layer.width + h)
    seconds = seconds + 2.0 * passes / (c["moe_stream_fraction"] * accelerator.memory_bandwidth)
    eager = (k < 2) | (k > 4)
    if accelerator.clock_hz:
        clocks = accelerator.core_count * accelerator.clock_hz
        seconds = seconds + eager * t * h * _REDUCE_CLOCKS / clocks
    launches = np.ceil(t / _CHUNK) if functional else 1.0
    seconds = seconds + launches * c["moe_fixed_s"]
    return seconds.reshape(shape)
