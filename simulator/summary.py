"""The figures that people ask for, from a plan and its timeline."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.plan.memory import MemoryReport
    from simulator.programs import Plan
    from simulator.timeline import Timeline
    from simulator.topology import Cluster


@dataclass(frozen=True)
class Summary:
    """One simulated step in figures; SI units.

    `breakdown_s` divides the step time of the mean rank into what its compute stream did:
    `gemm`, `attention`, `memory_bound`, `optimizer`, exposed communication by group (`tensor`,
    `context`, `expert`, `data`, ...), `bubble` (idle, waiting for another pipeline stage) and
    `other`; it sums to `step_time_s`.
    """

    step_time_s: float
    tokens_per_step: float
    tokens_per_s: float
    tokens_per_s_per_accelerator: float
    model_flops_per_step: float
    hardware_flops_per_step: float
    model_tflops_per_accelerator: float
    mfu: float
    """Model FLOP/s over the peak of the training precision; recomputation not counted."""
    hfu: float
    """FLOP/s actually executed over the same peak."""
    bubble_fraction: float
    """Share of the mean rank's step in which it waits for another pipeline stage."""
    exposed_communication_s: Mapping[str, float]
    breakdown_s: Mapping[str, float]
    peak_memory_bytes: float
    memory_capacity_bytes: float
    fits: bool
    memory: tuple[Mapping[str, float], ...]
    """Per pipeline rank: parameters, gradients, optimizer, activations, buffers, total."""
    accelerators: int
    accelerator: str
    classes: int
    events: int
    energy_j_per_step: float
    cost_usd_per_step: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `simulator run --json` prints them."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td>{html.escape(str(value))}</td></tr>"
            for name, value in self.to_dict().items()
            if name != "memory"
        )
        return f"<table>{rows}</table>"


def summarize(plan: Plan, cluster: Cluster, timeline: Timeline, memory: MemoryReport) -> Summary:
    """The summary of one run."""
    raise NotImplementedError
