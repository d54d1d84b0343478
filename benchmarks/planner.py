"""The planner on a large machine, and against exhaustive search.

    python benchmarks/planner.py             # both
    python benchmarks/planner.py large       # Llama-3 405B on 16,384 H100
    python benchmarks/planner.py exhaustive  # small spaces, dense and MoE

The large search is run at the issue's terms: at least 1,000 plans that fit into memory, two
processes. The exhaustive ones print by how much the planner's best is off the best of all.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from simulator.experiment import Experiment, parse_experiment
from simulator.model.lookup import resolve_model
from simulator.simulation import plan_memory, resolve
from simulator.studies.plan_space import PlanSpace, enumerate_choices
from simulator.studies.planner import _on, plan
from simulator.studies.pool import open_pool
from simulator.studies.sweep import shared_cluster

LARGE = parse_experiment(
    {
        "model": "llama3-405b",
        "cluster": {"topology": "dgx-h100", "nodes": 2048},
        "training": {"global_batch_size": 2048, "sequence_length": 8192},
    }
)
SPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama2-7b on 16 A100": (
        {"model": "llama2-7b", "cluster": {"topology": "dgx-a100", "nodes": 2},
         "training": {"global_batch_size": 16}},
        {"context": [1, 2], "pipeline": [1, 2, 4, 8], "micro_batch_size": [1, 2],
         "virtual_stages": [2, 4], "sharding": ["none", "zero1", "zero2"],
         "recompute": ["none", "full"]},
    ),
    "mixtral-8x7b on 16 H100": (
        {"model": "mixtral-8x7b", "cluster": {"topology": "dgx-h100", "nodes": 2},
         "training": {"global_batch_size": 128, "sequence_length": 4096}},
        {"tensor": [1, 2, 4], "context": [1], "pipeline": [1, 2, 4], "expert": [1, 2, 4, 8],
         "micro_batch_size": [1, 2], "virtual_stages": [2, 4], "sharding": ["zero1", "zero3"],
         "recompute": ["none", "selective", "full"]},
    ),
}  # fmt: skip


def fits(item: tuple[Experiment, Sequence[object]]) -> int:
    """How many of the choices fit into memory."""
    base, choices = item
    cluster = shared_cluster(base)
    count = 0
    for choice in choices:
        resolved, _ = resolve(choice.experiment(base), cluster=cluster)  # type: ignore[attr-defined]
        count += plan_memory(resolved).fits
    return count


def feasible(base: Experiment, accelerators: int, enough: int) -> int:
    """Plans that fit, counted until there are `enough`."""
    on = _on(base, accelerators)
    model = resolve_model(on.model, place="model")
    choices = enumerate_choices(on, model, accelerators, PlanSpace()).choices
    chunks = [(on, choices[i::200]) for i in range(200)]
    total = 0
    with open_pool(fits, jobs=2) as pool:
        for _, count, error in pool.map(chunks):
            if error is not None:
                raise error
            total += count or 0
            if total >= enough:
                break
    return total


def processor_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def large(console: Console) -> None:
    """Llama-3 405B on 16,384 H100."""
    began, used = time.perf_counter(), processor_seconds()
    result = plan(LARGE, 16384, jobs=2)
    seconds, used = time.perf_counter() - began, processor_seconds() - used
    table = Table(
        title=f"Llama-3 405B on 16,384 H100: {seconds:.1f} s on two processes "
        f"({used:.1f} s of processor time)"
    )
    for name in ("plan", "schedule", "step [s]", "MFU"):
        table.add_column(name)
    for ranked in result.best:
        table.add_row(
            ranked.choice.label(),
            ranked.choice.schedule,
            f"{ranked.objective:.4f}",
            f"{ranked.summary['mfu']:.1%}",
        )
    console.print(table)
    console.print(f"{result.valid} valid plans, {result.simulated} simulated")
    for reason, count in result.dropped.items():
        console.print(f"  {count}: {reason}")
    console.print(f"plans that fit: at least {feasible(LARGE, 16384, 1000)}")


def exhaustive(console: Console) -> None:
    """The planner's best against the best of all."""
    table = Table(title="The planner against exhaustive search")
    columns = ("space", "plans that fit", "exhaustive [s]", "planner [s]", "simulated", "best off")
    for name in columns:
        table.add_column(name, justify="right")
    for name, (mapping, space) in SPACES.items():
        base = parse_experiment(mapping)
        began = time.perf_counter()
        every = plan(base, space=space, jobs=2, exhaustive=True)
        middle = time.perf_counter()
        fast = plan(base, space=space, jobs=2)
        end = time.perf_counter()
        table.add_row(
            name,
            str(every.simulated),
            f"{middle - began:.1f}",
            f"{end - middle:.1f}",
            str(fast.simulated),
            f"{fast.best[0].objective / every.best[0].objective - 1:.2%}",
        )
        if fast.best[0].objective > 1.01 * every.best[0].objective:
            raise SystemExit(f"{name}: the planner is more than 1 % off")
    console.print(table)


def main() -> None:
    console = Console()
    which = sys.argv[1:] or ["large", "exhaustive"]
    if "large" in which:
        large(console)
    if "exhaustive" in which:
        exhaustive(console)


if __name__ == "__main__":
    main()
