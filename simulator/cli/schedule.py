"""`simulator schedule`: a pipeline schedule under abstract durations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from simulator.errors import InputError, unknown_name
from simulator.schedules import (
    Durations,
    Schedule,
    Timing,
    build,
    describe,
    lower,
    peak_in_flight,
    read_schedule,
    simulate,
    write_csv,
)

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
@click.option(
    "--microbatch-group-size",
    type=int,
    metavar="G",
    help="Megatron's group size of interleaved-1f1b.",
)
@click.option(
    "--stage-to-rank", metavar="0,1,1,0", help="Rank of each stage, for --actions with a CSV."
)
@click.option(
    "--strict", type=click.Choice(["pytorch"]), help="Also reject what this framework rejects."
)
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
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
def command(
    name: str | None,
    actions_file: Path | None,
    stages: int | None,
    microbatches: int | None,
    virtual: int | None,
    durations: str | None,
    sequential_overlap: bool,
    microbatch_group_size: int | None,
    stage_to_rank: str | None,
    strict: str | None,
    print_json: bool,
    csv_file: Path | None,
    lowered: bool,
) -> None:
    """Study a pipeline schedule under abstract durations.

    NAME is a published schedule (`simulator list schedules`) or PyTorch's class name.
    """
    times = parse_durations(durations)
    if (name is None) == (actions_file is None):
        raise InputError("give either the NAME of a schedule or --actions FILE")
    if actions_file is not None:
        ranks = _rank_list(stage_to_rank)
        schedule = read_schedule(actions_file, stage_to_rank=ranks)
    else:
        assert name is not None
        schedule = _named(name, stages, microbatches, virtual, times, strict, microbatch_group_size)
    timing = simulate(schedule, times, sequential_overlap=sequential_overlap)
    if csv_file is not None:
        write_csv(lower(schedule) if lowered else schedule, csv_file)
    if print_json:
        click.echo(json.dumps(as_json(timing)))


def _rank_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"expected ranks such as 0,1,1,0, got {text!r}", place="--stage-to-rank"
        ) from None


def _named(
    name: str,
    stages: int | None,
    microbatches: int | None,
    virtual: int | None,
    durations: Durations,
    strict: str | None,
    group_size: int | None,
) -> Schedule:
    kind = describe(name)
    for option, value in (("--stages", stages), ("--microbatches", microbatches)):
        if value is None:
            raise InputError(f"{kind.name} needs {option}")
    assert stages is not None
    assert microbatches is not None
    options: dict[str, Any] = {"microbatch_group_size": group_size}
    if kind.needs_durations:
        options["durations"] = durations
    return build(name, stages, microbatches, virtual, strict=strict, **options)
