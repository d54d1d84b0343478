"""The Chrome trace: fields, sums, and what Perfetto and HTA read of it."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator.reports.trace import TraceContext, TraceJob, write_hta, write_trace
from simulator.reports.view import trace_context, view_of

from .conftest import synthetic

JOB = TraceJob(range(4), group_of={"op3": "data"}, group_size={"data": 4})
CONTEXT = TraceContext(world_size=4, accelerator="H100-80GB-SXM", jobs=(JOB,))


def read(path: Path) -> dict[str, Any]:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def slices(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] != "cuda_runtime"]


def test_every_operation_is_one_slice_with_its_times(tmp_path: Path) -> None:
    frame = synthetic(2, 300)
    write_trace(frame, tmp_path / "trace.json", CONTEXT)
    events = slices(read(tmp_path / "trace.json"))
    assert len(events) == len(frame)
    seconds = sum(e["dur"] for e in events) * 1e-6
    # both ends are rounded to whole nanoseconds
    assert seconds == pytest.approx((frame["end"] - frame["start"]).sum(), abs=len(frame) * 1e-9)
    assert {(e["pid"], e["args"]["stream"]) for e in events} == {(r, s) for r in (0, 1)
                                                                for s in (7, 20)}  # fmt: skip


def test_slices_of_a_stream_never_overlap(tmp_path: Path) -> None:
    write_trace(synthetic(2, 2000), tmp_path / "trace.json.gz", CONTEXT)
    by_track: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in slices(read(tmp_path / "trace.json.gz")):
        start = round(event["ts"] * 1000)
        track = by_track.setdefault((event["pid"], event["tid"]), [])
        track.append((start, start + round(event["dur"] * 1000)))
    for track in by_track.values():
        track.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(track))


def test_the_same_timeline_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(synthetic(1, 50), tmp_path / name / "trace.json.gz", CONTEXT, flows=True)
    first, second = ((tmp_path / name / "trace.json.gz").read_bytes() for name in ("a", "b"))
    assert first == second


def test_fields_are_those_of_kineto(tmp_path: Path, result: Any) -> None:
    view = view_of(result)
    write_trace(view.frame, tmp_path / "trace.json", view.trace)
    trace = read(tmp_path / "trace.json")
    assert trace["schemaVersion"] == 1
    assert trace["distributedInfo"]["world_size"] == 8
    assert trace["distributedInfo"]["rank"] == int(view.frame["rank"].min())
    sizes = {g["pg_name"]: g["pg_size"] for g in trace["distributedInfo"]["pg_config"]}
    assert sizes["pipeline"] == sizes["tensor"] == 2
    assert {d["name"] for d in trace["deviceProperties"]} == {"H100-80GB-SXM"}
    events = slices(trace)
    assert len({e["args"]["correlation"] for e in events}) == len(events)
    collective = next(e for e in events if e["args"]["Kind"] == "all_reduce")
    assert collective["name"].startswith("ncclDevKernel_AllReduce")
    assert collective["args"]["Collective name"] == "allreduce"
    assert collective["args"]["Group size"] >= 2
    assert collective["args"]["dtype"] == "BFloat16"
    assert collective["args"]["In msg nelems"] == round(collective["args"]["bytes"] / 2)
    copy = next(e for e in events if e["args"]["Kind"] == "host_copy")
    assert (copy["cat"], copy["name"].startswith("Memcpy")) == ("gpu_memcpy", True)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert any("compute" in name for name in names)


def test_group_sizes_are_those_of_the_mesh(result: Any) -> None:
    context = trace_context(result)
    (job,) = context.jobs
    assert job.group_size["tensor"] == 2
    assert job.group_size["data_context"] == 2
    assert job.group_size["world"] == 8
    assert job.group_size["pipeline"] == 2
    assert set(job.group_of.values()) <= set(job.group_size)
    assert sum(context.stands_for.values()) == context.world_size == 8


def test_arrows_lead_from_the_end_of_what_was_waited_for(tmp_path: Path, result: Any) -> None:
    view = view_of(result)
    write_trace(view.frame, tmp_path / "trace.json", view.trace, flows=True)
    events = read(tmp_path / "trace.json")["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() != set()
    assert all(starts[i]["ts"] <= ends[i]["ts"] for i in starts)
    # transfers between the pipeline's ranks are among them
    assert any(starts[i]["pid"] != ends[i]["pid"] for i in starts)


def test_hostile_names_are_data(tmp_path: Path) -> None:
    name = '"},{"ph":"X" </script>\n\u2028 模型 \\'
    frame = synthetic(1, 3).assign(operation=name)
    write_trace(frame, tmp_path / "trace.json", CONTEXT)
    events = slices(read(tmp_path / "trace.json"))
    assert len(events) == len(frame)
    assert {e["args"]["Operation"] for e in events} == {name}


def test_perfetto_reads_it_and_sums_agree(tmp_path: Path, result: Any) -> None:
    processor = pytest.importorskip("perfetto.trace_processor")
    view = view_of(result)
    path = tmp_path / "trace.json"
    write_trace(view.frame, path, view.trace, flows=True)
    try:
        # the package downloads its binary when first used
        trace = processor.TraceProcessor(trace=str(path))
    except Exception as error:
        pytest.skip(f"the trace processor's binary is not available: {error}")
    try:
        rows = list(trace.query("select count(*) as n, sum(dur) as total from slice"))
        assert rows[0].n == len(view.frame)
        seconds = (view.frame["end"] - view.frame["start"]).sum()
        assert rows[0].total * 1e-9 == pytest.approx(seconds, abs=len(view.frame) * 1e-9)
        errors = trace.query("select name, value from stats where severity = 'error' and value > 0")
        assert [row.name for row in errors] == []
        last = next(iter(trace.query("select max(ts + dur) as t from slice"))).t
        assert last * 1e-9 == pytest.approx(result.summary.step_time_s, rel=1e-6)
    finally:
        trace.close()


def test_hta_reads_it_and_sums_agree(
    tmp_path: Path, result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = pytest.importorskip("hta.trace_analysis")
    monkeypatch.setenv("HTA_DISABLE_NS_ROUNDING", "1")
    view = view_of(result)
    write_hta(view.frame, tmp_path, view.trace)
    analyzer = analysis.TraceAnalysis(trace_dir=str(tmp_path))
    ranks = sorted(np.unique(view.frame["rank"]).tolist())
    assert sorted(analyzer.t.get_ranks()) == ranks
    breakdown = analyzer.get_temporal_breakdown(visualize=False).set_index("rank")
    for rank in ranks:
        mine = view.frame[view.frame["rank"] == rank]
        span = (mine["end"].max() - mine["start"].min()) * 1e6
        parts = breakdown.loc[rank]
        total = parts["idle_time(us)"] + parts["compute_time(us)"] + parts["non_compute_time(us)"]
        assert total == pytest.approx(span, rel=2e-3, abs=3.0)
        computes = ~mine["kind"].isin(
            ["all_reduce", "all_gather", "reduce_scatter", "send_recv", "host_copy"]
        )
        seconds = (mine["end"] - mine["start"] - mine["host_wait"])[computes].sum()
        assert parts["compute_time(us)"] == pytest.approx(seconds * 1e6, rel=2e-3)
    overlap = analyzer.get_comm_comp_overlap(visualize=False)
    assert overlap["comp_comm_overlap_pctg"].between(0.0, 100.0).all()
