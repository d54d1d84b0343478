"""Chakra execution traces, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.protobuf")

from simulator.engine import simulate
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.importers import Trace, TraceOperation, as_trace, read_chakra, replay, write_chakra
from simulator.importers.chakra import decode_rank, encode_rank
from simulator.importers.chakra_schema import messages
from simulator.importers.trace import COLLECTIVES
from simulator.simulation import build_workload, resolve
from simulator.topology import load_cluster


def simulated(**parallel: Any) -> tuple[Any, Any]:
    """Timeline and cluster of a small model whose step has every kind of communication."""
    experiment = parse_experiment(
        {
            "model": {
                "family": "gpt", "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8,
                "head_dim": 64, "ffn": 2048, "vocab": 1024, "name": "small", "max_seq": 256,
            },
            "cluster": {"topology": "dgx-h100", "nodes": 1},
            "parallel": {"tensor": 2, "pipeline": 2, **parallel},
            "training": {"global_batch_size": 8},
        }
    )  # fmt: skip
    plan, cluster = resolve(experiment)
    return simulate(build_workload(plan), cluster, overlap_sharing=False), cluster


@pytest.mark.parametrize(
    "parallel", [{}, {"sharding": "zero1"}, {"tensor": 1, "pipeline": 1, "sharding": "zero3"}]
)
def test_a_trace_is_read_back_unchanged(tmp_path: Path, parallel: dict[str, Any]) -> None:
    timeline, _ = simulated(**parallel)
    trace = as_trace(timeline)
    files = write_chakra(timeline, tmp_path / "a")
    assert len(files) == 8 + 1
    back = read_chakra(tmp_path / "a")
    assert back == trace
    again = write_chakra(back, tmp_path / "b")
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]


def test_export_keeps_every_operation_and_its_times() -> None:
    timeline, _ = simulated()
    frame = timeline.frame("all")
    trace = as_trace(timeline)
    for rank, operations in trace.operations.items():
        mine = frame[frame["rank"] == rank]
        kept = [
            op for op in operations if op.collective != "recv" and "overlapped" not in op.stream
        ]
        assert sorted((op.name, op.start, op.end) for op in kept) == sorted(
            zip(mine["operation"].astype(str), mine["start"], mine["end"], strict=True)
        )
        assert sum(op.flops for op in kept) == pytest.approx(mine["flops"].sum())


def test_nodes_are_those_of_the_standard(tmp_path: Path) -> None:
    timeline, _ = simulated()
    write_chakra(timeline, tmp_path)
    groups = json.loads((tmp_path / "trace.json").read_text())
    # tensor pairs, data pairs, and the tied embedding's first and last stage
    assert {tuple(members) for members in groups.values()} >= {(0, 1), (2, 3), (6, 7)}
    kinds = messages()
    data = (tmp_path / "trace.0.et").read_bytes()
    seen: dict[int, list[Any]] = {}
    offset, first = 0, True
    while offset < len(data):
        length = shift = 0
        while True:
            byte = data[offset]
            offset += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if first:
            assert (
                kinds.GlobalMetadata.FromString(data[offset : offset + length]).version == "0.0.4"
            )
        else:
            node = kinds.Node.FromString(data[offset : offset + length])
            seen.setdefault(node.type, []).append(node)
        first = False
        offset += length
    assert set(seen) == {4, 5, 6, 7}  # computation, send, receive, collective
    ids = sorted(node.id for nodes in seen.values() for node in nodes)
    assert ids == list(range(len(ids)))
    attributes = {a.name: a for a in seen[7][0].attr}
    assert attributes["pg_name"].string_val in groups
    assert attributes["comm_size"].int64_val > 0


@pytest.mark.parametrize("parallel", [{}, {"sharding": "zero1"}, {"pipeline": 4}])
def test_replay_on_the_same_cluster_takes_the_same_time(
    tmp_path: Path, parallel: dict[str, Any]
) -> None:
    timeline, cluster = simulated(**parallel)
    write_chakra(timeline, tmp_path)
    trace = read_chakra(tmp_path)
    again = simulate(trace.workload(), cluster, overlap_sharing=False)
    assert again.step_time == pytest.approx(timeline.step_time, rel=1e-9)
    slower = replay(trace, load_cluster("dgx-h100", nodes=8, network="10 Gb/s"))
    assert slower.step_time >= timeline.step_time * (1 - 1e-9)


def test_a_frame_alone_can_be_written(tmp_path: Path) -> None:
    timeline, _ = simulated()
    frame = timeline.frame("all")
    write_chakra(frame, tmp_path)
    back = read_chakra(tmp_path)
    assert sum(len(ops) for ops in back.operations.values()) == len(frame)
    times = sorted((op.start, op.end) for op in back.operations[3])
    mine = frame[frame["rank"] == 3]
    assert times == sorted(zip(mine["start"], mine["end"], strict=True))
    waits = sum(bool(op.waits) for op in back.operations[3])
    assert waits > 0


def astra_trace(tmp_path: Path, ranks: int = 4) -> Path:
    """What ASTRA-sim's own generators write: FLOPs instead of durations, no streams."""
    kinds = messages()
    for rank in range(ranks):
        nodes = [kinds.GlobalMetadata(version="0.0.4")]
        compute = kinds.Node(id=1, name="layer", type=4)
        compute.attr.add(name="num_ops", int64_val=10**12)
        compute.attr.add(name="tensor_size", uint64_val=10**6)
        reduce = kinds.Node(id=2, name="gradients", type=7, data_deps=[1])
        reduce.attr.add(name="comm_type", int64_val=0)
        reduce.attr.add(name="comm_size", int64_val=1 << 28)
        update = kinds.Node(id=3, name="update", type=4, data_deps=[2], duration_micros=100)
        nodes += [update, reduce, compute]  # the order in the file does not matter
        with (tmp_path / f"job.{rank}.et").open("wb") as out:
            for node in nodes:
                data = node.SerializeToString()
                out.write(
                    bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, 1])
                )
                out.write(data)
    return tmp_path


def test_a_foreign_trace_runs(tmp_path: Path) -> None:
    trace = read_chakra(astra_trace(tmp_path))
    assert trace.world_size == 4
    assert [op.name for op in trace.operations[0]] == ["layer", "gradients", "update"]
    cluster = load_cluster("dgx-h100", nodes=1)
    timeline = replay(trace, cluster)
    frame = timeline.frame([0]).set_index("operation")
    peak = cluster.accelerator_types[0].peak("bf16")
    assert frame.loc["layer", "end"] == pytest.approx(1e12 / peak)
    assert frame.loc["gradients", "start"] == pytest.approx(frame.loc["layer", "end"])
    assert frame.loc["update", "start"] == pytest.approx(frame.loc["gradients", "end"])
    # a ring of four: 2 (n - 1) / n of the buffer over 450 GB/s is a lower bound
    took = frame.loc["gradients", "end"] - frame.loc["gradients", "start"]
    assert took > 1.5 * (1 << 28) / 450e9 * 0.5


names = st.text(min_size=0, max_size=6)
times = st.floats(min_value=0, max_value=1e3, allow_nan=False)


@st.composite
def rank_operations(draw: Any) -> tuple[TraceOperation, ...]:
    operations: list[TraceOperation] = []
    clock: dict[str, float] = {}
    for position in range(draw(st.integers(0, 6))):
        stream = draw(st.sampled_from(["compute", "data", "é漢"]))
        waits = tuple(sorted(draw(st.sets(st.integers(0, position - 1))))) if position else ()
        start = max([clock.get(stream, 0.0)] + [operations[w].end for w in waits])
        start += draw(times)
        clock[stream] = start + draw(times)
        kind = draw(st.sampled_from(["", "send", "recv", *COLLECTIVES]))
        operations.append(
            TraceOperation(
                draw(names), stream, draw(names), start, clock[stream], draw(names),
                draw(st.integers(-1, 9)), draw(st.integers(-1, 9)), draw(st.integers(-1, 9)),
                0.0 if kind else draw(times), draw(times), waits, kind,
                "g/0" if kind and kind not in ("send", "recv") else "",
                draw(st.integers(0, 3)) if kind in ("send", "recv") else -1,
                draw(names) if kind in COLLECTIVES else "",
                draw(times) if kind else 0.0,
            )
        )  # fmt: skip
    return tuple(operations)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rank_operations())
def test_any_rank_is_read_back_unchanged(operations: tuple[TraceOperation, ...]) -> None:
    trace = Trace({2: operations}, {"g/0": (0, 1, 2, 3)}, 4, "t")
    data = encode_rank(trace, 2)
    assert decode_rank(data) == (2, 4, "t", operations)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x05ab", "cut off"),
        (b"\xff\xff\xff\xff\xff\x01", "message length"),
        (b"\x03\x0a\xff\xff", "not a Chakra message"),
    ],
)
def test_broken_files(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_rank(data)


def test_cycles_and_unknown_collectives() -> None:
    kinds = messages()

    def encoded(*nodes: Any) -> bytes:
        parts = [
            kinds.GlobalMetadata().SerializeToString(),
            *(n.SerializeToString() for n in nodes),
        ]
        return b"".join(bytes([len(p)]) + p for p in parts)

    a = kinds.Node(id=1, type=4, data_deps=[2])
    b = kinds.Node(id=2, type=4, data_deps=[1])
    with pytest.raises(InputError, match="cycle"):
        decode_rank(encoded(a, b))
    with pytest.raises(InputError, match="same id"):
        decode_rank(encoded(a, a))
    with pytest.raises(InputError, match="unknown comm_type"):
        decode_rank(encoded(kinds.Node(id=1, type=7)))


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.et file"):
        read_chakra(tmp_path)
    (tmp_path / "groups.json").write_text('{"a": [1, 1]}')
    (tmp_path / "a.0.et").write_bytes(b"\x00")
    with pytest.raises(InputError, match="distinct ranks"):
        read_chakra(tmp_path)
