"""Kernels that move bytes: what share of the datasheet HBM bandwidth each class reaches."""

from __future__ import annotations

from simulator.catalog.accelerators import Accelerator

#: Share of a plain stream's rate that each class of kernel reaches.
CLASS_SHARE: dict[str, float] = {
    "copy": 1.0,
    "elementwise": 1.0,
    "activation": 0.95,
    "norm": 0.75,
    "softmax": 0.80,
    "cross_entropy": 0.80,
    "embedding": 0.70,
    "permute": 0.70,
    "router": 0.50,
    "cast": 0.85,
    "optimizer": 0.92,
}


def memory_rate(op_class: str, accelerator: Accelerator) -> float:
    """byte/s that a kernel of this class reaches from HBM."""
    share = CLASS_SHARE.get(op_class, CLASS_SHARE["elementwise"])
    return accelerator.constants["stream_fraction"] * share * accelerator.memory_bandwidth
