"""Optimizer state and step: bytes per parameter as published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.catalog.frameworks import FrameworkProfile
from simulator.errors import InputError
from simulator.model.operations import Collective, MemoryBound, Phase
from simulator.model.optimizer import optimizer_bytes_per_parameter, optimizer_operations

MEGATRON = FrameworkProfile(name="megatron")
HALF_GRADIENTS = replace(MEGATRON, main_grad_bytes=2.0)


@pytest.mark.parametrize(
    "optimizer, precision, profile, expected",
    [
        ("adam", "bf16", HALF_GRADIENTS, (2, 2, 12)),  # ZeRO: 16 bytes
        ("adam", "bf16", MEGATRON, (2, 4, 12)),  # Megatron's distributed optimizer: 18 bytes
        ("adamw", "fp16", HALF_GRADIENTS, (2, 2, 12)),
        ("adam", "fp32", MEGATRON, (4, 4, 8)),
        ("sgd", "fp32", MEGATRON, (4, 4, 0)),
        ("momentum", "fp32", MEGATRON, (4, 4, 4)),
    ],
)
def test_bytes_per_parameter(
    optimizer: str, precision: str, profile: FrameworkProfile, expected: tuple[float, ...]
) -> None:
    state = optimizer_bytes_per_parameter(optimizer, precision, profile)
    assert (state.parameters, state.gradients, state.optimizer) == expected


def test_step_traffic_of_adam() -> None:
    """Master weight and two moments read and written, gradient read, 16-bit weight written."""
    n = 1e9
    operations = optimizer_operations(n, "adam", "bf16", MEGATRON, clip=False)
    traffic = {op.name: op.bytes / n for op in operations if isinstance(op, MemoryBound)}
    assert traffic["optimizer.adam"] == 12 + 4 + 12
    assert traffic["optimizer.copy_parameters"] == 4 + 2
    assert all(op.phase is Phase.OPTIMIZER for op in operations)


def test_sharding_divides_the_step() -> None:
    whole = optimizer_operations(8e9, "adam", "bf16", MEGATRON)
    part = optimizer_operations(8e9, "adam", "bf16", MEGATRON, shard=8)
    for one, eighth in zip(whole, part, strict=True):
        if isinstance(one, MemoryBound) and isinstance(eighth, MemoryBound):
            divided = 1 if one.name == "optimizer.zero_grad" else 8
            assert one.bytes == pytest.approx(divided * eighth.bytes)


def test_clipping_reduces_one_number() -> None:
    operations = optimizer_operations(1e9, "adam", "bf16", MEGATRON, norm_group="model")
    (reduction,) = [op for op in operations if isinstance(op, Collective)]
    assert (reduction.op, reduction.group, reduction.bytes) == ("all_reduce", "model", 4.0)
    half = optimizer_operations(1e9, "adam", "fp16", MEGATRON)
    assert next(op.name for op in half if isinstance(op, Collective)) == "optimizer.found_inf"


def test_eager_optimizer_moves_more() -> None:
    eager = replace(MEGATRON, fused_optimizer=False)

    def cost(profile: FrameworkProfile) -> float:
        return sum(
            op.bytes
            for op in optimizer_operations(1e6, "adamw", "fp32", profile)
            if isinstance(op, MemoryBound)
        )

    assert cost(eager) > 1.5 * cost(MEGATRON)


def test_unknown_optimizer() -> None:
    with pytest.raises(InputError, match="did you mean 'adam'"):
        optimizer_operations(1e6, "adan", "bf16", MEGATRON)
