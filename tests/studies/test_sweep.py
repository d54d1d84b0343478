"""Sweeps: every point one row, whatever happens to the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from simulator.errors import InputError
from simulator.studies.pool import Pool
from simulator.studies.sweep import run_sweep, sweep
from simulator.studies.sweep_file import make_spec
from simulator.studies.table import FOLD_ROWS, RowTable, iterate_flat, table_of

sys.path.insert(0, str(Path(__file__).parent))
import sweep_helpers as helpers

OVER = {"parallel.tensor": [1, 2, 4, 8, 16], "training.micro_batch_size": [1, 2, 4]}


def test_a_sweep_is_a_frame_with_one_row_per_point() -> None:
    frame = sweep(helpers.BASE, OVER, evaluate=helpers.product, jobs=1)
    assert list(frame["parallel.tensor"]) == [t for t in (1, 2, 4, 8, 16) for _ in range(3)]
    assert list(frame["status"]) == ["ok"] * 15
    expected = frame["training.micro_batch_size"] / frame["parallel.tensor"]
    assert (frame["step_time_s"] == expected).all()
    assert (frame["breakdown_s.gemm"] == frame["parallel.tensor"]).all()
    assert frame["key"].is_unique
    assert "memory" not in frame


def test_processes_and_folders_change_nothing(tmp_path: Path) -> None:
    here = sweep(helpers.BASE, OVER, evaluate=helpers.product, jobs=1)
    there = sweep(helpers.BASE, OVER, evaluate=helpers.product, jobs=2, out=tmp_path)
    pd.testing.assert_frame_equal(here, there)
    pd.testing.assert_frame_equal(here, pd.read_parquet(tmp_path / "results.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "results.parquet"]


def test_a_point_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    """An input error, a bug and a process that is killed."""
    frame = sweep(helpers.BASE, OVER, evaluate=helpers.picky, jobs=2, out=tmp_path)
    by_size = frame.groupby("parallel.tensor")
    assert {size: set(rows["status"]) for size, rows in by_size} == {
        1: {"ok"}, 2: {"failed"}, 4: {"failed"}, 8: {"failed"}, 16: {"ok"},
    }  # fmt: skip
    reasons = {size: rows["reason"].iloc[0] for size, rows in by_size}
    assert reasons[2] == "parallel.tensor: 2 is refused"
    assert reasons[4] == "ZeroDivisionError: a bug"
    assert "killed" in reasons[8]
    assert len(frame) == 15


def test_rows_that_are_there_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("SWEEP_LOG", str(log))
    less = {**OVER, "parallel.tensor": [1, 2]}
    first = sweep(helpers.BASE, less, evaluate=helpers.logged, jobs=1, out=tmp_path / "out")
    more = sweep(helpers.BASE, OVER, evaluate=helpers.logged, jobs=1, out=tmp_path / "out")
    calls = log.read_text().splitlines()
    assert len(calls) == len(set(calls)) == 15
    pd.testing.assert_frame_equal(more.head(6), first)
    sweep(helpers.BASE, less, evaluate=helpers.logged, jobs=1, out=tmp_path / "out", fresh=True)
    assert len(log.read_text().splitlines()) == 21
    assert len(pd.read_parquet(tmp_path / "out" / "results.parquet")) == 15


def test_another_version_runs_again_and_keeps_the_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(helpers.BASE, OVER, evaluate=helpers.product, jobs=1, out=tmp_path)
    monkeypatch.setattr("simulator.__version__", "99")
    frame = sweep(helpers.BASE, OVER, evaluate=helpers.product, jobs=1, out=tmp_path)
    assert set(frame["version"]) == {"99"}
    assert len(frame) == 15
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == 30


def test_progress_counts_rows_and_failures() -> None:
    seen: list[tuple[int, int, int]] = []
    spec = make_spec(helpers.BASE, OVER)
    run_sweep(spec, evaluate=helpers.product, jobs=1, progress=lambda *c: seen.append(c))
    assert seen == [(done, 15, 0) for done in range(16)]


# ----------------------------------------------------------------------------- killed


SCRIPT = """
    import sys
    sys.path.insert(0, {helpers!r})
    import sweep_helpers as helpers
    from simulator.studies.sweep import sweep
    sweep(helpers.BASE, {over!r}, evaluate=helpers.logged, jobs=2, out={out!r})
"""
MANY = {
    "parallel.tensor": {"from": 1, "to": 20},
    "training.micro_batch_size": {"from": 1, "to": 15},
}


def rows_so_far(folder: Path) -> int:
    table, journal = folder / "results.parquet", folder / "results.journal"
    rows = pq.read_metadata(table).num_rows if table.exists() else 0
    return rows + (journal.read_bytes().count(b"\n") if journal.exists() else 0)


@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_a_sweep_killed_and_resumed_ends_with_the_undisturbed_rows(
    tmp_path: Path, fraction: float
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    script = textwrap.dedent(
        SCRIPT.format(helpers=str(Path(__file__).parent), over=MANY, out=str(out))
    )
    environment = {**os.environ, "SWEEP_LOG": str(log)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    began = time.monotonic()
    while rows_so_far(out) < fraction * 300 and time.monotonic() - began < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows_so_far(out)
    assert 0 < before < 300, "killed before or after the sweep"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    resumed = pd.read_parquet(out / "results.parquet")
    undisturbed = sweep(helpers.BASE, MANY, evaluate=helpers.product, jobs=1)
    pd.testing.assert_frame_equal(resumed, undisturbed)
    # only what was at work or waiting for the dead parent is run a second time
    calls = log.read_text().splitlines()
    assert len(set(calls)) == 300
    assert len(calls) <= 300 + 8


def test_workers_do_not_outlive_a_killed_sweep(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import multiprocessing, time
        from simulator.studies.pool import Pool
        with Pool(time.sleep, 2) as pool:
            outcomes = pool.map([0.01, 0.01, 0.01, 0.01, 30])
            next(outcomes)
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            list(outcomes)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 10
    while any(running(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(running(worker) for worker in workers)


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("cut", range(0, 130, 9))
def test_a_row_cut_off_in_the_middle_is_dropped_and_nothing_else(tmp_path: Path, cut: int) -> None:
    rows: list[dict[str, Any]] = [{"key": f"k{i}", "value": i / 3} for i in range(4)]
    with RowTable(tmp_path) as table:
        for row in rows:
            table.append(row)
    journal = tmp_path / "results.journal"
    content = journal.read_bytes()
    journal.write_bytes(content[: len(content) - min(cut, len(content))])
    whole = journal.read_bytes().count(b"\n")
    with RowTable(tmp_path) as table:
        assert len(table) == whole
        for row in rows:
            table.append(row)
        table.fold([row["key"] for row in rows])
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == rows


def test_rows_in_table_and_journal_are_one_row(tmp_path: Path) -> None:
    """The state between putting the new table in place and emptying the journal."""
    rows = [{"key": f"k{index}", "value": index} for index in range(5)]
    with RowTable(tmp_path) as table:
        for row in rows:
            table.append(row)
    journal = (tmp_path / "results.journal").read_bytes()
    with RowTable(tmp_path) as table:
        table.fold()
    (tmp_path / "results.journal").write_bytes(journal)
    with RowTable(tmp_path) as table:
        assert len(table) == 5
        table.fold()
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == rows


def test_the_table_grows_while_rows_come(tmp_path: Path) -> None:
    with RowTable(tmp_path) as table:
        for index in range(FOLD_ROWS + 1):
            table.append({"key": str(index)})
        assert pq.read_metadata(tmp_path / "results.parquet").num_rows == FOLD_ROWS


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys; from simulator.studies.table import RowTable; RowTable(sys.argv[1]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with pytest.raises(InputError, match="another sweep"):
            RowTable(tmp_path)
    finally:
        other.communicate(b"")
    RowTable(tmp_path).close()


def test_a_file_that_is_no_table_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a Parquet table"):
        RowTable(tmp_path)
    pq.write_table(table_of([{"a": 1}]), tmp_path / "results.parquet")
    with pytest.raises(InputError, match="no column 'key'"):
        RowTable(tmp_path)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([True, None, False], [True, None, False]),
        ([1, None, 2], [1, None, 2]),
        ([1, 0.5], [1.0, 0.5]),
        ([1, "auto"], ["1", "auto"]),
        ([[1, 2], {"b": 1, "a": 2}], ["[1, 2]", '{"a": 2, "b": 1}']),
        ([True, 1], ["true", "1"]),
    ],
)
def test_a_column_holds_all_its_values(values: list[Any], wanted: list[Any]) -> None:
    table = table_of([{"key": index, "value": value} for index, value in enumerate(values)])
    assert table.column("value").to_pylist() == wanted


def test_numpy_scalars_are_plain_values() -> None:
    given = {"a": np.float64(0.5), "b": {"c": np.int64(2), "d": np.bool_(True)}, "e": None}
    flat = dict(iterate_flat(given))
    assert flat == {"a": 0.5, "b.c": 2, "b.d": True, "e": None}
    assert [type(value) for value in flat.values()] == [float, int, bool, type(None)]


# -------------------------------------------------------------------------------- pool


def test_a_pool_survives_workers_that_die() -> None:
    with Pool(die_on_seven, 2) as pool:
        outcomes = {item: (result, error) for item, result, error in pool.map(range(30))}
    assert sorted(outcomes) == list(range(30))
    assert outcomes[7][1] is not None
    assert all(outcomes[item] == (2 * item, None) for item in range(30) if item % 10 != 7)


def die_on_seven(item: int) -> int:
    if item % 10 == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * item


# -------------------------------------------------------------------------------- Dask


def test_a_dask_cluster_loses_a_worker_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
    ) as cluster:
        killed: list[int] = []

        def progress(done: int, total: int, failed: int) -> None:
            if done == 60 and not killed:
                worker = next(iter(cluster.workers.values()))
                killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

        frame = sweep(
            helpers.BASE,
            MANY,
            evaluate=helpers.slow_product,
            scheduler=cluster.scheduler_address,
            out=tmp_path,
            progress=progress,
        )
        assert killed
    undisturbed = sweep(helpers.BASE, MANY, evaluate=helpers.product, jobs=1)
    pd.testing.assert_frame_equal(frame, undisturbed)


def test_a_scheduler_that_does_not_answer_is_an_input_error() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        sweep(helpers.BASE, OVER, scheduler="tcp://127.0.0.1:9", evaluate=helpers.product)


# ---------------------------------------------------------------------- the real simulation

REAL: dict[str, Any] = {
    "model": {"family": "gpt", "name": "tiny", "layers": 2, "hidden": 256, "heads": 8,
              "vocab": 1024, "max_seq": 512},
    "cluster": {"topology": "dgx-a100", "nodes": 1},
    "training": {"global_batch_size": 16},
}  # fmt: skip


def test_simulated_points_have_the_summary_s_figures(tmp_path: Path) -> None:
    from simulator.experiment import parse_experiment
    from simulator.simulation import run

    over = {"parallel.tensor": [1, 2, 3], "parallel.pipeline": [1, 2]}
    frame = sweep(REAL, over, jobs=1, out=tmp_path)
    assert list(frame["status"]) == ["ok"] * 4 + ["failed"] * 2
    assert "does not divide" in frame["reason"].iloc[4]
    for _, row in frame.head(4).iterrows():
        parallel = {"tensor": row["parallel.tensor"], "pipeline": row["parallel.pipeline"]}
        summary = run(parse_experiment({**REAL, "parallel": parallel})).summary
        assert row["step_time_s"] == summary.step_time_s
        assert row["breakdown_s.gemm"] == summary.breakdown_s["gemm"]
        assert row["fits"]


def test_points_that_do_not_fit_say_so_and_how_much_they_need() -> None:
    base = {"model": "gpt3-175b", "cluster": {"topology": "dgx-a100", "nodes": 1}}
    frame = sweep(base, {"parallel.tensor": [8]}, jobs=1)
    assert list(frame["status"]) == ["out of memory"]
    assert frame["peak_memory_bytes"].iloc[0] > frame["memory_capacity_bytes"].iloc[0]
    assert not frame["fits"].iloc[0]
    assert "needs" in frame["reason"].iloc[0]
    allowed = sweep(base, {"parallel.tensor": [8]}, jobs=1, allow_oom=True)
    assert list(allowed["status"]) == ["ok"]
    assert not allowed["fits"].iloc[0]


# --------------------------------------------------------------------------- command line


def sweep_file(tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "study.yaml"
    over = {"parallel.tensor": [1, 2, 3], "training.micro_batch_size": [1, 2]}
    path.write_text(yaml.safe_dump({"base": REAL, "sweep": over, "filter": "tensor < 9"}))
    return path


def test_the_command_writes_the_table_and_prints_it(tmp_path: Path) -> None:
    from simulator.cli.sweep import command

    path = sweep_file(tmp_path)
    shown = CliRunner().invoke(command, [str(path), "-j", "1"])
    assert shown.exit_code == 0, shown.output
    assert "6 rows in" in shown.output
    assert "2 points have no result" in shown.output
    assert len(pd.read_parquet(tmp_path / "study.sweep" / "results.parquet")) == 6


def test_the_command_prints_json_and_plans(tmp_path: Path) -> None:
    from simulator.cli.sweep import command

    path = sweep_file(tmp_path)
    rows = json.loads(CliRunner().invoke(command, [str(path), "-j", "1", "--json"]).output)
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed"] * 2
    planned = CliRunner().invoke(command, [str(path), "--dry-run"])
    assert "6 points of 6 combinations" in planned.output
    changed = CliRunner().invoke(
        command, [str(path), "--dry-run", "--set", "parallel.pipeline=2", "--json"]
    )
    assert len(json.loads(changed.output)) == 6
    missing = CliRunner().invoke(command, [str(tmp_path / "none.yaml")])
    assert isinstance(missing.exception, InputError)
