"""Layers as operations: published FLOP formulas, conservation under sharding, communication."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.frameworks import FrameworkProfile
from simulator.errors import InputError
from simulator.model.context import LayerContext
from simulator.model.flops import attention_flops, flops_per_token, training_flops
from simulator.model.layers import (
    layer_operations,
    layer_parameters,
    weight_elements,
)
from simulator.model.library import model, model_names
from simulator.model.operations import (
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    MemoryBound,
    Operation,
    Phase,
)
from simulator.model.spec import LayerId, ModelSpec, layer_tensors

FUSED = FrameworkProfile(name="fused")
UNFUSED = FrameworkProfile(name="megatron 2021", fused_attention=False, dropout=True)


def products(operations: Iterable[Operation]) -> float:
    """FLOPs of matrix products and attention."""
    return sum(op.flops for op in operations if isinstance(op, Gemm | GroupedGemm | Attention))


def whole_model(spec: ModelSpec, ctx: LayerContext) -> tuple[float, float]:
    forward = backward = 0.0
    for layer in spec.layer_ids:
        ops = layer_operations(spec, layer, ctx)
        forward += products(ops.forward)
        backward += products(ops.backward)
    return forward, backward


def collectives(operations: Iterable[Operation], group: str = "tensor") -> list[Collective]:
    return [op for op in operations if isinstance(op, Collective) and op.group == group]


# -- published formulas -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-1.7b", "gpt-18.4b", "gpt-145.6b", "gpt-1008.0b"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_of_narayanan_et_al(name: str, recompute: str) -> None:
    """72 B s l h^2 (1 + s/6h + V/12lh); with full recomputation 96 B s l h^2 (1 + s/6h + V/16lh)
    (arXiv 2104.04473, appendix)."""
    spec = model(name)
    b, s, h, n, v = 2, 2048, spec.hidden, spec.layers, spec.vocab
    ctx = LayerContext(b, s, profile=UNFUSED, recompute=recompute, precision="fp16")
    total = sum(whole_model(spec, ctx))
    if recompute == "none":
        expected = 72 * b * s * n * h**2 * (1 + s / (6 * h) + v / (12 * n * h))
    else:
        expected = 96 * b * s * n * h**2 * (1 + s / (6 * h) + v / (16 * n * h))
    assert total == pytest.approx(expected, rel=1e-12)


def test_selective_recomputation_of_korthikanti_et_al() -> None:
    """72 B L s h^2 (1 + s/6h + V/12hL) + 4 B L s^2 h: only the attention core runs again
    (arXiv 2205.05198, equations 7 and 8)."""
    spec = model("gpt-22b")
    b, s, h, n = 4, 2048, spec.hidden, spec.layers
    plain = sum(whole_model(spec, LayerContext(b, s, profile=UNFUSED)))
    ctx = LayerContext(b, s, profile=UNFUSED, recompute="selective")
    again = sum(whole_model(spec, ctx)) - plain
    assert again == pytest.approx(4 * b * n * s**2 * h, rel=1e-12)


def test_model_flops_are_those_of_the_operations() -> None:
    for name in ("gpt3-175b", "llama3-70b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b"):
        spec = model(name)
        ctx = LayerContext(1, 4096, vocab_padding=1)
        forward, _ = whole_model(spec, ctx)
        assert 3 * forward == pytest.approx(training_flops(spec, 4096), rel=1e-9), name


def test_six_flops_per_parameter() -> None:
    """6 N per token without the lookup tables, plus 12 L h s for attention (Kaplan et al.; PaLM,
    arXiv 2204.02311, appendix B, counts the whole score matrix)."""
    spec = model("llama2-7b")
    n = spec.parameters - spec.vocab * spec.hidden
    norms = (2 * spec.layers + 1) * spec.hidden
    expected = 6 * (n - norms) + 12 * spec.layers * spec.hidden * 4096
    assert flops_per_token(spec, 4096, causal=False) == pytest.approx(expected, rel=1e-12)
    causal = 6 * (n - norms) + 6 * spec.layers * spec.hidden * 4096
    assert flops_per_token(spec, 4096) == pytest.approx(causal, rel=1e-12)


def test_windows_limit_attention() -> None:
    spec = model("gpt-oss-20b")
    full = replace(spec, window=None)
    seq, w = 8192, 128
    half = spec.layers // 2
    pair = 2 * spec.heads * 2 * spec.head_dim
    expected = pair * half * (seq**2 / 2 - (seq * w - w**2 / 2))
    saved = attention_flops(full, seq) - attention_flops(spec, seq)
    assert saved == pytest.approx(expected, rel=1e-12)


# -- operations and parameters agree ------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in model_names() if not n.startswith(("vit", "linear"))])
def test_every_weight_is_multiplied_once(name: str) -> None:
    """The weights of the forward GEMMs are exactly the matrix parameters of the layer."""
    spec = model(name)
    ctx = LayerContext(1, 256, vocab_padding=1, profile=FUSED)
    layers: list[LayerId] = [0, spec.layers - 1, "head"]
    for layer in layers:
        ops = layer_operations(spec, layer, ctx).forward
        multiplied = sum(weight_elements(op) for op in ops)
        matrices = sum(t.elements for t in layer_tensors(spec, layer) if t.matrix)
        if layer == "head":
            if spec.tied_embeddings:
                matrices += spec.vocab * (spec.embedding_dim or spec.hidden)
            if spec.pooler:
                matrices -= spec.hidden**2  # one token per sequence: not simulated
        if spec.shared_gate and isinstance(layer, int):
            matrices -= spec.hidden  # a product with a vector
        assert multiplied == matrices, (name, layer)


@pytest.mark.parametrize("name", ["gpt3-13b", "llama3-70b", "mixtral-8x7b", "deepseek-v2-lite"])
@pytest.mark.parametrize("profile", [FUSED, UNFUSED])
def test_backward_is_twice_the_forward(name: str, profile: FrameworkProfile) -> None:
    """Each linear layer has an input and a weight gradient of its forward's FLOPs."""
    spec = model(name)
    ops = layer_operations(spec, spec.layers - 1, LayerContext(1, 1024, profile=profile))

    def linear(operations: Iterable[Operation]) -> float:
        return sum(
            op.flops
            for op in operations
            if isinstance(op, Gemm | GroupedGemm) and ".core" not in op.name
        )

    forward = linear(ops.forward)
    assert linear(ops.weight_gradient) == pytest.approx(forward)
    assert linear(ops.input_gradient) == pytest.approx(forward)
    core = [op for op in ops.forward if ".core" in op.name]
    core_grad = [op for op in ops.backward if ".core" in op.name]
    ratio = 2.5 if profile.fused_attention else 2.0
    assert products(core_grad) == pytest.approx(ratio * products(core))


def test_split_backward_is_the_whole_backward() -> None:
    spec = model("llama3-8b")
    for recompute in ("none", "full"):
        ops = layer_operations(spec, 0, LayerContext(1, 1024, tensor=2, recompute=recompute))
        assert sorted(map(repr, ops.backward)) == sorted(
            map(repr, ops.input_gradient + ops.weight_gradient)
        )
        assert all(op.phase is Phase.WEIGHT_GRADIENT for op in ops.weight_gradient)
        assert not any(op.name.startswith("recompute") for op in ops.weight_gradient)


def test_first_layers_have_no_input_gradient() -> None:
    spec = model("mlp-small")
    names = [op.name for op in layer_operations(spec, 0, LayerContext(32, 1)).backward]
    assert "dense.wgrad" in names
    assert "dense.dgrad" not in names
    assert "dense.dgrad" in [
        op.name for op in layer_operations(spec, 1, LayerContext(32, 1)).backward
    ]


def test_regression_with_one_linear_layer() -> None:
    """y = Wx: 2 b i o FLOPs forward, as many for the weight gradient, none else."""
    spec = model("linear-regression")
    ctx = LayerContext(64, 1, precision="fp32")
    forward, backward = whole_model(spec, ctx)
    assert forward == backward == 2 * 64 * 1024
    gemm = next(op for op in layer_operations(spec, 0, ctx).forward if isinstance(op, Gemm))
    assert (gemm.m, gemm.n, gemm.k, gemm.precision) == (64, 1, 1024, "fp32")


# -- tensor and sequence parallelism ------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    name=st.sampled_from(["gpt3-175b", "llama3-70b", "qwen2-72b", "mixtral-8x7b", "deepseek-v3"]),
    tensor=st.sampled_from([1, 2, 4, 8]),
    sequence=st.booleans(),
    fused=st.booleans(),
    batch=st.integers(1, 4),
)
def test_tensor_parallelism_conserves_flops(
    name: str, tensor: int, sequence: bool, fused: bool, batch: int
) -> None:
    spec = replace(model(name), vocab=51200)  # needs no padding
    profile = FUSED if fused else UNFUSED
    one = LayerContext(batch, 1024, profile=profile)
    many = replace(
        one,
        tensor=tensor,
        sequence_parallel=sequence or spec.moe or spec.mla,
        expert_tensor=1,
        expert=tensor if spec.moe else 1,
    )
    for layer in (0, spec.layers - 1, "head"):
        alone, split = layer_operations(spec, layer, one), layer_operations(spec, layer, many)
        assert tensor * products(split.forward) == pytest.approx(products(alone.forward))
        assert tensor * products(split.backward) == pytest.approx(products(alone.backward))
        alone_params, split_params = (
            layer_parameters(spec, layer, one),
            layer_parameters(spec, layer, many),
        )
        assert split_params.total <= alone_params.total
        matrices = sum(
            t.elements
            for t in layer_tensors(spec, layer)
            if t.matrix and t.sharding != "replicated"
        )
        assert split_params.total * tensor >= matrices * (1 - 1e-12)


def test_communication_of_shoeybi_et_al() -> None:
    """Two all-reduces of b s h in the forward and two in the backward (arXiv 1909.08053)."""
    spec = model("gpt-22b")
    size = 2 * 4 * 2048 * spec.hidden
    ops = layer_operations(spec, 0, LayerContext(4, 2048, tensor=8))
    for part in (ops.forward, ops.backward):
        found = collectives(part)
        assert [op.op for op in found] == ["all_reduce"] * 2
        assert all(op.bytes == size for op in found)


def test_communication_of_sequence_parallelism() -> None:
    """All-gather and reduce-scatter in place of each all-reduce: the same bytes on a ring, and two
    more gathers in the backward (Korthikanti et al., arXiv 2205.05198, section 4.2.2)."""
    spec = model("gpt-22b")
    size = 2 * 4 * 2048 * spec.hidden
    ops = layer_operations(spec, 0, LayerContext(4, 2048, tensor=8, sequence_parallel=True))
    kinds = [op.op for op in collectives(ops.forward)]
    assert kinds == ["all_gather", "reduce_scatter"] * 2
    backward = collectives(ops.backward)
    assert sorted(op.op for op in backward) == ["all_gather"] * 4 + ["reduce_scatter"] * 2
    assert all(op.bytes == size for op in collectives(ops.forward) + backward)
    saved = [op for op in backward if op.name.endswith("input_all_gather")]
    assert [op.overlap for op in saved] == ["mlp.fc1.dgrad", "attention.qkv.dgrad"]
    assert all(op.phase is Phase.WEIGHT_GRADIENT for op in saved)


def test_overlaps_name_kernels_of_the_same_pass() -> None:
    profile = replace(FUSED, tensor_overlap=True, moe_overlap=True)
    for name in ("llama3-70b", "mixtral-8x7b", "deepseek-v3"):
        spec = model(name)
        ctx = LayerContext(
            1, 2048, tensor=4, context=2, expert=4 if spec.moe else 1,
            sequence_parallel=True, profile=profile, recompute="full",
        )  # fmt: skip
        for layer in spec.layer_ids:
            ops = layer_operations(spec, layer, ctx)
            for part in (ops.forward, ops.backward):
                names = {op.name for op in part if not isinstance(op, Collective)}
                for op in part:
                    if isinstance(op, Collective) and op.overlap is not None:
                        assert op.overlap in names, op


def test_key_value_heads_are_copied_beyond_their_number() -> None:
    spec = model("llama3-70b")  # 8 key-value heads
    kv = {t: layer_parameters(spec, 0, LayerContext(1, 1024, tensor=t)).total for t in (8, 16)}
    d, h = spec.head_dim, spec.hidden
    rest = spec.ffn * 3 * h + 2 * spec.heads * d * h
    assert kv[8] == pytest.approx((rest + 2 * 8 * d * h) / 8 + 2 * h)
    assert kv[16] == pytest.approx(rest / 16 + 2 * d * h + 2 * h)
    qkv = next(
        op
        for op in layer_operations(spec, 0, LayerContext(1, 1024, tensor=16)).forward
        if isinstance(op, Gemm) and op.name == "attention.qkv"
    )
    assert qkv.n == (4 + 2) * d


def test_vocabulary_is_padded_and_split() -> None:
    spec = model("gpt2-124m")
    ops = layer_operations(spec, "head", LayerContext(1, 1024, tensor=4))
    logits = next(op for op in ops.forward if op.name == "head.logits")
    assert isinstance(logits, Gemm)
    assert logits.n * 4 == 50688  # the next multiple of 128 * 4
    reductions = [op for op in ops.forward if op.kind == "all_reduce"]
    assert [op.bytes for op in reductions if isinstance(op, Collective)] == [4 * 1024, 8 * 1024]


# -- context parallelism ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("context", [2, 4, 8])
def test_context_parallelism_conserves_attention(kind: str, context: int) -> None:
    spec = model("llama3-8b")
    one = layer_operations(spec, 0, LayerContext(1, 32768))
    ctx = LayerContext(1, 32768, context=context, context_kind=kind)
    many = layer_operations(spec, 0, ctx)
    assert context * products(many.forward) == pytest.approx(products(one.forward))
    assert context * products(many.backward) == pytest.approx(products(one.backward))


def test_context_parallel_traffic() -> None:
    spec = model("llama3-8b")
    s, c = 32768, 4
    kv = 2 * (s // c) * 2 * spec.kv_heads * spec.head_dim
    ring = layer_operations(spec, 0, LayerContext(1, s, context=c))
    sent = collectives(ring.forward, "context")
    assert [op.op for op in sent] == ["send_recv"] * (c - 1)
    assert all(op.bytes == kv for op in sent)
    gather = layer_operations(spec, 0, LayerContext(1, s, context=c, context_kind="allgather"))
    (op,) = collectives(gather.forward, "context")
    assert (op.op, op.bytes) == ("all_gather", c * kv)
    back = collectives(gather.backward, "context")
    assert [op.op for op in back] == ["all_gather", "reduce_scatter"]
    ulysses = layer_operations(spec, 0, LayerContext(1, s, context=c, context_kind="ulysses"))
    into, out = collectives(ulysses.forward, "context")
    q = 2 * (s // c) * spec.heads * spec.head_dim
    assert (into.bytes, out.bytes) == (q + kv, q)


# -- experts --------------------------------------------------------------------------------------


def grouped(operations: Iterable[Operation]) -> list[GroupedGemm]:
    return [op for op in operations if isinstance(op, GroupedGemm)]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    expert=st.sampled_from([1, 2, 4, 8]),
    expert_tensor=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2, 4]),
    seq=st.sampled_from([512, 1024, 4096]),
)
def test_expert_rows_are_conserved(expert: int, expert_tensor: int, tensor: int, seq: int) -> None:
    """Over all ranks that share one micro-batch's tokens the experts multiply tokens * top_k rows:
    FLOPs of a rank are its tokens' share, whatever the experts' layout."""
    spec = model("mixtral-8x7b")
    ctx = LayerContext(
        1, seq, tensor=tensor, sequence_parallel=True, expert=expert, expert_tensor=expert_tensor
    )
    for op in grouped(layer_operations(spec, 0, ctx).forward):
        assert op.groups * expert == spec.n_experts
    flops = sum(op.flops for op in grouped(layer_operations(spec, 0, ctx).forward))
    expected = 2 * 3 * spec.hidden * spec.expert_ffn * seq * spec.top_k / tensor
    assert flops == pytest.approx(expected)
    held = layer_parameters(spec, 0, ctx).expert
    assert held * expert * expert_tensor == 3 * 8 * spec.hidden * spec.expert_ffn


def test_dispatch_and_combine_bytes() -> None:
    spec = model("qwen3-30b-a3b")
    ctx = LayerContext(1, 4096, expert=8)
    copies = 4096 * spec.top_k * spec.hidden
    plain = layer_operations(spec, 0, ctx)
    # the tokens per expert of all ranks, tokens, their probabilities, and the way back
    assert [(op.op, op.bytes) for op in collectives(plain.forward, "expert")] == [
        ("all_gather", 8 * spec.n_experts * 8),
        ("all_to_all", 2 * copies),
        ("all_to_all", 4 * 4096 * spec.top_k),
        ("all_to_all", 2 * copies),
    ]
    assert [(op.op, op.bytes) for op in collectives(plain.backward, "expert")] == [
        ("all_to_all", 2 * copies),
        ("all_to_all", 4 * 4096 * spec.top_k),
        ("all_to_all", 2 * copies),
    ]
    # where each expert takes a fixed number, nobody counts
    fixed = layer_operations(spec, 0, replace(ctx, capacity_factor=1.0)).forward
    assert [op.op for op in collectives(fixed, "expert")] == ["all_to_all"] * 3
    # but picks the tokens of each expert, which a compiler fuses with the rest
    names = {op.name for op in fixed}
    assert "moe.router.capacity" in names
    assert not names & {"moe.counts", "moe.token_counts"}
    compiled = replace(ctx, capacity_factor=1.0, profile=replace(FUSED, compiled=True))
    fused = layer_operations(spec, 0, compiled).forward
    assert "moe.router.capacity" not in {op.name for op in fused}
    # DeepEP: one copy per rank that holds any of the 8 of 128 experts, 16 of them per rank
    deepep = replace(FUSED, moe_dispatcher="deepep")
    narrow = replace(ctx, profile=deepep, precision="fp8")
    once = 4096 * spec.hidden * 8 * (1 - math.comb(112, 8) / math.comb(128, 8))
    assert once < copies
    ops = layer_operations(spec, 0, narrow)
    for part in (ops.forward, ops.backward):
        # Megatron-Core dispatches bf16 whatever the GEMMs' type
        assert [op.bytes for op in collectives(part, "expert")] == pytest.approx([2 * once] * 2)
    quantised = replace(narrow, profile=replace(deepep, moe_dispatch_fp8=True))
    ops = layer_operations(spec, 0, quantised)
    for part in (ops.forward, ops.backward):
        sizes = [op.bytes for op in collectives(part, "expert")]
        assert sizes == pytest.approx([once, 2 * once])
    gather = replace(ctx, profile=replace(FUSED, moe_dispatcher="allgather"))
    ops = layer_operations(spec, 0, gather)
    assert [op.op for op in collectives(ops.forward, "expert")] == ["all_gather", "reduce_scatter"]


def test_quantising_experts_takes_kernels_per_expert() -> None:
    """Transformer Engine quantises each expert's rows by itself: four launches with per-tensor
    current scaling, one (and two swizzles for all) in MXFP8, one for all with delayed scaling."""
    spec = model("qwen3-30b-a3b")

    def launches(precision: str, experts: int, **changes: object) -> list[int]:
        ctx = LayerContext(
            1, 4096, expert=128 // experts, precision=precision, profile=replace(FUSED, **changes)
        )
        ops = layer_operations(spec, 0, ctx).forward
        return [op.kernels for op in ops if op.name in ("moe.fc1.cast", "moe.fc2.cast")]

    assert launches("fp8", 16, fp8_recipe="current") == [64, 64]
    assert launches("fp8", 4, fp8_recipe="current") == [16, 16]
    assert launches("fp8", 16, fp8_recipe="delayed") == [1, 1]
    assert launches("mxfp8", 16) == [18, 18]
    assert launches("mxfp8", 16, grouped_cast="fused") == [1, 1]


def test_fused_expert_mlp_saves_launches_and_traffic() -> None:
    spec = model("qwen3-30b-a3b")
    ctx = LayerContext(1, 4096, expert=8, precision="mxfp8", profile=FUSED)
    fused = replace(ctx, profile=replace(FUSED, fused_grouped_mlp=True, grouped_cast="fused"))
    for part in ("forward", "backward"):
        apart, together = (
            [op for op in getattr(layer_operations(spec, 0, c), part) if op.name[:4] == "moe."]
            for c in (ctx, fused)
        )
        assert sum(op.flops for op in grouped(apart)) == sum(op.flops for op in grouped(together))
        moved = [sum(op.bytes for op in ops if isinstance(op, MemoryBound))
                 for ops in (apart, together)]  # fmt: skip
        assert moved[1] < moved[0]
        kernels = [sum(op.kernels for op in ops if isinstance(op, MemoryBound))
                   for ops in (apart, together)]  # fmt: skip
        assert kernels[1] < kernels[0]


def test_biased_experts_add_their_bias_expert_by_expert() -> None:
    spec = replace(model("qwen3-30b-a3b"), biases=True)
    for expert, local in ((8, 16), (32, 4)):
        ctx = LayerContext(1, 4096, expert=expert)
        ops = {op.name: op for op in layer_operations(spec, 0, ctx).forward}
        assert ops["moe.bias"].kernels == 2 * local + 2
        rows = 4096 * spec.top_k
        assert ops["moe.bias"].bytes == pytest.approx(28 * rows * spec.hidden)
    plain = layer_operations(model("qwen3-30b-a3b"), 0, LayerContext(1, 4096, expert=8))
    assert "moe.bias" not in {op.name for op in plain.forward}


def test_dropless_dispatch_reads_the_counts_on_the_host() -> None:
    spec = model("qwen3-30b-a3b")
    ctx = LayerContext(1, 4096, expert=8)
    names = [op.name for op in layer_operations(spec, 0, ctx).forward]
    assert names.index("moe.token_counts") < names.index("moe.dispatch")
    capped = replace(ctx, capacity_factor=1.0)
    free = replace(ctx, profile=replace(FUSED, moe_host_sync=False))
    for other in (capped, free):
        names = [op.name for op in layer_operations(spec, 0, other).forward]
        assert "moe.token_counts" not in names


def test_capacity_and_imbalance() -> None:
    spec = model("mixtral-8x7b")
    base = LayerContext(1, 4096)
    capped = replace(base, capacity_factor=1.25)
    skewed = replace(base, moe_imbalance=1.4)
    rows = grouped(layer_operations(spec, 0, base).forward)[0].m
    assert grouped(layer_operations(spec, 0, capped).forward)[0].m == pytest.approx(1.25 * rows)
    op = grouped(layer_operations(spec, 0, skewed).forward)[0]
    assert (op.m, op.imbalance) == (rows, 1.4)


def test_first_blocks_of_deepseek_are_dense() -> None:
    spec = model("deepseek-v3")
    ctx = LayerContext(1, 1024)
    kinds = [bool(grouped(layer_operations(spec, i, ctx).forward)) for i in range(5)]
    assert kinds == [False, False, False, True, True]
    assert layer_operations(spec, 3, ctx) is layer_operations(spec, 60, ctx)


# -- precision, recomputation, fusion -------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "nvfp4"])
def test_low_precision(precision: str) -> None:
    spec = model("llama3-8b")
    ctx = LayerContext(1, 4096, precision=precision)
    ops = layer_operations(spec, 0, ctx)
    gemms = [op for op in ops.forward + ops.backward if isinstance(op, Gemm)]
    assert {op.precision for op in gemms} == {precision}
    assert {op.precision for op in ops.forward if isinstance(op, Attention)} == {"bf16"}
    casts = [op for op in ops.forward if isinstance(op, MemoryBound) and op.op_class == "cast"]
    # input and weight of each of the four linear layers
    assert len(casts) == 8
    head = layer_operations(spec, "head", ctx)
    assert {op.precision for op in head.forward if isinstance(op, Gemm)} == {"bf16"}
    assert not [op for op in head.forward if op.kind == "cast"]
    shared = layer_operations(spec, 0, replace(ctx, micro_batches=4))
    weights = [op for op in ops.forward if op.name.endswith("cast_weight")]
    cached = [op for op in shared.forward if op.name.endswith("cast_weight")]
    for once, quarter in zip(weights, cached, strict=True):
        assert isinstance(once, MemoryBound)
        assert isinstance(quarter, MemoryBound)
        assert once.bytes == pytest.approx(4 * quarter.bytes)


def test_full_recomputation_runs_the_forward_again() -> None:
    spec = model("llama3-8b")
    ops = layer_operations(spec, 0, LayerContext(1, 2048, tensor=2, recompute="full"))
    again = [op for op in ops.backward if op.name.startswith("recompute.")]
    assert [op.name for op in again] == [f"recompute.{op.name}" for op in ops.forward]
    assert tuple(again) == ops.backward[: len(again)]
    early = replace(FUSED, recompute_early_stop=True)
    ops = layer_operations(spec, 0, LayerContext(1, 2048, recompute="full", profile=early))
    names = [op.name for op in ops.backward if op.name.startswith("recompute.")]
    assert names[-1] == "recompute.mlp.activation"


def test_selective_recomputation_of_listed_modules() -> None:
    spec = model("qwen3-30b-a3b")
    ctx = LayerContext(1, 2048, recompute="selective", recompute_modules=("layernorm", "moe_act"))
    names = [
        op.name
        for op in layer_operations(spec, 0, ctx).backward
        if op.name.startswith("recompute.")
    ]
    assert names == [
        "recompute.attention.norm",
        "recompute.attention.qk_norm",
        "recompute.moe.norm",
        "recompute.moe.activation",
    ]
    flash = layer_operations(spec, 0, LayerContext(1, 2048, recompute="selective"))
    assert flash.backward == layer_operations(spec, 0, LayerContext(1, 2048)).backward


def test_eager_kernels_move_more_and_launch_more() -> None:
    spec = model("llama3-8b")
    eager = FrameworkProfile(
        name="eager",
        fused_norm=False,
        fused_activation=False,
        fused_residual=False,
        fused_rope=False,
        fused_projections=False,
        fused_cross_entropy=False,
    )
    compiled = replace(eager, compiled=True)
    for layer in (0, "head"):
        traffic, launches = {}, {}
        for profile in (FUSED, eager, compiled):
            ops = layer_operations(spec, layer, LayerContext(1, 4096, profile=profile))
            bound = [op for op in ops.forward + ops.backward if isinstance(op, MemoryBound)]
            traffic[profile.name, profile.compiled] = sum(op.bytes for op in bound)
            launches[profile.name, profile.compiled] = sum(op.kernels for op in bound)
        assert traffic["eager", False] > 1.5 * traffic["fused", False]
        assert launches["eager", False] > launches["fused", False]
        assert traffic["eager", True] < 0.7 * traffic["eager", False]
    separate = layer_operations(spec, 0, LayerContext(1, 4096, profile=eager)).forward
    fused = layer_operations(spec, 0, LayerContext(1, 4096)).forward
    assert sum(isinstance(op, Gemm) for op in separate) == 7
    assert sum(isinstance(op, Gemm) for op in fused) == 4
    assert products(separate) == products(fused)


def test_logits_in_fp32_and_their_metrics_are_passes_over_the_vocabulary() -> None:
    """Bytes per logit: cast 2 + 4 both ways; the loss doubles; metrics read nine times, write
    three."""
    spec = model("llama3-8b")

    def per_logit(**changes: bool) -> tuple[float, float]:
        ctx = LayerContext(1, 4096, profile=replace(FUSED, **changes))  # type: ignore[arg-type]
        ops = layer_operations(spec, "head", ctx)
        logits = 4096.0 * ctx.padded_vocab(spec.vocab)
        forward, backward = (
            sum(op.bytes for op in part if isinstance(op, MemoryBound)) / logits
            for part in (ops.forward, ops.backward)
        )
        return forward, backward

    plain, wide = per_logit(), per_logit(fp32_logits=True)
    assert wide[0] - plain[0] == pytest.approx(6.0 + 3 * 2.0)
    assert wide[1] - plain[1] == pytest.approx(6.0 + 2 * 2.0)
    metrics = per_logit(fp32_logits=True, logit_metrics=True)
    assert metrics[0] - wide[0] == pytest.approx(12 * 4.0)
    assert metrics[1] == wide[1]


def test_multi_token_prediction_is_a_block_and_a_head() -> None:
    spec = model("deepseek-v3")
    ctx = LayerContext(1, 2048)
    mtp = products(layer_operations(spec, "mtp", ctx).forward)
    block = products(layer_operations(spec, 60, ctx).forward)
    head = products(layer_operations(spec, "head", ctx).forward)
    assert mtp == pytest.approx(block + head + 2 * 2048 * 2 * spec.hidden**2)


def test_encoder_decoder_attends_twice_in_the_decoder() -> None:
    spec = model("t5-11b")
    ctx = LayerContext(1, 512, decoder_seq=128)
    encoder = [op for op in layer_operations(spec, 0, ctx).forward if isinstance(op, Attention)]
    decoder = [op for op in layer_operations(spec, 24, ctx).forward if isinstance(op, Attention)]
    assert [(op.q_len, op.kv_len, op.causal) for op in encoder] == [(512, 512, False)]
    assert [(op.q_len, op.kv_len, op.causal) for op in decoder] == [
        (128, 128, True),
        (128, 512, False),
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensor": 3}, "does not divide the 64 attention heads"),
        ({"context": 3}, "does not divide the sequence length"),
        ({"expert": 2}, "has no experts"),
        ({"precision": "fp7"}, "did you mean 'fp"),
        ({"context_kind": "rings"}, "did you mean 'ring'"),
        ({"recompute": "some"}, "unknown recompute"),
        ({"micro_batch": 0}, "positive"),
        ({"recompute_modules": ("norms",)}, "unknown recompute module"),
    ],
)
def test_contradictions_are_input_errors(changes: dict[str, object], message: str) -> None:
    ctx = replace(LayerContext(1, 4096), **changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        ctx.check(model("llama3-70b"))


def test_gradient_accumulation() -> None:
    """Fused into the weight-gradient GEMM; else a pass per micro-batch, but not where each
    micro-batch's gradient is reduced to shards first."""
    spec = model("llama3-8b")

    def passes(profile: FrameworkProfile, micro_batches: int) -> int:
        ops = layer_operations(
            spec, 0, LayerContext(1, 1024, profile=profile, micro_batches=micro_batches)
        )
        return sum(op.name.endswith("accumulate") for op in ops.weight_gradient)

    plain = replace(FUSED, wgrad_accumulation_fusion=False)
    assert [passes(FUSED, 4), passes(plain, 1), passes(plain, 4)] == [0, 0, 4]
    assert passes(replace(plain, fsdp=True), 4) == 0
    gemm = next(
        op
        for op in layer_operations(spec, 0, LayerContext(1, 1024)).weight_gradient
        if isinstance(op, Gemm)
    )
    assert (gemm.output_bytes, gemm.accumulate) == (4.0, True)


def test_copies_of_fully_sharded_parameters() -> None:
    spec = model("llama3-8b")
    size = 2 * layer_parameters(spec, 0, LayerContext(1, 1024)).total

    def copies(kind: str, shards: int, wire: float = 4.0) -> list[tuple[str, float]]:
        profile = replace(FUSED, fsdp=True, fsdp_copies=kind, grad_reduce_bytes=wire)
        ctx = LayerContext(1, 1024, profile=profile, shards=shards, recompute="full")
        ops = layer_operations(spec, 0, ctx)
        return [
            (op.name, op.bytes)
            for op in ops.forward + ops.backward
            if isinstance(op, MemoryBound) and "fsdp" in op.name
        ]

    assert copies("fsdp2", 1) == copies("none", 8) == copies("lists", 8) == []
    assert copies("fsdp2", 8) == [
        ("fsdp.copy_out", 2 * size),
        ("fsdp.copy_out.backward", 2 * size),
        ("fsdp.copy_in_gradients", 3 * size),  # bf16 read, fp32 written
    ]
    assert copies("fsdp1", 2, wire=2.0) == [("fsdp.concatenate_gradients", 2 * size)]
    assert copies("fsdp1", 8) == [
        ("fsdp.concatenate_gradients", 2 * size),
        ("fsdp.cast_gradients", 3 * size),
        ("fsdp.divide_gradients", 4 * size),
    ]


def test_copies_of_a_split_projection_and_passes_of_a_native_norm() -> None:
    spec = model("gpt3-175b")

    def backward(**changes: Any) -> dict[str, float]:
        ctx = LayerContext(1, 1024, profile=replace(FUSED, **changes))
        operations = layer_operations(spec, 0, ctx).backward
        return {op.name: op.bytes for op in operations if isinstance(op, MemoryBound)}

    width = 2 * 1024 * spec.hidden
    plain, native = backward(), backward(native_norm=True, split_gradient_copy=True)
    assert native.pop("attention.qkv.grad_concat") == 2 * 3 * width
    norms = [name for name in plain if name.endswith("norm.grad")]
    assert {name: native[name] - plain[name] for name in norms} == dict.fromkeys(norms, 2 * width)
    assert {**native, **plain} == plain, "nothing else differs"
    assert not {"attention.qkv.grad_concat"} & set(
        backward(split_gradient_copy=True, fused_projections=False)
    )


def test_cast_traffic_by_recipe() -> None:
    """A quantised input is read once and written twice (for the weight gradient too); current
    scaling reads it once more; a norm that writes fp8 itself saves the reading."""
    spec = model("llama3-8b")
    x = 4096 * spec.hidden

    def traffic(precision: str, **changes: object) -> float:
        profile = replace(FUSED, **changes)  # type: ignore[arg-type]
        ops = layer_operations(spec, 0, LayerContext(1, 4096, precision=precision, profile=profile))
        casts = [op for op in ops.forward if op.name == "attention.qkv.cast"]
        return sum(op.bytes for op in casts if isinstance(op, MemoryBound)) / x

    assert traffic("fp8") == 2 + 2
    assert traffic("fp8", fp8_recipe="current") == 4 + 2
    assert traffic("fp8", fused_cast=True) == 0  # two bytes are written in place of two
    assert traffic("fp8", fused_cast=True, fp8_recipe="current") == 4 + 2
    assert traffic("fp8", compiled=True, fp8_recipe="current") == 2 + 2
    assert traffic("mxfp8") == pytest.approx(2 + 2 * 33 / 32)
    assert traffic("mxfp8", fused_cast=True, fp8_recipe="current") == pytest.approx(2 / 32)


def test_passes_of_an_unfused_softmax() -> None:
    """One kernel reads the half that the causal mask keeps; a compiler's three read all of it; an
    eager sequence moves the most."""
    spec = model("gpt3-175b")
    scores = 2 * spec.heads * 2048 * 2048

    def softmax(**changes: Any) -> MemoryBound:
        profile = replace(UNFUSED, **changes)
        forward = layer_operations(spec, 0, LayerContext(1, 2048, profile=profile)).forward
        return next(op for op in forward if op.name.endswith("softmax"))  # type: ignore[return-value]

    assert softmax().bytes_read == pytest.approx(scores / 2)
    assert softmax().bytes_written == scores
    compiled = softmax(fused_softmax=False, compiled=True)
    assert (compiled.bytes_read, compiled.bytes_written) == (3 * scores, scores)
    assert softmax(fused_softmax=False).bytes > compiled.bytes


def test_eager_rotary_and_repeated_keys() -> None:
    spec = model("llama3-8b")  # 32 query heads share 8 of keys and values

    def forward(**changes: Any) -> dict[str, Any]:
        ctx = LayerContext(1, 1024, profile=replace(FUSED, **changes))
        return {op.name: op for op in layer_operations(spec, 0, ctx).forward}

    fused, eager = forward(), forward(complex_rope=True, repeated_kv=True, compiled=True)
    assert eager["attention.rope"].bytes == 5 * fused["attention.rope"].bytes
    width = 2 * spec.head_dim * 1024  # of keys and values, per head
    assert eager["attention.repeat_kv"].bytes == 2 * width * (8 + 32)
    assert eager["attention.core"].kv_heads == 32
    assert eager["attention.core"].flops == fused["attention.core"].flops
    assert "attention.repeat_kv" not in fused


def test_merging_the_steps_of_ring_attention() -> None:
    """Eager fp32 operations move several times what one correction per step does; both grow with
    the number of steps."""
    spec = model("llama3-8b")

    def merged(context: int, **changes: Any) -> float:
        profile = replace(FUSED, **changes)
        ctx = LayerContext(1, 8192, context=context, context_kind="ring", profile=profile)
        operations = layer_operations(spec, 0, ctx)
        return sum(
            op.bytes
            for op in operations.forward + operations.backward
            if isinstance(op, MemoryBound) and ".merge" in op.name
        )

    assert 2.5 < merged(4, eager_ring=True) / merged(4) < 4
    assert merged(8) == merged(4), "twice the steps over half the tokens"
    assert merged(1, eager_ring=True) == 0.0
