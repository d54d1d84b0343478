"""What a run is written as: complete, whole or absent, and read back."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from simulator.errors import InputError
from simulator.reports import write_run
from simulator.reports.files import whole_directory, whole_file
from simulator.reports.view import read_run, view_of
from simulator.studies.comparison import compare


def test_a_run_is_read_back_as_it_was(tmp_path: Path, result: Any) -> None:
    write_run(result, tmp_path / "run", csv=True, hta=True, figures=("png",))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "summary.json", "experiment.yaml", "timeline.parquet", "timeline.csv", "trace.json.gz",
        "report.html", "hta", "figures",
    }  # fmt: skip
    view, back = view_of(result), read_run(tmp_path / "run")
    assert back.step_time == view.step_time == result.step_time
    assert back.title == view.title
    assert back.rank_labels == view.rank_labels
    assert len(back.frame) == len(view.frame)
    for name in ("start", "end", "flops", "bytes"):
        assert np.array_equal(back.frame[name].to_numpy(), view.frame[name].to_numpy())
    assert (back.frame["operation"].astype(str).to_numpy()
            == view.frame["operation"].astype(str).to_numpy()).all()  # fmt: skip
    csv = pd.read_csv(tmp_path / "run" / "timeline.csv")
    assert len(csv) == len(view.frame)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step_time_s"] == result.summary.step_time_s
    assert len(list((tmp_path / "run" / "figures").iterdir())) == 5


def test_all_ranks_can_be_written(tmp_path: Path, result: Any) -> None:
    write_run(result, tmp_path / "run", ranks="all")
    back = read_run(tmp_path / "run")
    assert np.unique(back.frame["rank"]).tolist() == list(range(8))
    assert set(back.trace.stands_for.values()) == {1}


def test_every_rank_asked_for_is_in_timeline_and_traces(tmp_path: Path, result: Any) -> None:
    for given, expected in (("all", list(range(8))), ([1, 6], [1, 6])):
        run = tmp_path / str(given)
        write_run(result, run, ranks=given, hta=True, flows=True)
        rows = pd.read_parquet(run / "timeline.parquet")
        assert np.unique(rows["rank"]).tolist() == expected
        trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))
        events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
        in_trace = pd.Series([e["pid"] for e in events]).value_counts()
        assert in_trace.sort_index().to_dict() == rows.groupby("rank").size().to_dict()
        assert len({e["args"]["correlation"] for e in events}) == len(rows)
        assert [d["id"] for d in trace["deviceProperties"]] == expected
        names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
        assert sorted(names) == [f"rank {rank}" for rank in expected]
        arrows = [e for e in trace["traceEvents"] if e["ph"] in "sf"]
        assert {e["pid"] for e in arrows} == set(expected)
        files = sorted(path.name for path in (run / "hta").iterdir())
        assert files == [f"rank-{rank}.json.gz" for rank in expected]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with contextlib.suppress(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), whole_directory(tmp_path / "run") as folder:
        (folder / "summary.json").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_replaces_files_and_keeps_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    for text in ("first", "second"):
        with whole_directory(run) as folder:
            (folder / "summary.json").write_text(text)
            (folder / "hta").mkdir()
            (folder / "hta" / text).write_text(text)
    assert (run / "summary.json").read_text() == "second"
    assert (run / "notes.txt").read_text() == "mine"
    assert [p.name for p in (run / "hta").iterdir()] == ["second"]


@pytest.mark.parametrize("kind", [whole_file, whole_directory])
def test_what_cannot_be_written_is_one_clear_error(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), kind(tmp_path / "file" / "below"):
        pass
    with pytest.raises(InputError), whole_directory(tmp_path / "file"):
        pass


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text("")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"summary.json": "{"},
        {"summary.json": "[]"},
        {"summary.json": '{"step_time_s": "soon"}'},
        {"summary.json": '{"step_time_s": 1.0}'},
        {"summary.json": '{"step_time_s": 1.0}', "timeline.parquet": "no"},
        {"summary.json": '{"step_time_s": 1.0}', "timeline.csv": "rank,start\n0,1\n"},
    ],
)
def test_what_is_no_run_is_one_clear_error(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError):
        read_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, result: Any) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write_run(result, directory, csv=True)
    return directory


@pytest.mark.parametrize("name", ["summary.json", "timeline.csv", "timeline.parquet"])
def test_mutated_files_give_a_result_or_one_clear_error(
    tmp_path: Path, written: Path, name: str
) -> None:
    random = np.random.default_rng(7)
    for other in ("summary.json", "timeline.csv" if name != "timeline.parquet" else name):
        shutil.copy(written / other, tmp_path)
    original = (written / name).read_bytes()
    if name == "timeline.csv":
        original = b"".join(original.splitlines(keepends=True)[:20])
    for _ in range(150):
        data = bytearray(original)
        for _ in range(random.integers(1, 6)):
            at = int(random.integers(0, len(data)))
            match random.integers(0, 4):
                case 0:
                    data[at] = int(random.integers(0, 256))
                case 1:
                    del data[at : at + int(random.integers(1, 40))]
                case 2:
                    data[at:at] = random.choice([b"-1", b"nan", b"1e999", b'"', b"\x00", b"[{"])
                case _:
                    data[at : at + 4] = data[:4]
            if not data:
                break
        (tmp_path / name).write_bytes(data)
        try:
            view = read_run(tmp_path)
        except InputError:
            continue
        assert np.isfinite(view.frame["start"].to_numpy()).all()
        compare(view, view)
