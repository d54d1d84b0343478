"""Is an order of actions a valid schedule? If not, which action is at fault."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.errors import InputError
from simulator.schedules.actions import COMPUTE_KINDS, Action, Overlap, flatten, parts
from simulator.schedules.schedule import Schedule

#: Where a compute action is: its rank, its place in the rank's order.
_Places = dict[tuple[int, str, int], tuple[int, int]]


def validate(schedule: Schedule) -> None:
    """Reject an order that cannot be executed or does not do the whole step.

    Raises
    ------
    InputError
        Naming the action at fault: an action of a stage on a rank that does not hold it, a
        doubled or missing action, a backward that is both split and unsplit, a micro-batch out of
        range, a W before its I or a backward before its forward on the same rank, a dependency
        cycle between ranks (deadlock), a receive without a send.
    """
    places = _collect(schedule)
    _check_complete(schedule, places)
    stuck = _run(schedule)
    if stuck is not None:
        raise deadlock_error(schedule, stuck)


def _where(rank: int, index: int) -> str:
    return f"rank {rank}, action {index}"


def _collect(schedule: Schedule) -> _Places:
    """The place of every action by (stage, kind, micro-batch); checks each on its own."""
    if len(schedule.actions) != schedule.ranks:
        raise InputError(f"expected orders of {schedule.ranks} ranks, got {len(schedule.actions)}")
    places: _Places = {}
    for rank, order in enumerate(schedule.actions):
        for index, entry in enumerate(order):
            for action in parts(entry):
                stage, kind, k = action
                if not 0 <= stage < schedule.stages:
                    raise InputError(
                        f"{entry}: there is no stage {stage}, the stages are 0 to "
                        f"{schedule.stages - 1}",
                        place=_where(rank, index),
                    )
                if schedule.stage_to_rank[stage] != rank:
                    raise InputError(
                        f"{entry}: stage {stage} is on rank {schedule.stage_to_rank[stage]}, "
                        f"not on rank {rank}",
                        place=_where(rank, index),
                    )
                if k is None:
                    continue
                if not 0 <= k < schedule.microbatches:
                    raise InputError(
                        f"{entry}: there is no micro-batch {k}, the micro-batches are 0 to "
                        f"{schedule.microbatches - 1}",
                        place=_where(rank, index),
                    )
                if (stage, kind, k) in places:
                    raise InputError(
                        f"{entry} is there twice, first at {_where(*places[stage, kind, k])}",
                        place=_where(rank, index),
                    )
                places[stage, kind, k] = (rank, index)
    return places


def _check_complete(schedule: Schedule, places: _Places) -> None:
    """Every stage of a chain does the same micro-batches, forward and (all or none) backward."""
    backward = any(kind in ("B", "I", "W") for _, kind, _ in places)
    seen: dict[int, int] = {}
    for first in range(0, schedule.stages, schedule.chain_len):
        chain = range(first, first + schedule.chain_len)
        served = sorted({k for stage, kind, k in places if kind == "F" and stage in chain})
        for k in served:
            seen[k] = seen.get(k, 0) + 1
        for stage in chain:
            for k in served:
                _check_one(schedule, places, stage, k, backward)
        known = frozenset(served)
        stray = [key for key in places if key[0] in chain and key[2] not in known]
        for stage, kind, k in sorted(stray):
            if kind in COMPUTE_KINDS:
                raise InputError(
                    f"{Action(stage, kind, k)} has no forward: {Action(stage, 'F', k)} is missing",
                    place=_where(*places[stage, kind, k]),
                )
    # Copies of the pipeline may number their micro-batches apart or together.
    own = schedule.replicas > 1 and all(
        {k for s, kind, k in places if kind == "F" and s == first}
        == set(range(schedule.microbatches // schedule.replicas))
        for first in range(0, schedule.stages, schedule.chain_len)
    )
    for k in range(schedule.microbatches):
        if k not in seen and not own:
            stage = 0
            rank = schedule.stage_to_rank[stage]
            raise InputError(f"{Action(stage, 'F', k)} is missing", place=f"rank {rank}")


def _check_one(schedule: Schedule, places: _Places, stage: int, k: int, backward: bool) -> None:
    rank = f"rank {schedule.stage_to_rank[stage]}"
    forward = places.get((stage, "F", k))
    if forward is None:
        raise InputError(f"{Action(stage, 'F', k)} is missing", place=rank)
    full = places.get((stage, "B", k))
    inputs = places.get((stage, "I", k))
    weights = places.get((stage, "W", k))
    if full is not None and (inputs is not None or weights is not None):
        other = "I" if inputs is not None else "W"
        raise InputError(
            f"{Action(stage, 'B', k)} and {Action(stage, other, k)}: a backward is either whole "
            "(B) or split (I and W)",
            place=_where(*full),
        )
    if full is None and inputs is None:
        if weights is not None:
            raise InputError(
                f"{Action(stage, 'I', k)} is missing before {Action(stage, 'W', k)}", place=rank
            )
        if backward:
            raise InputError(
                f"{Action(stage, 'B', k)} is missing (or {Action(stage, 'I', k)} and "
                f"{Action(stage, 'W', k)})",
                place=rank,
            )
        return
    if inputs is not None and weights is None:
        raise InputError(f"{Action(stage, 'W', k)} is missing", place=rank)
    first = full if full is not None else inputs
    assert first is not None
    kind = "B" if full is not None else "I"
    if first[1] <= forward[1]:
        raise InputError(
            f"{Action(stage, kind, k)} comes before {Action(stage, 'F', k)}, on which it depends",
            place=_where(*first),
        )
    if weights is not None and weights[1] <= first[1]:
        raise InputError(
            f"{Action(stage, 'W', k)} comes before {Action(stage, 'I', k)}, on which it depends",
            place=_where(*weights),
        )


def inputs_of(schedule: Schedule, action: Action) -> list[tuple[Action, ...]]:
    """What must be done before `action`; each entry lists equivalent alternatives."""
    stage, kind, k = action
    needs: list[tuple[Action, ...]] = []
    if kind == "F" and not schedule.is_first(stage):
        needs.append((Action(stage - 1, "F", k),))
    if kind in ("I", "B"):
        needs.append((Action(stage, "F", k),))
        if not schedule.is_last(stage):
            needs.append((Action(stage + 1, "B", k), Action(stage + 1, "I", k)))
    if kind == "W":
        needs.append((Action(stage, "I", k), Action(stage, "B", k)))
    if kind == "SEND_F":
        needs.append((Action(stage, "F", k),))
    if kind == "SEND_B":
        needs.append((Action(stage, "B", k), Action(stage, "I", k)))
    if kind == "RECV_F":
        needs.append((Action(stage - 1, "SEND_F", k),))
    if kind == "RECV_B":
        needs.append((Action(stage + 1, "SEND_B", k),))
    return needs


def _blocked_on(
    schedule: Schedule, entry: Action | Overlap, done: set[Action], received: bool
) -> tuple[Action, ...] | None:
    """The first unmet need of an entry, or None if it can run."""
    for action in parts(entry):
        for alternatives in inputs_of(schedule, action):
            if not any(need in done for need in alternatives):
                return alternatives
        if received:
            need = _receive_of(schedule, action)
            if need is not None and need not in done:
                return (need,)
    return None


def _receive_of(schedule: Schedule, action: Action) -> Action | None:
    """The receive that must precede a compute action in a schedule with communication."""
    stage, kind, k = action
    holder = schedule.stage_to_rank
    if kind == "F" and not schedule.is_first(stage) and holder[stage - 1] != holder[stage]:
        return Action(stage, "RECV_F", k)
    if kind in ("I", "B") and not schedule.is_last(stage) and holder[stage + 1] != holder[stage]:
        return Action(stage, "RECV_B", k)
    return None


def has_transfers(schedule: Schedule) -> bool:
    """Whether sends and receives are written out."""
    return any(
        action.kind in ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
        for order in schedule.actions
        for action in flatten(order)
    )


def _run(schedule: Schedule) -> list[int] | None:
    """Execute the orders without a clock: None if all ranks finish, else where each is stuck."""
    received = has_transfers(schedule)
    done: set[Action] = set()
    position = [0] * schedule.ranks
    waiting: dict[Action, list[int]] = {}
    runnable = list(range(schedule.ranks - 1, -1, -1))
    while runnable:
        rank = runnable.pop()
        order = schedule.actions[rank]
        while position[rank] < len(order):
            entry = order[position[rank]]
            blocked = _blocked_on(schedule, entry, done, received)
            if blocked is not None:
                for need in blocked:
                    waiting.setdefault(need, []).append(rank)
                break
            position[rank] += 1
            for action in parts(entry):
                done.add(action)
                for woken in waiting.pop(action, ()):
                    if woken != rank and woken not in runnable:
                        runnable.append(woken)
    if all(position[rank] == len(order) for rank, order in enumerate(schedule.actions)):
        return None
    return position


def deadlock_error(schedule: Schedule, position: Sequence[int]) -> InputError:
    """The error for ranks that are stuck at `position`: what waits for what.

    A need that no rank has in its order is a missing action; otherwise the ranks wait in a circle,
    which is printed.
    """
    received = has_transfers(schedule)
    done = {
        action
        for rank, order in enumerate(schedule.actions)
        for action in flatten(order[: position[rank]])
    }
    where = {
        action: rank for rank, order in enumerate(schedule.actions) for action in flatten(order)
    }
    stuck = [rank for rank, order in enumerate(schedule.actions) if position[rank] < len(order)]
    path: list[int] = []
    chain: list[str] = []
    rank = stuck[0]
    while rank not in path:
        path.append(rank)
        entry = schedule.actions[rank][position[rank]]
        needs = _blocked_on(schedule, entry, done, received)
        assert needs is not None, "a stuck rank waits for something"
        present = [need for need in needs if need in where]
        if not present:
            names = " or ".join(str(need) for need in needs)
            return InputError(
                f"{entry} waits for {names}, which is missing", place=_where(rank, position[rank])
            )
        chain.append(f"{entry} (rank {rank}) waits for {present[0]} (rank {where[present[0]]})")
        rank = where[present[0]]
    start = path.index(rank)
    entry = schedule.actions[rank][position[rank]]
    circle = "; ".join(chain[start:])
    return InputError(
        f"deadlock at {entry}: {circle}, which is behind it in the order",
        place=_where(rank, position[rank]),
    )
