"""`simulator schedule` as people and scripts call it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulator.cli.schedule import command, parse_durations
from simulator.errors import InputError
from simulator.schedules import build, closed_forms, describe, names

ROOT = Path(__file__).parents[2]


def run(*arguments: str):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def result(*arguments: str) -> dict:
    answer = run(*arguments, "--json")
    assert answer.exit_code == 0
    return json.loads(answer.output)


def test_json() -> None:
    found = result("1f1b", "--stages", "4", "--microbatches", "8")
    assert found["makespan"] == 8 * 3 + 3 * 3
    assert found["bubble_fraction"] == pytest.approx(9 / 33)
    assert found["window_bubble_fraction"] == pytest.approx(9 / 33)
    assert found["peak_in_flight"] == [4, 3, 2, 1]
    assert found["peak_in_flight_i_release"] == [4, 3, 2, 1]
    assert found["actions"] == build("1f1b", 4, 8).action_texts()
    assert [len(row) for row in found["start"]] == [16] * 4
    assert found["start"][3][0] == 3
    assert found["end"][0][-1] == 33


def test_json_details() -> None:
    found = result("zb-h2", "--stages", "4", "--microbatches", "8", "--details")
    assert [idle["synchronisation"] for idle in found["idle"]] == [3, 2, 1, 0]
    assert [m["peak"] for m in found["memory"]] == found["peak_in_flight"]
    for idle, starts, ends in zip(found["idle"], found["start"], found["end"], strict=True):
        busy = sum(ends) - sum(starts)
        causes = [v for k, v in idle.items() if k not in ("rank", "imbalance_by_stage")]
        assert sum(causes) == found["makespan"] - busy


@pytest.mark.parametrize("name", names())
def test_every_schedule(name: str) -> None:
    found = result(name, "--stages", "4", "--microbatches", "8", "--durations", "comm=0.1")
    assert found["schedule"] in (name, "synthesised")
    assert 0 <= found["window_bubble_fraction"] <= found["bubble_fraction"] < 1


def test_pytorchs_class_names() -> None:
    a = result("ZBVZeroBubble", "--stages", "4", "--microbatches", "8", "--virtual", "2")
    assert a["schedule"] == "zb-v"


def test_durations_option() -> None:
    found = result(
        "zb-h1", "--stages", "8", "--microbatches", "24",
        "--durations", "F=18.522,I=18.086,W=9.337,comm=0.601",
    )  # fmt: skip
    assert f"{found['window_bubble_fraction']:.4f}" == "0.1585"
    d = parse_durations("F=1:2:3, b=4, comm=0.5")
    assert (d.F, d.B, d.I, d.W, d.comm) == ((1, 2, 3), 4, 2, 2, 0.5)
    assert parse_durations(None) == parse_durations("F=1,I=1,W=1,comm=0")
    for text, message in (
        ("G=1", "unknown duration"),
        ("F", "expected F=<number>"),
        ("F=x", "expected a number"),
        ("F=1,F=2", "given twice"),
        ("F=-1", "not negative"),
    ):
        with pytest.raises(InputError, match=message):
            parse_durations(text)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_own_schedule(suffix: str, tmp_path) -> None:
    path = tmp_path / f"mine.{suffix}"
    if suffix == "csv":
        run("dualpipe-v", "--stages", "2", "--microbatches", "4", "--csv", str(path))
        assert path.read_text().startswith("0F0,0F1,0F2,3F0")
    else:
        actions = build("dualpipe-v", 2, 4).action_texts()
        path.write_text(json.dumps({"actions": actions, "stage_to_rank": [0, 1, 1, 0]}))
    fused = result("--actions", str(path))
    apart = result("--actions", str(path), "--sequential-overlap")
    named = result("dualpipe-v", "--stages", "2", "--microbatches", "4")
    assert fused["makespan"] == named["makespan"]
    assert fused["actions"] == named["actions"]
    assert any("OVERLAP_F_B" in text for text in fused["actions"][0])
    assert not any("OVERLAP_F_B" in text for text in apart["actions"][0])
    assert len(apart["start"][0]) == len(apart["actions"][0])


def test_lowered_csv_reads_back(tmp_path) -> None:
    path = tmp_path / "lowered.csv"
    run("zb-v", "--stages", "4", "--microbatches", "8", "--csv", str(path), "--lowered")
    assert "SEND_F" in path.read_text()
    found = result("--actions", str(path))
    assert found["makespan"] == result("zb-v", "--stages", "4", "--microbatches", "8")["makespan"]


def test_synthesis(tmp_path) -> None:
    found = result(
        "auto", "--stages", "4", "--microbatches", "12", "--memory-limit", "6",
        "--durations", "F=10,I=12,W=9,comm=1", "--objective", "window",
    )  # fmt: skip
    extra = found["synthesis"]
    assert extra["lower_bound"] <= extra["value"] <= min(extra["named"].values())
    assert max(found["peak_in_flight"]) <= 6
    assert max(extra["peak_memory"]) <= 6


def test_tables_and_plots(tmp_path) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    answer = run(
        "1f1b", "--stages", "4", "--microbatches", "8", "--compare", "interleaved-1f1b:2",
        "--recompute", "1", "--checkpoint", "0.1", "--plot", str(page), "--plot", str(picture),
    )  # fmt: skip
    assert answer.exit_code == 0
    assert "interleaved-1f1b (2 chunks)" in answer.output
    assert re.search(r"1f1b +44 +32 +27.27%", answer.output)
    assert "interleaved-1f1b" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["1f1b", "--stages", "4"], "needs --microbatches"),
        ([], "either the NAME"),
        (["1f1b", "--actions", "x.csv"], "either the NAME"),
        (["--actions", "none.csv"], "cannot read the schedule"),
        (["gpipe", "--stages", "4", "--microbatches", "4", "--memory-limit", "3"], "no option"),
        (["1f1b", "--stages", "4", "--microbatches", "3", "--strict", "pytorch"], "greater than"),
        (["auto", "--stages", "4", "--microbatches", "3", "--memory-limit", "0"], "must hold one"),
    ],
)
def test_errors_have_no_traceback(arguments, message) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulator", "schedule", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_options_of_schedules_can_be_found_and_given() -> None:
    from simulator.cli.list import command as list_command

    listed = CliRunner().invoke(list_command, ["schedules"], env={"COLUMNS": "400"}).output
    shown = " ".join(run("--help").output.replace("-\n", "-").split())
    for name in names():
        for option, text in describe(name).options.items():
            row = next(line for line in listed.splitlines() if line.split()[:2] == [name, option])
            assert text in row
            if option != "durations":
                assert f"--{option.replace('_', '-')} " in shown
    assert "with one, every backward follows another" in shown
    ahead = result("1f1b", "--stages", "4", "--microbatches", "8", "--forwards-ahead", "1")
    assert ahead["peak_in_flight"] == [5, 4, 3, 2]
    # square brackets of a text are no markup
    assert "a group g in [p, m] with m mod g = 0" in listed


def test_large_schedule_takes_three_seconds() -> None:
    """64 stages x 3072 micro-batches through the command line, process start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable, "-m", "simulator", "schedule", "1f1b", "--stages", "64",
            "--microbatches", "3072", "--json",
        ],
        capture_output=True, check=True, cwd=ROOT,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    assert found["makespan"] - 3072 * 3 == closed_forms.one_f_one_b(64, 3072, 1, 2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_sweep_script(tmp_path) -> None:
    done = subprocess.run(
        [
            sys.executable, "experiments/pipeline_bubbles.py", "--schedules", "1f1b,zb-v,dualpipe",
            "--stages", "2,4", "--per-stage", "1,2", "--out", str(tmp_path),
        ],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "MPLBACKEND": "Agg"},
    )  # fmt: skip
    rows = (tmp_path / "pipeline_bubbles.csv").read_text().splitlines()
    # DualPipe needs two micro-batches per stage.
    assert len(rows) == 1 + 4 + 4 + 2
    assert "12/12" in done.stderr
    assert (tmp_path / "pipeline_bubbles.png").stat().st_size > 10_000
    assert (tmp_path / "pipeline_bubbles.svg").exists()
