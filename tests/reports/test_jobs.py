"""What is written of several jobs that share a cluster: every figure is that of its own job."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from simulator.cli.run import command
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.reports.figures import save_figures
from simulator.reports.html import rank_breakdown, render, write_report
from simulator.reports.terminal import print_result
from simulator.reports.view import memory_over_time, memory_stages, read_run, view_of
from simulator.reports.writing import write_run
from simulator.simulation import OutOfMemoryError, Result, run
from simulator.studies.comparison import compare
from simulator.studies.monte_carlo import step_times
from simulator.studies.sweep import simulate_point

from .browser import browser
from .test_html import data_of

GPT = {"family": "gpt", "layers": 4, "hidden": 256, "heads": 4, "vocab": 1024, "max_seq": 128}
EXPERIMENT: dict[str, Any] = {
    "name": "own",
    "model": GPT,
    "cluster": {"topology": "a100-1nic", "nodes": 2, "placement": [0, 1, 8, 9]},
    "parallel": {"tensor": 2, "pipeline": 2},
    "training": {"global_batch_size": 4},
    "jobs": [
        {"name": "long", "model": GPT, "placement": [2, 3, 4, 5, 10, 11, 12, 13],
         "parallel": {"sharding": "zero3"},
         "training": {"global_batch_size": 64, "precision": "fp32"}},
        {"name": "deep", "model": {**GPT, "layers": 8}, "placement": [6, 7, 14, 15],
         "parallel": {"pipeline": 4}, "training": {"global_batch_size": 8}},
    ],
}  # fmt: skip
RANKS = {"own": range(4), "long": range(4, 12), "deep": range(12, 16)}


@pytest.fixture(scope="module")
def shared() -> Result:
    return run(parse_experiment(EXPERIMENT))


@pytest.fixture(scope="module")
def written(shared: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "run"
    write_run(shared, folder, hta=True)
    return folder


def summaries(result: Result) -> dict[str, Any]:
    return {"own": result.summary, **result.jobs}


def test_the_jobs_end_at_different_times(shared: Result) -> None:
    ends = {name: summary.step_time_s for name, summary in summaries(shared).items()}
    assert max(ends.values()) == ends["long"] == pytest.approx(shared.timeline.step_time)
    assert ends["own"] < 0.7 * ends["long"]
    assert len(set(ends.values())) == 3


def test_every_rank_is_labelled_with_its_job_and_the_jobs_own_coordinates(shared: Result) -> None:
    view = view_of(shared)
    assert {job.name: job.ranks for job in view.jobs} == RANKS
    for rank, label in view.rank_labels.items():
        (job,) = (name for name, ranks in RANKS.items() if rank in ranks)
        assert label.startswith(f"{job}, rank {rank}")
        # a job without pipeline stages does not speak of them because another has some
        assert ("pipeline" in label) == (job != "long")
    counts = view.trace.stands_for
    for ranks in RANKS.values():
        assert sum(count for rank, count in counts.items() if rank in ranks) == len(ranks)


def test_bars_of_a_rank_add_up_to_the_step_of_its_job(shared: Result) -> None:
    view = view_of(shared)
    table = rank_breakdown(view)
    steps = {name: summary.step_time_s for name, summary in summaries(shared).items()}
    for rank, seconds in table.sum(axis=1).items():
        (job,) = (name for name, ranks in RANKS.items() if rank in ranks)
        assert seconds == pytest.approx(steps[job], rel=1e-9)


def test_the_page_has_every_jobs_figures(shared: Result) -> None:
    data = data_of(render(view_of(shared)))
    assert data["figure_head"] == ["", "own", "long", "deep"]
    assert data["jobs"] == 3
    assert [bar["job"] for bar in data["breakdowns"]] == ["own", "long", "deep"]
    for bar, summary in zip(data["breakdowns"], summaries(shared).values(), strict=True):
        assert bar["step_time"] == pytest.approx(summary.step_time_s)
        assert sum(part["value"] for part in bar["parts"]) == pytest.approx(bar["step_time"])
    labels = [stage["label"] for stage in data["memory"]["stages"]]
    assert labels == [
        "own, pipeline rank 0", "own, pipeline rank 1", "long, pipeline rank 0",
        *(f"deep, pipeline rank {i}" for i in range(4)),
    ]  # fmt: skip
    assert [curve["label"] for curve in data["memory"]["curves"]] == labels
    groups = list(dict.fromkeys(track["group"].split(",")[0] for track in data["tracks"]))
    assert groups == ["own", "long", "deep"]


def test_memory_over_time_peaks_at_each_jobs_report(shared: Result) -> None:
    view = view_of(shared)
    stages = {stage.label: stage for stage in memory_stages(view)}
    curves = memory_over_time(view)
    assert len(curves) == len(stages) == 7
    for label, curve in curves:
        assert curve.bytes.max() == pytest.approx(stages[label].total)
    assert stages["long, pipeline rank 0"].total == shared.jobs["long"].memory[0]["total"]


def test_one_job_that_does_not_fit_is_told(shared: Result) -> None:
    view = view_of(shared)
    assert view.fits
    spoilt = dataclasses.replace(view.jobs[1], summary={**view.jobs[1].summary, "fits": False})
    assert not dataclasses.replace(view, jobs=(view.jobs[0], spoilt)).fits


def test_a_further_job_that_does_not_fit_is_refused() -> None:
    large = {"name": "large", "model": "llama3-70b", "placement": [2, 10]}
    experiment = parse_experiment({**EXPERIMENT, "jobs": [large]})
    with pytest.raises(OutOfMemoryError, match="job 'large'"):
        run(experiment, allow_oom=False)


def test_the_command_names_the_job_that_does_not_fit(tmp_path: Path) -> None:
    import yaml

    large = {"name": "large", "model": "llama3-70b", "placement": [2, 10]}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "jobs": [large]}))
    outcome = CliRunner().invoke(command, [str(path), "--json"])
    assert isinstance(outcome.exception, InputError)
    assert "job 'large' does not fit" in str(outcome.exception)
    assert json.loads(outcome.stdout)["job"] == "large"


def test_what_was_written_is_read_again(shared: Result, written: Path) -> None:
    view, again = view_of(shared), read_run(written)
    summary = json.loads((written / "summary.json").read_text())
    assert summary["step_time_s"] == shared.summary.step_time_s
    assert {name: job["step_time_s"] for name, job in summary["jobs"].items()} == {
        name: job.step_time_s for name, job in shared.jobs.items()
    }
    assert [(job.name, job.ranks) for job in again.jobs] == list(RANKS.items())
    assert again.step_time == pytest.approx(view.step_time)
    assert again.rank_labels == view.rank_labels
    assert data_of(render(again))["figures"] == data_of(render(view))["figures"]


def test_the_timeline_has_the_job_of_every_row(written: Path) -> None:
    frame = pd.read_parquet(written / "timeline.parquet")
    names = list(RANKS)
    for rank, job in frame[["rank", "job"]].drop_duplicates().itertuples(index=False):
        assert rank in RANKS[names[job]]


def test_the_trace_tells_the_jobs_groups_apart(shared: Result, written: Path) -> None:
    trace = json.loads(gzip.decompress((written / "trace.json.gz").read_bytes()))
    processes = {
        event["pid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    sizes = {group["pg_name"]: group["pg_size"] for group in trace["distributedInfo"]["pg_config"]}
    assert sizes["own: tensor"] == 2
    assert sizes["long: world"] == 8
    assert "long: tensor" not in sizes
    seen = set()
    for event in trace["traceEvents"]:
        group = event.get("args", {}).get("Process Group Name")
        if not group:
            continue
        job = group.split(":")[0]
        assert event["pid"] in RANKS[job]
        assert processes[event["pid"]].startswith(f"{job}: rank {event['pid']}")
        if event["args"]["Kind"] != "send_recv":
            assert event["args"]["Group size"] == sizes[group]
            wide = 4 if job == "long" else 2
            assert event["args"]["dtype"] == ("Float" if job == "long" else "BFloat16")
            elements = max(event["args"]["In msg nelems"], event["args"]["Out msg nelems"])
            assert elements == round(event["args"]["bytes"] / wide)
        seen.add(job)
    assert seen == set(RANKS)


def test_hta_gets_one_trace_per_rank(shared: Result, written: Path) -> None:
    representatives = sorted(shared.timeline.representatives.tolist())
    names = sorted(path.name for path in (written / "hta").iterdir())
    assert names == sorted(f"rank-{rank}.json.gz" for rank in representatives)


def test_a_comparison_is_that_of_the_own_job(shared: Result, written: Path) -> None:
    alone = run(parse_experiment({**EXPERIMENT, "jobs": []}))
    difference = compare(read_run(written), view_of(alone))
    assert difference.a.step_time == pytest.approx(shared.summary.step_time_s)
    assert difference.b.step_time == alone.step_time
    on_stream = difference.by_kind[~difference.by_kind["overlapped"].astype(bool)]
    assert on_stream["a_s"].sum() == pytest.approx(shared.summary.step_time_s)
    assert np.isin(np.unique(difference.a.frame["rank"]), list(RANKS["own"])).all()


def test_figures_and_terminal_name_the_jobs(shared: Result, tmp_path: Path) -> None:
    paths = save_figures(view_of(shared), tmp_path, formats=("svg",))
    assert len(paths) == 5
    console = Console(record=True, width=80, file=(tmp_path / "text").open("w"))
    print_result(shared, console)
    text = console.export_text()
    assert "Jobs that share the cluster" in text
    assert "…" not in text


def test_a_sweep_has_the_figures_of_all_jobs(shared: Result) -> None:
    figures = simulate_point(parse_experiment(EXPERIMENT), True)
    assert figures["step_time_s"] == shared.summary.step_time_s
    assert figures["jobs"]["deep"]["step_time_s"] == shared.jobs["deep"].step_time_s


def test_seeds_of_several_jobs_are_refused() -> None:
    noisy = parse_experiment({**EXPERIMENT, "jitter": {"scale": 0.1}})
    with pytest.raises(InputError, match="simulates one job"):
        step_times(noisy, 2)


def test_in_a_browser(shared: Result, tmp_path: Path) -> None:
    write_report(view_of(shared), tmp_path / "report.html")
    with browser() as page:
        page.open(tmp_path / "report.html")
        assert page.problems == []
        text = page.run("document.querySelector('#summary').textContent")
        for name in RANKS:
            assert f"Where the step of {name} goes" in text
        head = page.run("[...document.querySelectorAll('#summary th')].slice(0, 4)"
                        ".map(e => e.textContent)")  # fmt: skip
        assert head == ["", "own", "long", "deep"]
        # nothing lies over anything: the table ends before the bars begin
        table, bar = page.box("#summary .jobs"), page.box("#summary .stack")
        assert table["width"] <= 1400
        assert page.run(
            "document.querySelector('#summary .jobs').getBoundingClientRect().bottom"
            " <= document.querySelector('#summary .columns').getBoundingClientRect().top"
        ), (table, bar)
        assert page.run(
            "[...document.querySelectorAll('#summary .columns > div')]"
            ".every(e => e.scrollWidth <= e.clientWidth + 1)"
        )
