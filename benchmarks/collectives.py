"""Clusters and collectives at scale, and predictions against measured collectives.

    python benchmarks/collectives.py                    # build, routes, traffic up to 131,072 GPUs
    python benchmarks/collectives.py --data FILE.csv    # errors on a table of measured collectives

The table has the columns collective, n_gpus, n_nodes, gpus_per_node, bytes, latency_us, gpu,
network, algo and source.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from simulator.costs.collectives import collective_traffic
from simulator.costs.collectives_predict import predict_collective
from simulator.topology import load_cluster


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def scale(console: Console) -> None:
    """Wall seconds of building, routing and costing on DGX H100 clusters."""
    table = Table(title="DGX H100, one core", title_justify="left")
    for name in ("accelerators", "arrays s", "graph s", "131,072 routes s", "DP all-reduce s",
                 "again s", "TP all-gather s", "EP all-to-all s", "peak MB"):  # fmt: skip
        table.add_column(name, justify="right")
    rng = np.random.default_rng(0)
    for nodes in (128, 2048, 16384):
        cluster, build = timed(lambda nodes=nodes: load_cluster("dgx-h100", nodes=nodes))
        _, graph = timed(lambda c=cluster: c.graph)
        n = len(cluster)
        source, target = rng.integers(0, n, (2, 131_072))
        _, routes = timed(lambda c=cluster, s=source, t=target: c.routes(s, t))
        # One group of 128 nodes per position: 1,024 groups on 131,072 GPUs.
        data = np.arange(n).reshape(128, -1).T
        tensor = np.arange(n).reshape(-1, 8)
        expert = np.arange(n).reshape(-1, 64)

        def cost(op: str, ranks: np.ndarray, size: float, c: Any = cluster) -> float:
            return timed(lambda: collective_traffic(c, op, ranks, size))[1]

        row = [
            f"{n:,}", f"{build:.2f}", f"{graph:.2f}", f"{routes:.2f}",
            f"{cost('all_reduce', data, 1e9):.3f}", f"{cost('all_reduce', data, 2e9):.3f}",
            f"{cost('all_gather', tensor, 1e8):.3f}", f"{cost('all_to_all', expert, 1e7):.3f}",
            f"{peak_mb():,.0f}",
        ]  # fmt: skip
        table.add_row(*row)
    console.print(table)
    table = Table(title="one collective on 4,096 accelerators, 1 GB", title_justify="left")
    for name in ("operation", "algorithm", "first ms", "again ms", "simulated ms"):
        table.add_column(name, justify="right")
    cluster = load_cluster("dgx-h100", nodes=512)
    everyone = np.arange(4096)
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        traffic, first = timed(lambda o=op: collective_traffic(cluster, o, everyone, 1e9))
        _, again = timed(lambda o=op: collective_traffic(cluster, o, everyone, 2e9))
        table.add_row(
            op, traffic.algorithm, f"{first * 1e3:.1f}", f"{again * 1e3:.1f}",
            f"{traffic.duration(cluster)[0] * 1e3:.2f}",
        )  # fmt: skip
    console.print(table)


def accuracy(console: Console, path: str) -> None:
    """Median and 90th-percentile absolute error by kind of row."""
    data = pd.read_csv(path, comment="#")
    predicted = np.array(
        [
            predict_collective(
                r.collective, r.gpu, r.n_gpus, r.n_nodes, r.gpus_per_node, r.bytes,
                network=r.network, algorithm=r.algo, source=r.source,
            )
            for r in data.itertuples()
        ]
    )  # fmt: skip
    data["error"] = predicted / (data.latency_us.to_numpy() * 1e-6) - 1
    one = data.n_nodes == 1
    groups = {
        "one node, >= 16 MB (demand 6 / 14)": one & (data.bytes >= 16e6),
        "one node, 1-16 MB (demand 15 / 35)": one & (data.bytes >= 1e6) & (data.bytes < 16e6),
        "one node, < 1 MB": one & (data.bytes < 1e6),
        "several nodes, >= 1 GiB (demand 5 / 15)": ~one & (data.bytes >= 2**30 * 0.999),
        "several nodes, 16 MB - 1 GiB": ~one & (data.bytes >= 16e6) & (data.bytes < 2**30 * 0.999),
        "several nodes, < 16 MB": ~one & (data.bytes < 16e6),
    }
    table = Table(title="absolute error, %", title_justify="left")
    for name in ("rows", "n", "median", "90th", "signed median"):
        table.add_column(name, justify="left" if name == "rows" else "right")
    for name, where in groups.items():
        error = data.error[where]
        if len(error):
            table.add_row(
                name, str(len(error)), f"{100 * error.abs().median():.1f}",
                f"{100 * error.abs().quantile(0.9):.1f}", f"{100 * error.median():+.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="CSV of measured collectives")
    arguments = parser.parse_args()
    if arguments.data:
        accuracy(Console(width=150), arguments.data)
    else:
        scale(Console(width=150))
