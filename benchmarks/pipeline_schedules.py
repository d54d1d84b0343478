"""Speed of the schedule laboratory, and how good synthesis is.

    python benchmarks/pipeline_schedules.py            # all
    python benchmarks/pipeline_schedules.py --quick    # up to 8 stages

Prints (1) processor time of 64 stages x 3072 micro-batches of 1F1B through the command line,
process start included; (2) time of a synthesis of 16 stages x 64 micro-batches; (3) over a grid of
settings, synthesis against the best named schedule that fits, against the Zero Bubble paper's
automatic scheduler, and its gap to the proved lower bound.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import click
from rich.progress import track

from simulator.schedules import Durations, synthesise
from simulator.schedules.automatic import MemoryModel, automatic_orders
from simulator.schedules.synthesis import _problem, _Search

#: F, I, W and comm; the second is the Zero Bubble paper's 1.5B model (its table 5).
RATIOS = {
    "F=I=W": (1.0, 1.0, 1.0, 0.0),
    "1.5B": (18.522, 18.086, 9.337, 0.601),
    "W large": (10.0, 12.0, 14.0, 0.0),
    "slow links": (10.0, 12.0, 9.0, 1.5),
}
#: Memory limit in units of p activations (1 is 1F1B's memory).
LIMITS = (0.5, 1.0, 1.5, 2.0)


def large_schedule() -> float:
    """Processor seconds of the 64 x 3072 case."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            sys.executable, "-m", "simulator", "schedule", "1f1b", "--stages", "64",
            "--microbatches", "3072", "--json",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def automatic(p: int, m: int, durations: Durations, limit: float, objective: str) -> float | None:
    """What the paper's scheduler alone reaches, or None where it finds nothing."""
    problem = _problem(p, m, durations, limit, 1.0, 1.0, 1)
    orders = automatic_orders(
        p, m, durations, MemoryModel(problem.activation, problem.kept), problem.limits
    )
    if orders is None:
        return None
    search = _Search(problem, durations, objective, 1)
    value = search.evaluate([[(a.kind, a.stage) for a in order] for order in orders])  # type: ignore[union-attr]
    return None if value is None else float(value[0])


@click.command()
@click.option("--quick", is_flag=True, help="Only up to 8 stages.")
def main(quick: bool) -> None:
    """Measure and print."""
    click.echo(f"64 stages x 3072 micro-batches, 1F1B: {large_schedule():.2f} s of processor time")
    begin = time.process_time()
    synthesise(16, 64, Durations(F=18.522, I=18.086, W=9.337, comm=0.601), memory_limit=16)
    click.echo(f"synthesis of 16 x 64: {time.process_time() - begin:.2f} s of processor time")
    settings = [
        (p, p * rounds, ratio, share, objective)
        for p in ((4, 8) if quick else (4, 8, 16, 32))
        for rounds in (1, 2, 4)
        for ratio in RATIOS
        for share in LIMITS
        for objective in ("makespan", "window")
        # The large ones take most of the time: fewer of them.
        if (p <= 8 or objective == "makespan") and (p < 32 or ratio in ("F=I=W", "1.5B"))
    ]
    gaps: dict[float, list[float]] = {share: [] for share in LIMITS}
    worse = better = optimal = fitting = beaten = compared = 0
    gain = 0.0
    for p, m, ratio, share, objective in track(settings, description="grid"):
        f, i, w, c = RATIOS[ratio]
        durations = Durations(F=f, I=i, W=w, comm=c)
        found = synthesise(p, m, durations, memory_limit=share * p, objective=objective)
        gaps[share].append(max(0.0, found.gap))
        optimal += found.gap < 1e-9
        if found.named:
            fitting += 1
            best = min(found.named.values())
            worse += found.value > best
            better += found.value < best * (1 - 1e-9)
        paper = automatic(p, m, durations, share * p, objective)
        if paper is not None:
            compared += 1
            beaten += found.value < paper * (1 - 1e-9)
            gain += 1 - float(found.value) / paper
    every = [gap for group in gaps.values() for gap in group]
    click.echo(f"{len(settings)} settings; a named schedule fits in {fitting} of them:")
    click.echo(f"  worse than the best named: {worse}; better: {better}; equal: the rest")
    click.echo(
        f"  against the paper's automatic scheduler (finds an order in {compared}): better in "
        f"{beaten}, {gain / max(1, compared):.2%} on average"
    )
    click.echo(
        f"  gap to the lower bound: mean {sum(every) / len(every):.2%}, largest {max(every):.2%}; "
        f"proved optimal in {optimal}"
    )
    for share, group in gaps.items():
        click.echo(f"    limit {share:g} p: mean {sum(group) / len(group):.2%}")
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
