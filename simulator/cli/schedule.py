"""`simulator schedule`: a pipeline schedule under abstract durations."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from simulator.errors import InputError, unknown_name
from simulator.schedules import (
    ActivationMemory,
    Durations,
    IdleTime,
    Schedule,
    Synthesis,
    Timing,
    attribute,
    build,
    describe,
    lower,
    memory_curves,
    names,
    peak_in_flight,
    read_schedule,
    simulate,
    steady_bubble_fraction,
    synthesise,
    write_csv,
)
from simulator.schedules.bubbles import CAUSES
from simulator.schedules.registry import check_options
from simulator.schedules.synthesis import OBJECTIVES

_KEYS = ("F", "B", "I", "W", "comm", "overlap")


def parse_durations(text: str | None) -> Durations:
    """`F=1,B=2,I=1,W=1,comm=0`; `F=1:1:2` gives one duration per stage.

    Keys that are missing are F = 1, I = W = 1 and B = I + W; with B alone, I = W = B / 2.

    Raises
    ------
    InputError
        For an unknown key, a missing value or a value that is no number.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        known = {name.casefold(): name for name in _KEYS}
        if key.casefold() not in known:
            raise unknown_name("duration", key, _KEYS, place="--durations")
        if not equals:
            raise InputError(f"expected {key}=<number>, got {item!r}", place="--durations")
        if known[key.casefold()] in values:
            raise InputError(f"{key} is given twice", place="--durations")
        numbers = [_number(part, key) for part in value.split(":")]
        values[known[key.casefold()]] = numbers[0] if len(numbers) == 1 else tuple(numbers)
    if "B" in values and "I" not in values and "W" not in values:
        whole = values["B"]
        half = tuple(b / 2 for b in whole) if isinstance(whole, tuple) else whole / 2
        values["I"] = values["W"] = half
    try:
        return Durations(**values)
    except InputError as error:
        raise error.at("--durations") from None


def _number(text: str, key: str) -> int | float:
    try:
        return int(text) if re.fullmatch(r"\+?\d+", text.strip()) else float(text)
    except ValueError:
        raise InputError(f"{key}: expected a number, got {text!r}", place="--durations") from None


def as_json(timing: Timing) -> dict[str, Any]:
    """The result as the command's JSON object; times are in the unit of the durations."""
    schedule = timing.schedule
    return {
        "schedule": schedule.name,
        "stages": schedule.ranks,
        "microbatches": schedule.microbatches,
        "virtual": schedule.virtual // schedule.replicas,
        "stage_to_rank": list(schedule.stage_to_rank),
        "chain_len": schedule.chain_len,
        "weight_copies": schedule.weight_copies,
        "makespan": timing.makespan,
        "ideal": timing.ideal,
        "bubble_fraction": timing.bubble_fraction,
        "window_bubble_fraction": timing.window_bubble_fraction,
        "windows": list(timing.windows),
        "peak_in_flight": peak_in_flight(schedule, "W"),
        "peak_in_flight_i_release": peak_in_flight(schedule, "I"),
        "actions": schedule.action_texts(),
        "start": list(timing.start),
        "end": list(timing.end),
    }


def _of_schedules(option: str, type: Any, metavar: str | None = None) -> Any:
    """An option that some schedules take; its help stands with them."""
    key = option.removeprefix("--").replace("-", "_")
    helps = {name: describe(name).options[key] for name in names() if key in describe(name).options}
    texts = {text.partition(" Default:")[0] for text in helps.values()}
    return click.option(
        option, type=type, metavar=metavar, help=f"{', '.join(helps)}: {' '.join(texts)}"
    )


def _share(option: str, help: str, default: float | None = 0.0) -> Any:
    """An option whose value is a share from 0 to 1."""
    return click.option(
        option, type=click.FloatRange(0, 1), default=default, metavar="SHARE", help=help
    )


@click.command("schedule", short_help="Study a pipeline schedule under abstract durations.")
@click.argument("name", required=False)
@click.option(
    "--actions",
    "actions_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A schedule of one's own (.json or PyTorch's .csv) in place of NAME.",
)
@click.option("--stages", type=int, metavar="P", help="Pipeline ranks.")
@click.option("--microbatches", type=int, metavar="M", help="Micro-batches of one step.")
@click.option("--virtual", type=int, metavar="V", help="Chunks (model parts) per rank.")
@click.option(
    "--durations",
    metavar="F=1,B=2,I=1,W=1,comm=0",
    help="Durations of one chunk's actions; F=1:1:2 gives one per stage. B is the unsplit "
    "backward, I and W its halves, comm the delay between two ranks.",
)
@click.option(
    "--sequential-overlap",
    is_flag=True,
    help="Run an OVERLAP_F_B pair as two actions, not as one block.",
)
@_of_schedules("--forwards-ahead", int, "N")
@_of_schedules("--microbatch-group-size", int, "G")
@click.option(
    "--stage-to-rank",
    metavar="0,1,1,0",
    help="Rank of each stage, for --actions with a CSV.",
)
@click.option(
    "--strict", type=click.Choice(["pytorch"]), help="Also reject what this framework rejects."
)
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--details",
    is_flag=True,
    help="With --json: also the idle time by cause and the memory peak of every rank.",
)
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the orders as PyTorch's CSV.",
)
@click.option(
    "--lowered",
    is_flag=True,
    help="With --csv: with PyTorch's communication actions (compute_comms).",
)
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw it: .html (interactive), .png, .svg or .pdf. May be repeated.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="NAME[:V]",
    help="Also time and draw this schedule, with V chunks per rank and as much work per rank. "
    "May be repeated.",
)
@click.option("--arrows", is_flag=True, help="With --plot: draw the transfers.")
@_share(
    "--recompute",
    "Share of the forward that is repeated in the backward: 1 is full recomputation.",
)
@_share("--checkpoint", "Share of an activation that is stored where it is recomputed.")
@_share("--offload", "Share of the stored activations that moves to the host and back.")
@click.option(
    "--offload-time",
    type=click.FloatRange(0),
    default=0.0,
    metavar="T",
    help="Time of one such transfer, one way.",
)
@_of_schedules("--memory-limit", float, "N")
@_of_schedules("--kept-for-weights", click.FloatRange(0, 1), "SHARE")
@_of_schedules("--objective", click.Choice(OBJECTIVES))
@_of_schedules("--effort", int, "N")
def command(
    name: str | None,
    actions_file: Path | None,
    stages: int | None,
    microbatches: int | None,
    virtual: int | None,
    durations: str | None,
    sequential_overlap: bool,
    forwards_ahead: int | None,
    microbatch_group_size: int | None,
    stage_to_rank: str | None,
    strict: str | None,
    print_json: bool,
    details: bool,
    csv_file: Path | None,
    lowered: bool,
    plots: tuple[Path, ...],
    compare: tuple[str, ...],
    arrows: bool,
    recompute: float,
    checkpoint: float,
    offload: float,
    offload_time: float,
    memory_limit: float | None,
    kept_for_weights: float | None,
    objective: str | None,
    effort: int | None,
) -> None:
    """Study a pipeline schedule under abstract durations.

    NAME is a published schedule, `auto` (synthesised), or PyTorch's class name; `simulator list
    schedules` has them with their options, which an experiment gives in parallel.schedule_options.

    \b
    simulator schedule 1f1b --stages 4 --microbatches 8
    simulator schedule zb-v --stages 8 --microbatches 32 --plot zbv.html
    simulator schedule auto --stages 8 --microbatches 32 --memory-limit 12
    simulator schedule --actions mine.csv --durations F=1,B=2,comm=0.1 --json
    """
    memory = ActivationMemory(
        kept_for_weights=1.0 if kept_for_weights is None else kept_for_weights,
        recompute=recompute,
        checkpoint=checkpoint,
        offload=offload,
        offload_time=offload_time,
    )
    times = memory.durations(parse_durations(durations))
    if (name is None) == (actions_file is None):
        raise InputError("give either the NAME of a schedule or --actions FILE")
    options: dict[str, Any] = {
        "forwards_ahead": forwards_ahead,
        "microbatch_group_size": microbatch_group_size,
        "memory_limit": memory_limit,
        "kept_for_weights": kept_for_weights,
        "objective": objective,
        "effort": effort,
    }
    found: Synthesis | None = None
    if actions_file is not None:
        given = [key for key, value in options.items() if value is not None]
        if given:
            option = given[0].replace("_", "-")
            raise InputError(f"--{option} is for a schedule's NAME, not for --actions")
        schedule = read_schedule(actions_file, stage_to_rank=_rank_list(stage_to_rank))
    else:
        assert name is not None
        schedule, found = _named(name, stages, microbatches, virtual, times, strict, options)
    timing = simulate(schedule, times, sequential_overlap=sequential_overlap)
    steady: float | None = None
    if not schedule.flush and name is not None and microbatches is not None:
        # Without a flush, what counts is what one more step takes.
        longer, _ = _named(name, stages, 2 * microbatches, virtual, times, strict, options)
        steady = steady_bubble_fraction(timing, simulate(longer, times))
    if csv_file is not None:
        _write(csv_file, lower(schedule) if lowered else schedule)
    others = [_compared(text, schedule, times, sequential_overlap) for text in compare]
    timings = [timing, *(other for _, other in others)]
    titles = [schedule.name, *(title for title, _ in others)]
    if plots:
        from simulator.reports.pipeline_plot import write_plot

        drawn = memory if memory != ActivationMemory() else None
        for path in plots:
            write_plot(timings, path, titles=titles, memory=drawn, arrows=arrows)
    if print_json:
        result = as_json(timing)
        if details:
            result["idle"] = [_idle_json(idle) for idle in attribute(timing)]
            result["memory"] = [
                {"peak": curve.peak, "at": curve.peak_time, "host_busy": curve.host_busy}
                for curve in memory_curves(timing, memory)
            ]
        if steady is not None:
            result["steady_bubble_fraction"] = steady
        if found is not None:
            result["synthesis"] = _synthesis_json(found)
        if others:
            result["compared"] = [as_json(other) for _, other in others]
        click.echo(json.dumps(result))
    else:
        _print_tables(titles, timings, memory, found)
        if steady is not None:
            click.echo(f"{schedule.name} has no flush; bubble of one more step: {steady:.2%}")


def _rank_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"expected ranks such as 0,1,1,0, got {text!r}", place="--stage-to-rank"
        ) from None


def _write(path: Path, schedule: Schedule) -> None:
    try:
        write_csv(schedule, path)
    except OSError as error:
        raise InputError(f"cannot write the orders: {error.strerror}", place=str(path)) from error


def _named(
    name: str,
    stages: int | None,
    microbatches: int | None,
    virtual: int | None,
    durations: Durations,
    strict: str | None,
    options: dict[str, Any],
) -> tuple[Schedule, Synthesis | None]:
    kind = describe(name)
    for option, value in (("--stages", stages), ("--microbatches", microbatches)):
        if value is None:
            raise InputError(f"{kind.name} needs {option}")
    assert stages is not None
    assert microbatches is not None
    if kind.name == "auto":
        chosen = {key: value for key, value in options.items() if value is not None}
        check_options(kind, chosen)
        found = synthesise(stages, microbatches, durations, virtual=virtual or 1, **chosen)
        return found.schedule, found
    if kind.needs_durations:
        options = {**options, "durations": durations}
    return build(name, stages, microbatches, virtual, strict=strict, **options), None


def _idle_json(idle: IdleTime) -> dict[str, Any]:
    causes = {cause: getattr(idle, cause) for cause in CAUSES}
    blamed = {str(stage): time for stage, time in idle.imbalance_by_stage}
    return {"rank": idle.rank, **causes, "imbalance_by_stage": blamed}


def _synthesis_json(found: Synthesis) -> dict[str, Any]:
    return {
        "objective": found.objective,
        "value": found.value,
        "lower_bound": found.lower_bound,
        "lower_bound_makespan": found.bound.makespan,
        "lower_bound_window": found.bound.window,
        "gap": found.gap,
        "source": found.source,
        "named": found.named,
        "peak_memory": list(found.peak_memory),
    }


def _compared(
    text: str, schedule: Schedule, durations: Durations, sequential_overlap: bool
) -> tuple[str, Timing]:
    """A schedule of the same ranks and micro-batches, with as much work per rank."""
    name, _, chunks = text.partition(":")
    if chunks and not chunks.isdigit():
        raise InputError(f"expected NAME or NAME:V, got {text!r}", place="--compare")
    kind = describe(name)
    virtual = int(chunks) if chunks else kind.default_virtual
    options: dict[str, Any] = {}
    own = schedule.virtual // schedule.replicas
    if virtual != own:
        uniform = ("F", "B", "I", "W")
        if any(isinstance(getattr(durations, key), tuple) for key in uniform):
            raise InputError(
                "another number of chunks needs uniform durations", place=f"--compare {text}"
            )
        changed = {
            key: getattr(durations, key) * own / virtual
            for key in uniform
            if getattr(durations, key) is not None
        }
        durations = replace(durations, **changed)
    if kind.needs_durations:
        options["durations"] = durations
    built = build(name, schedule.ranks, schedule.microbatches, virtual, **options)
    title = built.name if virtual == 1 else f"{built.name} ({virtual} chunks)"
    return title, simulate(built, durations, sequential_overlap=sequential_overlap)


def _print_tables(
    titles: list[str], timings: list[Timing], memory: ActivationMemory, found: Synthesis | None
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    columns = ("makespan", "ideal", "bubble", "window bubble", "in flight", "weights")
    summary = _table(columns, first="schedule", wrap=True)
    for title, timing in zip(titles, timings, strict=True):
        summary.add_row(
            title,
            f"{float(timing.makespan):g}",
            f"{float(timing.ideal):g}",
            f"{timing.bubble_fraction:.2%}",
            f"{timing.window_bubble_fraction:.2%}",
            str(max(peak_in_flight(timing.schedule))),
            f"{timing.schedule.weight_copies}x",
        )
    console.print(summary)
    if found is not None:
        console.print(
            f"{found.objective} {float(found.value):g}, lower bound {float(found.lower_bound):g} "
            f"({found.bound_term}): at most {max(0.0, found.gap):.2%} above the optimum; "
            f"found from {found.source}"
        )
    for title, timing in zip(titles, timings, strict=True):
        console.print(_rank_table(title, timing, memory))


def _table(
    columns: Sequence[str], *, first: str = "", title: str | None = None, wrap: bool = False
) -> Any:
    """An empty table without frames: `first` to the left, the numbers of `columns` to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        collapse_padding=True,
    )
    if first:
        table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not wrap)
    return table


def _rank_table(title: str, timing: Timing, memory: ActivationMemory) -> Any:
    columns = (
        "rank", "busy", "warm-up", "cool-down", "imbalance", "comm", "order", "sync", "peak", "at",
    )  # fmt: skip
    table = _table(columns, title=f"{title}: idle time by cause, and the peak of activation memory")
    curves = memory_curves(timing, memory)
    blamed: dict[int, float] = {}
    for idle, curve in zip(attribute(timing), curves, strict=True):
        for stage, blame in idle.imbalance_by_stage:
            blamed[stage] = blamed.get(stage, 0.0) + float(blame)
        table.add_row(
            str(idle.rank),
            f"{float(timing.busy[idle.rank]):g}",
            f"{float(idle.warm_up):.4g}",
            f"{float(idle.cool_down):.4g}",
            f"{float(idle.imbalance):.4g}",
            f"{float(idle.communication):.4g}",
            f"{float(idle.dependency):.4g}",
            f"{float(idle.synchronisation):.4g}",
            f"{curve.peak:.4g}",
            f"{curve.peak_time:.4g}",
        )
    if blamed:
        shares = ", ".join(f"stage {stage} {blamed[stage]:.4g}" for stage in sorted(blamed))
        table.caption = f"imbalance over all ranks by the slow stage: {shares}"
        table.caption_justify = "left"
    return table
