"""Comparing two steps: what differs, by what it is aligned, and that the parts add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from simulator.cli.compare import command
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.reports import write_run
from simulator.reports.comparison import print_comparison, write_comparison
from simulator.reports.palette import COMMUNICATION_KINDS
from simulator.reports.trace import write_hta, write_trace
from simulator.reports.view import view_of
from simulator.simulation import run
from simulator.studies.comparison import WAITING, Comparison, compare, load

from .browser import browser
from .conftest import EXPERIMENT, synthetic, view_of_frame
from .test_terminal import printed


@pytest.fixture(scope="module")
def slowed() -> Any:
    """The tiny step on a cluster whose first accelerator is slow."""
    faults = [{"gpu": 0, "slowdown": 1.5}]
    cluster = {**EXPERIMENT["cluster"], "faults": faults}
    return run(parse_experiment({**EXPERIMENT, "cluster": cluster, "name": "slow GPU"}))


@pytest.fixture(scope="module")
def comparison(result: Any, slowed: Any) -> Comparison:
    return compare(view_of(result), view_of(slowed))


def test_kinds_and_waiting_add_up_to_the_step(comparison: Comparison) -> None:
    table = comparison.by_kind
    mine = table[~table["overlapped"]]
    assert mine["a_s"].sum() == pytest.approx(comparison.a.step_time)
    assert mine["b_s"].sum() == pytest.approx(comparison.b.step_time)
    assert mine["difference_s"].sum() == pytest.approx(comparison.difference)
    assert comparison.difference > 0


def test_communication_counts_as_exposed_as_in_the_summary(result: Any) -> None:
    """Tensor collectives that computation waits for are on a stream of their own all the same."""
    table = compare(view_of(result), view_of(result)).by_kind
    talks = table["kind"].isin(COMMUNICATION_KINDS)
    timeline = result.timeline
    counts = np.array([len(timeline.members(c)) for c in range(timeline.classes)])
    exposed = [timeline.exposed_communication_total(c, besides="host") for c in range(len(counts))]
    mine = table[talks & ~table["overlapped"]]["a_s"].sum()
    expected = (counts * exposed).sum() / counts.sum()
    # a copy of input hides communication in the summary, and here it does not
    copies = table.loc[table["kind"] == "host_copy", "a_s"].sum()
    assert expected * (1 - 1e-9) <= mine <= expected + copies
    assert copies < 0.1 * expected
    # tensor all-reduces are most of it; a transfer between stages may end within one
    reduces = table[table["kind"] == "all_reduce"].groupby("overlapped")["a_s"].sum()
    assert reduces[False] > 0.9 * reduces.sum()


def test_half_hidden_communication_is_in_two_rows() -> None:
    rows = [
        ("compute", "gemm", 0.0, 4.0),
        ("tensor", "all_gather", 3.0, 5.0),
        ("data", "all_reduce", 4.0, 6.0),
        ("copy", "host_copy", 0.0, 7.0),
        ("compute", "norm", 7.0, 8.0),
    ]
    frame = pd.DataFrame(rows, columns=["stream", "kind", "start", "end"]).assign(
        rank=0, stage=0, operation="x", phase="F", layer=0, microbatch=0, flops=0.0, bytes=0.0
    )
    view = view_of_frame(frame)
    table = compare(view, view).by_kind.set_index(["kind", "overlapped"])
    # exposed from 4 to 6, of that 1 s by both
    expected = {
        ("gemm", False): 4.0, ("norm", False): 1.0, ("host_copy", True): 7.0, (WAITING, False): 1.0,
        ("all_gather", False): 2 / 3, ("all_gather", True): 4 / 3,
        ("all_reduce", False): 4 / 3, ("all_reduce", True): 2 / 3,
    }  # fmt: skip
    assert table["a_s"].to_dict() == pytest.approx(expected)
    assert table["a_count"].groupby("kind").sum()["all_reduce"] == pytest.approx(1.0)


def test_largest_difference_comes_first(comparison: Comparison) -> None:
    for table in (
        comparison.by_kind, comparison.by_stage, comparison.by_layer, comparison.by_operation
    ):  # fmt: skip
        assert len(table)
        sizes = table["difference_s"].abs().to_numpy()
        assert (np.diff(sizes) <= 0).all()


def test_classes_weigh_as_much_as_they_have_members(slowed: Any) -> None:
    """Folded, one class of one slow rank; the mean over all ranks written out must be the same."""
    folded = view_of(slowed)
    unfolded = view_of_frame(slowed.frame("all"))
    table = compare(folded, unfolded).by_kind
    assert table["a_s"].to_numpy() == pytest.approx(table["b_s"].to_numpy(), rel=1e-9, abs=1e-15)
    assert table["a_count"].to_numpy() == pytest.approx(table["b_count"].to_numpy())


def test_a_step_does_not_differ_from_itself(result: Any) -> None:
    same = compare(view_of(result), view_of(result))
    assert same.difference == 0.0
    assert (same.by_operation["difference_s"] == 0.0).all()
    assert (same.by_operation["ratio"].dropna() == 1.0).all()


def test_a_slower_kind_is_named_with_its_stage_and_layer() -> None:
    frame = synthetic(2, 240)
    slower = frame.copy()
    hit = (frame["kind"] == "gemm") & (frame["stage"] == 1) & (frame["layer"] == 9)
    assert hit.any()
    slower.loc[hit, "end"] += 0.4 * (frame["end"] - frame["start"])[hit]
    found = compare(view_of_frame(frame), view_of_frame(slower))
    top = found.by_operation.iloc[0]
    assert (top["kind"], top["stage"], top["layer"]) == ("gemm", 1, 9)
    assert found.by_stage["stage"].iloc[0] == 1
    assert found.by_layer["layer"].iloc[0] == 9
    changed = found.by_operation[found.by_operation["difference_s"] > 1e-12]
    assert changed["ratio"].to_numpy() == pytest.approx(1.4)
    assert changed["difference_s"].sum() == pytest.approx(
        0.4 * (frame["end"] - frame["start"])[hit].sum() / 2
    )


def test_what_only_one_side_has_is_shown() -> None:
    frame = synthetic(1, 60)
    found = compare(view_of_frame(frame), view_of_frame(frame[frame["kind"] != "norm"]))
    row = found.by_kind.set_index("kind").loc["norm"]
    assert (row["b_s"], row["b_count"]) == (0.0, 0.0)
    assert row["difference_s"] == -row["a_s"]


def test_stages_of_other_pipelines_are_not_aligned(tmp_path: Path, result: Any) -> None:
    parallel = {**EXPERIMENT["parallel"], "pipeline": 4}
    cluster = {**EXPERIMENT["cluster"], "nodes": 2}
    deeper = run(parse_experiment({**EXPERIMENT, "parallel": parallel, "cluster": cluster}))
    found = compare(view_of(result), view_of(deeper))
    assert dict(found.unaligned) == {"stage": (2, 4)}
    assert found.by_stage.empty
    assert "stage" not in found.by_operation
    # the layers are the same: no operation is only on one side
    assert ((found.by_operation["a_s"] > 0) & (found.by_operation["b_s"] > 0)).all()
    assert set(found.by_layer["layer"]) == {0, 1, 2, 3}
    said = "A has 2 stages, B has 4: they are not compared stage by stage."
    assert printed(print_comparison, found).count(said) == 1
    write_comparison(found, tmp_path / "report.html")
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert found.to_dict()["unaligned"] == {"stage": {"a": 2, "b": 4}}


def test_layers_of_other_models_are_not_aligned() -> None:
    frame = synthetic(1, 240)
    found = compare(view_of_frame(frame), view_of_frame(frame[frame["layer"] < 8]))
    assert dict(found.unaligned) == {"layer": (12, 8)}
    assert found.by_layer.empty
    assert len(found.by_stage) == 4
    assert list(found.by_operation.columns[:4]) == ["kind", "stage", "phase", "operation"]


def test_a_run_and_its_own_trace_differ_by_rounding(tmp_path: Path, result: Any) -> None:
    """The written trace read back as if it had been measured."""
    view = view_of(result)
    write_hta(view.frame, tmp_path / "traces", view.trace)
    measured = load(tmp_path / "traces")
    found = compare(view, measured)
    assert measured.step_time == pytest.approx(view.step_time, rel=1e-3)
    kinds = found.by_kind.groupby("kind")[["a_s", "b_s"]].sum()
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "send_recv"):
        if kind in kinds.index:
            assert kinds.loc[kind, "b_s"] == pytest.approx(kinds.loc[kind, "a_s"], rel=0.01)


def test_load_understands_all_kinds_of_input(tmp_path: Path, result: Any) -> None:
    write_run(result, tmp_path / "run")
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    view = view_of(result)
    write_trace(view.frame, tmp_path / "trace.json", view.trace)
    times = [load(tmp_path / name).step_time for name in ("run", "tiny.yaml", "trace.json")]
    assert times == pytest.approx([result.step_time] * 3, rel=1e-3)


def test_a_changed_key_is_a_what_if(tmp_path: Path, result: Any) -> None:
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    slow_host = "framework={base: megatron-core, host_time_per_kernel: 2.0e-5}"
    answer = CliRunner().invoke(
        command, [str(experiment), str(experiment), "--set-b", slow_host, "--json"]
    )
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["a"]["step_time_s"] == result.step_time < found["b"]["step_time_s"]
    write_run(result, tmp_path / "run")
    with pytest.raises(InputError, match="experiment file"):
        load(tmp_path / "run", overrides=["parallel.tensor=1"])


@pytest.mark.parametrize("name", ["none", "empty", "text.json", "list.json", "broken.json.gz"])
def test_what_cannot_be_compared_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(InputError):
        load(tmp_path / name)


def test_the_command(tmp_path: Path, result: Any, slowed: Any) -> None:
    write_run(result, tmp_path / "a")
    write_run(slowed, tmp_path / "b")
    arguments = [str(tmp_path / "a"), str(tmp_path / "b")]
    answer = CliRunner().invoke(command, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["difference_s"] == pytest.approx(slowed.step_time - result.step_time)
    assert {row["kind"] for row in found["by_kind"]} >= {"gemm", WAITING}
    answer = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "report.html")])
    assert answer.exit_code == 0, answer.output
    assert "slow GPU" in answer.stdout
    assert "gemm" in answer.stdout
    assert (tmp_path / "report.html").is_file()


def test_printed_names_are_no_markup(comparison: Comparison) -> None:
    frame = synthetic(1, 30).assign(operation="[bold]x[/nope]")
    text = printed(print_comparison, compare(view_of_frame(frame, "[red]a[/b]"), comparison.b))
    assert "[red]a[/b]" in text


def test_the_page_shows_both_timelines(tmp_path: Path, comparison: Comparison) -> None:
    write_comparison(comparison, tmp_path / "report.html")
    with browser() as page:
        page.open(tmp_path / "report.html")
        rows = len(comparison.a.frame) + len(comparison.b.frame)
        assert page.run("report.operations") == rows
        groups = page.run("report.timeline.heads.map(h => h.label)")
        assert groups[0].startswith("A: rank 0")
        assert groups[1].startswith("B: rank 0")
        assert "gemm" in page.run("document.querySelector('#by-kind').innerText")
        assert page.problems == []


def test_every_row_of_the_page_waits_for_the_same_as_before(comparison: Comparison) -> None:
    """Ranks of both runs take turns in the page; what they waited for moves along."""
    from simulator.reports.columns import awaited_rows
    from simulator.reports.html import _joined

    frame, _ = _joined([(comparison.a, "A"), (comparison.b, "B")])
    expected = []
    for view in (comparison.a, comparison.b):
        source = awaited_rows(view.frame)
        names = view.frame["operation"].astype(str).to_numpy()
        expected += [names[s] for s in source if s >= 0]
    awaited = frame["awaited"].to_numpy()
    names = frame["operation"].to_numpy()
    found = [names[a] for a in awaited if a >= 0]
    assert sorted(found) == sorted(expected)
    waiting = np.flatnonzero(awaited >= 0)
    end, start = frame["end"].to_numpy(), frame["start"].to_numpy()
    assert (end[awaited[waiting]] <= start[waiting] + 1e-12).all()
    assert isinstance(frame, pd.DataFrame)
