"""The whole path from experiment to result: closed forms, monotonicity, contradictions."""

from __future__ import annotations

import dataclasses
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.errors import InputError
from simulator.experiment import Experiment, parse_experiment
from simulator.simulation import OutOfMemoryError, Result, resolve, straggler_pace

#: Blocks, heads and vocabulary small enough that a step takes milliseconds to simulate.
SMALL: dict[str, Any] = {
    "family": "gpt", "layers": 8, "hidden": 1024, "heads": 16, "vocab": 32000,
}  # fmt: skip
MIXTURE = {**SMALL, "n_experts": 8, "top_k": 2, "expert_ffn": 1024, "family": "moe"}


#: Kernels replayed from graphs: what is compared is the device's, not a host's that starves it.
GRAPHS = {"base": "megatron-core", "cuda_graphs": True}


def experiment(**changes: Any) -> Experiment:
    base = parse_experiment(
        {
            "model": SMALL,
            "cluster": {"topology": "dgx-a100-80gb", "accelerators": 8, "variability": 0},
            "framework": GRAPHS,
            "training": {
                "micro_batch_size": 2,
                "sequence_length": 1024,
                "gradient_clipping": False,
            },
        }
    )
    return base.replace(**changes)


def run(**changes: Any) -> Result:
    return simulator.run(experiment(**changes))


def test_result_is_the_same_on_every_run() -> None:
    first, second = (
        run(**{"parallel.tensor": 2, "parallel.pipeline": 2, "training.global_batch_size": 16})
        for _ in range(2)
    )
    assert first.summary == second.summary
    assert first.frame().equals(second.frame())


@pytest.mark.parametrize("microbatches", [4, 8, 32])
def test_1f1b_bubble_is_p_minus_1_over_m(microbatches: int) -> None:
    """Idle over ideal time is (p-1)/m (Narayanan et al., arXiv 2104.04473, section 2.2.1).

    The embedding and the head are taken out of the comparison by looking at a middle stage's own
    forward and backward time; transfers add a little.
    """
    p = 4
    result = run(
        **{
            "parallel.pipeline": p,
            "parallel.data": 2,
            "model": {**SMALL, "layers": 32, "vocab": 128},
            "training.global_batch_size": microbatches * 4,
        }
    )
    frame = result.frame()
    compute = frame[(frame.stream == "compute") & (frame.phase != "O")]
    busy = [(rows.end - rows.start).sum() for _, rows in compute.groupby("rank")]
    ideal = np.median(busy)
    span = compute.end.max() - compute.start.min()
    assert span / ideal - 1 == pytest.approx((p - 1) / microbatches, rel=0.12)


def test_data_parallel_traffic_is_two_bytes_sets_of_the_gradients() -> None:
    """Without sharding every rank all-reduces each fp32 gradient once."""
    result = run(framework="megatron-core")
    frame = result.frame()
    reduced = frame[frame.operation.str.startswith("grad_reduce")]
    model = result.plan.model
    padded = result.plan.context.padded_vocab(model.vocab) - model.vocab
    parameters = model.parameters + 2 * padded * model.hidden
    if model.tied_embeddings:
        parameters -= padded * model.hidden
    assert set(reduced.kind) == {"all_reduce"}
    assert reduced.bytes.sum() == pytest.approx(4.0 * parameters, rel=1e-6)


@pytest.mark.parametrize(
    ("sharding", "kinds"),
    [
        ("none", {"all_reduce"}),
        ("zero1", {"reduce_scatter", "all_gather"}),
        ("zero3", {"reduce_scatter", "all_gather"}),
    ],
)
def test_sharding_decides_the_collectives(sharding: str, kinds: set[str]) -> None:
    frame = run(**{"parallel.sharding": sharding}).frame()
    assert set(frame[frame.stream == "data"].kind) == kinds


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_fsdp_in_a_pipeline_gathers_and_reduces_once_per_step(sharding: str) -> None:
    """torch.distributed.pipelining holds parameters and gradients until the last micro-batch."""
    pipelined = {
        "framework": "torchtitan",
        "parallel.sharding": sharding,
        "parallel.pipeline": 2,
        "training.global_batch_size": 32,
    }

    def collectives(result: Result, kind: str) -> int:
        frame = result.frame()
        return int(((frame["rank"] == 0) & (frame["kind"] == kind)).sum())

    once, alone = run(**pipelined), run(**{**pipelined, "parallel.pipeline": 1})
    units = 1 + SMALL["layers"] // 2  # embedding and blocks of the first stage
    assert collectives(once, "all_gather") == collectives(once, "reduce_scatter") == units
    assert collectives(alone, "reduce_scatter") > SMALL["layers"] + 2
    assert (
        once.memory.stages[0].parameters
        == run(**{**pipelined, "parallel.sharding": "zero1"}).memory.stages[0].parameters
    )


def test_lists_of_shards_cost_the_host_a_launch_per_rank_and_collective() -> None:
    """DeepSpeed of 2021: a gather of every weight in both passes, again after recomputation where
    a layer is large, and a reduction; each with one copy per rank that nothing hides."""

    def step(**profile: Any) -> Result:
        framework = {"base": "deepspeed-zero3", "host_time_per_kernel": 1e-4, **profile}
        return run(
            **{"framework": framework, "parallel.sharding": "zero3", "training.recompute": "full"}
        )

    def copies(result: Result, what: str = "") -> Any:
        frame = result.frame()
        names = frame["operation"].str
        return frame[(frame["rank"] == 0) & names.endswith(".copies") & names.startswith(what)]

    kept, released = step(), step(fsdp_keep_elements=1e6)
    gathers = len(copies(kept, "param_gather.F"))
    assert len(copies(kept, "param_gather.B")) == len(copies(kept, "grad_reduce")) == gathers
    again = 4 * SMALL["layers"]  # weights of a block: query-key-value, projection, two of the MLP
    assert len(copies(released, "param_gather.B")) == gathers + again
    lasting = copies(released)["end"] - copies(released)["start"]
    assert lasting.min() >= 8 * 1e-4
    assert copies(step(fsdp_copies="none")).empty
    assert released.step_time > kept.step_time > step(fsdp_copies="none").step_time


def test_sharding_saves_memory_in_order() -> None:
    peaks = [
        run(**{"parallel.sharding": sharding}).memory.peak
        for sharding in ("none", "zero1", "zero2", "zero3")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[1] > peaks[-1]


def test_recomputation_trades_time_for_memory() -> None:
    none, full = (run(**{"training.recompute": mode}) for mode in ("none", "full"))
    assert full.memory.peak < none.memory.peak
    # one more forward: 4/3 of the matrix work of the blocks, less for the head
    assert 1.15 < full.step_time / none.step_time < 1.36
    assert full.summary.hfu > full.summary.mfu
    assert none.summary.hfu == pytest.approx(none.summary.mfu)


def test_tensor_parallelism_divides_work_and_adds_traffic() -> None:
    one = run(**{"cluster.accelerators": 1})
    four = run(**{"cluster.accelerators": 4, "parallel.tensor": 4})
    gemm = [result.summary.breakdown_s["gemm"] for result in (one, four)]
    assert 0.2 < gemm[1] / gemm[0] < 0.45
    assert four.summary.exposed_communication_s["tensor"] > 0
    assert four.memory.peak < one.memory.peak


def test_interleaving_shrinks_the_bubble() -> None:
    changes = {
        "parallel.pipeline": 4,
        "parallel.data": 2,
        "model": {**SMALL, "layers": 32, "vocab": 128},
        "training.global_batch_size": 32,
    }
    plain = run(**changes)
    interleaved = run(**changes, **{"parallel.virtual_stages": 4})
    assert interleaved.summary.bubble_fraction < 0.55 * plain.summary.bubble_fraction


def test_lower_precision_is_faster() -> None:
    big = {"model": {**SMALL, "hidden": 4096, "heads": 32}, "cluster.topology": "dgx-h100"}
    times = [
        run(**big, **{"training.precision": precision}).step_time
        for precision in ("fp32", "tf32", "bf16", "fp8")
    ]
    assert times == sorted(times, reverse=True)


def test_expert_parallelism_exchanges_tokens() -> None:
    result = run(**{"model": MIXTURE, "parallel.expert": 8})
    frame = result.frame()
    exchanged = frame[frame.kind == "all_to_all"]
    # dispatch of tokens and probabilities, and combine, forward and backward, in every block
    assert len(exchanged) == 6 * SMALL["layers"] * result.timeline.classes
    assert result.memory.peak < run(model=MIXTURE).memory.peak


@pytest.mark.parametrize("kind", ["ring", "allgather", "ulysses"])
def test_context_parallelism_divides_the_sequence(kind: str) -> None:
    changes = {"training.sequence_length": 8192, "training.micro_batch_size": 1}
    one = run(**changes)
    four = run(**changes, **{"parallel.context": 4, "parallel.context_kind": kind})
    assert 0.2 < four.step_time / one.step_time < 0.5
    assert four.memory.peak < one.memory.peak


def test_every_group_of_dimensions_works_together() -> None:
    result = run(
        **{
            "model": MIXTURE,
            "cluster.accelerators": 32,
            "parallel.tensor": 2,
            "parallel.sequence_parallel": True,
            "parallel.context": 2,
            "parallel.pipeline": 2,
            "parallel.virtual_stages": 2,
            "parallel.expert": 4,
            "parallel.sharding": "zero1",
            "training.global_batch_size": 64,
        }
    )
    groups = set(result.summary.exposed_communication_s)
    assert result.step_time > 0
    assert {"tensor", "expert"} <= groups


@pytest.mark.parametrize(
    "schedule",
    ["gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-h2", "zb-v",
     "interleaved-zb", "dualpipe", "dualpipe-v", "chimera", "hanayo"],
)  # fmt: skip
def test_every_schedule_runs_with_real_durations(schedule: str) -> None:
    virtual = 2 if schedule in ("interleaved-1f1b", "looped-bfs", "zb-v", "interleaved-zb",
                                "dualpipe-v", "hanayo") else 1  # fmt: skip
    result = run(
        **{
            "parallel.pipeline": 4,
            "parallel.data": 2,
            "parallel.virtual_stages": virtual,
            "parallel.schedule": schedule,
            "training.global_batch_size": 32,
        }
    )
    flops = run(
        **{"parallel.pipeline": 4, "parallel.data": 2, "training.global_batch_size": 32}
    ).frame("all")
    mine = result.frame("all")
    matrix = ("gemm", "attention")
    total = [frame[frame.kind.isin(matrix)].flops.sum() for frame in (mine, flops)]
    assert total[0] == pytest.approx(total[1], rel=1e-9)


def test_inference_is_the_forward_pass() -> None:
    frame = run(**{"training.inference": True}).frame()
    assert set(frame.phase) == {"F"}


def test_a_slow_accelerator_slows_the_step_and_splits_its_class() -> None:
    healthy = run()
    slow = run(**{"cluster.faults": [{"gpu": 3, "slowdown": 1.3}]})
    assert 1.2 < slow.step_time / healthy.step_time < 1.3 + 1e-9
    assert slow.timeline.classes == healthy.timeline.classes + 1


def test_unfolded_run_gives_the_same_timeline() -> None:
    changes = {"parallel.tensor": 2, "parallel.pipeline": 2, "training.global_batch_size": 16}
    folded, unfolded = run(**changes), run(**changes, fold=False)
    a, b = folded.frame("all"), unfolded.frame("all")
    assert len(a) == len(b)
    keys = ["rank", "stream", "start", "operation"]
    a, b = (f.sort_values(keys, kind="stable").reset_index(drop=True) for f in (a, b))
    assert np.allclose(a.start, b.start, rtol=1e-9, atol=1e-15)
    assert np.allclose(a.end, b.end, rtol=1e-9, atol=1e-15)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    sharding=st.sampled_from(["none", "zero1", "zero2", "zero3"]),
    microbatches=st.integers(1, 4),
    recompute=st.sampled_from(["none", "full"]),
)
def test_invariants(
    tensor: int, pipeline: int, sharding: str, microbatches: int, recompute: str
) -> None:
    data = 8 // (tensor * pipeline)
    result = run(
        **{
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.sharding": sharding,
            "training.global_batch_size": microbatches * data * 2,
            "training.recompute": recompute,
        }
    )
    frame = result.frame()
    summary = result.summary
    assert (frame.end >= frame.start).all()
    for _, rows in frame.groupby(["rank", "stream"]):
        ordered = rows.sort_values(["start", "end"])
        assert (ordered.start.to_numpy()[1:] >= ordered.end.to_numpy()[:-1] - 1e-12).all()
    assert summary.step_time_s == pytest.approx(frame.end.max())
    assert sum(summary.breakdown_s.values()) == pytest.approx(summary.step_time_s)
    assert summary.step_time_low_s < summary.step_time_s < summary.step_time_high_s
    # never faster than the arithmetic allows
    peak = result.plan.accelerators[0].peak_flops["bf16"]
    for _, rows in frame.groupby("rank"):
        assert rows.flops.sum() <= peak * summary.step_time_s
    path = result.timeline.critical_path()
    assert path.end.max() == pytest.approx(summary.step_time_s)


def test_faster_links_and_chips_never_hurt() -> None:
    changes = {
        "cluster.topology": "dgx-a100-80gb",
        "cluster.accelerators": 16,
        "parallel.tensor": 4,
        "training.global_batch_size": 32,
    }
    rates = ["25 Gb/s", "100 Gb/s", "200 Gb/s", "400 Gb/s"]
    times = [run(**changes, **{"cluster.network": rate}).step_time for rate in rates]
    assert times == sorted(times, reverse=True)
    assert run(**{**changes, "cluster.topology": "dgx-h100"}).step_time < times[2]


def test_more_hosts_have_a_slower_slowest_host() -> None:
    assert straggler_pace(1) == 1.0
    assert straggler_pace(1024) > straggler_pace(32) > 1.0
    assert straggler_pace(1024, 0.0) == 1.0


def test_a_graph_of_ones_own_is_a_cluster() -> None:
    graph = nx.Graph()
    for i in range(4):
        graph.add_node(f"gpu{i}", type="gpu", accelerator="A100-80GB-SXM")
        graph.add_edge(f"gpu{i}", "switch", link="NVLink", bandwidth=300e9, latency=1e-6)
    graph.add_node("switch", type="nvswitch")
    result = simulator.run(experiment(), cluster=graph)
    assert result.summary.accelerators == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tensor": 3}, "does not divide"),
        ({"parallel.data": 3}, "parallel.data"),
        ({"training.global_batch_size": 17}, "multiple"),
        ({"parallel.expert": 2}, "no experts"),
        ({"parallel.expert_tensor": 2}, "no experts"),
        ({"training.recompute_modules": ["mlp"]}, "selective"),
        ({"training.recompute_layers": 2}, "full"),
        ({"model": "gtp2"}, "did you mean"),
        ({"cluster.topology": "dgx-a10"}, "did you mean"),
        ({"framework": "megatron"}, "did you mean"),
        ({"training.precision": "fp8"}, "fp8"),
        ({"parallel.schedule": "1f2b", "parallel.pipeline": 2}, "1f1b"),
        ({"parallel.stage_layers": [4, 5], "parallel.pipeline": 2}, "9"),
        ({"cluster.placement": [0, 0]}, "twice"),
        ({"cluster.network": "fast"}, "bandwidth"),
        ({"parallel.pipeline": 16, "cluster.accelerators": 16}, "fewer"),
    ],
)
def test_contradictions_are_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_a_plan_that_does_not_fit_is_refused_with_its_breakdown() -> None:
    huge = experiment(model="gpt3-175b")
    with pytest.raises(OutOfMemoryError, match="activations"):
        simulator.run(huge, allow_oom=False)
    assert not simulator.run(huge).summary.fits


def test_plan_resolves_without_simulating() -> None:
    plan, cluster = resolve(experiment(**{"parallel.pipeline": 2}))
    assert plan.mesh.data == 4
    assert len(cluster.accelerators) == 8
    assert plan.stage_layers[0][0] == "embedding"
    assert plan.stage_layers[-1][-1] == "head"


def test_jitter_is_seeded() -> None:
    jittered = {"jitter": {"scale": 0.05, "seed": 7, "per": "class"}}
    first, second = run(**jittered), run(**jittered)
    assert first.step_time == second.step_time
    other = run(jitter={"scale": 0.05, "seed": 8, "per": "class"})
    assert other.step_time != first.step_time


def test_dense_network_is_a_model_too() -> None:
    result = run(
        **{
            "model": {"dense_sizes": [64, 256, 1]},
            "training.optimizer": "sgd",
            "training.precision": "fp32",
            "training.sequence_length": 1,
            "training.micro_batch_size": 512,
        }
    )
    assert result.plan.model.parameters == 64 * 256 + 256 + 256 + 1
    assert dataclasses.asdict(result.summary)["step_time_s"] > 0


def test_two_jobs_contend_for_the_spine_that_both_cross() -> None:
    """Data-parallel rings that cross an oversubscribed spine slow each other; alone they do not."""
    half = {
        "model": {**SMALL, "hidden": 2048},
        "cluster.topology": {
            "extends": "dgx-a100-80gb",
            "network": {
                "kind": "fat-tree",
                "nodes_per_leaf": 2,
                "oversubscription": 4,
                "spines": 1,
            },
        },
        "cluster.accelerators": 32,
        "cluster.nodes": None,
        "parallel.overlap": {"grad_reduce": False},
    }
    # each job has one node under each leaf
    mine, other = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    alone = run(**half, **{"cluster.placement": mine})
    job = {
        "name": "neighbour",
        "model": {**SMALL, "hidden": 2048},
        "placement": other,
        "framework": GRAPHS,
        "parallel": {"overlap": {"grad_reduce": False}},
        "training": {"micro_batch_size": 2, "sequence_length": 1024, "gradient_clipping": False},
    }
    shared = run(**half, **{"cluster.placement": mine, "jobs": [job]})
    assert shared.jobs["neighbour"].step_time_s == pytest.approx(shared.step_time, rel=1e-6)
    traffic = [result.summary.exposed_communication_s["data_context"] for result in (alone, shared)]
    assert traffic[1] == pytest.approx(2 * traffic[0], rel=0.1)
    with pytest.raises(InputError, match="already serves"):
        run(**half, jobs=[job])


@pytest.mark.parametrize("microbatches", [4, 8, 16])
def test_expert_exchanges_hide_behind_another_microbatch(microbatches: int) -> None:
    changes = {
        "model": MIXTURE,
        "cluster.accelerators": 16,
        "cluster.topology": "dgx-h100",
        "parallel.expert": 4,
        "parallel.pipeline": 4,
        "parallel.virtual_stages": 2,
        "training.global_batch_size": 4 * 2 * microbatches,
    }
    plain = run(**changes)
    hidden = run(**changes, **{"parallel.overlap": {"expert": True}})
    exposed = [r.summary.exposed_communication_s.get("expert", 0.0) for r in (plain, hidden)]
    assert exposed[1] < exposed[0]
    # so small a model waits for its host too: with few micro-batches little is left to hide
    assert hidden.step_time < plain.step_time * (1.001 if microbatches == 4 else 1.0)


def test_without_a_pipeline_one_forward_ahead_hides_the_exchanges() -> None:
    """Megatron-LM runs the next micro-batch's forward before a backward: all pairs but the first
    forward and the last backward overlap, and one micro-batch more is held."""
    changes = {
        "model": MIXTURE,
        "cluster.accelerators": 8,
        "cluster.topology": "dgx-h100",
        "parallel.expert": 8,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 8 * 4 * 8,
    }
    overlapped = {**changes, "parallel.overlap": {"expert": True}}
    plain, hidden = run(**changes), run(**overlapped)
    schedule = hidden.plan.schedule
    first = [action.kind for action in schedule.actions[0][:4]]
    assert first == ["F", "F", "B", "F"]
    exposed = [r.summary.exposed_communication_s.get("expert", 0.0) for r in (plain, hidden)]
    assert exposed[1] < 0.4 * exposed[0]
    assert hidden.memory.peak > plain.memory.peak
    assert run(**overlapped, **{"parallel.schedule": "1f1b"}).step_time == hidden.step_time
    asked = run(**overlapped, **{"parallel.schedule_options": {"forwards_ahead": 0}})
    assert asked.memory.peak == plain.memory.peak


def test_monte_carlo_seeds_are_single_runs() -> None:
    from simulator.studies.monte_carlo import step_time_percentiles, step_times

    jittered = experiment(jitter={"scale": 0.05, "seed": 7, "per": "class"})
    times = step_times(jittered, 3)
    single = [
        simulator.run(jittered.replace(**{"jitter.seed": seed})).step_time for seed in (7, 8, 9)
    ]
    assert times.tolist() == pytest.approx(single, rel=1e-12)
    figures = step_time_percentiles(jittered, 3)
    assert figures["min_s"] <= figures["p50_s"] <= figures["max_s"]
