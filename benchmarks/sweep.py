"""A sweep of 1,000 points on two cores, killed half-way and resumed.

    python benchmarks/sweep.py          # a process pool, killed with SIGKILL
    python benchmarks/sweep.py dask     # a local Dask cluster that loses a worker

Prints the times and whether the resumed table equals that of an undisturbed sweep.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import yaml

from simulator.studies.sweep import run_sweep, sweep
from simulator.studies.sweep_file import load_sweep

#: 5 x 5 x 8 x 5 = 1,000 small experiments; some of them cannot be run, which is a row as well.
FILE = {
    "base": {
        "model": {"family": "gpt", "name": "tiny", "layers": 4, "hidden": 256, "heads": 8,
                  "vocab": 1024, "max_seq": 512},
        "cluster": {"topology": "dgx-a100", "nodes": 1},
    },
    "sweep": {
        "parallel.tensor": [1, 2, 4, 8, 16],
        "parallel.pipeline": {"from": 1, "to": 5},
        "training.global_batch_size": {"from": 16, "to": 128, "step": 16},
        "training.micro_batch_size": [1, 2, 4, 8, 16],
    },
}  # fmt: skip


def rows(folder: Path) -> int:
    """Rows of the table and its journal."""
    table, journal = folder / "results.parquet", folder / "results.journal"
    count = pq.read_metadata(table).num_rows if table.exists() else 0
    return count + (journal.read_bytes().count(b"\n") if journal.exists() else 0)


def killed(folder: Path, file: Path) -> pd.DataFrame:
    """The sweep by the command line, killed half-way and run again."""
    out = folder / "killed"
    command = [sys.executable, "-m", "simulator", "sweep", str(file), "--out", str(out), "-j", "2"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--rows", "0"])
    while rows(out) < 500:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed with {rows(out)} rows after {time.perf_counter() - began:.1f} s")
    began = time.perf_counter()
    subprocess.run([*command, "--rows", "0"], check=True)
    print(f"resumed and finished in {time.perf_counter() - began:.1f} s")
    return pd.read_parquet(out / "results.parquet")


def dask(folder: Path, file: Path) -> pd.DataFrame:
    """The sweep on a local Dask cluster of two workers, one of which is killed."""
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
    ) as cluster:

        def progress(done: int, total: int, failed: int) -> None:
            if done == 500:
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
                print("killed a worker")

        began = time.perf_counter()
        run_sweep(
            load_sweep(file),
            out=folder / "dask",
            scheduler=cluster.scheduler_address,
            progress=progress,
        )
        print(f"finished in {time.perf_counter() - began:.1f} s")
    return pd.read_parquet(folder / "dask" / "results.parquet")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "sweep.yaml"
        file.write_text(yaml.safe_dump(FILE, sort_keys=False))
        began = time.perf_counter()
        undisturbed = sweep(file, jobs=2)
        print(f"{len(undisturbed)} points undisturbed in {time.perf_counter() - began:.1f} s")
        print(undisturbed["status"].value_counts().to_string())
        disturbed = (dask if "dask" in sys.argv[1:] else killed)(folder, file)
        pd.testing.assert_frame_equal(disturbed, undisturbed)
        print(f"the {len(disturbed)} rows are equal")


if __name__ == "__main__":
    main()
