"""Host launch time: what the device waits for, in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simulator.catalog.accelerators import accelerator
from simulator.catalog.frameworks import FrameworkProfile, framework, framework_from_mapping
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.model.layers import HOST_READ
from simulator.model.operations import (
    Collective,
    Gemm,
    GroupedGemm,
    HostCopy,
    MemoryBound,
    Operation,
)
from simulator.programs import TaskFactory
from simulator.simulation import Result, run

H100 = accelerator("H100-80GB-SXM")
PROFILE = FrameworkProfile("host", host_time_per_kernel=1e-4, host_time_per_grouped_kernel=1e-4)
TINY = MemoryBound("tiny", "elementwise", 1e3, 1e3)
LONG = MemoryBound("long", "elementwise", 1e9, 1e9)
READ = HostCopy(HOST_READ, 1e3, to_device=False)


def seconds(*operations: Operation, profile: FrameworkProfile = PROFILE) -> float:
    named = [dataclasses.replace(op, name=f"{i}.{op.name}") for i, op in enumerate(operations)]
    factory = TaskFactory(H100, profile, lambda collective: 0.0, 1)
    return sum(factory._alone(task) for task in factory.tasks(named, 0))


def device(*operations: Operation) -> float:
    return seconds(*operations, profile=dataclasses.replace(PROFILE, cuda_graphs=True))


def test_the_longer_of_host_and_device_counts() -> None:
    assert seconds(*[TINY] * 20) == pytest.approx(20e-4)
    assert seconds(*[LONG] * 20) == pytest.approx(device(*[LONG] * 20))
    # the host runs ahead while the long kernel runs
    mixed = [LONG, *[TINY] * 5]
    assert device(*mixed) > 6e-4
    assert seconds(*mixed) == pytest.approx(device(*mixed))


def test_a_host_that_reads_a_result_has_launched_nothing_beyond() -> None:
    apart = [LONG, *[TINY] * 5]
    synced = [LONG, READ, *[TINY] * 5]
    # the read and five launches, while the device is done with each at once
    waited = seconds(*synced) - seconds(*apart)
    assert waited == pytest.approx(6e-4 - device(*[TINY] * 4), rel=0.05)
    # what follows a long kernel after the read is launched behind it
    behind = [LONG, READ, LONG, *[TINY] * 5]
    assert seconds(*behind) == pytest.approx(device(*behind) + 2e-4, rel=0.02)


def test_time_per_operation_comes_on_top_and_doubles_in_fp8() -> None:
    calls = dataclasses.replace(PROFILE, host_time_per_operation=3e-4)
    gemm = Gemm("gemm", 64, 64, 64)
    assert seconds(*[gemm] * 10, profile=calls) == pytest.approx(10 * 4e-4)
    low = dataclasses.replace(gemm, precision="fp8")
    assert seconds(*[low] * 10, profile=calls) == pytest.approx(10 * 7e-4)
    # a cast is part of its module's call; one without launches belongs to another kernel
    cast = MemoryBound("cast", "cast", 1e3, 1e3, kernels=4)
    assert seconds(*[cast] * 10, profile=calls) == pytest.approx(40e-4)
    fused = dataclasses.replace(cast, kernels=0)
    assert seconds(gemm, fused, profile=calls) == pytest.approx(4e-4, rel=0.02)


def test_one_call_launches_many_kernels_faster() -> None:
    calls = dataclasses.replace(
        PROFILE, host_time_per_operation=3e-4, host_time_per_grouped_kernel=1e-5
    )
    experts = GroupedGemm("fc1", 16, 256, 64, 64)
    assert seconds(*[experts] * 5, profile=calls) == pytest.approx(5 * (3e-4 + 16 * 1e-5))
    # never slower than a launch of its own
    slow = dataclasses.replace(calls, host_time_per_grouped_kernel=1.0)
    assert seconds(*[experts] * 5, profile=slow) == pytest.approx(5 * (3e-4 + 16 * 1e-4))


def stretched(*names: str, profile: FrameworkProfile) -> float:
    operations = [dataclasses.replace(TINY, name=name) for name in names]
    factory = TaskFactory(H100, profile, lambda collective: 0.0, 1)
    return sum(factory._alone(task) for task in factory.tasks(operations, 0))


def test_operations_of_experts_take_their_own_time() -> None:
    calls = dataclasses.replace(
        PROFILE, host_time_per_operation=1e-4, host_time_per_expert_operation=4e-4
    )
    experts = ("moe.router", "moe.permute", "moe.fc1", "recompute.moe.activation")
    assert stretched(*experts, profile=calls) == pytest.approx(4 * 5e-4)
    others = ("moe.norm", "moe.residual", "moe.grad_add", "moe.shared.fc1", "moe.post_norm")
    assert stretched(*others, "mlp.fc1", "attention.qkv", profile=calls) == pytest.approx(7 * 2e-4)
    # a framework whose operations cost nothing of their own has none for experts either
    free = dataclasses.replace(calls, host_time_per_operation=0.0)
    assert stretched(*experts, profile=free) == pytest.approx(4 * 1e-4)


@pytest.mark.parametrize(
    ("modules", "launched"),
    [
        ("", 6),
        ("attn", 4),
        ("attn mlp", 3),
        ("attn moe_router moe_preprocess", 2),
        ("attn moe_router moe_preprocess moe mlp", 0),
    ],
)
def test_graphs_of_modules_leave_the_others_to_the_host(modules: str, launched: int) -> None:
    names = (
        "attention.qkv", "recompute.attention.norm", "mlp.fc1", "moe.router.top_k", "moe.counts",
        "moe.fc1",
    )  # fmt: skip
    profile = dataclasses.replace(PROFILE, graphed_modules=modules)
    found = stretched(*names, profile=profile)
    assert found == pytest.approx(launched * 1e-4 if launched else device(*[TINY] * 6))


def test_transfers_between_stages_are_launched_too() -> None:
    calls = dataclasses.replace(PROFILE, host_time_per_operation=3e-4)
    factory = TaskFactory(H100, calls, lambda collective: 0.0, 1)

    def total(*operations: Operation, transfers: int) -> float:
        tasks = factory.tasks(operations, 0, transfers=transfers)
        return sum(factory._alone(task) for task in tasks)

    assert total(TINY, transfers=2) == pytest.approx(3 * 4e-4)
    # hidden behind a long kernel
    assert total(*[LONG] * 3, transfers=1) == pytest.approx(device(*[LONG] * 3))


def test_exchanges_on_another_stream_leave_their_launches() -> None:
    """What hides behind them no longer hides the host's work, and they take no time themselves."""
    exchange = Collective("moe.dispatch", "all_to_all", "expert", 1e6)
    calls = dataclasses.replace(PROFILE, host_time_per_operation=1e-4)
    factory = TaskFactory(H100, calls, lambda collective: 5e-3, 1)
    together, beside = (
        factory.tasks([exchange, *[TINY] * 9], 0, exchanges_beside=flag) for flag in (False, True)
    )
    # 2 ms of launches within an exchange of 5 ms, which is counted on its own
    assert sum(map(factory._alone, together)) == pytest.approx(device(*[TINY] * 9))
    assert all(task.collective is None for task in beside)
    assert sum(map(factory._alone, beside)) == pytest.approx(10 * 2e-4)
    free = dataclasses.replace(PROFILE, cuda_graphs=True)
    graphs = TaskFactory(H100, free, lambda collective: 5e-3, 1)
    assert len(graphs.tasks([exchange, TINY], 0, exchanges_beside=True)) == 1


def test_unknown_graph_modules_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown graph module 'attention'.*attn"):
        framework_from_mapping({"base": "megatron-core", "graphed_modules": "attention mlp"})


def test_graphs_need_no_host() -> None:
    graphs = dataclasses.replace(framework("megatron-core"), cuda_graphs=True)
    assert seconds(*[TINY] * 50, profile=graphs) < 0.1 * seconds(
        *[TINY] * 50, profile=framework("megatron-core")
    )


def step(*, graphs: bool, per_operation: float = 0.0, ranks: int = 1, **changes: Any) -> Result:
    host = {"host_time_per_kernel": 2e-5, "host_time_per_operation": per_operation}
    return run(
        parse_experiment(
            {
                "model": {"family": "gpt", "layers": 4, "hidden": 1024, "heads": 8, "vocab": 4096,
                          "max_seq": 512},
                "cluster": {"topology": "dgx-h100", "accelerators": ranks},
                "parallel": changes,
                "training": {"micro_batch_size": 1, "global_batch_size": 8},
                "framework": {"base": "megatron-core", "cuda_graphs": graphs, **host},
            }
        )
    )  # fmt: skip


def test_waits_for_the_host_are_a_part_of_their_own() -> None:
    """What graphs save, and all that differs: kernels and communication keep their parts."""
    graphs, eager = step(graphs=True), step(graphs=False, per_operation=3e-4)
    waited = eager.summary.breakdown_s["host"] - graphs.summary.breakdown_s.get("host", 0.0)
    assert waited > 0.5 * eager.summary.step_time_s
    assert eager.summary.step_time_s - waited == pytest.approx(graphs.summary.step_time_s, rel=1e-3)
    for name, seconds in graphs.summary.breakdown_s.items():
        if name != "host":
            # copies of input batches beside the kernels take a little HBM bandwidth from them
            assert eager.summary.breakdown_s[name] == pytest.approx(seconds, rel=1e-3), name


@pytest.mark.parametrize(
    "parallel", [{"ranks": 1}, {"ranks": 2, "tensor": 2}, {"ranks": 4, "sharding": "zero1"}]
)
def test_column_and_breakdown_agree_on_the_host(parallel: dict[str, Any]) -> None:
    result = step(graphs=False, per_operation=3e-4, **parallel)
    frame = result.frame()
    assert (frame["host_wait"] <= frame["end"] - frame["start"] + 1e-12).all()
    mine = frame[frame["rank"] == 0]["host_wait"].sum()
    assert result.summary.breakdown_s["host"] == pytest.approx(mine, rel=1e-6)
    assert sum(result.summary.breakdown_s.values()) == pytest.approx(result.summary.step_time_s)


def test_a_waiting_accelerator_draws_idle_power() -> None:
    graphs, eager = step(graphs=True).summary, step(graphs=False, per_operation=3e-4).summary
    longer = eager.step_time_s - graphs.step_time_s
    spent = eager.energy_j_per_step - graphs.energy_j_per_step
    assert spent == pytest.approx(H100.idle_power_w * longer, rel=1e-3)


def test_kernels_that_share_with_communication_do_the_same_work() -> None:
    """Overlap shortens the step; that it stretches kernels costs no energy."""
    parallel = {"ranks": 8, "sharding": "zero1"}
    beside, after = (
        step(graphs=True, **parallel, overlap={"grad_reduce": flag, "param_gather": flag}).summary
        for flag in (True, False)
    )
    assert beside.step_time_s < after.step_time_s
    saved = 8 * H100.idle_power_w * (after.step_time_s - beside.step_time_s)
    assert after.energy_j_per_step - beside.energy_j_per_step == pytest.approx(saved, rel=1e-3)
