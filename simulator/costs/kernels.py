"""The cost of any kernel: one function from operation and accelerator to demand."""

from __future__ import annotations

import functools

from simulator.catalog.accelerators import Accelerator
from simulator.catalog.frameworks import FrameworkProfile
from simulator.costs.attention import (
    attention_body_seconds,
    attention_traffic,
    cached_attention_rates,
)
from simulator.costs.demand import KernelCost
from simulator.costs.gemm import cached_gemm_rates, gemm_body, gemm_traffic
from simulator.costs.memory_bound import memory_cost
from simulator.model.operations import Attention, Gemm, GroupedGemm, HostCopy, MemoryBound, Phase

#: A pinned host copy's start-up (driver and DMA), seconds: order of magnitude seen in traces.
HOST_COPY_LATENCY = 8e-6

Kernel = Gemm | GroupedGemm | Attention | MemoryBound | HostCopy


def launch_latency(accelerator: Accelerator) -> float:
    """Seconds that a kernel takes on the device beyond its work, in a graph or a full queue."""
    return accelerator.constants["launch_latency_s"]


def host_copy_rate(accelerator: Accelerator) -> float:
    """byte/s of a pinned copy between host and device that has the host link to itself."""
    return accelerator.constants["host_copy_fraction"] * accelerator.host_bandwidth


@functools.lru_cache(maxsize=1 << 16)
def kernel_cost(
    op: Kernel,
    accelerator: Accelerator,
    profile: FrameworkProfile | None = None,
    *,
    sustained: bool = True,
    pace: float = 1.0,
) -> KernelCost:
    """Latency and demand of one kernel on one accelerator.

    Parameters
    ----------
    op:
        A `Gemm`, `GroupedGemm`, `Attention`, `MemoryBound` or `HostCopy`.
    profile:
        The framework, where its choice of kernels matters.
    sustained:
        Matrix kernels at the rate that training sustains: the clock settled at the power limit,
        and `gemm_derate` (layouts, another laboratory); False: the level of a micro-benchmark.
    pace:
        Factor on the time of matrix kernels' arithmetic; not on that of their memory traffic.
    """
    if isinstance(op, Gemm | GroupedGemm | Attention) and sustained:
        pace /= accelerator.constants["gemm_derate"]
    if (
        isinstance(op, Gemm | GroupedGemm)
        and op.phase is not Phase.FORWARD
        and accelerator.compute_precision(op.precision) == "fp8"
    ):
        pace *= accelerator.constants["gemm_fp8_gradient_accumulation"]
    if isinstance(op, Gemm):
        return _gemm(op, accelerator, sustained, pace)
    if isinstance(op, GroupedGemm):
        return _grouped(op, accelerator, sustained, pace)
    if isinstance(op, Attention):
        return _attention(op, accelerator, sustained, pace)
    if isinstance(op, MemoryBound):
        return _memory_bound(op, accelerator)
    if isinstance(op, HostCopy):
        return KernelCost(HOST_COPY_LATENCY, 0.0, op.bytes, host_copy_rate(accelerator), 0.0)
    raise TypeError(f"no kernel: {op!r}")


def _gemm(op: Gemm, accelerator: Accelerator, sustained: bool, pace: float) -> KernelCost:
    rates = cached_gemm_rates(accelerator, op.precision, sustained=sustained, pace=pace)
    shape: tuple[float, float, float] = (op.m, op.n, op.k)
    body = gemm_body(*shape, rates, op.output_bytes, op.batch, op.accumulate)
    traffic = gemm_traffic(*shape, rates.e_in, op.output_bytes, op.batch, op.accumulate)
    return KernelCost(rates.latency, body, traffic, rates.hbm_rate, op.flops)


def _grouped(op: GroupedGemm, accelerator: Accelerator, sustained: bool, pace: float) -> KernelCost:
    rates = cached_gemm_rates(accelerator, op.precision, sustained=sustained, pace=pace)
    rows = op.m * op.imbalance
    shape: tuple[float, float, float] = (rows, op.n, op.k)
    # a weight gradient sums over the rows: they are the inner dimension of n x k results
    if op.phase is Phase.WEIGHT_GRADIENT:
        shape = (op.n, op.k, rows)
    body = gemm_body(*shape, rates, op.output_bytes, op.groups, op.accumulate)
    traffic = gemm_traffic(*shape, rates.e_in, op.output_bytes, op.groups, op.accumulate)
    return KernelCost(rates.latency, body, traffic, rates.hbm_rate, op.flops)


def _attention(op: Attention, accelerator: Accelerator, sustained: bool, pace: float) -> KernelCost:
    rates = cached_attention_rates(accelerator, op.precision, sustained=sustained)
    body = pace * attention_body_seconds(op, accelerator, sustained=sustained)
    return KernelCost(rates.latency, body, attention_traffic(op), rates.hbm_rate, op.flops)


def _memory_bound(op: MemoryBound, accelerator: Accelerator) -> KernelCost:
    hbm_bytes, rate = memory_cost(op.op_class, op.bytes, accelerator, op.kernels)
    compute = op.flops / accelerator.peak_flops.get("fp32", accelerator.peak("bf16"))
    latency = op.kernels * launch_latency(accelerator)
    return KernelCost(latency, compute, hbm_bytes, rate, op.flops)
