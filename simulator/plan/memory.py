"""Memory of every pipeline rank: parameters, gradients, optimizer, activations, buffers.

Sharded data parallelism divides what its stage says (ZeRO, Rajbhandari et al., arXiv 1910.02054):
`zero1` the optimizer's state, `zero2` gradients as well, `zero3` parameters as well. Dense
parameters are sharded over the data x context group (or `shard_group` of it), experts over
their own replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from simulator.errors import InputError, unknown_name
from simulator.model.activations import activation_bytes, transient_bytes
from simulator.model.context import LayerContext
from simulator.model.layers import LayerParameters, layer_parameters
from simulator.model.operations import BYTES_PER_ELEMENT
from simulator.model.optimizer import has_master_weights, optimizer_bytes_per_parameter
from simulator.model.spec import LayerId, ModelSpec, block_tensors
from simulator.model.vocabulary import (
    vocabulary_activation_bytes,
    vocabulary_parameters,
    vocabulary_transient_bytes,
)
from simulator.plan.mesh import Mesh
from simulator.plan.offload import check_offload_layers, peak_on_device
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
    def fullest(self) -> StageMemory:
        """The pipeline rank that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> float:
        """Bytes that the fullest pipeline rank needs."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.peak <= self.capacity

    def explain(self) -> str:
        """One sentence: what the fullest rank needs and of what."""
        stage = self.fullest
        parts = ", ".join(
            f"{name} {format_bytes(size)}"
            for name, size in stage.as_dict().items()
            if name != "total"
        )
        limit = "" if self.capacity is None else f" of {format_bytes(self.capacity)}"
        return f"pipeline rank {stage.stage} needs {format_bytes(stage.total)}{limit}: {parts}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; bytes."""
        return {
            "fits": self.fits,
            "capacity": self.capacity,
            "peak": self.peak,
            "stages": [
                {"stage": stage.stage, **stage.as_dict(), "buffer_parts": dict(stage.buffer_parts)}
                for stage in self.stages
            ],
        }


def holds_table_copy(model: ModelSpec, layers: Sequence[LayerId]) -> bool:
    """True if a rank with these layers needs its own copy of the token table: it has the tied
    output projection, or a multi-token prediction's lookup, but not the embedding."""
    if "embedding" in layers or model.family in ("mlp", "vit"):
        return False
    return ("head" in layers and model.tied_embeddings) or "mtp" in layers


def rank_parameters(
    model: ModelSpec, ctx: LayerContext, layers: Sequence[LayerId]
) -> LayerParameters:
    """Parameters that a rank with these layers holds before data-parallel sharding; without its
    share of a vocabulary that is spread over the pipeline."""
    total = LayerParameters(0.0, 0.0)
    for layer in layers:
        total = total + layer_parameters(model, layer, ctx)
    if ctx.vocabulary_ranks == 1 and holds_table_copy(model, layers):
        table = ctx.padded_vocab(model.vocab) / ctx.tensor * (model.embedding_dim or model.hidden)
        total = total + LayerParameters(table, 0.0)
    return total


def _weight_sizes(model: ModelSpec, ctx: LayerContext, layers: Sequence[LayerId]) -> list[float]:
    """Elements per rank of every parameter tensor of these layers; equal blocks once, twice."""
    parts = {"tensor": ctx.tensor, "expert": ctx.expert * ctx.expert_tensor, "replicated": 1}
    kinds = dict.fromkeys(
        model.block(layer) if isinstance(layer, int) else layer for layer in layers
    )
    return [
        tensor.elements / parts[tensor.sharding]
        for kind in kinds
        for tensor in block_tensors(model, kind)
        for _ in range(2)
    ]


def _gathered(
    model: ModelSpec, ctx: LayerContext, layers: Sequence[LayerId], sharding: str
) -> tuple[float, float]:
    """(parameters gathered, gradients not yet reduced) of ZeRO-3 and ZeRO-2 at one time, bytes.

    ZeRO-3 holds the layer (or weight, `profile.fsdp_unit`) that runs and those prefetched (all of
    them without `profile.fsdp_limit_all_gathers`); ZeRO-2 and 3 hold the full gradient of the one
    whose reduction is under way and of the next.
    """
    if sharding not in ("zero2", "zero3"):
        return 0.0, 0.0
    if ctx.profile.fsdp_unit == "weight":
        sizes = _weight_sizes(model, ctx, layers)
    else:
        sizes = [layer_parameters(model, layer, ctx).total for layer in layers]
    sizes.sort(reverse=True)
    weight = BYTES_PER_ELEMENT[ctx.wide]
    profile = ctx.profile
    ahead = 1 + max(0, profile.fsdp_prefetch)
    gathered = sum(sizes[:ahead]) * weight if sharding == "zero3" else 0.0
    if sharding == "zero3" and not profile.fsdp_limit_all_gathers:
        gathered = sum(layer_parameters(model, layer, ctx).total for layer in layers) * weight
    reduced = sum(sizes[: 2 if profile.overlap_grad_reduce else 1])
    return gathered, reduced * max(weight, profile.grad_reduce_bytes)


class PipelineSchedule(Protocol):
    """What memory needs of a schedule (`simulator.schedules.Schedule` has it)."""

    @property
    def stage_to_rank(self) -> Sequence[int]:
        """Rank of every global stage."""

    @property
    def actions(self) -> Sequence[Sequence[Any]]:
        """Per rank, its actions in order: `kind` F, B, I or W, and `stage`; or pairs of them."""


def _peak_activations(actions: Sequence[Any], stored: Mapping[int, float]) -> float:
    """Most bytes of activations that a rank keeps at one time.

    A forward adds its stage's bytes; the backward that ends a micro-batch's work on the stage (B,
    or W where it is split) releases them.
    """
    now = peak = 0.0
    for action in actions:
        pair = (action,) if hasattr(action, "kind") else (action.forward, action.backward)
        for part in pair:
            if part.kind == "F":
                now += stored.get(part.stage, 0.0)
                peak = max(peak, now)
            elif part.kind in ("B", "W"):
                now -= stored.get(part.stage, 0.0)
    return peak


def _working_set(
    model: ModelSpec, layers: Sequence[LayerId], context_of: Callable[[LayerId], LayerContext]
) -> float:
    """Most bytes of temporaries beside the stored activations' peak.

    The peak comes before a backward begins: while a block's backward runs, what the head stored
    (logits) has been released already.
    """
    released = 0.0
    if "head" in layers:
        released = activation_bytes(model, "head", context_of("head"))
    most = 0.0
    for layer in layers:
        transient = transient_bytes(model, layer, context_of(layer))
        most = max(most, transient if layer == "head" else transient - released)
    return most


def _trains(actions: Sequence[Sequence[Any]]) -> bool:
    return any(
        not hasattr(action, "kind") or action.kind in ("B", "I", "W")
        for rank in actions
        for action in rank
    )


def memory_report(
    model: ModelSpec,
    ctx: LayerContext,
    *,
    mesh: Mesh,
    schedule: PipelineSchedule,
    stage_layers: Sequence[Sequence[LayerId]],
    sharding: str = "none",
    optimizer: str = "adam",
    capacity: float | None = None,
    offload: bool = False,
    offload_layers: int | None = None,
    process_bytes: float = PROCESS_BYTES,
    context_of: Callable[[LayerId], LayerContext] | None = None,
    vocabulary_in_flight: Sequence[int] | None = None,
) -> MemoryReport:
    """Peak memory of every pipeline rank.

    Parameters
    ----------
    schedule:
        Says which stages a rank has and how many micro-batches are in flight; without backward
        actions there are no gradients, no optimizer and no stored activations.
    stage_layers:
        Layers of each global stage of the schedule, embedding and head among them.
    capacity:
        Bytes of the accelerator's memory; None: unlimited.
    offload:
        Stored activations of transformer layers are kept in host memory, all but those of the
        layers whose copies are, or may be, under way (`simulator.plan.offload.peak_on_device`).
    offload_layers:
        How many layers per stage, the first ones (all of a stage with fewer); None: all.
    process_bytes:
        Memory of the process besides its tensors.
    context_of:
        Context of each layer, where they differ (recomputation of some layers only).
    vocabulary_in_flight:
        With vocabulary parallelism, per pipeline rank: micro-batches between their passes S and T
        at one time (`simulator.schedules.vocabulary.VocabularyPlacement`).

    Raises
    ------
    InputError
        For an unknown sharding or optimizer, stages that do not match the schedule, or more
        offloaded layers than the largest stage has.
    """
    if sharding not in SHARDINGS:
        raise unknown_name("sharding", sharding, SHARDINGS, place="parallel.sharding")
    if len(stage_layers) != len(schedule.stage_to_rank):
        raise InputError(
            f"layers of {len(stage_layers)} stages given, the schedule has "
            f"{len(schedule.stage_to_rank)}"
        )
    if offload:
        check_offload_layers(offload_layers, stage_layers)
    context_of = context_of or (lambda layer: ctx)
    state = optimizer_bytes_per_parameter(optimizer, ctx.precision, ctx.profile)
    weight, gradient, rest = state.parameters, state.gradients, state.optimizer
    training = _trains(schedule.actions)
    if sharding == "zero3" and has_master_weights(ctx.precision) and gradient >= 4.0:
        # FSDP keeps the fp32 parameter itself in shards and casts what it gathers
        weight, rest = 4.0, rest - 4.0
    if not training:
        weight, gradient, rest = BYTES_PER_ELEMENT[ctx.wide], 0.0, 0.0
    hybrid = mesh.shard < mesh.data * mesh.context
    shards = {
        "dense": mesh.shard,
        "expert": min(mesh.expert_data, mesh.shard) if hybrid else mesh.expert_data,
    }
    # weight versions that stages do not already stand for (PipeDream-2BW keeps two)
    versions = getattr(schedule, "weight_copies", 1) / getattr(schedule, "replicas", 1)
    report = []
    for rank in range(mesh.pipeline):
        own = [stage for stage, on in enumerate(schedule.stage_to_rank) if on == rank]
        layers = [layer for stage in own for layer in stage_layers[stage]]
        parameters = gradients = optimizer_bytes = 0.0
        held = rank_parameters(model, ctx, layers)
        if ctx.vocabulary_ranks > 1:
            held = held + vocabulary_parameters(model, ctx)
        for kind, count in (("dense", held.dense), ("expert", held.expert)):
            n = shards[kind]
            parameters += versions * weight * count / (n if sharding == "zero3" else 1)
            gradients += gradient * count / (n if sharding in ("zero2", "zero3") else 1)
            optimizer_bytes += rest * count / (n if sharding != "none" else 1)
        stored = {
            stage: sum(
                activation_bytes(model, layer, context_of(layer)) for layer in stage_layers[stage]
            )
            for stage in own
        }
        working = _working_set(model, layers, context_of)
        activations = 0.0
        if training:
            activations = (
                peak_on_device(
                    schedule.actions[rank],
                    {stage: stage_layers[stage] for stage in own},
                    lambda layer: activation_bytes(model, layer, context_of(layer)),
                    offload_layers,
                )
                if offload
                else _peak_activations(schedule.actions[rank], stored)
            )
        if ctx.vocabulary_ranks > 1 and training:
            between = 1 if vocabulary_in_flight is None else vocabulary_in_flight[rank]
            activations += between * vocabulary_activation_bytes(model, ctx)
            working = max(working, vocabulary_transient_bytes(model, ctx))
        gathered, reduced = _gathered(model, ctx, layers, sharding)
        parts = {
            "working_set": working,
            "gathered_parameters": gathered,
            "unreduced_gradients": reduced if training else 0.0,
            "process": process_bytes,
        }
        if mesh.pipeline > 1:
            # a received and a sent boundary tensor
            parts["pipeline"] = 2.0 * ctx.element * ctx.sharded_tokens * model.hidden
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
