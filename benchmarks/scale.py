"""Scale: Llama-3 405B from 1,024 to 131,072 H100, and one slow GPU among 16,384.

    python benchmarks/scale.py [--accelerators 1024 16384 131072] [--slow 16384]

Every line is a process of its own. `cluster` is the building of the cluster's arrays, `graph` that
of its networkx graph, `step` everything else up to the summary and the per-operation timeline of
every distinct rank; `step CPU s` is its CPU time, which other processes of the machine disturb
less, and `growth` the ratio of that to the first line's. Peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "llama3_405b_16384xh100.yaml"


def measure(accelerators: int, *, slow: bool, graph: bool) -> dict[str, Any]:
    """One run in this process: wall seconds by part, classes, events, peak MB."""
    from simulator.experiment import load_experiment
    from simulator.simulation import build_cluster, run

    data = accelerators // (8 * 16)
    changes: dict[str, Any] = {
        "cluster.nodes": accelerators // 8,
        # sixteen micro-batches per pipeline at every size
        "training.global_batch_size": 16 * data,
    }
    if slow:
        changes["cluster.faults"] = [{"gpu": 17, "slowdown": 1.3}]
    experiment = load_experiment(EXPERIMENT, values=changes)
    clock = [time.perf_counter()]
    cluster = build_cluster(experiment)
    clock.append(time.perf_counter())
    if graph:
        cluster.graph.number_of_nodes()
    clock.append(time.perf_counter())
    cpu = time.process_time()
    result = run(experiment, cluster=cluster)
    rows = len(result.frame())
    cpu = time.process_time() - cpu
    clock.append(time.perf_counter())
    return {
        "accelerators": accelerators,
        "slow": slow,
        "classes": result.timeline.classes,
        "events": result.timeline.events,
        "rows": rows,
        "cluster_s": clock[1] - clock[0],
        "graph_s": clock[2] - clock[1],
        "step_s": clock[3] - clock[2],
        "step_cpu_s": cpu,
        "step_time_s": result.step_time,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [1024, 4096, 16384, 131072]
    parser.add_argument("--accelerators", type=int, nargs="*", default=sizes)
    parser.add_argument("--slow", type=int, nargs="*", default=[16384])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    print(
        f"{'accelerators':>12} {'slow GPU':>8} {'classes':>8} {'events':>8} {'rows':>9} "
        f"{'cluster s':>9} {'graph s':>8} {'step s':>7} {'step CPU s':>10} {'growth':>6} "
        f"{'peak MB':>8} {'step time s':>12}"
    )
    cases = [(n, False) for n in options.accelerators] + [(n, True) for n in options.slow]
    first = None
    for accelerators, slow in cases:
        case = {"accelerators": accelerators, "slow": slow, "graph": True}
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(case)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        r = json.loads(done.stdout)
        first = first or r["step_cpu_s"]
        print(
            f"{r['accelerators']:>12} {'yes' if r['slow'] else 'no':>8} {r['classes']:>8} "
            f"{r['events']:>8} {r['rows']:>9} {r['cluster_s']:>9.2f} {r['graph_s']:>8.2f} "
            f"{r['step_s']:>7.2f} {r['step_cpu_s']:>10.2f} {r['step_cpu_s'] / first:>6.2f} "
            f"{r['peak_mb']:>8.0f} {r['step_time_s']:>12.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
