"""The accelerator catalogue: datasheet figures, and the measured constants of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Accelerator:
    """One accelerator type; SI units. Datasheet peaks and measured rates are different fields."""

    name: str
    vendor: str
    family: str
    """`volta`, `ampere`, `hopper`, `blackwell`, `cdna3`, `tpu`, ...: where constants are inherited."""
    kind: str
    """`gpu` or `tpu`."""
    peak_flops: Mapping[str, float]
    """Dense FLOP/s by precision (fp32, tf32, fp16, bf16, fp8, mxfp8, nvfp4, int8)."""
    core_count: int
    """SMs, CUs or TensorCores."""
    memory_bytes: float
    memory_bandwidth: float
    """Datasheet HBM byte/s."""
    l2_bytes: float
    scale_up_bandwidth: float
    """NVLink / Infinity Fabric byte/s per direction and accelerator; TPU: per ICI link."""
    scale_up_links: int
    host_bandwidth: float
    """PCIe / C2C byte/s per direction."""
    power_w: float
    idle_power_w: float
    price_usd_per_hour: float | None
    constants: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
