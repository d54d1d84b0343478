"""Memory per pipeline rank: bytes per parameter as published, in-flight activations, sharding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from simulator.catalog.frameworks import FrameworkProfile
from simulator.errors import InputError
from simulator.model.activations import activation_bytes
from simulator.model.context import LayerContext
from simulator.model.library import model
from simulator.model.spec import LayerId, ModelSpec
from simulator.plan.memory import MemoryReport, memory_report, rank_parameters
from simulator.plan.mesh import Mesh
from simulator.plan.stages import assign_stages
from simulator.schedules import build

ZERO = FrameworkProfile(name="zero", main_grad_bytes=2.0)
MEGATRON = FrameworkProfile(name="megatron")


def report(
    spec: ModelSpec,
    ctx: LayerContext,
    mesh: Mesh,
    *,
    schedule: str = "1f1b",
    micro_batches: int = 8,
    virtual: int = 1,
    **options: Any,
) -> MemoryReport:
    plan = build(schedule, mesh.pipeline, micro_batches, virtual)
    parts: list[list[LayerId]] = [
        list(stage)
        for stage in assign_stages(spec.layers, mesh.pipeline, plan.parts // mesh.pipeline)
    ]
    parts[0].insert(0, "embedding")
    parts[-1].append("head")
    if spec.mtp_layers:
        parts[-1].append("mtp")
    layers = [parts[part] for part in plan.stage_layer_part]
    return memory_report(
        spec, ctx, mesh=mesh, schedule=plan, stage_layers=layers, process_bytes=0.0, **options
    )


@pytest.mark.parametrize(
    "sharding, expected",
    [("none", 16.0), ("zero1", 4 + 12 / 64), ("zero2", 2 + 14 / 64), ("zero3", 16 / 64)],
)
def test_model_states_of_zero(sharding: str, expected: float) -> None:
    """7.5B parameters over 64 ranks: 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al., arXiv
    1910.02054, figure 1)."""
    spec = model("gpt-7.5b")
    ctx = LayerContext(1, 2048, profile=ZERO, vocab_padding=1)
    stage = report(spec, ctx, Mesh(data=64), sharding=sharding).stages[0]
    held = stage.parameters + stage.gradients + stage.optimizer
    assert held == pytest.approx(expected * spec.parameters)
    published = {"none": 120e9, "zero1": 31.4e9, "zero2": 16.6e9, "zero3": 1.9e9}[sharding]
    assert held * 7.5e9 / spec.parameters == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    "sharding, expected",
    [("none", 18.0), ("zero1", 6 + 12 / 8), ("zero2", 2 + 16 / 8), ("zero3", 16 / 8)],
)
def test_bytes_per_parameter_of_megatron(sharding: str, expected: float) -> None:
    """18 and 6 + 12/d: "Theoretical bytes per parameter" of Megatron-LM's distributed optimizer;
    FSDP keeps fp32 shards of weight, gradient and moments."""
    spec = model("llama2-7b")
    ctx = LayerContext(1, 2048, profile=MEGATRON, vocab_padding=1)
    stage = report(spec, ctx, Mesh(data=8), sharding=sharding).stages[0]
    held = stage.parameters + stage.gradients + stage.optimizer
    assert held == pytest.approx(expected * spec.parameters)


def test_hybrid_sharding_divides_by_the_group() -> None:
    spec = model("llama2-7b")
    ctx = LayerContext(1, 2048)
    whole = report(spec, ctx, Mesh(data=64), sharding="zero3").stages[0]
    hybrid = report(spec, ctx, Mesh(data=64, shard_group=8), sharding="zero3").stages[0]
    assert hybrid.optimizer == pytest.approx(8 * whole.optimizer)
    assert hybrid.parameters == pytest.approx(8 * whole.parameters)


def test_model_parallelism_divides_parameters() -> None:
    """GPT-3 175B on tensor 8 x pipeline 8: each rank holds about a 64th, the ends a part of the
    embedding more (which both ends hold)."""
    spec = model("gpt3-175b")
    ctx = LayerContext(1, 2048, tensor=8, sequence_parallel=True, profile=ZERO)
    stages = report(spec, ctx, Mesh(tensor=8, pipeline=8, data=1)).stages
    held = [s.parameters / 2 for s in stages]
    table = ctx.padded_vocab(spec.vocab) * spec.hidden / 8
    assert held[7] == pytest.approx(held[1] + table + 2 * spec.hidden)
    assert held[0] == pytest.approx(held[1] + table + spec.max_seq * spec.hidden)
    total = 8 * sum(held) - 8 * table  # over tensor ranks, the copy taken off
    assert total == pytest.approx(spec.parameters, rel=0.002)  # positions are not split


def test_activations_of_1f1b() -> None:
    """min(m, p - rank) micro-batches in flight (Narayanan et al., arXiv 2104.04473)."""
    spec = model("gpt-18.4b")
    ctx = LayerContext(1, 2048)
    for m in (2, 8):
        stages = report(spec, ctx, Mesh(pipeline=4), micro_batches=m).stages
        block = activation_bytes(spec, 0, ctx)
        for rank in (1, 2):
            assert stages[rank].activations == pytest.approx(min(m, 4 - rank) * 10 * block)
    gpipe = report(spec, ctx, Mesh(pipeline=4), schedule="gpipe").stages
    assert gpipe[1].activations == pytest.approx(8 * 10 * activation_bytes(spec, 0, ctx))


def test_interleaving_costs_activations() -> None:
    """First rank of interleaved 1F1B: L (1 + (p-1)/(p v)) layers' activations (Korthikanti et
    al., arXiv 2205.05198, section 4.2.3)."""
    spec = replace(model("gpt-175b"), vocab=128)
    p, v = 8, 3
    ctx = LayerContext(1, 2048, tensor=8, sequence_parallel=True)
    first = report(
        spec, ctx, Mesh(tensor=8, pipeline=p), schedule="interleaved-1f1b", virtual=v,
        micro_batches=64,
    ).stages[0]  # fmt: skip
    layers = first.activations / activation_bytes(spec, 0, ctx)
    assert layers == pytest.approx(96 * (1 + (p - 1) / (p * v)), rel=0.01)


def test_korthikanti_activation_memory_per_gpu() -> None:
    """530B, tensor 8, pipeline 35, micro-batch 1, sequence parallelism and selective
    recomputation: L sbh/t (34) (1 + (p-1)/(p m)) on the first rank (section 4.2.3, table 4)."""
    spec = model("gpt-530b")
    profile = replace(MEGATRON, fused_attention=False, dropout=True)
    ctx = LayerContext(
        1, 2048, tensor=8, sequence_parallel=True, profile=profile, recompute="selective"
    )
    first = report(
        spec, ctx, Mesh(tensor=8, pipeline=35), schedule="interleaved-1f1b", virtual=3,
        micro_batches=70,
    ).stages[0]  # fmt: skip
    blocks = 105 * 34 * 2048 * spec.hidden / 8 * (1 + 34 / (35 * 3))
    assert first.activations == pytest.approx(blocks, rel=0.03)


def test_experts_are_sharded_over_their_own_replicas() -> None:
    spec = model("mixtral-8x7b")
    mesh = Mesh(data=16, expert=8)
    ctx = LayerContext(1, 4096, expert=8)
    held = rank_parameters(spec, ctx, spec.layer_ids)
    stage = report(spec, ctx, mesh, sharding="zero1").stages[0]
    assert stage.optimizer == pytest.approx(12 * (held.dense / 16 + held.expert / 2))


def test_sharding_needs_buffers() -> None:
    spec = model("llama2-70b")
    ctx = LayerContext(1, 4096)
    parts = report(spec, ctx, Mesh(data=64), sharding="zero3").stages[0].buffer_parts
    block = rank_parameters(spec, ctx, (0,)).total
    # the layer that runs and one ahead, in 16 bits
    assert parts["gathered_parameters"] >= 2 * 2 * block
    assert report(spec, ctx, Mesh(data=64)).stages[0].buffer_parts["gathered_parameters"] == 0


def test_forward_only_keeps_weights_alone() -> None:
    spec = model("llama3-8b")
    stage = report(spec, LayerContext(1, 8192), Mesh(), schedule="forward-only").stages[0]
    assert (stage.gradients, stage.optimizer, stage.activations) == (0.0, 0.0, 0.0)
    assert stage.parameters == pytest.approx(2 * spec.parameters)


def test_two_copies_of_bidirectional_schedules() -> None:
    spec = model("gpt-18.4b")
    ctx = LayerContext(1, 2048)
    one = report(spec, ctx, Mesh(pipeline=4)).stages
    both = report(spec, ctx, Mesh(pipeline=4), schedule="dualpipe", micro_batches=8).stages
    assert sum(s.parameters for s in both) > 1.8 * sum(s.parameters for s in one)


def test_recomputation_and_offload_save_memory() -> None:
    spec = model("llama3-70b")
    ctx = LayerContext(1, 8192, tensor=8, sequence_parallel=True)
    mesh = Mesh(tensor=8, pipeline=4)
    plain = report(spec, ctx, mesh).peak
    assert report(spec, replace(ctx, recompute="full"), mesh).peak < plain
    assert report(spec, ctx, mesh, offload=True).peak < plain
    some = [report(spec, ctx, mesh, offload=True, offload_layers=n).peak for n in (5, 10, 20)]
    assert plain > some[0] > some[1] > some[2] == report(spec, ctx, mesh, offload=True).peak
    with pytest.raises(InputError, match="at most 20"):
        report(spec, ctx, mesh, offload=True, offload_layers=21)


def test_fits_and_explains() -> None:
    spec = model("llama3-70b")
    result = report(spec, LayerContext(1, 8192), Mesh(), capacity=80 * 2.0**30)
    assert not result.fits
    assert "of 80 GiB" in result.explain()
    assert result.to_dict()["peak"] == result.peak
    assert report(spec, LayerContext(1, 8192), Mesh()).fits


def test_unknown_sharding() -> None:
    with pytest.raises(InputError, match="did you mean 'zero"):
        report(model("gpt2-124m"), LayerContext(1, 1024), Mesh(), sharding="zero4")


@pytest.mark.parametrize(
    "vocab, seq, gigabytes",
    [
        (32768, 2048, 16.01),
        (65536, 2048, 17.74),
        (131072, 2048, 21.0),
        (32768, 4096, 22.23),
        (65536, 4096, 23.98),
        (131072, 4096, 27.22),
        (262144, 4096, 33.86),
    ],
)
def test_measured_peaks(vocab: int, seq: int, gigabytes: float) -> None:
    """Peak allocated memory of a 4B GPT on 8 A100s, 1F1B, 128 micro-batches of one sequence, as
    Yeung et al. measured it (Vocabulary Parallelism, arXiv 2411.05288, baseline rows of its
    tables)."""
    spec = replace(model("gpt-4b-vp"), vocab=vocab, max_seq=seq)
    ctx = LayerContext(1, seq, profile=replace(MEGATRON, dropout=True), micro_batches=128)
    predicted = report(spec, ctx, Mesh(pipeline=8), micro_batches=128).peak / 2**30
    assert predicted == pytest.approx(gigabytes, rel=0.05)
