"""Scale of the engine: what one step costs, from 1,024 to 131,072 accelerators.

    python benchmarks/engine.py [--case NAME ...] [--json]

Llama-3 405B as in `experiments/llama3_405b_16384xh100.yaml` (TP 8, PP 16, 8 virtual stages of one
layer) with the data-parallel size that fills the cluster, healthy and with one slow GPU; GPT-3 175B
on 1,024 A100 (TP 8, PP 8, DP 16, 96 micro-batches). Every case runs in a process of its own, so
that the peak memory is its own. Times are CPU seconds of one core (on an idle machine those of the
wall clock, which `wall` gives for all but the cluster); `cluster` builds the cluster
and resolves the plan, `programs` builds what the ranks execute, `network` asks for the traffic of
all collectives, `fold` partitions, `engine` simulates, `frame` makes the DataFrame of every
distinct rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"

#: name -> (experiment, nodes or None, slow GPU or None)
CASES: dict[str, tuple[str, int | None, int | None]] = {
    "gpt3-1024": ("gpt3_175b_1024xa100.yaml", None, None),
    "llama3-405b-1024": ("llama3_405b_16384xh100.yaml", 128, None),
    "llama3-405b-16384": ("llama3_405b_16384xh100.yaml", 2048, None),
    "llama3-405b-131072": ("llama3_405b_16384xh100.yaml", 16384, None),
    "llama3-405b-16384-slow-gpu": ("llama3_405b_16384xh100.yaml", 2048, 12345),
}
STAGES = ("cluster", "programs", "network", "fold", "engine", "frame")


def measure(case: str) -> dict[str, object]:
    """One case, in this process."""
    from simulator.costs.collectives import collective_traffic
    from simulator.engine.core import Engine
    from simulator.experiment import load_experiment
    from simulator.folding import fold, resolve
    from simulator.programs import build_workload
    from simulator.simulation import resolve as resolve_plan
    from simulator.timeline import Timeline

    name, nodes, slow = CASES[case]
    experiment = load_experiment(EXPERIMENTS / name)
    if nodes is not None:
        grown = nodes / experiment.cluster.nodes
        batch = round(experiment.training.global_batch_size * grown)
        experiment = dataclasses.replace(
            experiment,
            cluster=dataclasses.replace(experiment.cluster, nodes=nodes),
            training=dataclasses.replace(experiment.training, global_batch_size=batch),
        )
    times = [time.process_time()]
    plan, cluster = resolve_plan(experiment)
    begin = time.perf_counter()
    times.append(time.process_time())
    workload = build_workload(plan)
    if slow is not None:
        slowdown = workload.slowdown.copy()
        slowdown[slow] = 1.3
        workload = dataclasses.replace(workload, slowdown=slowdown)
    times.append(time.process_time())
    system = resolve(workload, cluster, collective_traffic)
    times.append(time.process_time())
    quotient = fold(system)
    times.append(time.process_time())
    timeline = Timeline(quotient, Engine(quotient).execute())
    times.append(time.process_time())
    rows = len(timeline.frame())
    times.append(time.process_time())
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return {
        "case": case,
        "accelerators": workload.ranks,
        "classes": timeline.classes,
        "events": timeline.events,
        "rows": rows,
        **{stage: round(s, 3) for stage, s in zip(STAGES, seconds, strict=True)},
        "without_cluster": round(sum(seconds[1:]), 3),
        "wall": round(time.perf_counter() - begin, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "step_time_s": timeline.step_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    results = []
    for case in options.case:
        command = [sys.executable, __file__, "--here", case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        results.append(json.loads(done.stdout))
    if options.json:
        print(json.dumps(results, indent=2))
        return
    columns = ("case", "accelerators", "classes", "events", "rows", *STAGES, "without_cluster",
               "wall", "peak_mb")  # fmt: skip
    table = [columns, *[[str(r[c]) for c in columns] for r in results]]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
