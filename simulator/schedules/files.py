"""Schedules as files: PyTorch's CSV (compute-only or with communication) and JSON.

CSV: one row per rank, one cell per action, no header; an empty cell is an idle slot.
JSON: an object with `actions` (per rank a list of texts; also `rank_actions`), `stage_to_rank`
and optionally `microbatches`, `chain_len`, `name`; or the list of orders alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulator.errors import InputError, InputErrors, nearest, raise_all
from simulator.schedules.actions import Action, Overlap, flatten, parse_action
from simulator.schedules.checking import validate
from simulator.schedules.schedule import Schedule

_JSON_KEYS = (
    "actions", "rank_actions", "stage_to_rank", "microbatches", "n_microbatches", "chain_len",
    "name", "weight_copies", "flush",
)  # fmt: skip


def schedule_from_texts(
    orders: Sequence[Sequence[str | None]],
    *,
    name: str = "own",
    stage_to_rank: Sequence[int] | None = None,
    microbatches: int | None = None,
    chain_len: int | None = None,
    weight_copies: int = 1,
    flush: bool = True,
    check: bool = True,
) -> Schedule:
    """A schedule from the texts of its actions, per rank; None and "" are idle slots.

    Parameters
    ----------
    stage_to_rank:
        The rank of each stage; by default each stage is on the rank whose order names it.
    chain_len:
        Stages of one pass through the model, if independent copies of the pipeline exist.

    Raises
    ------
    InputError
        If a text is no action (all such are reported), or the schedule is invalid
        (see `validate`).
    """
    parsed: list[tuple[Action | Overlap, ...]] = []
    errors: list[InputError] = []
    for rank, texts in enumerate(orders):
        order: list[Action | Overlap] = []
        for index, text in enumerate(texts):
            if text is None or not str(text).strip():
                continue
            try:
                order.append(parse_action(str(text), place=f"rank {rank}, action {index}"))
            except InputError as error:
                errors.append(error)
        parsed.append(tuple(order))
    raise_all(errors[:20])
    if not any(parsed):
        raise InputError("the schedule has no action")
    holders: dict[int, int] = {}
    largest = -1
    for rank, actions in enumerate(parsed):
        for action in flatten(actions):
            if stage_to_rank is None and holders.setdefault(action.stage, rank) != rank:
                raise InputError(
                    f"stage {action.stage} has actions on rank {holders[action.stage]} and on "
                    f"rank {rank} ({action})"
                )
            if action.microbatch is not None:
                largest = max(largest, action.microbatch)
    if stage_to_rank is None:
        missing = next((stage for stage in range(len(holders)) if stage not in holders), None)
        if missing is not None:
            raise InputError(f"stage {missing} has no action on any rank")
        stage_to_rank = [holders[stage] for stage in range(len(holders))]
    placed = _checked_ranks(stage_to_rank, len(parsed))
    chain = len(placed) if chain_len is None else chain_len
    if isinstance(chain, bool) or not isinstance(chain, int) or chain < 1 or len(placed) % chain:
        raise InputError(
            f"chain_len must divide the number of stages ({len(placed)}), got {chain!r}"
        )
    if microbatches is None:
        microbatches = largest + 1
        firsts = range(0, len(placed), chain)
        served = [
            {a.microbatch for o in parsed for a in flatten(o) if a.kind == "F" and a.stage == s}
            for s in firsts
        ]
        if len(served) > 1 and all(own == served[0] for own in served):
            # Every copy numbers its own micro-batches from 0.
            microbatches *= len(served)
    schedule = Schedule(
        name=name,
        ranks=len(parsed),
        stages=len(placed),
        microbatches=microbatches,
        stage_to_rank=placed,
        actions=tuple(parsed),
        chain_len=chain,
        flush=flush,
        weight_copies=weight_copies,
    )
    if check:
        validate(schedule)
    return schedule


def _by_number(mapping: dict[Any, Any], place: str) -> list[Any]:
    """Values of a mapping whose keys are the numbers 0, 1, ... (JSON writes them as text)."""
    try:
        return [mapping[key] for key in sorted(mapping, key=int)]
    except (TypeError, ValueError):
        raise InputError("expected numbers as keys", place=place) from None


def _checked_ranks(stage_to_rank: Sequence[Any], ranks: int) -> tuple[int, ...]:
    if isinstance(stage_to_rank, dict):
        stage_to_rank = _by_number(stage_to_rank, "stage_to_rank")
    for stage, rank in enumerate(stage_to_rank):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks:
            raise InputError(
                f"expected a rank from 0 to {ranks - 1}, got {rank!r}",
                place=f"stage_to_rank[{stage}]",
            )
    return tuple(stage_to_rank)


def read_schedule(
    path: str | Path, *, stage_to_rank: Sequence[int] | None = None, ranks: int | None = None
) -> Schedule:
    """Read and validate a schedule from a `.csv` or `.json` file.

    Parameters
    ----------
    stage_to_rank:
        The rank of each stage, if the file does not say it; by default each stage is on the rank
        whose order names it.
    ranks:
        If given, the number of ranks that the file must have.

    Raises
    ------
    InputError
        If the file cannot be read, is not of the format, or the schedule is invalid.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the schedule: {reason}", place=str(path)) from error
    try:
        if path.suffix.lower() == ".json":
            schedule = _from_json(text, path.stem, stage_to_rank)
        else:
            schedule = schedule_from_texts(_rows(text), name=path.stem, stage_to_rank=stage_to_rank)
        if ranks is not None and schedule.ranks != ranks:
            raise InputError(f"expected the orders of {ranks} ranks, got {schedule.ranks}")
        return schedule
    except InputErrors as errors:
        raise InputErrors([error.at(str(path)) for error in errors.errors]) from None
    except InputError as error:
        raise error.at(str(path)) from None


def _rows(text: str) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text)) if row]


def _from_json(text: str, name: str, stage_to_rank: Sequence[int] | None) -> Schedule:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at line {error.lineno}") from error
    except (RecursionError, ValueError):
        raise InputError("not JSON: nested too deep, or a number is too long") from None
    if isinstance(data, list):
        data = {"actions": data}
    if not isinstance(data, dict):
        raise InputError("expected an object with `actions`, or a list of orders")
    orders = data.get("actions", data.get("rank_actions"))
    if isinstance(orders, dict):
        orders = _by_number(orders, "actions")
    if not isinstance(orders, list) or not all(
        isinstance(order, list) and all(text is None or isinstance(text, str) for text in order)
        for order in orders
    ):
        guesses = {key: nearest(key, ("actions",)) for key in data if key not in _JSON_KEYS}
        hint = next((f"; did you mean it by {key!r}?" for key in guesses if guesses[key]), "")
        raise InputError(f"expected `actions`, a list of action texts for every rank{hint}")
    microbatches = data.get("microbatches", data.get("n_microbatches"))
    if microbatches is not None and (
        isinstance(microbatches, bool) or not isinstance(microbatches, int)
    ):
        raise InputError(f"expected an integer, got {microbatches!r}", place="microbatches")
    return schedule_from_texts(
        orders,
        name=str(data.get("name", name)),
        stage_to_rank=stage_to_rank if stage_to_rank is not None else data.get("stage_to_rank"),
        microbatches=microbatches,
        chain_len=data.get("chain_len"),
        weight_copies=_copies(data.get("weight_copies", 1)),
        flush=bool(data.get("flush", True)),
    )


def _copies(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"expected a positive whole number, got {value!r}", place="weight_copies")
    return value


def to_csv(schedule: Schedule) -> str:
    """The orders as PyTorch's CSV: one row per rank, lines end with CR LF as csv.writer's do."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(schedule.action_texts())
    return buffer.getvalue()


def write_csv(schedule: Schedule, path: str | Path) -> None:
    """Write `to_csv(schedule)`; PyTorch's `_load_csv` reads it back."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(to_csv(schedule))


def to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as the JSON object that `read_schedule` reads."""
    return {
        "name": schedule.name,
        "microbatches": schedule.microbatches,
        "stage_to_rank": list(schedule.stage_to_rank),
        "chain_len": schedule.chain_len,
        "weight_copies": schedule.weight_copies,
        "flush": schedule.flush,
        "actions": schedule.action_texts(),
    }
