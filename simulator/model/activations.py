"""Activation memory: what the forward of one micro-batch keeps for its backward.

The accounting follows Korthikanti et al. (arXiv 2205.05198, section 4): every tensor that a
backward operation reads is counted once, in the bytes it is stored in, after sharding. For a
GPT-3-style layer (fp16, dropout, unfused attention) it gives their sbh(34 + 5as/h).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from simulator.model.context import LayerContext
from simulator.model.layers import expert_rows, is_vocabulary
from simulator.model.spec import Block, LayerId, ModelSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor kept for the backward: bytes per rank and micro-batch, and the part it is of."""

    name: str
    bytes: float
    module: str
    """`attention`, `core_attn`, `layernorm`, `mlp`, `moe`, `activation`, `boundary`, ..."""


def _split(total: float, parts: int) -> float:
    return max(1.0, total / parts)


def _mask(ctx: LayerContext) -> float:
    return 1.0 if ctx.profile.dropout else 0.0


def _attention(
    model: ModelSpec, name: str, ctx: LayerContext, tokens: float, shard: float, kv_tokens: float
) -> Iterator[StoredTensor]:
    a, t, h = ctx.element, ctx.tensor, model.hidden
    low = ctx.cast_element
    heads = _split(model.heads, t)
    gemm_in = low if ctx.low_precision else a
    yield StoredTensor(f"{name}.input", gemm_in * shard * h, "linear_input")
    if model.mla:
        latent = (model.q_lora_rank or 0) + model.kv_lora_rank
        # input and output of the two latent norms; queries, keys and values after the up-projection
        yield StoredTensor(f"{name}.latent", 2 * a * shard * latent, "attention")
        yield StoredTensor(f"{name}.qkv.q", a * tokens * heads * model.qk_dim, "mla_up_proj")
        yield StoredTensor(f"{name}.qkv.k", a * tokens * heads * model.qk_dim, "mla_up_proj")
        yield StoredTensor(f"{name}.qkv.v", a * tokens * heads * model.v_dim, "mla_up_proj")
    else:
        kv = _split(model.kv_heads, t) * model.head_dim
        q = heads * model.head_dim
        yield StoredTensor(f"{name}.qkv.q", a * tokens * q, "attention")
        yield StoredTensor(f"{name}.qkv.k", a * kv_tokens * kv, "attention")
        yield StoredTensor(f"{name}.qkv.v", a * kv_tokens * kv, "attention")
        if model.qk_norm != "none":
            yield StoredTensor(f"{name}.qk_norm", a * (tokens * q + kv_tokens * kv), "layernorm")
    if ctx.profile.fused_attention or ctx.context > 1:
        # softmax statistics, one fp32 number per query and head
        yield StoredTensor(f"{name}.statistics", 4.0 * tokens * heads, "core_attn")
        out = tokens * heads * model.value_dim
        # the output is read by the backward and by the projection's weight gradient
        yield StoredTensor(f"{name}.output", a * out, "attention")
        if ctx.low_precision:
            yield StoredTensor(f"{name}.proj_input", low * out, "linear_input")
    else:
        scores = tokens * heads * kv_tokens / ctx.micro_batch
        yield StoredTensor(f"{name}.softmax", a * scores, "core_attn")
        if ctx.profile.dropout:
            yield StoredTensor(f"{name}.dropout", (a + 1.0) * scores, "core_attn")
        yield StoredTensor(
            f"{name}.proj_input", gemm_in * tokens * heads * model.value_dim, "linear_input"
        )
    if _mask(ctx):
        yield StoredTensor(f"{name}.residual.mask", shard * h, "attention")


def _mlp(
    model: ModelSpec, name: str, ffn: float, ctx: LayerContext, tokens: float, shard: float
) -> Iterator[StoredTensor]:
    a = ctx.element
    gemm_in = ctx.cast_element if ctx.low_precision else a
    f = ffn / ctx.tensor
    wide = 2 if model.gated_mlp else 1
    yield StoredTensor(f"{name}.input", gemm_in * shard * model.hidden, "linear_input")
    yield StoredTensor(f"{name}.fc1_output", wide * a * tokens * f, "mlp")
    if not (ctx.profile.fused_activation or ctx.profile.compiled):
        extra = (1 if model.gated_mlp else 0) + (1 if model.activation == "squared_relu" else 0)
        yield StoredTensor(f"{name}.eager_activation", extra * a * tokens * f, "activation")
    yield StoredTensor(f"{name}.activation_output", gemm_in * tokens * f, "activation")


def _moe(model: ModelSpec, ctx: LayerContext) -> Iterator[StoredTensor]:
    a, h = ctx.element, model.hidden
    gemm_in = ctx.cast_element if ctx.low_precision else a
    tokens = ctx.tokens / ctx.tensor
    _, rows = expert_rows(model, ctx)
    rows *= ctx.moe_imbalance if ctx.capacity_factor is None else 1.0
    f = model.expert_ffn / ctx.expert_tensor
    wide = 2 if model.gated_mlp else 1
    yield StoredTensor("moe.input", a * tokens * h, "layernorm_output")
    yield StoredTensor("moe.router", 4.0 * tokens * model.n_experts * 2, "moe")
    yield StoredTensor("moe.dispatched", gemm_in * rows * h, "moe")
    yield StoredTensor("moe.fc1_output", wide * a * rows * f, "moe")
    yield StoredTensor("moe.activation_output", gemm_in * rows * f, "moe_act")
    if model.shared_ffn:
        shard = ctx.tokens / ctx.tensor if ctx.sharded else ctx.tokens
        yield from _mlp(model, "moe.shared", model.shared_ffn, ctx, ctx.tokens, shard)


def _block(model: ModelSpec, block: Block, ctx: LayerContext) -> Iterator[StoredTensor]:
    a, h = ctx.element, model.hidden
    if model.family == "mlp":
        index = block.index
        inputs = model.dense_sizes[index]
        outputs = model.dense_sizes[index + 1]
        column = index % 2 == 0
        yield StoredTensor(
            "dense.input", a * ctx.tokens * (inputs if column else inputs / ctx.tensor), "boundary"
        )
        if index < model.layers - 1 and model.activation != "identity":
            width = outputs / ctx.tensor if column else outputs
            yield StoredTensor("dense.output", a * ctx.tokens * width, "activation")
        return
    tokens = float(ctx.tokens)
    encoder_tokens = tokens
    if model.encoder_layers and block.cross_attention and ctx.decoder_seq is not None:
        tokens = ctx.micro_batch * ctx.decoder_seq / ctx.context
    shard = tokens / ctx.tensor if ctx.sharded else tokens
    norms = a * shard * h
    yield StoredTensor("attention.norm.input", norms, "boundary")
    yield from _attention(model, "attention", ctx, tokens, shard, tokens)
    if block.cross_attention:
        yield StoredTensor("cross.norm.input", norms, "residual")
        yield from _attention(model, "cross", ctx, tokens, shard, encoder_tokens)
    if model.block_norms > 1:
        yield StoredTensor("mlp.norm.input", norms, "residual")
    if model.block_norms == 4:
        yield StoredTensor("post_norms.input", 2 * norms, "layernorm")
    if block.moe:
        yield from _moe(model, ctx)
    else:
        yield from _mlp(model, "mlp", model.ffn, ctx, tokens, shard)
    if _mask(ctx):
        yield StoredTensor("mlp.residual.mask", shard * h, "mlp")


def _embedding(model: ModelSpec, ctx: LayerContext) -> Iterator[StoredTensor]:
    if model.family == "mlp":
        return
    shard = float(ctx.sharded_tokens)
    yield StoredTensor("embedding.indices", 8.0 * ctx.tokens, "embedding")
    if model.family == "vit":
        patch = model.channels * model.patch_size**2
        yield StoredTensor("embedding.patches", ctx.element * ctx.tokens * patch, "embedding")
    if model.embedding_norm:
        yield StoredTensor("embedding.norm.input", ctx.element * shard * model.hidden, "embedding")
    if _mask(ctx):
        yield StoredTensor("embedding.dropout.mask", shard * model.hidden, "embedding")


def _head(model: ModelSpec, ctx: LayerContext) -> Iterator[StoredTensor]:
    a, h = ctx.element, model.hidden
    if model.family == "mlp":
        yield StoredTensor("head.prediction", a * ctx.tokens * model.dense_sizes[-1], "head")
        return
    tokens, shard = float(ctx.tokens), float(ctx.sharded_tokens)
    if model.family == "vit":
        tokens = shard = float(ctx.micro_batch)
    if model.encoder_layers and ctx.decoder_seq is not None:
        tokens = ctx.micro_batch * ctx.decoder_seq / ctx.context
        shard = tokens / ctx.tensor if ctx.sharded else tokens
    if model.final_norm:
        yield StoredTensor("head.norm.input", a * shard * h, "head")
    if model.lm_head_transform:
        yield StoredTensor("head.transform", 3 * a * shard * h, "head")
    yield StoredTensor("head.logits.input", a * shard * (model.embedding_dim or h), "head")
    logits = tokens * ctx.padded_vocab(model.vocab) / ctx.tensor
    if ctx.profile.fused_cross_entropy or ctx.profile.compiled:
        # the gradient is written over the logits
        width = 4.0 if ctx.profile.fp32_logits else a
        yield StoredTensor("head.logits", width * logits, "head")
    else:
        # fp32 softmax (Korthikanti et al., section 4.3: 4sbv)
        yield StoredTensor("head.logits", 4.0 * logits, "head")


def _mtp(model: ModelSpec, ctx: LayerContext) -> Iterator[StoredTensor]:
    a, h, shard = ctx.element, model.hidden, float(ctx.sharded_tokens)
    block = model.block(model.layers - 1)
    for _ in range(model.mtp_layers):
        yield StoredTensor("mtp.norms.input", 2 * a * shard * h, "mtp")
        yield StoredTensor("mtp.project.input", 2 * a * shard * h, "linear_input")
        yield from _block(model, block, ctx)
        if not ctx.mtp_head_with_loss:
            yield from _head(model, ctx)


def _recomputed(tensor: StoredTensor, part: str) -> bool:
    """True if selective recomputation of `part` makes this tensor again."""
    name, module = tensor.name, tensor.module
    # the normalised input of a sub-block's first linear layers
    normalised = name in ("attention.input", "mlp.input", "cross.input")
    norms = module in ("layernorm", "layernorm_output") or normalised
    match part:
        case "core_attn":
            return module == "core_attn"
        case "layernorm":
            return norms
        case "activation":
            return module in ("activation", "moe_act")
        case "moe_act" | "mla_up_proj":
            return module == part
        case "attention":
            return name.startswith(("attention.", "cross.")) and module != "boundary"
        case "mlp":
            return name.startswith("mlp.") and module != "residual"
        case "moe":
            return name.startswith("moe.")
        case "shared_experts":
            return name.startswith("moe.shared")
        case "elementwise":
            return module in ("activation", "moe_act") or norms
        case "alternate_gemm":
            return name.endswith("qkv.k")  # of query, key, value the second product
    return False


def _kept(tensor: StoredTensor, ctx: LayerContext, *, gated: bool) -> float:
    """Share of `tensor` that is stored rather than recomputed."""
    if ctx.recompute == "none":
        return 1.0
    if ctx.recompute == "full":
        return float(tensor.module == "boundary")
    modules = ctx.selected_modules
    if any(_recomputed(tensor, part) for part in modules):
        return 0.0
    # of gate and up projection the second product
    halved = gated and "alternate_gemm" in modules and tensor.name.endswith("fc1_output")
    return 0.5 if halved else 1.0


def _keep(
    tensors: Iterator[StoredTensor], model: ModelSpec, ctx: LayerContext
) -> Iterator[StoredTensor]:
    for tensor in tensors:
        share = 1.0 if tensor.module == "head" else _kept(tensor, ctx, gated=model.gated_mlp)
        if share:
            yield tensor if share == 1.0 else replace(tensor, bytes=share * tensor.bytes)


@lru_cache(maxsize=4096)
def _stored(model: ModelSpec, layer: Block | str, ctx: LayerContext) -> tuple[StoredTensor, ...]:
    if model.traced is not None:
        return (StoredTensor("traced", model.traced.stored_bytes(layer, ctx), "boundary"),)
    if isinstance(layer, Block):
        return tuple(_keep(_block(model, layer, ctx), model, ctx))
    if layer == "embedding":
        return tuple(_embedding(model, ctx))
    if layer == "head":
        spread = ctx.vocabulary_ranks > 1
        heads = 1 + (model.mtp_layers if ctx.mtp_head_with_loss else 0)
        kept = [t for t in _head(model, ctx) if not (spread and is_vocabulary(t.name))]
        return tuple(kept * heads)
    return tuple(_keep(_mtp(model, ctx), model, ctx))


def stored_tensors(model: ModelSpec, layer: LayerId, ctx: LayerContext) -> tuple[StoredTensor, ...]:
    """Tensors that one micro-batch keeps on one rank between a layer's forward and backward."""
    return _stored(model, model.block(layer) if isinstance(layer, int) else layer, ctx)


def activation_bytes(model: ModelSpec, layer: LayerId, ctx: LayerContext) -> float:
    """Bytes that one micro-batch keeps on one rank between a layer's forward and backward.

    GPT-3-style profile: sbh(10 + 24/t + 5as/(ht)) with tensor parallelism, sbh/t (34 + 5as/h)
    with sequence parallelism, sbh/t 34 with selective recomputation, 2sbh with full (2sbh/t with
    sequence parallelism) (Korthikanti et al., arXiv 2205.05198, table 2).
    """
    return sum(tensor.bytes for tensor in stored_tensors(model, layer, ctx))


def transient_bytes(model: ModelSpec, layer: LayerId, ctx: LayerContext) -> float:
    """Largest working set of a layer beyond what it stores, at one time.

    What recomputation brings back for the one layer that runs, the gathered (not sequence
    -sharded) input and output of a linear layer, and the gradient of its widest tensor.
    """
    if model.traced is not None:
        return float(model.traced.transient_bytes(layer, ctx))
    if layer in ("embedding", "head") or model.family == "mlp":
        tokens = float(ctx.tokens if model.family != "vit" else ctx.micro_batch)
        if layer == "head" and model.family != "mlp" and ctx.vocabulary_ranks == 1:
            # logits gradient beside the logits (eager: fp32 logits and their bf16 copy)
            logits = tokens * ctx.padded_vocab(model.vocab) / ctx.tensor
            fused = ctx.profile.fused_cross_entropy or ctx.profile.compiled
            return logits * (ctx.element if fused else 4.0 + ctx.element)
        return ctx.element * tokens * (model.hidden or max(model.dense_sizes, default=1))
    whole = activation_bytes(model, layer, replace(ctx, recompute="none", recompute_modules=()))
    recomputed = whole - activation_bytes(model, layer, ctx)
    tokens, a = float(ctx.tokens), ctx.element
    is_moe = model.is_moe(layer) if isinstance(layer, int) else model.moe
    wide = 2 if model.gated_mlp else 1
    if is_moe:
        _, rows = expert_rows(model, ctx)
        rows *= ctx.moe_imbalance if ctx.capacity_factor is None else 1.0
        widest = max(rows * wide * model.expert_ffn / ctx.expert_tensor, rows * model.hidden)
        base = rows * model.hidden
    else:
        widest = tokens * wide * model.ffn / ctx.tensor
        base = tokens * model.hidden
    return max(0.0, recomputed) + a * (widest + 2 * base)
