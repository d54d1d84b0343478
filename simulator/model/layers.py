"""Layers as operations: what one rank runs forward and backward, after sharding.

`layer_operations(model, layer, ctx)` returns two tuples in execution order. Names are
`part.step` (`attention.qkv`, `mlp.fc1.dgrad`); blocks that do the same work share them.

Conventions
-----------
* The backward's operations carry phase I (input gradient) or W (weight gradient); a schedule that
  splits the backward takes the W ones out: nothing in I needs them. Recomputed forward operations
  come first, are called `recompute....` and keep phase F (an `Attention` in phase F is the forward
  kernel); they belong to I.
* Collectives stand where Megatron-LM puts them. With sequence parallelism: an all-gather before
  each column-parallel linear, a reduce-scatter after each row-parallel one, the reverse in the
  backward, and a second gather of the saved input for the weight gradient (Korthikanti et al.,
  arXiv 2205.05198, section 4.2.2). Without: one all-reduce after attention and after the MLP in
  the forward and one each in the backward (Shoeybi et al., arXiv 1909.08053).
* `Collective.overlap` names the GEMM of the same pass beside which a collective runs.
* Attention FLOPs follow the causal convention: half the score matrix in fused kernels. Unfused
  attention computes all of it.
* Biases are added in GEMM epilogues or in the fused bias kernels counted here; their gradients are
  reductions over the output gradient (phase W).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from simulator.model.context import LayerContext
from simulator.model.operations import (
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    HostCopy,
    MemoryBound,
    Operation,
    Phase,
)
from simulator.model.spec import Block, LayerId, ModelSpec, block_tensors

#: The host reads the numbers of tokens per expert: it has launched nothing beyond.
HOST_READ = "moe.token_counts"

F, I, W = Phase.FORWARD, Phase.INPUT_GRADIENT, Phase.WEIGHT_GRADIENT  # noqa: E741


@dataclass(frozen=True, slots=True)
class LayerOperations:
    """Operations of one layer and micro-batch on one rank, in execution order."""

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]

    @property
    def input_gradient(self) -> tuple[Operation, ...]:
        """The backward without its weight-gradient part (recomputation included)."""
        return tuple(op for op in self.backward if op.phase is not W)

    @property
    def weight_gradient(self) -> tuple[Operation, ...]:
        return tuple(op for op in self.backward if op.phase is W)


@dataclass(slots=True)
class _Piece:
    """A step of the forward and, in its own execution order, its backward."""

    forward: list[Operation]
    backward: list[Operation]


def _split(total: int, parts: int) -> int:
    return max(1, math.ceil(total / parts))


# -- linear layers -------------------------------------------------------------------------------


def _weight_cast(name: str, elements: float, ctx: LayerContext) -> list[Operation]:
    """Quantising a weight and its transpose; once per step, shared by the micro-batches."""
    if not ctx.low_precision or ctx.profile.fp8_param_gather:
        return []
    share = elements / max(1, ctx.micro_batches)
    written = _copies(ctx) * ctx.cast_element * share
    return [MemoryBound(f"{name}.cast_weight", "cast", 2.0 * share, written, phase=F)]


def _copies(ctx: LayerContext) -> float:
    """Copies of a quantised value: scaled in blocks, one along either axis."""
    return ctx.scaled_copies if ctx.precision in ("fp8", "int8") else 2.0


def _cast(
    name: str, elements: float, ctx: LayerContext, phase: Phase, *, after: str = ""
) -> list[Operation]:
    """Quantising a GEMM input; the copy for the weight gradient (transposed, or scaled along the
    other axis) is written in the same pass (Transformer Engine's cast-transpose)."""
    if not ctx.low_precision:
        return []
    written = _copies(ctx) * ctx.cast_element * elements
    read = ctx.element * elements
    if ctx.precision in ("fp8", "int8") and ctx.profile.fp8_recipe == "current":
        # the maximum first: a pass of its own, unless a compiler reduces it in the producer
        passes = 1 if ctx.profile.compiled and after else 2
        return [MemoryBound(name, "cast", passes * read, written, kernels=passes, phase=phase)]
    fused = (ctx.profile.fused_cast and after == "norm") or (
        ctx.profile.compiled and after in ("norm", "activation")
    )
    if fused:
        # the producer writes the narrow type instead of the wide one: only the copy is extra
        read, written = 0.0, max(0.0, written - ctx.element * elements)
        if not written:
            return []
        return [MemoryBound(name, "cast", read, written, kernels=0, phase=phase)]
    return [MemoryBound(name, "cast", read, written, phase=phase)]


def _accumulates(ctx: LayerContext) -> bool:
    """True if whole gradients of several micro-batches are added up (FSDP adds reduced shards)."""
    return ctx.micro_batches > 1 and not ctx.profile.fsdp


def _wgrad(name: str, m: int, n: int, k: int, ctx: LayerContext, precision: str) -> list[Operation]:
    """Weight gradient [m, n] over k tokens, added into the main gradient or written beside it."""
    profile = ctx.profile
    fused = profile.wgrad_accumulation_fusion
    accumulate = ctx.accumulate_gradients
    if accumulate is None:
        accumulate = fused or _accumulates(ctx)
    wide = max(profile.main_grad_bytes, ctx.element if ctx.wide == "fp32" else 0.0)
    if fused or not accumulate:
        out = wide if fused else ctx.element
        return [
            Gemm(f"{name}.wgrad", m, n, k, 1, precision, W, out, accumulate=fused and accumulate)
        ]
    elements = float(m) * n
    return [
        Gemm(f"{name}.wgrad", m, n, k, 1, precision, W, ctx.element),
        MemoryBound(
            f"{name}.wgrad.accumulate",
            "elementwise",
            (ctx.element + wide) * elements,
            wide * elements,
            phase=W,
        ),
    ]


def _bias_gradient(name: str, tokens: int, n: int, ctx: LayerContext) -> Operation:
    return MemoryBound(
        f"{name}.bias_grad", "elementwise", ctx.element * tokens * n, ctx.element * n, phase=W
    )


def _tensor_bytes(ctx: LayerContext, tokens: int, width: int, *, narrow: bool = False) -> float:
    """Bytes of a tensor-parallel gather or reduction. Gathers of a quantised GEMM input move the
    quantised values (Transformer Engine and torchao gather after the cast)."""
    return (ctx.cast_element if narrow else ctx.element) * tokens * width


def _linear(
    name: str,
    tokens: int,
    n: int,
    k: int,
    ctx: LayerContext,
    *,
    mode: str = "plain",
    bias: bool = False,
    parts: tuple[int, ...] = (),
    precision: str | None = None,
    input_gradient: bool = True,
    after: str = "",
) -> _Piece:
    """A linear layer [tokens, k] -> [tokens, n] (local sizes).

    `mode`: `column` (output split over tensor ranks; its input is gathered and its input gradient
    reduced), `row` (input split; its output is reduced), `plain` (no communication). `parts`:
    widths of the matrices that one fused GEMM stands for, where the framework runs them apart.
    """
    precision = precision or ctx.precision
    low = precision in ("fp8", "mxfp8", "nvfp4", "int8")
    overlap_all = ctx.profile.tensor_overlap
    overlap_back = ctx.profile.tensor_backward_overlap or overlap_all
    communicates = mode != "plain" and ctx.tensor > 1
    widths = (n,) if ctx.profile.fused_projections or not parts else parts
    names = [name] if len(widths) == 1 else [f"{name}{i}" for i in range(len(widths))]
    out = ctx.element

    forward: list[Operation] = []
    if low:
        forward += _cast(f"{name}.cast", float(tokens) * k, ctx, F, after=after)
        forward += _weight_cast(name, float(n) * k, ctx)
    if communicates and mode == "column" and ctx.sharded:
        size = _tensor_bytes(ctx, tokens, k, narrow=low)
        hide = names[0] if overlap_all else None
        forward.append(Collective(f"{name}.all_gather", "all_gather", "tensor", size, F, hide))
    forward += [
        Gemm(part, tokens, width, k, 1, precision, F, out)
        for part, width in zip(names, widths, strict=True)
    ]
    if communicates and mode == "row":
        size = _tensor_bytes(ctx, tokens, n)
        hide = names[-1] if overlap_all else None
        if ctx.sharded:
            forward.append(
                Collective(f"{name}.reduce_scatter", "reduce_scatter", "tensor", size, F, hide)
            )
        else:
            forward.append(Collective(f"{name}.all_reduce", "all_reduce", "tensor", size, F, None))

    backward: list[Operation] = []
    if low:
        backward += _cast(f"{name}.cast_grad", float(tokens) * n, ctx, I)
    if communicates and mode == "row" and ctx.sharded:
        size = _tensor_bytes(ctx, tokens, n, narrow=low)
        hide = f"{names[0]}.dgrad" if overlap_all else None
        backward.append(
            Collective(f"{name}.grad_all_gather", "all_gather", "tensor", size, I, hide)
        )
    column = communicates and mode == "column"
    if column and ctx.sharded:
        hide = f"{names[0]}.dgrad" if overlap_back else None
        size = _tensor_bytes(ctx, tokens, k, narrow=low)
        backward.append(
            Collective(f"{name}.input_all_gather", "all_gather", "tensor", size, W, hide)
        )
    if input_gradient:
        backward += [
            Gemm(f"{part}.dgrad", tokens, k, width, 1, precision, I, out)
            for part, width in zip(names, widths, strict=True)
        ]
        if len(widths) > 1:
            # the matrices share their input: autograd adds their input gradients
            adds, x = len(widths) - 1, float(tokens) * k
            backward.append(
                MemoryBound(
                    f"{name}.dgrad.sum", "elementwise", 2 * out * x * adds, out * x * adds,
                    x * adds, kernels=adds, phase=I,
                )
            )  # fmt: skip
    if column and input_gradient:
        hide = f"{names[0]}.wgrad" if overlap_back else None
        size = _tensor_bytes(ctx, tokens, k)
        op = "reduce_scatter" if ctx.sharded else "all_reduce"
        backward.append(Collective(f"{name}.grad_{op}", op, "tensor", size, I, hide))
    for part, width in zip(names, widths, strict=True):
        backward += _wgrad(part, width, k, tokens, ctx, precision)
    if bias:
        # a row-parallel layer's bias is added after the reduction, to the rank's own tokens
        own = _split(tokens, ctx.tensor) if mode == "row" and ctx.sharded else tokens
        backward.append(_bias_gradient(name, own, n, ctx))
    return _Piece(forward, backward)


# -- memory-bound steps --------------------------------------------------------------------------


def _norm(
    name: str, tokens: int, width: int, ctx: LayerContext, *, rms: bool, read_input: bool = True
) -> _Piece:
    """Forward reads x and writes y; backward reads dy and x and writes dx.

    Not fused, an rmsnorm is the sequence cast, square-mean, rsqrt, multiply, cast, scale in fp32
    (as `LlamaRMSNorm` of Hugging Face transformers); a layernorm under autocast casts to fp32 and
    back around its one kernel.
    """
    a, x = ctx.element, float(tokens) * width
    if ctx.profile.fused_norm or ctx.profile.compiled or a == 4.0:
        read = a * x if read_input else 0.0
        forward = [MemoryBound(name, "norm", read, a * x, flops=5 * x)]
        # for the gradients of scale and shift, PyTorch's own kernels read their inputs again
        passes = 2 if ctx.profile.native_norm and not ctx.profile.compiled else 1
        backward = [
            MemoryBound(
                f"{name}.grad", "norm", passes * 2 * a * x, a * x,
                flops=9 * x, kernels=passes, phase=I,
            )
        ]  # fmt: skip
    elif rms:
        forward = [
            MemoryBound(name, "norm", (2 * a + 12) * x, (12 + 2 * a) * x, flops=5 * x, kernels=6)
        ]
        backward = [
            MemoryBound(
                f"{name}.grad", "norm", (4 * a + 28) * x, (2 * a + 20) * x,
                flops=9 * x, kernels=10, phase=I,
            )
        ]  # fmt: skip
    else:
        forward = [MemoryBound(name, "norm", (a + 8) * x, (8 + a) * x, flops=5 * x, kernels=3)]
        backward = [
            MemoryBound(
                f"{name}.grad", "norm", (a + 12) * x, (8 + a) * x,
                flops=9 * x, kernels=4, phase=I,
            )
        ]  # fmt: skip
    return _Piece(list(forward), list(backward))


def _residual(name: str, tokens: int, width: int, ctx: LayerContext, *, bias: bool) -> _Piece:
    """bias + dropout + residual add; masks are one byte per element.

    Backward: the two branches of the residual add up (one pass), and dropout's mask is applied.
    """
    a, x = ctx.element, float(tokens) * width
    profile = ctx.profile
    drop = profile.dropout
    fused = profile.fused_residual or profile.compiled
    if fused:
        forward: list[Operation] = [
            MemoryBound(name, "elementwise", 2 * a * x, (a + drop) * x, flops=(1 + bias) * x)
        ]
    else:
        forward = []
        if bias:
            forward.append(MemoryBound(f"{name}.bias", "elementwise", a * x, a * x, flops=x))
        if drop:
            forward.append(MemoryBound(f"{name}.dropout", "elementwise", a * x, (a + 1) * x))
        forward.append(MemoryBound(name, "elementwise", 2 * a * x, a * x, flops=x))
    backward: list[Operation] = []
    if drop:
        backward.append(
            MemoryBound(f"{name}.dropout_grad", "elementwise", (a + 1) * x, a * x, phase=I)
        )
    return _Piece(forward, backward)


def _residual_gradient(name: str, tokens: int, width: int, ctx: LayerContext) -> Operation:
    """Sum of the gradients of a sub-block's two branches, where its input was read twice."""
    a, x = ctx.element, float(tokens) * width
    return MemoryBound(f"{name}.grad_add", "elementwise", 2 * a * x, a * x, flops=x, phase=I)


def _activation(
    name: str,
    tokens: float,
    ffn: float,
    ctx: LayerContext,
    *,
    gated: bool,
    bias: bool,
    activation: str,
) -> _Piece:
    """Activation of the MLP: fused it reads its input once; eager it makes one pass per step
    (bias, activation, gate product; a squared relu is two)."""
    a, x = ctx.element, float(tokens) * ffn
    wide = 2 if gated else 1
    flops = 8.0 * x
    if ctx.profile.fused_activation or ctx.profile.compiled:
        forward = [MemoryBound(name, "activation", wide * a * x, a * x, flops=flops)]
        backward = [
            MemoryBound(
                f"{name}.grad", "activation", (1 + wide) * a * x, wide * a * x,
                flops=2 * flops, phase=I,
            )
        ]  # fmt: skip
    else:
        passes = (wide if bias else 0) + (2 if activation == "squared_relu" else 1)
        read = passes + (2 if gated else 0)
        kernels = (1 if bias else 0) + (2 if activation == "squared_relu" else 1) + gated
        write = passes + (1 if gated else 0)
        forward = [
            MemoryBound(name, "activation", read * a * x, write * a * x, flops, kernels=kernels)
        ]
        # product: read dy, both factors, write both; activation: read dy, x, write dx
        back_read, back_write = (2, 1) if not gated else (6, 3)
        if activation == "squared_relu":
            back_read, back_write = back_read + 2, back_write + 1
        backward = [
            MemoryBound(
                f"{name}.grad", "activation", back_read * a * x, back_write * a * x,
                2 * flops, kernels=kernels + gated, phase=I,
            )
        ]  # fmt: skip
    return _Piece(list(forward), list(backward))


def _rope(name: str, elements: float, ctx: LayerContext) -> _Piece:
    """Rotary embedding of queries and keys; eager: slice, negate, concatenate, two products and a
    sum per tensor (`rotate_half`), or a cast, a complex product and a cast back."""
    a = ctx.element
    if ctx.profile.complex_rope:
        read, write, kernels = (a + 8.0) * elements, (8.0 + a) * elements, 6
    elif ctx.profile.fused_rope or ctx.profile.compiled:
        read = write = a * elements
        kernels = 1
    else:
        read, write, kernels = 5 * a * elements, 4 * a * elements, 10
    flops = 3.0 * elements
    return _Piece(
        [MemoryBound(name, "elementwise", read, write, flops, kernels)],
        [MemoryBound(f"{name}.grad", "elementwise", read, write, flops, kernels, I)],
    )


def _repeated_kv(
    name: str, elements: float, heads: int, kv_heads: int, ctx: LayerContext
) -> _Piece:
    """Keys and values copied to every query head, whose gradients are summed."""
    one, all_heads = ctx.element * elements, ctx.element * elements * heads / kv_heads
    return _Piece(
        [MemoryBound(name, "copy", one, all_heads, kernels=2)],
        [MemoryBound(f"{name}.grad", "elementwise", all_heads, one, kernels=2, phase=I)],
    )


# -- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Core:
    """Shape of an attention core on one rank before context parallelism is applied."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    """Queries of this rank."""
    kv_len: int
    """Keys of this rank."""
    qk_dim: int
    v_dim: int
    causal: bool
    window: int | None
    kv_width: int
    """Elements of keys and values per token of this rank."""


def _fused_core(core: _Core, ctx: LayerContext, **changes: object) -> Attention:
    precision = ctx.precision if ctx.profile.fp8_attention and ctx.low_precision else ctx.wide
    values: dict[str, object] = {
        "name": core.name,
        "batch": core.batch,
        "heads": core.heads,
        "kv_heads": core.kv_heads,
        "q_len": core.q_len,
        "kv_len": core.kv_len,
        "qk_dim": core.qk_dim,
        "v_dim": core.v_dim,
        "causal": core.causal,
        "window": core.window,
        "precision": precision,
    }
    values.update(changes)
    return Attention(**values)  # type: ignore[arg-type]


def _unfused_core(core: _Core, ctx: LayerContext) -> _Piece:
    """Batched GEMMs over the whole score matrix, scale-mask-softmax and dropout between them."""
    a, p = ctx.element, ctx.wide
    batch = core.batch * core.heads
    scores = float(batch) * core.q_len * core.kv_len
    s, k, d, v = core.q_len, core.kv_len, core.qk_dim, core.v_dim
    name, profile = core.name, ctx.profile
    if profile.fused_softmax:
        # the kernels of Megatron-LM and Transformer Engine read what the mask keeps, write it all
        kept = a * batch * _fused_core(core, ctx).score_pairs
        softmax = MemoryBound(f"{name}.softmax", "softmax", kept, a * scores, 5 * scores)
        softmax_grad = MemoryBound(
            f"{name}.softmax.grad", "softmax", 2 * kept, a * scores, 5 * scores, phase=I
        )
    elif profile.compiled:
        # XLA joins elementwise work to a reduction, but not a reduction to what uses it: maximum,
        # sum and quotient read the scores in turn; the gradient's sum and its result likewise
        softmax = MemoryBound(
            f"{name}.softmax", "softmax", 3 * a * scores, a * scores, 5 * scores, kernels=3
        )
        softmax_grad = MemoryBound(
            f"{name}.softmax.grad", "softmax", 4 * a * scores, a * scores,
            5 * scores, kernels=2, phase=I,
        )  # fmt: skip
    else:
        # scale, mask, cast to fp32, softmax, cast back
        softmax = MemoryBound(
            f"{name}.softmax", "softmax", (3 * a + 8) * scores, (3 * a + 8) * scores,
            5 * scores, kernels=5,
        )  # fmt: skip
        softmax_grad = MemoryBound(
            f"{name}.softmax.grad", "softmax", (3 * a + 12) * scores, (3 * a + 8) * scores,
            5 * scores, kernels=5, phase=I,
        )  # fmt: skip
    forward: list[Operation] = [
        Gemm(f"{name}.scores", s, k, d, batch, p, F, a),
        softmax,
    ]
    backward: list[Operation] = [
        Gemm(f"{name}.values.grad_probs", s, k, v, batch, p, I, a),
        Gemm(f"{name}.values.grad_values", k, v, s, batch, p, I, a),
    ]
    if profile.dropout:
        forward.append(MemoryBound(f"{name}.dropout", "elementwise", a * scores, (a + 1) * scores))
        backward.append(
            MemoryBound(
                f"{name}.dropout.grad", "elementwise", (a + 1) * scores, a * scores, phase=I
            )
        )
    forward.append(Gemm(f"{name}.values", s, v, k, batch, p, F, a))
    backward += [
        softmax_grad,
        Gemm(f"{name}.scores.grad_queries", s, d, k, batch, p, I, a),
        Gemm(f"{name}.scores.grad_keys", k, d, s, batch, p, I, a),
    ]
    return _Piece(forward, backward)


def _attention_core(core: _Core, ctx: LayerContext) -> _Piece:
    """The core with its context-parallel communication.

    ring: keys and values travel once around (c-1 exchanges, each beside a step's attention); with
    the load-balanced causal order every step after the first covers half of its block pair
    (Transformer Engine's `AttnFuncWithCPAndKVP2P`), so that a rank computes s*s/(2c) pairs.
    allgather: keys and values are gathered, their gradients reduce-scattered (Llama 3, arXiv
    2407.21783, section 3.3.2). ulysses: all-to-all to whole sequences of fewer heads and back
    (Jacobs et al., arXiv 2309.14509).
    """
    c, a = ctx.context, ctx.element
    name = core.name
    if c == 1:
        if not ctx.profile.fused_attention:
            return _unfused_core(core, ctx)
        return _Piece(
            [_fused_core(core, ctx)], [_fused_core(core, ctx, name=f"{name}.grad", phase=I)]
        )
    tokens = core.batch * core.kv_len
    kv_bytes = a * tokens * core.kv_width
    if ctx.context_kind == "ulysses":
        query_width = core.heads * core.qk_dim
        out_width = core.heads * core.v_dim
        into = a * tokens * (query_width + core.kv_width)
        back = a * tokens * out_width
        whole = replace(
            core,
            heads=_split(core.heads, c),
            kv_heads=_split(core.kv_heads, c),
            q_len=core.q_len * c,
            kv_len=core.kv_len * c,
        )
        inner = _attention_core(whole, replace(ctx, context=1))
        return _Piece(
            [
                Collective(f"{name}.scatter_heads", "all_to_all", "context", into),
                *inner.forward,
                Collective(f"{name}.gather_heads", "all_to_all", "context", back),
            ],
            [
                Collective(f"{name}.gather_heads.grad", "all_to_all", "context", back, I),
                *inner.backward,
                Collective(f"{name}.scatter_heads.grad", "all_to_all", "context", into, I),
            ],
        )
    if ctx.context_kind == "allgather" or core.window is not None:
        gathered = replace(core, kv_len=core.kv_len * c)
        inner = _attention_core(gathered, replace(ctx, context=1))
        total = kv_bytes * c
        return _Piece(
            [
                Collective(f"{name}.kv_all_gather", "all_gather", "context", total),
                *inner.forward,
            ],
            [
                Collective(f"{name}.kv_all_gather.grad", "all_gather", "context", total, I),
                *inner.backward,
                Collective(f"{name}.kv_reduce_scatter", "reduce_scatter", "context", total, I),
            ],
        )
    forward: list[Operation] = []
    backward: list[Operation] = []
    for step in range(c):
        diagonal = step == 0
        kv_len = core.kv_len if diagonal or not core.causal else core.kv_len // 2
        causal = core.causal and diagonal
        op = _fused_core(core, ctx, name=f"{name}.step{step}", kv_len=max(1, kv_len), causal=causal)
        grad = replace(op, name=f"{name}.grad.step{step}", phase=I)
        if step < c - 1:
            forward.append(
                Collective(
                    f"{name}.kv_exchange{step}", "send_recv", "context", kv_bytes, F, op.name
                )
            )
            backward.append(
                Collective(
                    f"{name}.kv_exchange_grad{step}",
                    "send_recv",
                    "context",
                    # keys and values again, and from the second step their gradients
                    kv_bytes * (1 if diagonal else 2),
                    I,
                    grad.name,
                )
            )
        forward.append(op)
        backward.append(grad)
    backward.append(
        Collective(f"{name}.kv_exchange_grad{c - 1}", "send_recv", "context", kv_bytes, I)
    )
    # partial outputs are rescaled by their softmax statistics and summed in fp32, gradients of
    # queries, keys and values on those of the steps before
    out = float(core.batch) * core.q_len * core.heads * core.v_dim
    kv = float(tokens) * core.kv_width
    grads = out + kv
    if ctx.profile.eager_ring:
        # a cast, two differences and a product; keys and values are concatenated to be sent
        passes, read, written = 4, (a + 20.0) * out + a * kv, 16.0 * out + a * kv
        grad_read, grad_written = (a + 8.0) * grads + (a + 4.0) * kv, 8.0 * grads + (a + 4.0) * kv
    else:
        passes, read, written = 1, (a + 4.0) * out, 4.0 * out
        grad_read, grad_written = (a + 4.0) * grads, 4.0 * grads
    forward.append(
        MemoryBound(f"{name}.merge", "elementwise", c * read, c * written, kernels=passes * c)
    )
    backward.append(
        MemoryBound(
            f"{name}.merge.grad", "elementwise", c * grad_read, c * grad_written,
            kernels=2 * passes * c, phase=I,
        )
    )  # fmt: skip
    return _Piece(forward, backward)


def _attention(
    model: ModelSpec,
    name: str,
    ctx: LayerContext,
    *,
    tokens: int,
    kv_tokens: int,
    causal: bool,
    window: int | None,
    cross: bool,
) -> list[_Piece]:
    """Projections, rotary embedding, core and output projection of one attention."""
    t, h = ctx.tensor, model.hidden
    heads = _split(model.heads, t)
    bias = model.biases
    q_len = tokens // ctx.micro_batch
    kv_len = kv_tokens // ctx.micro_batch
    pieces: list[_Piece] = []
    if model.mla:
        shard = ctx.sharded_tokens
        q_in = model.q_lora_rank or h
        narrow = model.kv_lora_rank + model.qk_rope_dim
        if model.q_lora_rank:
            pieces.append(_linear(f"{name}.q_down", shard, q_in, h, ctx, after="norm"))
            pieces.append(_norm(f"{name}.q_norm", shard, q_in, ctx, rms=True))
        pieces.append(
            _linear(
                f"{name}.q_up",
                tokens,
                heads * model.qk_dim,
                q_in,
                ctx,
                mode="column",
                after="norm",
            )
        )
        pieces.append(_linear(f"{name}.kv_down", shard, narrow, h, ctx))
        pieces.append(_norm(f"{name}.kv_norm", shard, model.kv_lora_rank, ctx, rms=True))
        up = heads * (model.qk_nope_dim + model.v_dim)
        pieces.append(
            _linear(
                f"{name}.kv_up", tokens, up, model.kv_lora_rank, ctx, mode="column", after="norm"
            )
        )
        rotated = float(tokens) * (heads + 1) * model.qk_rope_dim
        pieces.append(_rope(f"{name}.rope", rotated, ctx))
        # keys: the shared rotary part is copied beside every head's own part
        a, keys = ctx.element, float(tokens) * heads * model.qk_dim
        pieces.append(
            _Piece(
                [MemoryBound(f"{name}.keys", "elementwise", a * keys, a * keys)],
                [MemoryBound(f"{name}.keys.grad", "elementwise", a * keys, a * keys, phase=I)],
            )
        )
        kv_heads = heads
        kv_width = heads * (model.qk_dim + model.v_dim)
    else:
        d = model.head_dim
        kv_heads = _split(model.kv_heads, t)
        kv_width = 2 * kv_heads * d
        qkv_bias = bias or model.qkv_bias
        if cross:
            pieces.append(
                _linear(
                    f"{name}.q",
                    tokens,
                    heads * d,
                    h,
                    ctx,
                    mode="column",
                    bias=qkv_bias,
                    after="norm",
                )
            )
            pieces.append(
                _linear(f"{name}.kv", kv_tokens, kv_width, h, ctx, mode="column", bias=qkv_bias)
            )
        else:
            parts = (heads * d, kv_heads * d, kv_heads * d)
            pieces.append(
                _linear(
                    f"{name}.qkv", tokens, sum(parts), h, ctx,
                    mode="column", bias=qkv_bias, after="norm", parts=parts,
                )
            )  # fmt: skip
            if ctx.profile.split_gradient_copy and ctx.profile.fused_projections:
                size = ctx.element * tokens * sum(parts)
                copy = MemoryBound(f"{name}.qkv.grad_concat", "copy", size, size, phase=I)
                pieces.append(_Piece([], [copy]))
        rotated_width = (heads + kv_heads) * d
        if model.qk_norm != "none":
            pieces.append(
                _norm(f"{name}.qk_norm", tokens, rotated_width, ctx, rms=model.norm == "rmsnorm")
            )
        if model.positions == "rope" and not cross:
            pieces.append(_rope(f"{name}.rope", float(tokens) * rotated_width, ctx))
    if ctx.profile.repeated_kv and kv_heads < heads:
        pieces.append(
            _repeated_kv(f"{name}.repeat_kv", float(kv_tokens) * kv_width, heads, kv_heads, ctx)
        )
        kv_width, kv_heads = kv_width * heads // kv_heads, heads
    pieces.append(
        _attention_core(
            _Core(
                f"{name}.core", ctx.micro_batch, heads, kv_heads, q_len, kv_len,
                model.qk_dim, model.value_dim, causal, window, kv_width,
            ),
            ctx,
        )
    )  # fmt: skip
    pieces.append(
        _linear(
            f"{name}.proj", tokens, h, heads * model.value_dim, ctx,
            mode="row", bias=bias,
        )
    )  # fmt: skip
    return pieces


# -- feed-forward --------------------------------------------------------------------------------


def _mlp(model: ModelSpec, name: str, ffn: int, tokens: int, ctx: LayerContext) -> list[_Piece]:
    f = _split(ffn, ctx.tensor)
    gated, bias = model.gated_mlp, model.biases
    wide = 2 * f if gated else f
    parts = (f, f) if gated else ()
    return [
        _linear(
            f"{name}.fc1", tokens, wide, model.hidden, ctx,
            mode="column", bias=bias, parts=parts, after="norm",
        ),
        _activation(
            f"{name}.activation", tokens, f, ctx,
            gated=gated, bias=bias, activation=model.activation,
        ),
        _linear(
            f"{name}.fc2", tokens, model.hidden, f, ctx, mode="row", bias=bias, after="activation"
        ),
    ]  # fmt: skip


def expert_rows(model: ModelSpec, ctx: LayerContext) -> tuple[float, float]:
    """(token copies that a rank sends, rows that its experts multiply), means per micro-batch.

    A rank routes its own tokens (each tensor rank a share of the sequence) to `top_k` experts;
    with a capacity factor every expert's share is padded or cut to `capacity_factor` times the
    mean. Ranks that share experts by tensor parallelism multiply each other's rows too.
    """
    tokens = ctx.tokens / ctx.tensor
    copies = tokens * model.top_k * (ctx.capacity_factor or 1.0)
    return copies, copies * ctx.expert_tensor


def _grouped_cast(
    name: str, elements: float, groups: int, ctx: LayerContext, phase: Phase
) -> list[Operation]:
    """Quantising the rows of all local experts.

    Transformer Engine's `split_quantize` runs one quantiser per expert: per-tensor current scaling
    clears and reduces a maximum, computes a scale and casts with a transpose (four launches),
    MXFP8 casts both ways in one and swizzles the scales of all in two; delayed scaling casts all
    experts in one (`multi_cast_transpose`).
    """
    ops = _cast(name, elements, ctx, phase)
    profile = ctx.profile
    if profile.grouped_cast == "fused" or profile.compiled:
        return ops
    launches = groups * 4
    if ctx.precision == "mxfp8":
        launches = groups + 2
    elif ctx.precision in ("fp8", "int8") and profile.fp8_recipe == "delayed":
        launches = 1
    return [replace(op, kernels=launches) if isinstance(op, MemoryBound) else op for op in ops]


def _grouped(
    name: str, rows: float, groups: int, n: int, k: int, ctx: LayerContext, *, bias: bool
) -> _Piece:
    """A linear layer of all local experts in one grouped kernel."""
    a, m = ctx.element, rows / groups
    skew = ctx.moe_imbalance if ctx.capacity_factor is None else 1.0
    profile = ctx.profile
    wide = max(profile.main_grad_bytes, ctx.element if ctx.wide == "fp32" else 0.0)
    fused = profile.wgrad_accumulation_fusion
    forward: list[Operation] = []
    backward: list[Operation] = []
    if ctx.low_precision:
        forward += _grouped_cast(f"{name}.cast", rows * k, groups, ctx, F)
        forward += _weight_cast(name, float(groups) * n * k, ctx)
        backward += _grouped_cast(f"{name}.cast_grad", rows * n, groups, ctx, I)
    p = ctx.precision
    forward.append(GroupedGemm(name, groups, m, n, k, p, F, a, imbalance=skew))
    backward.append(GroupedGemm(f"{name}.dgrad", groups, m, k, n, p, I, a, imbalance=skew))
    # dW[n, k] sums over the rows: the m of a group is its inner dimension here
    backward.append(
        GroupedGemm(
            f"{name}.wgrad", groups, m, n, k, p, W, wide if fused else a,
            accumulate=fused, imbalance=skew,
        )
    )  # fmt: skip
    accumulate = ctx.accumulate_gradients
    if not fused and (_accumulates(ctx) if accumulate is None else accumulate):
        elements = float(groups) * n * k
        backward.append(
            MemoryBound(
                f"{name}.wgrad.accumulate", "elementwise",
                (a + wide) * elements, wide * elements, phase=W,
            )
        )  # fmt: skip
    if bias:
        backward.append(
            MemoryBound(f"{name}.bias_grad", "elementwise", a * rows * n, a * groups * n, phase=W)
        )
    return _Piece(forward, backward)


def _expert_bias(elements: float, experts: int) -> _Piece:
    """The second bias of biased experts, weighted by the router's probability.

    Megatron-Core's `TEGroupedMLP._apply_bias`: per expert `t + b * p` with probabilities in fp32,
    so that product, sum and their concatenation are fp32, then a cast back; the backward is
    autograd's of the same.
    """
    x = elements
    return _Piece(
        [MemoryBound("moe.bias", "elementwise", 14 * x, 14 * x, 2 * x, kernels=2 * experts + 2)],
        [
            MemoryBound(
                "moe.bias.grad", "elementwise", 22 * x, 14 * x, 4 * x,
                kernels=5 * experts + 1, phase=I,
            )
        ],
    )  # fmt: skip


def _fused_epilogues(
    pieces: list[_Piece], inner: float, outer: float, ctx: LayerContext
) -> list[_Piece]:
    """Grouped GEMMs that apply the activation, and quantise its result, in their epilogues.

    fc1 still writes its `outer` elements for the backward; the activation's `inner` elements are
    written once, quantised (both ways) if GEMMs are, and likewise its gradient by fc2's dgrad,
    which reads what fc1 wrote. No launches of their own (cuDNN's CuTe grouped GEMM + GLU +
    quantisation, NeMo 26.06).
    """
    a = ctx.element
    written = _copies(ctx) * ctx.cast_element if ctx.low_precision else a
    up, activation, down = pieces

    def fused(op: Operation, read: float, out: float) -> Operation:
        if not isinstance(op, MemoryBound):
            return op
        return replace(op, bytes_read=read, bytes_written=out, kernels=0)

    forward = [fused(op, 0.0, written * inner) for op in activation.forward[:1]]
    backward = [fused(op, a * outer, written * outer) for op in activation.backward[:1]]
    up.backward[:] = [op for op in up.backward if not op.name.endswith(".cast_grad")]
    down.forward[:] = [op for op in down.forward if not op.name.endswith(".cast")]
    return [up, _Piece(forward, backward), down]


def _moe(model: ModelSpec, ctx: LayerContext) -> list[_Piece]:
    """Router, dispatch, experts, combine, shared experts.

    Bytes of the all-to-all are the token copies of the rank times the width of a token. `deepep`
    sends one copy of a token to each rank and permutes inside its kernels; with `moe_dispatch_fp8`
    it dispatches quantised tokens (DeepSeek-V3, arXiv 2412.19437, section 3.3), which Megatron-Core
    does not (`fused_a2a.py`: "we do not support fp8 dispatch"). `allgather` gathers all tokens of
    the group and reduce-scatters the result.
    """
    a, h = ctx.element, model.hidden
    tokens = ctx.tokens / ctx.tensor
    local = _split(ctx.tokens, ctx.tensor)
    copies, rows = expert_rows(model, ctx)
    experts = _split(model.n_experts, ctx.expert)
    f = _split(model.expert_ffn, ctx.expert_tensor)
    wide = 2 * f if model.gated_mlp else f
    dispatcher = ctx.profile.moe_dispatcher
    narrow = dispatcher == "deepep" and ctx.low_precision and ctx.profile.moe_dispatch_fp8
    sent = ctx.cast_element if narrow else a
    travelling = copies
    if dispatcher == "deepep":
        # one copy per rank that any of the token's experts is on
        share = model.routing.reached(ctx.expert)
        travelling *= share * ctx.expert / model.top_k

    # Megatron-Core's router (moe_utils.py, router.py): casts, softmax, top-k, normalisation,
    # scatter of probabilities and of the map into zeroed tables, counts, auxiliary loss
    router_width = float(local) * model.n_experts
    pieces = [
        _linear(
            "moe.router", local, model.n_experts, h, ctx, precision=ctx.wide,
            bias=model.router_bias,
        ),
        _Piece(
            [
                MemoryBound(
                    "moe.router.top_k", "router", 4 * 3 * router_width, 4 * 2 * router_width,
                    kernels=1 if ctx.profile.compiled else 18,
                )
            ],
            [
                MemoryBound(
                    "moe.router.top_k.grad", "router", 4 * 2 * router_width,
                    4 * router_width, kernels=1 if ctx.profile.compiled else 12, phase=I,
                )
            ],
        ),
    ]  # fmt: skip

    if ctx.capacity_factor is not None and not ctx.profile.compiled:
        # Megatron-Core's `apply_router_token_dropping`: every expert's tokens of highest
        # probability (`torch.topk` along the tokens: radix passes over the table, then a sort), a
        # mask scattered from them, and both products with it
        pieces.append(
            _Piece(
                [
                    MemoryBound(
                        "moe.router.capacity", "router", 4 * 8 * router_width, 4 * 5 * router_width,
                        kernels=18,
                    )
                ],
                [
                    MemoryBound(
                        "moe.router.capacity.grad", "router", 4 * 2 * router_width,
                        4 * router_width, kernels=2, phase=I,
                    )
                ],
            )
        )  # fmt: skip

    def permute(name: str, read: float, written: float, kernels: int = 1) -> _Piece:
        # the fused permutation first makes its row map, in three passes over the routing map
        return _Piece(
            [MemoryBound(name, "permute", a * h * read, a * h * written, kernels=kernels)],
            [
                MemoryBound(
                    f"{name}.grad", "permute", a * h * written, a * h * read,
                    phase=I,
                )
            ],
        )  # fmt: skip

    def exchange(name: str, forward_bytes: float, backward_bytes: float) -> _Piece:
        return _Piece(
            [Collective(name, "all_to_all", "expert", forward_bytes, F)],
            [Collective(f"{name}.grad", "all_to_all", "expert", backward_bytes, I)],
        )

    def gather(name: str, group: str, size: float, *, reverse: bool = False) -> _Piece:
        ops = ("reduce_scatter", "all_gather") if reverse else ("all_gather", "reduce_scatter")
        return _Piece(
            [Collective(name, ops[0], group, size)],
            [Collective(f"{name}.grad", ops[1], group, size, I)],
        )

    spread = ctx.expert > 1
    by_gather = dispatcher == "allgather"
    by_exchange = spread and dispatcher == "alltoall" and not ctx.profile.compiled
    if ctx.capacity_factor is None and ctx.profile.moe_host_sync:
        table = 8.0 * model.n_experts
        if by_exchange:
            # `MoEAlltoAllTokenDispatcher.preprocess`: all ranks' tokens per expert, and from them
            # the sizes to send and to receive in small kernels
            sizes = Collective("moe.counts.all_gather", "all_gather", "expert", table * ctx.expert)
            pieces.append(
                _Piece(
                    [
                        sizes,
                        MemoryBound("moe.counts", "elementwise", table, table, kernels=10),
                    ],
                    [],
                )
            )
        counts = HostCopy(HOST_READ, table, to_device=False)
        pieces.append(_Piece([counts], []))
    if spread and by_gather:
        pieces.append(gather("moe.dispatch", "expert", a * h * tokens * ctx.expert))
        pieces.append(permute("moe.permute", tokens * ctx.expert, copies, 4))
    else:
        if not (spread and dispatcher == "deepep"):
            pieces.append(permute("moe.permute", tokens, copies, 4))
        if spread:
            pieces.append(exchange("moe.dispatch", sent * h * travelling, a * h * travelling))
        if by_exchange:  # the router's probabilities travel by themselves
            pieces.append(exchange("moe.dispatch.probabilities", 4 * copies, 4 * copies))
    if ctx.expert_tensor > 1:
        pieces.append(gather("moe.expert_gather", "expert_tensor", a * h * rows))
    if spread and not by_gather and experts > 1:
        pieces.append(permute("moe.sort", rows, rows, 4 if dispatcher == "deepep" else 2))
    experts_mlp = [
        _grouped("moe.fc1", rows, experts, wide, h, ctx, bias=model.biases),
        _activation(
            "moe.activation", rows, f, ctx,
            gated=model.gated_mlp, bias=model.biases, activation=model.activation,
        ),
        _grouped("moe.fc2", rows, experts, h, f, ctx, bias=model.biases),
    ]  # fmt: skip
    if ctx.profile.fused_grouped_mlp:
        experts_mlp = _fused_epilogues(experts_mlp, rows * f, rows * wide, ctx)
    elif model.biases and not ctx.profile.compiled:
        experts_mlp.append(_expert_bias(rows * h, experts))
    pieces += experts_mlp
    if spread and not by_gather and experts > 1:
        pieces.append(permute("moe.unsort", rows, rows))
    if ctx.expert_tensor > 1:
        pieces.append(gather("moe.expert_reduce", "expert_tensor", a * h * rows, reverse=True))
    if spread and by_gather:
        pieces.append(permute("moe.unpermute", copies, tokens * ctx.expert))
        pieces.append(gather("moe.combine", "expert", a * h * tokens * ctx.expert, reverse=True))
    else:
        if spread:
            # the combine's backward dispatches gradients
            pieces.append(exchange("moe.combine", a * h * travelling, sent * h * travelling))
        if not (spread and dispatcher == "deepep"):
            pieces.append(permute("moe.unpermute", copies, tokens))
    if model.shared_ffn:
        pieces += _mlp(model, "moe.shared", model.shared_ffn, ctx.tokens, ctx)
        x = tokens * h
        pieces.append(
            _Piece([MemoryBound("moe.shared.add", "elementwise", 2 * a * x, a * x, x)], [])
        )
    return pieces


# -- blocks --------------------------------------------------------------------------------------


def _block_pieces(model: ModelSpec, block: Block, ctx: LayerContext) -> list[_Piece]:
    if model.family == "mlp":
        return _dense_block(model, block, ctx)
    decoder_tokens = ctx.tokens
    encoder_tokens = ctx.tokens
    if model.encoder_layers and ctx.decoder_seq is not None:
        decoder_tokens = ctx.micro_batch * _split(ctx.decoder_seq, ctx.context)
    tokens = decoder_tokens if block.cross_attention else encoder_tokens
    shard = _split(tokens, ctx.tensor) if ctx.sharded else tokens
    h, rms, bias = model.hidden, model.norm == "rmsnorm", model.biases

    def sub_block(name: str, inner: list[_Piece], *, own_norm: bool = True) -> list[_Piece]:
        pieces: list[_Piece] = []
        if own_norm:
            norm = _norm(f"{name}.norm", shard, h, ctx, rms=rms)
            # the last step of a sub-block's backward joins its two branches
            norm.backward.append(_residual_gradient(name, shard, h, ctx))
            pieces.append(norm)
        pieces += inner
        if model.block_norms == 4:
            pieces.append(_norm(f"{name}.post_norm", shard, h, ctx, rms=rms))
        pieces.append(_residual(f"{name}.residual", shard, h, ctx, bias=bias))
        return pieces

    attention = _attention(
        model, "attention", ctx,
        tokens=tokens, kv_tokens=tokens, causal=block.causal, window=block.window, cross=False,
    )  # fmt: skip
    if block.moe:
        feed_forward, feed_name = _moe(model, ctx), "moe"
    else:
        feed_forward, feed_name = _mlp(model, "mlp", model.ffn, tokens, ctx), "mlp"
    pieces = sub_block("attention", attention)
    if block.cross_attention:
        cross = _attention(
            model, "cross", ctx,
            tokens=tokens, kv_tokens=encoder_tokens, causal=False, window=None, cross=True,
        )  # fmt: skip
        pieces += sub_block("cross", cross)
    own_norm = model.block_norms > 1
    pieces += sub_block(feed_name, feed_forward, own_norm=own_norm)
    return pieces


def _dense_block(model: ModelSpec, block: Block, ctx: LayerContext) -> list[_Piece]:
    """One layer of a plain network; with tensor parallelism column and row splits alternate."""
    index = block.index
    inputs, outputs = model.dense_sizes[index], model.dense_sizes[index + 1]
    column = index % 2 == 0
    last = index == model.layers - 1
    n = _split(outputs, ctx.tensor) if column else outputs
    k = inputs if column else _split(inputs, ctx.tensor)
    tokens = ctx.tokens
    pieces = [
        _linear(
            "dense", tokens, n, k, ctx, mode="column" if column else "row",
            bias=model.biases, input_gradient=index > 0,
        )
    ]  # fmt: skip
    if column and last and ctx.tensor > 1:
        size = ctx.element * tokens * outputs
        pieces.append(
            _Piece([Collective("dense.output_all_gather", "all_gather", "tensor", size)], [])
        )
    if not last and model.activation != "identity":
        pieces.append(
            _activation(
                "dense.activation", tokens, n, ctx,
                gated=False, bias=False, activation=model.activation,
            )
        )  # fmt: skip
    return pieces


def _assemble(pieces: Iterable[_Piece]) -> tuple[list[Operation], list[Operation]]:
    ordered = list(pieces)
    forward = [op for piece in ordered for op in piece.forward]
    backward = [op for piece in reversed(ordered) for op in piece.backward]
    return forward, backward


def _fuse_compiled(forward: list[Operation]) -> list[Operation]:
    """A compiler writes the residual sum and its norm in one pass (inductor, XLA): the norm that
    follows a residual add in the same layer reads nothing of its own."""
    fused: list[Operation] = []
    for op in forward:
        previous = fused[-1] if fused else None
        if (
            isinstance(op, MemoryBound)
            and op.op_class == "norm"
            and isinstance(previous, MemoryBound)
            and previous.name.endswith(".residual")
        ):
            op = replace(op, bytes_read=0.0, kernels=0)
        fused.append(op)
    return fused


# -- recomputation -------------------------------------------------------------------------------


def _in_module(op: Operation, module: str) -> bool:
    name = op.name
    if module == "core_attn":
        return name.startswith(("attention.core", "cross.core"))
    if module == "layernorm":
        return name.endswith((".norm", "_norm")) and isinstance(op, MemoryBound)
    if module in ("activation", "moe_act"):
        return name.endswith(".activation") and (module == "activation" or "moe." in name)
    if module == "mla_up_proj":
        return ".q_up" in name or ".kv_up" in name or name.endswith((".rope", ".keys"))
    if module == "attention":
        return name.startswith(("attention.", "cross."))
    if module == "shared_experts":
        return name.startswith("moe.shared")
    if module in ("mlp", "moe"):
        return name.startswith(f"{module}.")
    return module == "elementwise" and isinstance(op, MemoryBound)


def graph_module(name: str) -> str:
    """The part of a layer, of `GRAPH_MODULES`, that an operation of this name belongs to.

    As Megatron-LM cuts a layer (`TransformerLayer._forward_attention` and `_forward_mlp`): the
    router takes the norm before it and the shared experts along; `moe_preprocess` counts tokens;
    `moe` is the rest, from the dispatch to the combine. Empty: none of them.
    """
    part, _, operation = name.removeprefix("recompute.").partition(".")
    if part in ("attention", "cross"):
        return "attn"
    if part != "moe" or operation.startswith(("post_norm", "residual", "grad_add")):
        return part if part == "mlp" else ""
    if operation.startswith(("norm", "router", "shared")):
        return "moe_router"
    return "moe_preprocess" if operation.startswith(("token_counts", "counts")) else "moe"


def is_expert_operation(name: str) -> bool:
    """Does it stand between a mixture-of-experts layer's router and its combine?"""
    part, _, operation = name.removeprefix("recompute.").partition(".")
    return part == "moe" and not operation.startswith(
        ("norm", "shared", "post_norm", "residual", "grad_add")
    )


def _recomputation(forward: list[Operation], ctx: LayerContext) -> list[Operation]:
    """Forward operations that run again before the backward."""
    if ctx.recompute == "full":
        again = list(forward)
        if ctx.profile.recompute_early_stop:
            # nothing after the last saved tensor: the last linear layer's output is not needed
            last = max(
                (i for i, op in enumerate(again) if isinstance(op, Gemm | GroupedGemm)),
                default=len(again),
            )
            again = again[:last]
    else:
        modules = ctx.selected_modules
        again = [op for op in forward if any(_in_module(op, module) for module in modules)]
        if "alternate_gemm" in modules:
            products = [op for op in forward if isinstance(op, Gemm) and op.batch == 1]
            second = {op.name for op in products[1::2]}
            again = [op for op in forward if op in again or op.name in second]
    renamed: list[Operation] = []
    for op in again:
        changed = replace(op, name=f"recompute.{op.name}")
        if isinstance(changed, Collective) and changed.overlap is not None:
            changed = replace(changed, overlap=f"recompute.{changed.overlap}")
        renamed.append(changed)
    return renamed


# -- embedding, head, multi-token prediction ------------------------------------------------------


def _embedding(model: ModelSpec, ctx: LayerContext) -> list[_Piece]:
    if model.family == "mlp":
        return []
    a, h, tokens = ctx.element, model.hidden, ctx.tokens
    shard = ctx.sharded_tokens
    if model.family == "vit":
        patch = model.channels * model.patch_size**2
        pieces = [
            _linear(
                "embedding.patch", tokens, h, patch, ctx,
                bias=True, input_gradient=False, precision=ctx.wide,
            )
        ]  # fmt: skip
    else:
        width = model.embedding_dim or h
        x = float(tokens) * width
        rows = ctx.padded_vocab(model.vocab) // ctx.tensor
        table = float(rows) * width
        main = max(ctx.profile.main_grad_bytes, a if ctx.wide == "fp32" else 0.0)
        forward: list[Operation] = [MemoryBound("embedding.lookup", "embedding", a * x, a * x)]
        backward: list[Operation] = []
        if ctx.tensor > 1:
            op, back = ("reduce_scatter", "all_gather") if ctx.sharded else ("all_reduce", "")
            forward.append(Collective(f"embedding.{op}", op, "tensor", a * x))
            if back:
                backward.append(Collective("embedding.grad_all_gather", back, "tensor", a * x, I))
        # the gradient is written as a whole table and then added to the main gradient
        backward.append(
            MemoryBound("embedding.wgrad", "embedding", 2 * a * x, a * (x + table), phase=W)
        )
        if ctx.profile.wgrad_accumulation_fusion or _accumulates(ctx):
            backward.append(
                MemoryBound(
                    "embedding.wgrad.accumulate", "elementwise",
                    (a + main) * table, main * table, phase=W,
                )
            )  # fmt: skip
        pieces = [_Piece(forward, backward)]
        if model.embedding_dim:
            pieces.append(_linear("embedding.project", tokens, h, width, ctx))
    x = float(shard) * h
    extra = (model.positions == "learned") + bool(model.token_types)
    if model.family == "vit":
        extra = 1
    if extra:
        pieces.append(
            _Piece(
                [
                    MemoryBound(
                        "embedding.positions", "elementwise", 2 * a * x * extra, a * x * extra,
                        kernels=extra,
                    )
                ],
                [
                    MemoryBound(
                        "embedding.positions.wgrad", "elementwise", a * x * extra, 0.0,
                        kernels=extra, phase=W,
                    )
                ],
            )
        )  # fmt: skip
    if model.embedding_norm:
        pieces.append(_norm("embedding.norm", shard, h, ctx, rms=model.norm == "rmsnorm"))
    if ctx.profile.dropout:
        pieces.append(
            _Piece(
                [MemoryBound("embedding.dropout", "elementwise", a * x, (a + 1) * x)],
                [MemoryBound("embedding.dropout.grad", "elementwise", (a + 1) * x, a * x, phase=I)],
            )
        )
    return pieces


def _cross_entropy(name: str, tokens: int, classes: int, ctx: LayerContext) -> _Piece:
    """Cross-entropy over a rank's share of the vocabulary.

    Fused: logits are read twice (maximum and sum; gradient) and overwritten by their gradient,
    which the backward scales. Eager: cast to fp32, log-softmax (two reads), loss; backward a
    zeroed fp32 gradient with the targets set, the log-softmax's gradient, and the cast back.
    Vocabulary-parallel, the ranks reduce maximum, target logit and sum, one fp32 number per token
    each; fused the last two travel together.
    """
    a, x = ctx.element, float(tokens) * classes
    fused = ctx.profile.fused_cross_entropy or ctx.profile.compiled
    if fused:
        forward: list[Operation] = [
            MemoryBound(name, "cross_entropy", 2 * a * x, a * x, 6 * x, kernels=2)
        ]
        backward: list[Operation] = [
            MemoryBound(f"{name}.grad", "cross_entropy", a * x, a * x, x, phase=I)
        ]
    elif ctx.tensor > 1:
        # Megatron-LM's vocab_parallel_cross_entropy: cast, maximum, subtract, exponential, sum,
        # divide, each a pass over fp32; backward scales the softmax in place and casts back
        forward = [MemoryBound(name, "cross_entropy", (a + 20) * x, 16 * x, 6 * x, kernels=6)]
        backward = [
            MemoryBound(
                f"{name}.grad", "cross_entropy", 8 * x, (4 + a) * x, 2 * x, kernels=2, phase=I
            )
        ]
    else:
        forward = [MemoryBound(name, "cross_entropy", (a + 8) * x, 8 * x, 6 * x, kernels=3)]
        backward = [
            MemoryBound(
                f"{name}.grad", "cross_entropy", 12 * x, (8 + a) * x, 2 * x, kernels=4, phase=I
            )
        ]
    if ctx.tensor > 1:
        sizes = (4.0 * tokens, 8.0 * tokens) if fused else (4.0 * tokens,) * 3
        labels = ("max", "sums") if fused else ("max", "target", "sum")
        forward += [
            Collective(f"{name}.{label}", "all_reduce", "tensor", size)
            for label, size in zip(labels, sizes, strict=True)
        ]
    return _Piece(forward, backward)


def _head(model: ModelSpec, ctx: LayerContext, prefix: str = "head") -> list[_Piece]:
    a, h = ctx.element, model.hidden
    rms = model.norm == "rmsnorm"
    if model.family == "mlp":
        x = float(ctx.tokens) * model.dense_sizes[-1]
        return [
            _Piece(
                [MemoryBound("head.loss", "elementwise", 2 * a * x, 4.0, 3 * x, kernels=2)],
                [MemoryBound("head.loss.grad", "elementwise", 2 * a * x, a * x, 2 * x, phase=I)],
            )
        ]
    wide = replace(ctx, precision=ctx.wide)
    if model.family == "vit":
        classes = _split(model.vocab, ctx.tensor)
        images = ctx.micro_batch
        return [
            _norm(f"{prefix}.norm", ctx.sharded_tokens, h, ctx, rms=rms),
            _linear(f"{prefix}.logits", images, classes, h, wide, mode="column", bias=True),
            _cross_entropy(f"{prefix}.cross_entropy", images, classes, wide),
        ]
    tokens, shard = ctx.tokens, ctx.sharded_tokens
    if model.encoder_layers and ctx.decoder_seq is not None:
        tokens = ctx.micro_batch * _split(ctx.decoder_seq, ctx.context)
        shard = _split(tokens, ctx.tensor) if ctx.sharded else tokens
    vocab = ctx.padded_vocab(model.vocab) // ctx.tensor
    pieces: list[_Piece] = []
    if model.final_norm:
        pieces.append(_norm(f"{prefix}.norm", shard, h, ctx, rms=rms))
    if model.lm_head_transform:
        pieces.append(_linear(f"{prefix}.transform", shard, h, h, wide, bias=True))
        pieces.append(
            _activation(
                f"{prefix}.activation", shard, h, wide,
                gated=False, bias=True, activation=model.activation,
            )
        )  # fmt: skip
        pieces.append(_norm(f"{prefix}.transform_norm", shard, h, ctx, rms=rms))
    width = model.embedding_dim or h
    if model.embedding_dim:
        pieces.append(_linear(f"{prefix}.project", tokens, width, h, wide))
    # the output projection stays in the wide type (Micikevicius et al., arXiv 2209.05433)
    pieces.append(
        _linear(f"{prefix}.logits", tokens, vocab, width, wide, mode="column", bias=model.head_bias)
    )
    if ctx.profile.fp32_logits:
        pieces.append(_float_logits(f"{prefix}.float", float(tokens) * vocab, wide.element))
        wide = replace(wide, precision="fp32")
    pieces.append(_cross_entropy(f"{prefix}.cross_entropy", tokens, vocab, wide))
    if ctx.profile.logit_metrics:
        pieces.append(_logit_metrics(f"{prefix}.metrics", float(tokens) * vocab, wide.element))
    return pieces


def _float_logits(name: str, x: float, element: float) -> _Piece:
    """`x` logits cast to fp32, and their gradient cast back."""
    return _Piece(
        [MemoryBound(name, "cast", element * x, 4.0 * x)],
        [MemoryBound(f"{name}.grad", "cast", 4.0 * x, element * x, phase=I)],
    )


def _logit_metrics(name: str, x: float, element: float) -> _Piece:
    """Accuracy and perplexity of `x` logits, forward only.

    InternEvo, internlm/model/metrics.py, AccPerplex and LossWithTypeId: a copy, maximum (twice) and
    argmax, the maximum subtracted, the exponential, its sum; and a second cross-entropy (two
    reads). The ranks' reductions of one number per token are left out.
    """
    reads, writes = 9.0 * element * x, 3.0 * element * x
    return _Piece([MemoryBound(name, "cross_entropy", reads, writes, 6 * x, kernels=9)], [])


def _mtp(model: ModelSpec, ctx: LayerContext) -> list[_Piece]:
    """Per depth: embedding of the shifted tokens, two norms, a 2h -> h projection, a block and the
    shared head (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    pieces: list[_Piece] = []
    shard, h, rms = ctx.sharded_tokens, model.hidden, model.norm == "rmsnorm"
    block = model.block(model.layers - 1)
    for _ in range(model.mtp_layers):
        pieces += _embedding(model, ctx)
        pieces.append(_norm("mtp.hidden_norm", shard, h, ctx, rms=rms))
        pieces.append(_norm("mtp.embedding_norm", shard, h, ctx, rms=rms))
        n = _split(h, ctx.tensor)
        pieces.append(_linear("mtp.project", ctx.tokens, n, 2 * h, ctx, mode="column"))
        if ctx.tensor > 1:
            # the block expects whole rows: outputs are gathered, or scattered to sequence shards
            size = ctx.element * ctx.tokens * h
            pieces.append(
                _Piece(
                    [Collective("mtp.project.output_all_gather", "all_gather", "tensor", size)],
                    [],
                )
            )
        pieces += _block_pieces(model, block, ctx)
        if not ctx.mtp_head_with_loss:
            pieces += _head(model, ctx, "mtp.head")
    return pieces


#: What names begin with that grows with the vocabulary: operations, and tensors that are stored.
_VOCABULARY = (
    "embedding.lookup", "embedding.wgrad", "embedding.all_reduce", "embedding.reduce_scatter",
    "embedding.grad_all_gather", "embedding.tokens", "head.logits", "head.cross_entropy",
    "head.output",
)  # fmt: skip


# -- public --------------------------------------------------------------------------------------


def is_vocabulary(name: str) -> bool:
    """Is an operation or tensor of embedding or head one that vocabulary parallelism spreads?"""
    return name.startswith(_VOCABULARY)


def _with_shard_copies(
    model: ModelSpec,
    layer: Block | str,
    ctx: LayerContext,
    forward: list[Operation],
    backward: list[Operation],
) -> tuple[list[Operation], list[Operation]]:
    """Add what PyTorch FSDP copies on the compute stream (`profile.fsdp_copies`)."""
    kind = ctx.profile.fsdp_copies
    if ctx.shards == 1 or kind in ("none", "lists"):
        return forward, backward
    size = ctx.element * _parameters(model, layer, ctx).total
    wire = size * ctx.profile.grad_reduce_bytes / ctx.element
    if kind == "fsdp1":
        copies = [MemoryBound("fsdp.concatenate_gradients", "copy", size, size, phase=W)]
        if wire != size:
            copies.append(MemoryBound("fsdp.cast_gradients", "copy", size, wire, phase=W))
        if ctx.shards >= 4:  # torch.distributed._get_gradient_predivide_factor is above 1
            copies.append(MemoryBound("fsdp.divide_gradients", "elementwise", wire, wire, phase=W))
        return forward, [*backward, *copies]
    out = MemoryBound("fsdp.copy_out", "copy", size, size)
    again = replace(out, name="fsdp.copy_out.backward", phase=I)
    copy_in = MemoryBound("fsdp.copy_in_gradients", "copy", size, wire, phase=W)
    backward = [*backward, copy_in]
    regathers = ctx.profile.fsdp_regather_backward
    return [out, *forward], [again, *backward] if regathers else backward


@lru_cache(maxsize=4096)
def _operations(model: ModelSpec, layer: Block | str, ctx: LayerContext) -> LayerOperations:
    if model.traced is not None:
        traced = model.traced.operations(layer, ctx)
        forward, backward = _with_shard_copies(
            model, layer, ctx, list(traced.forward), list(traced.backward)
        )
        return LayerOperations(tuple(forward), tuple(backward))
    if isinstance(layer, Block):
        pieces = _block_pieces(model, layer, ctx)
    elif layer == "embedding":
        pieces = _embedding(model, ctx)
    elif layer == "head":
        pieces = _head(model, ctx)
        for _ in range(model.mtp_layers if ctx.mtp_head_with_loss else 0):
            pieces += _head(model, ctx, "mtp.head")
    else:
        pieces = _mtp(model, ctx)
    forward, backward = _assemble(pieces)
    if ctx.profile.compiled:
        forward = _fuse_compiled(forward)
    if isinstance(layer, Block) or layer == "mtp":
        backward = _recomputation(forward, ctx) + backward
    if ctx.vocabulary_ranks > 1:
        forward = [op for op in forward if not is_vocabulary(op.name)]
        backward = [op for op in backward if not is_vocabulary(op.name)]
    forward, backward = _with_shard_copies(model, layer, ctx, forward, backward)
    return LayerOperations(tuple(forward), tuple(backward))


def layer_operations(model: ModelSpec, layer: LayerId, ctx: LayerContext) -> LayerOperations:
    """Operations of one layer and micro-batch on one rank.

    Parameters
    ----------
    layer:
        Index of a transformer block, or `"embedding"`, `"head"` or `"mtp"`.

    Returns
    -------
    LayerOperations
        `forward` and `backward` in execution order; equal blocks return the same object.
    """
    return _operations(model, model.block(layer) if isinstance(layer, int) else layer, ctx)


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer that one rank holds before data-parallel sharding."""

    dense: float
    """Replicated over (or sharded by) the data x context group."""
    expert: float
    """Expert weights: replicated over the expert-data group."""

    @property
    def total(self) -> float:
        return self.dense + self.expert

    def __add__(self, other: LayerParameters) -> LayerParameters:
        return LayerParameters(self.dense + other.dense, self.expert + other.expert)


@lru_cache(maxsize=4096)
def _parameters(model: ModelSpec, layer: Block | str, ctx: LayerContext) -> LayerParameters:
    dense = expert = 0.0
    for tensor in block_tensors(model, layer):
        elements = float(tensor.elements)
        if tensor.name in ("embedding.tokens", "head.output.weight", "head.output.bias"):
            if ctx.vocabulary_ranks > 1:
                continue
            elements *= ctx.padded_vocab(model.vocab) / model.vocab
        if tensor.sharding == "expert":
            expert += elements / (ctx.expert * ctx.expert_tensor)
        elif tensor.sharding == "tensor":
            # key and value heads are copied where there are fewer of them than tensor ranks
            parts = ctx.tensor
            if tensor.name.rsplit(".", 2)[-2:-1] == ["kv"]:
                parts = min(parts, model.kv_heads)
            dense += elements / parts
        else:
            dense += elements
    return LayerParameters(dense, expert)


def layer_parameters(model: ModelSpec, layer: LayerId, ctx: LayerContext) -> LayerParameters:
    """Parameters of one layer on one rank, after tensor and expert parallelism."""
    return _parameters(model, model.block(layer) if isinstance(layer, int) else layer, ctx)


def weight_elements(op: Operation) -> float:
    """Elements of the weight that a GEMM multiplies by (0 for other operations)."""
    if isinstance(op, GroupedGemm):
        return float(op.groups) * op.n * op.k
    return float(op.n) * op.k if isinstance(op, Gemm) and op.batch == 1 else 0.0
