"""The timeline's columns, files and sums."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from simulator.engine import simulate
from simulator.errors import InputError
from simulator.timeline import union_length
from simulator.workload import Segment

from .synthetic import Builder, RingTraffic, comm, compute, mesh_workload, random_case, toy_cluster


@pytest.fixture(scope="module")
def timeline():
    workload, cluster, traffic = random_case(4)
    return simulate(workload, cluster, traffic=traffic)


def test_frame_of_all_ranks_is_that_of_the_unfolded_run(timeline):
    workload, cluster, traffic = random_case(4)
    whole = simulate(workload, cluster, traffic=traffic, fold=False)
    assert timeline.classes < whole.classes == workload.ranks
    a, b = timeline.frame("all"), whole.frame("all")
    assert list(a.columns[:13]) == [
        "rank", "stage", "stream", "operation", "kind", "phase", "layer", "microbatch", "start",
        "end", "flops", "bytes", "waited_for",
    ]  # fmt: skip
    assert {"tensor", "data", "pipeline"} <= set(a.columns)
    for name in a.columns:
        if name in ("start", "end"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9 * whole.step_time)
        else:
            assert a[name].astype(str).tolist() == b[name].astype(str).tolist(), name


def test_files_hold_the_frame(timeline, tmp_path):
    frame = timeline.frame("all").sort_values(["rank"], kind="stable").reset_index(drop=True)
    timeline.write_parquet(tmp_path / "t.parquet", "all")
    timeline.write_csv(tmp_path / "t.csv", "all")
    back = pd.read_parquet(tmp_path / "t.parquet")
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == timeline.workload.ranks
    text = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    for other in (back, text):
        other = other.sort_values(["rank"], kind="stable").reset_index(drop=True)
        assert list(other.columns) == list(frame.columns)
        np.testing.assert_allclose(other["end"], frame["end"], rtol=1e-12)
        for name in ("operation", "waited_for", "stream", "rank", "microbatch"):
            assert other[name].astype(str).tolist() == frame[name].astype(str).tolist()


def test_frames_one_rank_at_a_time(timeline):
    frames = list(timeline.iter_frames("all"))
    assert len(frames) == timeline.workload.ranks
    assert sorted(f["rank"].iloc[0] for f in frames) == list(range(timeline.workload.ranks))
    assert len(timeline.frame()) == sum(
        len(f) for f in timeline.iter_frames(timeline.representatives)
    )
    assert timeline.frame([5, 2])["rank"].drop_duplicates().tolist() == [5, 2]


def test_unknown_ranks(timeline):
    with pytest.raises(InputError, match="there is no rank 9999"):
        timeline.frame([9999])
    with pytest.raises(InputError, match="representatives"):
        timeline.frame("some")


def test_exposed_communication():
    """A reduction of 3.2 ms beside 2 ms of computation: 1.2 ms show."""
    b = Builder(1)
    b.add(0, "compute", Segment("c", (compute("k", 2e-3, 0.0, 0.0),)))
    b.add(0, "data", Segment("d", (comm("grad", "all_reduce", "data", 3.2e7),)))
    workload = mesh_workload(b.programs(), 1, 2)
    timeline = simulate(workload, toy_cluster(2, node_size=1), traffic=RingTraffic(0.0, 0.0, 0.0))
    assert timeline.exposed_communication(0) == pytest.approx({"all_reduce": 1.2e-3})
    assert timeline.exposed_communication(0, by="group") == pytest.approx({"data": 1.2e-3})
    assert timeline.exposed_communication_total(0) == pytest.approx(1.2e-3)
    assert timeline.busy(0)["compute"] == pytest.approx({"gemm": 2e-3})
    assert timeline.compute_time(0) == pytest.approx(2e-3)
    assert timeline.idle_time(0) == pytest.approx(0.0, abs=1e-12)
    # no link can run short here: the table of those that can is empty, the bytes are counted
    assert timeline.link_bytes().sum() == pytest.approx(2 * 2 * 3.2e7)


def test_link_utilisation(timeline):
    table = timeline.link_utilisation()
    assert np.all(table["busy"] <= timeline.step_time * (1 + 1e-12))
    assert np.all(table["bytes"] <= table["capacity"] * table["busy"] * (1 + 1e-9))


def test_union():
    assert union_length(np.array([0.0, 1, 5, 2]), np.array([2.0, 3, 6, 2])) == 4.0
    assert union_length(np.array([]), np.array([])) == 0.0
