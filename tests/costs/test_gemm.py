"""Properties of the GEMM model that hold on any accelerator."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.accelerators import accelerator, accelerators
from simulator.costs.gemm import gemm_body, gemm_body_seconds, gemm_rates
from simulator.costs.kernels import kernel_cost
from simulator.model.operations import Gemm, GroupedGemm, Phase

SIZES = st.integers(min_value=1, max_value=20_000)
NAMES = sorted(name for name in accelerators() if accelerators()[name].supports("fp16"))


def duration(op, item, sustained=False):
    return kernel_cost(op, item, sustained=sustained).duration


@settings(deadline=None, derandomize=True, max_examples=150)
@given(m=SIZES, n=SIZES, k=SIZES, name=st.sampled_from(NAMES))
def test_never_faster_than_peak_nor_than_memory(m, n, k, name):
    item = accelerator(name)
    op = Gemm("g", m, n, k, precision="fp16")
    cost = kernel_cost(op, item, sustained=False)
    assert cost.duration >= op.flops / item.peak("fp16")
    minimum = 2 * (m * k + k * n + m * n)
    assert cost.hbm_bytes == pytest.approx(minimum)
    assert cost.duration >= minimum / item.memory_bandwidth
    assert cost.hbm_bandwidth <= item.memory_bandwidth
    assert cost.flops == op.flops
    # what the engine shares adds up to what the model says
    assert cost.compute >= cost.hbm_bytes / cost.hbm_bandwidth * (1 - 1e-12)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(m=SIZES, n=SIZES, k=SIZES, scale=st.floats(1.05, 4.0))
def test_faster_hardware_is_never_slower(m, n, k, scale):
    item = accelerator("H100-SXM")
    op = Gemm("g", m, n, k)
    more_memory = dataclasses.replace(item, memory_bandwidth=item.memory_bandwidth * scale)
    more_peak = dataclasses.replace(
        item,
        peak_flops={p: f * scale for p, f in item.peak_flops.items()},
        power_w=item.power_w * scale,
    )
    more_power = dataclasses.replace(item, power_w=item.power_w * scale)
    for better in (more_memory, more_peak, more_power):
        assert duration(op, better) <= duration(op, item) * (1 + 1e-9)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(m=SIZES, n=SIZES, k=SIZES, name=st.sampled_from(["A100", "H100", "B200", "TPU-v5p"]))
def test_doubling_the_rows_costs_more_but_at_most_about_double(m, n, k, name):
    item = accelerator(name)
    once = duration(Gemm("g", m, n, k), item)
    twice = duration(Gemm("g", 2 * m, n, k), item)
    assert twice >= once * (1 - 0.12)  # a larger product may choose a better tile
    # twice the same tiles is always possible; throttling adds at most its own factor
    throttle = gemm_rates(item, "bf16").throttle
    assert twice <= 2 * once * (1 + throttle) + 1e-9


@settings(deadline=None, derandomize=True, max_examples=60)
@given(m=SIZES, n=SIZES, k=SIZES)
def test_scalar_and_vector_paths_are_one_model(m, n, k):
    rates = gemm_rates(accelerator("A100"), "bf16")
    many = gemm_body_seconds([m, 1], [n, 1], [k, 1], rates, 2.0, 3.0, False)
    assert many[0] == pytest.approx(gemm_body(m, n, k, rates, 2.0, 3.0, False), rel=1e-12)


def test_a_wave_more_costs_a_step_on_ampere():
    # 108 SMs: 108 tiles of 256x128 are one wave, 109 are two
    item = accelerator("A100")
    full = duration(Gemm("g", 128 * 108, 256, 4096), item)
    over = duration(Gemm("g", 128 * 110, 256, 4096), item)
    assert over > 1.5 * full


def test_wgrad_that_accumulates_in_fp32_is_some_percent_slower():
    item = accelerator("A100-PCIe")
    forward = duration(Gemm("g", 5120, 8192, 4096), item, True)
    wgrad = duration(
        Gemm("w", 5120, 8192, 4096, phase=Phase.WEIGHT_GRADIENT, output_bytes=4.0, accumulate=True),
        item, True,
    )  # fmt: skip
    assert 1.02 < wgrad / forward < 1.15


def test_sustained_products_all_run_at_the_clock_of_the_power_limit():
    """A micro-benchmark reaches it with long products only; half the power, 0.5^0.4 of the rate."""
    item = accelerator("H100")
    for n, least in ((1024, 0.9), (2048, 0.9), (16384, 0.0)):
        op = Gemm("g", n, n, n)
        micro, sustained = (kernel_cost(op, item, sustained=s) for s in (False, True))
        slower = sustained.compute * item.constants["gemm_derate"] / micro.compute - 1.0
        throttle = gemm_rates(item, "bf16").throttle
        assert least * 0.5 * throttle <= slower <= throttle * (1 + 1e-9)
        assert sustained.latency == micro.latency
    half = dataclasses.replace(item, power_w=item.power_w / 2)
    long = Gemm("g", 16384, 16384, 16384)
    ratio = kernel_cost(long, half).compute / kernel_cost(long, item).compute
    assert ratio == pytest.approx(2**0.4, rel=0.02)


def test_lower_precision_is_faster_and_unsupported_precision_is_no_faster_than_wider():
    item = accelerator("B200")
    times = [
        duration(Gemm("g", 8192, 8192, 8192, precision=p), item)
        for p in ("fp32", "tf32", "bf16", "fp8", "nvfp4")
    ]
    assert times == sorted(times, reverse=True)
    a100 = accelerator("A100")
    fp8, bf16 = (duration(Gemm("g", 8192, 8192, 8192, precision=p), a100) for p in ("fp8", "bf16"))
    assert fp8 == pytest.approx(bf16, rel=0.05)


def test_power_limits_long_products_only():
    item = accelerator("H100")
    capped = dataclasses.replace(item, power_w=350.0)
    short, long = Gemm("s", 1024, 1024, 512), Gemm("l", 16384, 16384, 16384)
    assert duration(short, capped) < 1.03 * duration(short, item)
    # P goes with f^2.5: half the power leaves 0.5^0.4 of the clock
    ratio = duration(long, capped) / duration(long, item)
    assert ratio == pytest.approx(0.5**-0.4, rel=0.05)


def test_batched_products_fill_the_machine():
    item = accelerator("H100")
    one = duration(Gemm("g", 128, 128, 128), item)
    many = duration(Gemm("g", 128, 128, 128, batch=256), item)
    assert many < 12 * one


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    groups=st.integers(1, 64),
    m=st.floats(1.0, 4096.0),
    n=st.integers(64, 8192),
    k=st.integers(64, 8192),
    imbalance=st.floats(1.0, 4.0),
)
def test_grouped_gemm_bounds_and_imbalance(groups, m, n, k, imbalance):
    item = accelerator("H100")
    even = kernel_cost(GroupedGemm("g", groups, m, n, k), item, sustained=False)
    skew = kernel_cost(
        GroupedGemm("g", groups, m, n, k, imbalance=imbalance), item, sustained=False
    )
    assert even.duration >= even.flops / item.peak("bf16")
    assert even.hbm_bytes >= 2 * groups * n * k
    assert skew.duration >= 0.88 * even.duration
    assert skew.duration >= even.flops * imbalance / item.peak("bf16")


def test_grouped_weight_gradient_sums_over_the_rows():
    item = accelerator("A100-PCIe")
    op = GroupedGemm("w", 20, 1232, 3072, 5120, phase=Phase.WEIGHT_GRADIENT, output_bytes=4.0,
                     accumulate=True)  # fmt: skip
    plain = Gemm("w", 3072, 5120, 1232, batch=20, output_bytes=4.0, accumulate=True)
    assert duration(op, item) == pytest.approx(duration(plain, item))


def test_systolic_arrays_pad_to_their_edge():
    for name, edge in (("TPU-v5e", 128), ("TPU-v6e", 256)):
        item = accelerator(name)
        exact = duration(Gemm("g", 8192, 8192, 32 * edge), item)
        over = duration(Gemm("g", 8192, 8192, 32 * edge + 1), item)
        assert over / exact == pytest.approx(33 / 32, rel=0.01)


def test_many_distinct_shapes_are_cheap():
    item = accelerator("H100")
    kernel_cost(Gemm("g", 7, 7, 7), item)
    start = time.process_time()
    for i in range(500):
        kernel_cost(Gemm("g", 3000 + i, 4096, 1111), item)
    assert (time.process_time() - start) / 500 < 500e-6


def test_costs_are_deterministic():
    item = accelerator("B200")
    op = Gemm("g", 4097, 5120, 777)
    values = {kernel_cost.__wrapped__(op, item).duration for _ in range(3)}
    assert len(values) == 1
    assert np.isfinite(values.pop())
