"""The figures that people ask for, from a plan and its timeline."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.model.flops import forward_flops, training_flops
from simulator.uncertainty import band

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
    `context`, `expert`, `data`, ...), waiting for the host's launches (`host`) and for copies to
    and from its memory (`host_copy`), `bubble` (idle, waiting for another pipeline stage) and
    `other`; it sums to `step_time_s`.

    `energy_j_per_step` is that of the accelerators: idle power throughout, and the difference to
    full power for as long as the kernels would take undisturbed. What waits for a host, or shares
    SMs and HBM with communication, does the same work in more time.
    """

    step_time_s: float
    step_time_low_s: float
    """Lower end of the central 90 % band (`simulator.uncertainty`)."""
    step_time_high_s: float
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


#: `breakdown_s` part of each kind of operation; kinds that are not named are memory-bound.
_PARTS = {
    "gemm": "gemm",
    "grouped_gemm": "gemm",
    "attention": "attention",
    "optimizer": "optimizer",
    "host_copy": "other",
    "host": "host",
}


def summarize(
    plan: Plan, cluster: Cluster, timeline: Timeline, memory: MemoryReport, *, ranks: range
) -> Summary:
    """The summary of the job that runs on `ranks`.

    MFU follows PaLM and Megatron-LM: FLOPs of the model's matrix products and of the whole score
    matrix (Chowdhery et al., arXiv 2204.02311, appendix B). HFU adds what is recomputed, in the
    proportion in which the timeline recomputes (Korthikanti et al., arXiv 2205.05198, section 6.4).
    """
    training, mesh = plan.experiment.training, plan.mesh
    classes = [c for c, rank in enumerate(timeline.representatives) if int(rank) in ranks]
    step = max((float(timeline.end(c).max(initial=0.0)) for c in classes), default=0.0)
    sequences = plan.microbatches * training.micro_batch_size * mesh.data
    tokens = float(sequences) * plan.context.seq
    flops_of = forward_flops if training.inference else training_flops
    model_flops = flops_of(plan.model, plan.context.seq, causal=False) * sequences
    accelerators = mesh.ranks
    shares = _Shares(timeline, classes)
    types, counts = np.unique(plan.accelerator_of, return_counts=True)
    precision = plan.context.precision
    peak = sum(
        plan.accelerators[int(t)].peak_flops[precision] * int(n)
        for t, n in zip(types, counts, strict=True)
    )
    achieved = model_flops / step if step > 0 else 0.0
    recomputed = shares.executed_flops / max(shares.executed_flops - shares.recomputed_flops, 1.0)
    hardware_flops = model_flops * recomputed
    breakdown = shares.breakdown(step, pipelined=mesh.pipeline > 1)
    most = plan.accelerators[int(types[np.argmax(counts)])]
    spread = band(breakdown, most.family)
    energy = cost = 0.0
    priced = True
    for t, n in zip(types, counts, strict=True):
        chip = plan.accelerators[int(t)]
        active = chip.power_w - chip.idle_power_w
        energy += (chip.idle_power_w * step + active * shares.working_s) * int(n)
        if chip.price_usd_per_hour is None:
            priced = False
        else:
            cost += chip.price_usd_per_hour * int(n) * step / 3600.0
    return Summary(
        step_time_s=step,
        step_time_low_s=spread.low_s,
        step_time_high_s=spread.high_s,
        tokens_per_step=tokens,
        tokens_per_s=tokens / step if step > 0 else 0.0,
        tokens_per_s_per_accelerator=tokens / step / accelerators if step > 0 else 0.0,
        model_flops_per_step=model_flops,
        hardware_flops_per_step=hardware_flops,
        model_tflops_per_accelerator=achieved / accelerators / 1e12,
        mfu=achieved / peak,
        hfu=achieved * recomputed / peak,
        bubble_fraction=breakdown.get("bubble", 0.0) / step if step > 0 else 0.0,
        exposed_communication_s=shares.exposed,
        breakdown_s=breakdown,
        peak_memory_bytes=memory.peak,
        memory_capacity_bytes=memory.capacity or 0.0,
        fits=memory.fits,
        memory=tuple(stage.as_dict() for stage in memory.stages),
        accelerators=accelerators,
        accelerator=most.name,
        classes=len(classes),
        events=timeline.events,
        energy_j_per_step=energy,
        cost_usd_per_step=cost if priced else None,
    )


class _Shares:
    """What the mean rank does with its time: classes weighted by their members."""

    def __init__(self, timeline: Timeline, classes: Sequence[int]) -> None:
        sizes = np.array([len(timeline.members(c)) for c in classes], dtype=float)
        weights = sizes / max(sizes.sum(), 1.0)
        self.kinds: dict[str, float] = {}
        self.exposed: dict[str, float] = {}
        self.working_s = self.exposed_total = self.executed_flops = self.recomputed_flops = 0.0
        for c, size, weight in zip(classes, sizes.tolist(), weights.tolist(), strict=True):
            table = timeline.program_table(c)
            wait = timeline.host_wait(c)
            duration = timeline.end(c) - timeline.start(c) - wait
            computes = ~table.task_communicates[table.task]
            self._add("host", weight * float(wait.sum()))
            # streams may compute at the same time: the first, on which kernels are, counts whole,
            # the others together for the time that it does not cover
            left = timeline.compute_time(c) - float(wait[computes].sum())
            first = computes & (table.stream == 0)
            for rows in (first, computes & ~first):
                sums = np.bincount(
                    table.task_kind[table.task[rows]], weights=duration[rows],
                    minlength=len(table.kinds),
                )  # fmt: skip
                total = float(sums.sum())
                scale = min(1.0, left / total) if total > 0.0 else 0.0
                for name, seconds in zip(table.kinds, sums.tolist(), strict=True):
                    self._add(_PARTS.get(name, "memory_bound"), weight * scale * seconds)
                left = max(0.0, left - total)
            exposed = timeline.exposed_communication(c, by="group")
            if "host" in exposed:
                # copies go on nearly all the time, also while a pipeline idles anyway
                exposed["host"] = timeline.stalled(c, "host")
            for name, seconds in exposed.items():
                self.exposed[name] = self.exposed.get(name, 0.0) + weight * seconds
            self.working_s += weight * timeline.working_time(c)
            self.exposed_total += weight * timeline.exposed_communication_total(c, besides="host")
            flops = table.numbers("flops", float)
            again = np.char.startswith(
                np.array([task.name for task in table.tasks] or [""], dtype=str), "recompute."
            )
            self.executed_flops += size * float(flops.sum())
            if len(table.tasks):
                self.recomputed_flops += size * float(flops[again[table.task]].sum())
        self.exposed = {name: value for name, value in self.exposed.items() if value > 0.0}

    def _add(self, part: str, seconds: float) -> None:
        if seconds > 0.0:
            self.kinds[part] = self.kinds.get(part, 0.0) + seconds

    def breakdown(self, step: float, *, pipelined: bool) -> dict[str, float]:
        """Parts that sum to `step`; what is left over is the bubble of a pipeline."""
        parts = dict(self.kinds)
        total = sum(seconds for name, seconds in self.exposed.items() if name != "host")
        scale = self.exposed_total / total if total > 0.0 else 0.0
        for name, seconds in self.exposed.items():
            key = _GROUP_PARTS.get(name, name)
            parts[key] = parts.get(key, 0.0) + seconds * (1.0 if name == "host" else scale)
        left = step - sum(parts.values())
        if left > 1e-12 * step:
            key = "bubble" if pipelined else "other"
            parts[key] = parts.get(key, 0.0) + left
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


#: Groups of the mesh under the names that people use for their traffic.
_GROUP_PARTS = {
    "data_context": "data",
    "expert_data": "data",
    "shard": "data",
    "replicate": "data",
    "embedding": "data",
    "world": "optimizer",
    "expert_tensor": "expert",
    "host": "host_copy",
    "model": "pipeline",
}
