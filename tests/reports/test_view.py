"""What reports show: causes, critical path, memory over time, links."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.reports.columns import awaited_rows, complete, templates
from simulator.reports.html import rank_breakdown
from simulator.reports.network import network_drawing
from simulator.reports.palette import colour, family, ordered
from simulator.reports.view import in_flight, thinned, trimmed, view_of
from simulator.simulation import run
from simulator.topology import load_cluster

from .conftest import EXPERIMENT, synthetic, view_of_frame


def test_one_rank_of_every_class_is_shown_and_stands_for_its_members(result: Any) -> None:
    view = view_of(result)
    assert len(view.rank_labels) == result.timeline.classes
    assert sum(view.trace.stands_for.values()) == 8
    assert view.omitted == 0
    fewer = view_of(result, most_ranks=1)
    assert len(fewer.rank_labels) == 1
    assert fewer.omitted == result.timeline.classes - 1


def test_programs_take_turns_where_not_all_classes_are_shown() -> None:
    noisy = {**EXPERIMENT, "jitter": {"scale": 0.05, "per": "rank"}}
    result = run(parse_experiment(noisy))
    view = view_of(result, most_ranks=4)
    pipeline = result.workload.labels["pipeline"]
    assert sorted(pipeline[r] for r in view.rank_labels) == [0, 0, 1, 1]
    assert view.omitted == 4


def test_a_trimmed_view_has_the_first_ranks() -> None:
    view = view_of_frame(synthetic(5, 100))
    assert trimmed(view) is view
    assert np.unique(trimmed(view, most_ranks=2).frame["rank"]).tolist() == [0, 1]
    assert np.unique(trimmed(view, most_rows=650).frame["rank"]).tolist() == [0, 1, 2]
    assert len(trimmed(view, most_rows=1).frame) == 200
    assert trimmed(view, most_ranks=2).omitted == 3


def test_causes_end_before_what_waited_for_them_starts(result: Any) -> None:
    view = view_of(result)
    source = awaited_rows(view.frame)
    waits = np.flatnonzero(source >= 0)
    assert len(waits)
    start, end = view.frame["start"].to_numpy(), view.frame["end"].to_numpy()
    assert (end[source[waits]] <= start[waits] * (1 + 1e-12) + 1e-15).all()


def test_the_critical_path_is_the_step(result: Any) -> None:
    path = view_of(result).critical
    assert path is not None
    start, end = path["start"].to_numpy(), path["end"].to_numpy()
    assert end[-1] == pytest.approx(result.step_time, rel=1e-12)
    assert (np.diff(start) >= 0).all()
    # gapless: each operation starts when the one before it ends
    assert (end - start).sum() == pytest.approx(result.step_time, rel=1e-9)
    assert (path.index >= 0).all()


def test_breakdown_of_every_rank_is_the_step(result: Any) -> None:
    table = rank_breakdown(view_of(result))
    assert table.sum(axis=1).to_numpy() == pytest.approx(result.step_time, rel=1e-9)


def test_memory_over_time_peaks_at_the_report(result: Any) -> None:
    curves = view_of(result).curves
    assert len(curves) == 2
    for curve, stage in zip(curves, result.memory.stages, strict=True):
        assert curve.bytes.max() == pytest.approx(stage.total)
        assert curve.bytes[-1] == pytest.approx(stage.total - stage.activations)
        assert (np.diff(curve.times) > 0).all()


def test_1f1b_holds_as_many_microbatches_as_stages_follow(result: Any) -> None:
    """Peak in flight of 1F1B: min(m, p - rank) (Narayanan et al., arXiv 2104.04473)."""
    for rank, pipeline in enumerate(result.workload.labels["pipeline"]):
        _, held = in_flight(result.frame([rank]))
        assert held.max() == 2 - pipeline
        assert held[-1] == 0


@given(
    st.lists(st.floats(0.0, 100.0), min_size=1, max_size=300), st.integers(1, 40)
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=60)
def test_thinned_curves_keep_the_peak(values: list[float], most: int) -> None:
    times = np.arange(len(values), dtype=float)
    kept_times, kept = thinned(times, np.array(values), most)
    assert len(kept) == min(most, len(values)) == len(kept_times)
    assert kept.max() == max(values)


def test_templates_reconstruct_every_row() -> None:
    frame = complete(synthetic(3, 400))
    found = templates(frame)
    assert len(found.rows) < len(frame)
    rebuilt = found.rows.iloc[found.code].reset_index(drop=True)
    for name in found.rows.columns:
        assert (rebuilt[name].to_numpy() == frame[name].to_numpy()).all()


def test_rows_are_sorted_whatever_their_order() -> None:
    frame = synthetic(2, 100)
    shuffled = frame.sample(frac=1.0, random_state=1)
    pd.testing.assert_frame_equal(complete(shuffled), complete(frame))
    with pytest.raises(InputError, match="needs the columns"):
        complete(frame.drop(columns=["start"]))


def test_colours_are_stable_and_kinds_ordered() -> None:
    assert colour("gemm") != colour("attention")
    assert colour("new kind") == colour("new kind") != colour("newer kind")
    assert family("all_reduce") == "communication"
    assert ordered(["bubble", "zeta", "all_reduce", "gemm", "gemm"]) == [
        "gemm", "all_reduce", "zeta", "bubble",
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 4, 64])
def test_links_keep_their_number_and_bytes_at_every_size(nodes: int) -> None:
    cluster = load_cluster("dgx-h100", nodes=nodes)
    random = np.random.default_rng(1)
    work = random.random(cluster.links) * 1e9
    drawing = network_drawing(cluster, work, 1.0)
    assert sum(link.count for link in drawing.links) == cluster.links
    assert sum(link.count * link.work for link in drawing.links) == pytest.approx(work.sum())
    use = work / cluster.link_capacity
    assert max(link.highest_use for link in drawing.links) == pytest.approx(use.max())
    top = max(drawing.links, key=lambda link: link.highest_use)
    assert top.busiest == cluster.link_name(int(use.argmax()))
    assert len(drawing.nodes) <= 110
    accelerators = [node for node in drawing.nodes if node.type == "gpu"]
    assert sum(node.count for node in accelerators) == 8 * nodes


def test_a_huge_cluster_is_drawn_by_type_of_node() -> None:
    cluster = load_cluster("dgx-h100", nodes=4096)
    work = np.full(cluster.links, 1e6)
    drawing = network_drawing(cluster, work, 1.0)
    assert sum(link.count for link in drawing.links) == cluster.links
    assert {node.type for node in drawing.nodes} >= {"gpu", "nvswitch", "nic", "leaf"}
    (gpus,) = (node for node in drawing.nodes if node.type == "gpu")
    assert gpus.count == 32768


def test_hosts_without_traffic_are_left_out() -> None:
    cluster = load_cluster("dgx-h100", nodes=1)
    work = np.zeros(cluster.links)
    work[0] = 1.0
    assert not any(n.type == "host" for n in network_drawing(cluster, work, 1.0).nodes)


def test_a_view_without_extras_has_a_breakdown() -> None:
    table = rank_breakdown(view_of_frame(synthetic(2, 50)))
    assert list(table.columns) == ["gemm", "attention", "norm", "waiting"]
