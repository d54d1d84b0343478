"""The common currency of the cost model: a latency, and work on resources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Demand of one kernel on its accelerator.

    Alone it lasts `latency + max(compute, hbm_bytes / HBM bandwidth)` seconds. `compute` is in
    seconds of the whole accelerator's SMs (capacity 1 per second): tile and wave quantisation and
    achieved efficiency are already in it. `hbm_bytes` are bytes to and from HBM, with
    `hbm_bandwidth` the byte/s that this kind of kernel can reach alone.
    """

    latency: float
    compute: float
    hbm_bytes: float
    hbm_bandwidth: float
    flops: float

    @property
    def duration(self) -> float:
        """Seconds when nothing else runs."""
        return self.latency + max(self.compute, self.hbm_bytes / self.hbm_bandwidth)
