"""Activation memory: the tables of Korthikanti et al. (arXiv 2205.05198)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.frameworks import FrameworkProfile
from simulator.model.activations import activation_bytes, stored_tensors, transient_bytes
from simulator.model.context import LayerContext
from simulator.model.library import model

GPT3_ERA = FrameworkProfile(
    name="megatron 2021", fused_attention=False, dropout=True, fused_cross_entropy=False
)


@pytest.mark.parametrize("name", ["gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t"])
@pytest.mark.parametrize("t", [1, 8])
def test_table_2_of_korthikanti_et_al(name: str, t: int) -> None:
    spec = model(name)
    b, s, h, a = 2, 2048, spec.hidden, spec.heads
    base = LayerContext(b, s, tensor=t, profile=GPT3_ERA, precision="fp16")
    score = 5 * a * s / h
    expected = {
        ("none", False): s * b * h * (10 + 24 / t + score / t),
        ("none", True): s * b * h / t * (34 + score),
        ("selective", False): s * b * h * (10 + 24 / t),
        ("selective", True): s * b * h / t * 34,
        ("full", False): 2 * s * b * h,
        ("full", True): 2 * s * b * h / t,
    }
    for (recompute, sequence), value in expected.items():
        ctx = replace(base, recompute=recompute, sequence_parallel=sequence)
        assert activation_bytes(spec, 0, ctx) == pytest.approx(value), (recompute, sequence)


def test_head_of_korthikanti_et_al() -> None:
    """Embedding sbh/t; final norm, its output and the fp32 logits: 4sbh/t (1 + v/h) (section
    4.3)."""
    spec = model("gpt-22b")
    b, s, h, t, v = 1, 2048, spec.hidden, 8, spec.vocab
    ctx = LayerContext(b, s, tensor=t, profile=GPT3_ERA, sequence_parallel=True)
    assert activation_bytes(spec, "head", ctx) == pytest.approx(4 * s * b * h / t * (1 + v / h))
    embedding = {t.name: t.bytes for t in stored_tensors(spec, "embedding", ctx)}
    assert embedding["embedding.dropout.mask"] == s * b * h / t


def test_flash_attention_stores_no_scores() -> None:
    spec = model("gpt-175b")
    flash = replace(GPT3_ERA, fused_attention=True)
    short, long = (
        activation_bytes(spec, 0, LayerContext(1, s, profile=flash)) for s in (2048, 65536)
    )
    assert long == pytest.approx(32 * short)  # linear in the sequence
    # 34 s b h, and one fp32 statistic per head and token
    assert short == pytest.approx(34 * 2048 * spec.hidden + 4 * 2048 * spec.heads)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    name=st.sampled_from(["llama3-70b", "mixtral-8x7b", "deepseek-v3", "gpt3-175b"]),
    modules=st.lists(
        st.sampled_from(["core_attn", "layernorm", "activation", "mlp", "moe", "attention"]),
        unique=True,
    ),
    precision=st.sampled_from(["bf16", "fp8"]),
)
def test_more_recomputation_stores_less(name: str, modules: list[str], precision: str) -> None:
    spec = model(name)
    base = LayerContext(1, 4096, tensor=2, sequence_parallel=True, precision=precision)
    stored = [
        activation_bytes(spec, spec.layers - 1, ctx)
        for ctx in (
            replace(base, recompute="full"),
            replace(base, recompute="selective", recompute_modules=tuple(modules)),
            base,
        )
    ]
    assert 0 < stored[0] <= stored[1] <= stored[2]
    full = replace(base, recompute="full")
    assert transient_bytes(spec, 0, full) >= transient_bytes(spec, 0, base)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
)
def test_sequence_and_context_parallelism_divide_everything(
    tensor: int, context: int, batch: int
) -> None:
    spec = model("llama2-70b")
    one = activation_bytes(spec, 0, LayerContext(1, 8192))
    many = LayerContext(batch, 8192, tensor=tensor, context=context, sequence_parallel=True)
    assert activation_bytes(spec, 0, many) == pytest.approx(one * batch / (tensor * context))


def test_eight_bit_activations_take_less() -> None:
    spec = model("llama3-70b")
    ctx = LayerContext(1, 8192)
    assert activation_bytes(spec, 0, replace(ctx, precision="fp8")) < activation_bytes(spec, 0, ctx)
    assert activation_bytes(spec, 0, replace(ctx, precision="fp32")) > 1.9 * activation_bytes(
        spec, 0, ctx
    )


def test_experts_store_dispatched_rows() -> None:
    spec = model("mixtral-8x7b")
    ctx = LayerContext(1, 4096)
    stored = {t.name: t.bytes for t in stored_tensors(spec, 0, ctx)}
    assert stored["moe.dispatched"] == 2 * 4096 * spec.top_k * spec.hidden
    assert stored["moe.fc1_output"] == 2 * 4096 * spec.top_k * 2 * spec.expert_ffn
    skewed = {t.name: t.bytes for t in stored_tensors(spec, 0, replace(ctx, moe_imbalance=1.5))}
    assert skewed["moe.dispatched"] == 1.5 * stored["moe.dispatched"]
