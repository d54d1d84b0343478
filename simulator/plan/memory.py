"""Memory of every pipeline rank: parameters, gradients, optimizer, activations, buffers.

Sharded data parallelism divides what its stage says (ZeRO, Rajbhandari et al., arXiv 1910.02054):
`zero1` the optimizer's state, `zero2` gradients as well, `zero3` parameters as well. Dense
parameters are sharded over the data x context group (or `shard_group` of it), experts over
their own replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from simulator.errors import InputError, unknown_name
from simulator.model.activations import activation_bytes, transient_bytes
from simulator.model.context import LayerContext
from simulator.model.layers import LayerParameters, layer_parameters
from simulator.model.operations import BYTES_PER_ELEMENT
from simulator.model.optimizer import has_master_weights, optimizer_bytes_per_parameter
from simulator.model.spec import LayerId, ModelSpec
from simulator.plan.mesh import Mesh
from simulator.units import format_bytes

SHARDINGS = ("none", "zero1", "zero2", "zero3")

#: CUDA context, NCCL's channel buffers and the GEMM workspace of a training process. A context
#: alone is 0.3-0.5 GiB, cuBLAS on Hopper takes 32 MiB per handle, NCCL about 10 MiB per channel
#: and communicator: together about 1 GiB before the first tensor.
PROCESS_BYTES = 2.0**30


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes at the peak on one pipeline rank."""

    stage: int
    """Pipeline coordinate."""
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    """Working set, gathered parameters, process overhead: the sum of `buffer_parts`."""
    buffer_parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    def as_dict(self) -> dict[str, float]:
        """The five parts and the total by name, for tables and JSON."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "buffers": self.buffers,
            "total": self.total,
        }


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Memory of all pipeline ranks against an accelerator's capacity (None: not limited)."""

    stages: tuple[StageMemory, ...]
    capacity: float | None = None

    @property
    def peak(self) -> StageMemory:
        """The pipeline rank that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak_bytes(self) -> float:
        return self.peak.total

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.peak_bytes <= self.capacity

    def explain(self) -> str:
        """One sentence: what the fullest rank needs and of what."""
        peak = self.peak
        parts = ", ".join(
            f"{name} {format_bytes(size)}"
            for name, size in peak.as_dict().items()
            if name != "total"
        )
        limit = "" if self.capacity is None else f" of {format_bytes(self.capacity)}"
        return f"pipeline rank {peak.stage} needs {format_bytes(peak.total)}{limit}: {parts}"


def stage_layers(
    model: ModelSpec, stages: Sequence[Sequence[int]], stage: int
) -> tuple[LayerId, ...]:
    """Layers of global stage `stage`: its blocks, the embedding on the first, the head (and the
    multi-token prediction) on the last."""
    layers: list[LayerId] = list(stages[stage])
    if stage == 0:
        layers.insert(0, "embedding")
    if stage == len(stages) - 1:
        layers.append("head")
        if model.mtp_layers:
            layers.append("mtp")
    return tuple(layers)


def tied_copy(model: ModelSpec, ctx: LayerContext, stages: Sequence[Sequence[int]]) -> float:
    """Parameters per rank of the token table's copy on the last stage of a pipeline: the tied
    output projection, or the lookup of multi-token prediction."""
    if len(stages) == 1 or model.family in ("mlp", "vit"):
        return 0.0
    if not (model.tied_embeddings or model.mtp_layers):
        return 0.0
    width = model.embedding_dim or model.hidden
    return ctx.padded_vocab(model.vocab) / ctx.tensor * width


def stage_parameters(
    model: ModelSpec, ctx: LayerContext, stages: Sequence[Sequence[int]], stage: int
) -> LayerParameters:
    """Parameters that one rank of global stage `stage` holds before data-parallel sharding."""
    total = LayerParameters(0.0, 0.0)
    for layer in stage_layers(model, stages, stage):
        total = total + layer_parameters(model, layer, ctx)
    if stage == len(stages) - 1:
        total = total + LayerParameters(tied_copy(model, ctx, stages), 0.0)
    return total


def _gathered(
    model: ModelSpec,
    ctx: LayerContext,
    layers: Sequence[LayerId],
    sharding: str,
) -> tuple[float, float]:
    """(parameters gathered, gradients not yet reduced) of ZeRO-3 and ZeRO-2 at one time, bytes.

    ZeRO-3 holds the layer that runs and those prefetched; ZeRO-2 and 3 hold the full gradient of
    the layer whose reduction is under way and of the one computed meanwhile.
    """
    if sharding not in ("zero2", "zero3"):
        return 0.0, 0.0
    sizes = sorted((layer_parameters(model, layer, ctx).total for layer in layers), reverse=True)
    weight = BYTES_PER_ELEMENT[ctx.wide]
    profile = ctx.profile
    ahead = 1 + max(0, profile.fsdp_prefetch)
    gathered = sum(sizes[:ahead]) * weight if sharding == "zero3" else 0.0
    reduced = sum(sizes[: 2 if profile.overlap_grad_reduce else 1])
    return gathered, reduced * max(weight, profile.grad_reduce_bytes)


def memory_report(
    model: ModelSpec,
    ctx: LayerContext,
    mesh: Mesh,
    stages: Sequence[Sequence[int]],
    in_flight: Sequence[Sequence[float]],
    *,
    sharding: str = "none",
    optimizer: str = "adam",
    capacity: float | None = None,
    process_bytes: float = PROCESS_BYTES,
    offload_fraction: float = 0.0,
) -> MemoryReport:
    """Peak memory of every pipeline rank.

    Parameters
    ----------
    stages:
        Block indices of each global stage (`simulator.plan.stages.assign_stages`).
    in_flight:
        `in_flight[rank][chunk]`: most micro-batches whose activations the rank keeps of a chunk at
        the time of its peak, from the schedule.
    capacity:
        Bytes of the accelerator's memory.
    process_bytes:
        Memory of the process besides its tensors.
    offload_fraction:
        Share of stored activations that is kept in host memory instead.

    Raises
    ------
    InputError
        For an unknown sharding or optimizer, or arrays that do not match the mesh.
    """
    if sharding not in SHARDINGS:
        raise unknown_name("sharding", sharding, SHARDINGS, place="parallel.sharding")
    p = mesh.pipeline
    if len(stages) % p or len(in_flight) != p:
        raise InputError(
            f"{len(stages)} stages and in-flight counts of {len(in_flight)} ranks do not match "
            f"pipeline {p}"
        )
    virtual = len(stages) // p
    state = optimizer_bytes_per_parameter(optimizer, ctx.precision, ctx.profile)
    weight, gradient, rest = state.parameters, state.gradients, state.optimizer
    if sharding == "zero3" and has_master_weights(ctx.precision) and gradient >= 4.0:
        # FSDP keeps the fp32 parameter itself in shards and casts what it gathers
        weight, rest = 4.0, rest - 4.0
    shards = {
        "dense": mesh.shard,
        "expert": min(mesh.expert_data, mesh.shard) if mesh.shard_group else mesh.expert_data,
    }
    report = []
    for rank in range(p):
        chunks = range(rank, len(stages), p)
        parameters = gradients = optimizer_bytes = 0.0
        activations = working = 0.0
        layers: list[LayerId] = []
        for chunk, stage in enumerate(chunks):
            held = stage_parameters(model, ctx, stages, stage)
            for kind, count in (("dense", held.dense), ("expert", held.expert)):
                n = shards[kind]
                parameters += weight * count / (n if sharding == "zero3" else 1)
                gradients += gradient * count / (n if sharding in ("zero2", "zero3") else 1)
                optimizer_bytes += rest * count / (n if sharding != "none" else 1)
            own = stage_layers(model, stages, stage)
            layers += own
            stored = sum(activation_bytes(model, layer, ctx) for layer in own)
            activations += in_flight[rank][chunk] * stored * (1.0 - offload_fraction)
            working = max([working, *(transient_bytes(model, layer, ctx) for layer in own)])
        if len(in_flight[rank]) != virtual:
            raise InputError(f"expected in-flight counts of {virtual} chunks on rank {rank}")
        gathered, reduced = _gathered(model, ctx, layers, sharding)
        parts = {
            "working_set": working,
            "gathered_parameters": gathered,
            "unreduced_gradients": reduced,
            "process": process_bytes,
        }
        if p > 1:
            # a received and a sent boundary tensor
            tokens = ctx.sharded_tokens
            parts["pipeline"] = 2.0 * ctx.element * tokens * model.hidden
        report.append(
            StageMemory(
                rank,
                parameters,
                gradients,
                optimizer_bytes,
                activations,
                sum(parts.values()),
                parts,
            )
        )
    return MemoryReport(tuple(report), capacity)


def in_flight_1f1b(pipeline: int, micro_batches: int) -> tuple[tuple[float, ...], ...]:
    """Peak in-flight micro-batches of 1F1B without virtual stages: min(m, p - rank) (Narayanan et
    al., arXiv 2104.04473, section 2.2.1)."""
    return tuple((float(min(micro_batches, pipeline - rank)),) for rank in range(pipeline))
