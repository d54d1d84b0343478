"""PyTorch profiler traces: kernels, collectives, dependencies, replay."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.importers import read_kineto, replay
from simulator.importers.kineto import kernel_kind, kineto_trace
from simulator.simulation import run
from simulator.topology import load_cluster

RANKS = 8


def event(name: str, cat: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "pid": 0, "tid": 7,
            "args": args}  # fmt: skip


def kernel(name: str, ts: float, dur: float, stream: int, corr: int, **args: Any) -> dict[str, Any]:
    return event(name, "kernel", ts, dur, stream=stream, correlation=corr, device=0, **args)


def launch(ts: float, corr: int) -> dict[str, Any]:
    return event("cudaLaunchKernel", "cuda_runtime", ts, 2.0, correlation=corr)


def all_reduce(
    ts: float, dur: float, corr: int, elements: int, ranks: str = str(list(range(RANKS)))
) -> dict[str, Any]:
    return kernel(
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        ts, dur, 24, corr, **{
            "Collective name": "allreduce", "In msg nelems": elements, "Out msg nelems": elements,
            "Group size": RANKS, "dtype": "BFloat16", "Process Group Name": "0",
            "Process Group Description": "default_pg", "Process Group Ranks": ranks,
        },
    )  # fmt: skip


def document(scale: float = 1.0, rank: int = 0, sync: bool = False) -> dict[str, Any]:
    """Two matrix products, an all-reduce of the first beside the second, an optimizer."""
    base = 1e6
    events = [
        event("ProfilerStep#3", "user_annotation", base - 50, 5000),
        event("aten::mm", "cpu_op", base, 5, **{
            "External id": 11, "Input Dims": [[1024, 4096], [4096, 512]]}),
        launch(base + 1, 101), launch(base + 5, 102), launch(base + 9, 103), launch(base + 20, 104),
        kernel("sm90_xmma_gemm_bf16bf16", base + 100, 200, 7, 101, **{"External id": 11}),
        all_reduce(base + 301, 500 * scale, 102, 1 << 20),
        kernel("sm90_xmma_gemm_bf16bf16", base + 300, 300, 7, 103),
        kernel("multi_tensor_apply_adam", base + 801 + 500 * (scale - 1) + 3, 50, 7, 104),
        event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", base + 90, 5,
              stream=9, correlation=105, bytes=4096),
        {"ph": "M", "name": "process_name", "args": {}},
    ]  # fmt: skip
    if sync:
        events += [
            event("cudaStreamWaitEvent", "cuda_runtime", base + 15, 1, correlation=200),
            event("cudaEventRecord", "cuda_runtime", base + 10, 1, correlation=199),
            event("Stream Wait Event", "cuda_sync", base + 15, 0, stream=7, correlation=200,
                  wait_on_stream=24, wait_on_cuda_event_record_corr_id=199),
        ]  # fmt: skip
    return {"distributedInfo": {"rank": rank, "world_size": RANKS}, "traceEvents": events}


@pytest.mark.parametrize("sync", [False, True])
def test_kernels_sizes_and_waits(sync: bool) -> None:
    trace = kineto_trace(document(sync=sync), place="t")
    frame = trace.frame()
    assert frame["kind"].tolist() == ["host_copy", "gemm", "gemm", "all_reduce", "optimizer"]
    assert frame["flops"].iloc[1] == 2 * 1024 * 4096 * 512
    assert frame["bytes"].iloc[3] == 2 * (1 << 20)
    assert frame["end"].iloc[1] - frame["start"].iloc[1] == pytest.approx(200e-6)
    by_kind = {op.kind: op for op in trace.operations[0]}
    reduce, optimizer = by_kind["all_reduce"], by_kind["optimizer"]
    if not sync:
        assert [trace.operations[0][i].name for i in reduce.waits] == ["sm90_xmma_gemm_bf16bf16"]
    assert [trace.operations[0][i].kind for i in optimizer.waits] == ["all_reduce"]
    (members,) = trace.groups.values()
    assert members == tuple(range(RANKS))


def test_files_gzip_and_steps(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document()).encode()))
    assert len(read_kineto(path, step=3).operations[0]) == 5
    with pytest.raises(InputError, match="ProfilerStep#4"):
        read_kineto(path, step=4)
    for rank in range(RANKS):
        (tmp_path / f"r{rank}.json").write_text(json.dumps(document(rank=rank)))
    path.unlink()
    trace = read_kineto(tmp_path)
    assert sorted(trace.operations) == list(range(RANKS))


def test_measured_replay_reproduces_the_trace() -> None:
    trace = kineto_trace(document(), place="t")
    cluster = load_cluster("dgx-h100", nodes=1)
    timeline = replay(trace, cluster, communication="measured")
    assert timeline.step_time == pytest.approx(trace.duration, rel=1e-12)
    replayed = timeline.frame([0]).sort_values(["start", "end"])
    replayed = replayed[replayed["kind"] != "host"]
    measured = trace.frame()
    assert np.allclose(np.sort(replayed["start"]), np.sort(measured["start"]), atol=1e-12)
    assert timeline.classes == 1  # all ranks do the same


def test_replay_on_a_slower_network_moves_only_communication() -> None:
    trace = kineto_trace(document(), place="t")
    near = replay(trace, load_cluster("dgx-h100", nodes=1))
    far = replay(trace, load_cluster("dgx-h100", nodes=8), world_size=64)
    slow = replay(trace, load_cluster("dgx-h100", nodes=8, network="1 Gb/s"), world_size=64)
    assert near.step_time <= far.step_time < slow.step_time
    reductions = []
    for timeline in (near, far, slow):
        frame = timeline.frame([0])
        reduction = frame[frame["kind"] == "all_reduce"].iloc[0]
        reductions.append(reduction["end"] - reduction["start"])
        gemm = frame[frame["kind"] == "gemm"]
        assert (gemm["end"] - gemm["start"]).tolist() == pytest.approx([200e-6, 300e-6])
    assert reductions[0] < reductions[1] < reductions[2]
    # 64 ranks over 1 Gb/s: 2 (n - 1) / n of the buffer per node of eight is a lower bound
    assert reductions[2] > 2 * (7 / 8) * (2 << 20) / (8 * 0.125e9)


def test_groups_spread_as_a_mesh() -> None:
    trace = kineto_trace(
        {"distributedInfo": {"rank": 0, "world_size": 16},
         "traceEvents": [all_reduce(0, 10, 1, 1024, ranks="[0, 2, 4, 6]")]}, place="t",
    )  # fmt: skip
    whole = trace.spread()
    assert sorted(whole.groups.values()) == [
        (0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15),
    ]  # fmt: skip
    labels = next(iter(whole.workload().groups.values()))
    assert all((labels[list(members)] == labels[members[0]]).all() for members in
               whole.groups.values())  # fmt: skip


def test_truncated_rank_lists_go_on() -> None:
    trace = kineto_trace(
        {"traceEvents": [all_reduce(0, 10, 1, 1024, ranks="[0, 8, ..., 56]")]}, place="t"
    )
    assert list(trace.groups.values()) == [tuple(range(0, 64, 8))]


def test_point_to_point_pairs() -> None:
    def transfer(rank: int) -> dict[str, Any]:
        name = "send" if rank == 0 else "recv"
        return {"distributedInfo": {"rank": rank, "world_size": 2}, "traceEvents": [
            kernel("gemm", 0, 100, 7, 1),
            kernel("ncclDevKernel_SendRecv", 0 if rank else 100, 50 + 100 * rank, 20, 2, **{
                "Collective name": name, "In msg nelems": 1 << 20, "dtype": "Half",
                "Group size": 2, "Process Group Ranks": "[0, 1]"}),
        ]}  # fmt: skip

    pair = [kineto_trace(transfer(rank), place="t") for rank in range(2)]
    trace = type(pair[0])(
        {0: pair[0].operations[0], 1: pair[1].operations[1]}, pair[0].groups, 2, "t"
    )
    timeline = replay(trace, load_cluster("dgx-h100", nodes=1))
    received = timeline.frame([1]).set_index("operation").loc["ncclDevKernel_SendRecv"]
    sent = timeline.frame([0]).set_index("operation").loc["ncclDevKernel_SendRecv"]
    # the send starts after the sender's product, and the receive ends with it
    assert sent["start"] >= 100e-6 - 1e-12
    assert received["end"] == pytest.approx(sent["end"])
    assert sent["end"] - sent["start"] > (2 << 20) / 450e9
    with pytest.raises(InputError, match="all ranks"):
        pair[0].spread()
    alone = type(trace)({0: pair[0].operations[0][:1], 1: trace.operations[1]}, trace.groups, 2)
    with pytest.raises(InputError, match="receives 1 times from rank 0, which sends 0"):
        alone.workload()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no GPU work"),
        ("{}", "traceEvents"),
        ('{"traceEvents": 3}', "traceEvents"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": "x", "dur": 1}]}', "no GPU work"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": NaN, "dur": 1}]}', "no GPU work"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_kineto(path)


def test_a_trace_that_the_simulator_wrote(tmp_path: Path) -> None:
    from simulator.reports.trace import TraceContext, write_hta

    result = run(
        parse_experiment(
            {
                "model": {
                    "family": "gpt", "layers": 4, "hidden": 512, "heads": 8, "vocab": 1024,
                    "max_seq": 256,
                },
                "cluster": {"topology": "dgx-h100", "nodes": 1},
                "parallel": {"tensor": 2, "pipeline": 2},
                "training": {"global_batch_size": 8},
            }
        )
    )  # fmt: skip
    frame = result.frame("all")
    trace = read_kineto(write_hta(frame, tmp_path, TraceContext(8)))
    back = trace.frame()
    for rank, mine in frame.groupby("rank"):
        theirs = back[back["rank"] == rank]
        columns = ["operation", "kind", "phase", "stage", "layer", "microbatch"]
        ours = sorted(mine[columns].astype(str).itertuples(index=False, name=None))
        assert sorted(theirs[columns].astype(str).itertuples(index=False, name=None)) == ours
        launched = mine["start"] + mine["host_wait"]  # a profiler does not see a kernel before
        starts = np.sort(launched) - launched.min()
        assert np.allclose(np.sort(theirs["start"]), starts, atol=2e-9)
        assert theirs["flops"].sum() == pytest.approx(mine["flops"].sum())


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b"[" * 1000)[:-12])
    with pytest.raises(InputError, match="gzip"):
        read_kineto(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "gemm"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norm"),
        ("multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("void softmax_warp_forward<float>", "softmax"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind
