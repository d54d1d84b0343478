"""Fused expert layers: bounds, padding, re-reads, expert ranks, unaligned widths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from simulator.catalog.accelerators import accelerator
from simulator.costs.grouped_gemm import moe_layer_seconds

H100, A100 = accelerator("H100-80GB-SXM"), accelerator("A100-80GB-SXM")


def layer(tokens=4096, hidden=4096, inter=1536, top_k=8, experts=128, tp=1, ep=1, on=H100, **more):
    return float(
        moe_layer_seconds(tokens, hidden, inter, top_k, experts, tp, ep, on, **more).item()
    )


@pytest.mark.parametrize("name", ["A100-80GB-SXM", "H100-80GB-SXM", "H200", "B200", "L40S"])
@pytest.mark.parametrize("stack", ["modular", "functional", "tuned"])
def test_never_faster_than_its_arithmetic_and_its_traffic(name, stack):
    chip = accelerator(name)
    for tokens in (1, 16, 128, 1024, 16384):
        seconds = layer(tokens, on=chip, stack=stack)
        hit = min(128, 8 * tokens)
        weights = hit * 3 * 2.0 * 4096 * 1536
        assert seconds > weights / chip.memory_bandwidth
        assert seconds > tokens * 8 * 6.0 * 4096 * 1536 / chip.peak("bf16")


@pytest.mark.parametrize("on", [A100, H100])
@pytest.mark.parametrize("skewed", [False, True])
def test_grows_with_tokens_and_falls_with_ranks(on, skewed):
    times = [layer(2**n, on=on, skewed=skewed) for n in range(7, 16)]
    assert all(b > 0.95 * a for a, b in itertools.pairwise(times))
    assert times[-1] > 4 * times[0]
    assert layer(ep=8, on=on, skewed=skewed) < layer(on=on, skewed=skewed)
    assert layer(tp=8, on=on, skewed=skewed) < layer(on=on, skewed=skewed)


def test_few_tokens_cost_the_weights_they_hit():
    """With one row or more per expert, time hardly depends on the tokens (all weights are read)."""
    assert layer(512, inter=2048, experts=256) < 1.1 * layer(128, inter=2048, experts=256)


def test_a_second_row_block_reads_large_weights_again():
    """8 experts, top-2: above 64 rows an expert has two blocks of 64, and its weights (235 MB)
    do not stay in L2: measured 1.73 times the time."""
    one = layer(256, 4096, 14336, 2, 8)
    two = layer(320, 4096, 14336, 2, 8)
    assert two > 1.35 * one


def test_other_ranks_pairs_still_cost_passes():
    """With 256 ranks the products vanish, the passes over all pairs do not (vLLM)."""
    t = 16384
    seconds = layer(t, 6144, 2048, 8, 256, ep=256)
    passes = 2.0 * (3 * t * 8 * 2048 + (t * 8 + t) * 6144) / H100.memory_bandwidth
    assert seconds > passes


def test_widths_that_are_no_multiple_of_16_are_slow():
    narrow = layer(512, 2816, 704, 8, 128, tp=8)  # 88
    wide = layer(512, 2816, 768, 8, 128, tp=8)  # 96
    assert narrow > 1.3 * wide


def test_tuned_blocks_are_no_slower_than_the_default():
    for tokens in (128, 1024, 8192):
        for on in (A100, H100):
            tuned = layer(tokens, on=on, stack="tuned")
            assert tuned <= layer(tokens, on=on, stack="modular") * (1 + 1e-12)


def test_known_configurations_use_tuned_blocks():
    """128 experts of width 192 are tuned for H100; 200 are not in the catalogue."""
    assert layer(256, inter=192) == pytest.approx(layer(256, inter=192, stack="tuned"))
    assert layer(256, inter=208) >= layer(256, inter=208, stack="tuned")


def test_ungated_experts_have_two_matrices():
    ratio = layer(128, 2688, 1856, 6, 128, gated=False) / layer(128, 2688, 1856, 6, 128)
    assert 0.6 < ratio < 0.8


def test_skew_loads_the_busiest_rank():
    assert layer(8192, ep=32, skewed=True) > 1.2 * layer(8192, ep=32)
    again = layer(8192, ep=32, skewed=True)
    assert again == layer(8192, ep=32, skewed=True)


def test_broadcasts():
    tokens = np.array([128.0, 1024.0, 8192.0])
    together = moe_layer_seconds(tokens, 4096, 1536, 8, 128, 1, 1, H100)
    assert together.shape == (3,)
    assert together.tolist() == [layer(t) for t in (128, 1024, 8192)]
