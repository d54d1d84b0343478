"""From compute actions to everything a rank does: parameter gathers, reductions and transfers.

The passes and their order are those of `torch.distributed.pipelining`, so that a lowered schedule
is identical to what PyTorch executes:

1. UNSHARD gathers the parameters of the next three distinct stages, RESHARD drops the others
   (fully sharded data parallelism).
2. REDUCE_GRAD follows the last weight gradient of a stage.
3. SEND follows its producer at once; the RECV is posted on the receiver at that moment, so that
   sends and receives match in order on both sides. Two stages of one rank exchange nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap, parts
from simulator.schedules.checking import inputs_of
from simulator.schedules.schedule import Schedule

Order = list[Action | Overlap]


def lower(schedule: Schedule, *, prefetch: int = 3, defer_receives: bool = False) -> Schedule:
    """`schedule` with UNSHARD, RESHARD, REDUCE_GRAD, SEND and RECV actions.

    Parameters
    ----------
    schedule:
        Compute actions only.
    prefetch:
        Stages whose parameters a rank holds at once (PyTorch's `max_active_stages`).
    defer_receives:
        Post a receive as late as possible (PyTorch's `defer_pp_recv`): before the action that
        consumes it, or before a send to the same, higher rank.

    Raises
    ------
    InputError
        If the schedule has communication actions already, or deadlocks.
    """
    for rank, order in enumerate(schedule.actions):
        for entry in order:
            if not isinstance(entry, Overlap) and entry.kind not in ("F", "I", "W", "B"):
                raise InputError(
                    f"expected compute actions only, but found {entry}", place=f"rank {rank}"
                )
    orders = [
        _with_reductions(_with_gathers(list(order), prefetch), schedule.microbatches)
        for order in schedule.actions
    ]
    sent = _with_transfers(schedule, orders)
    if defer_receives:
        sent = [_deferred(schedule, rank, order) for rank, order in enumerate(sent)]
    return replace(schedule, actions=tuple(tuple(order) for order in sent))


def _with_gathers(order: Order, prefetch: int) -> Order:
    remaining = Counter(action.stage for entry in order for action in parts(entry))
    # PyTorch iterates a set of small integers here; the same type gives the same order.
    active: set[int] = set()
    lowered: Order = []
    for index, entry in enumerate(order):
        upcoming = _upcoming_stages(order, index, prefetch, len(+remaining))
        for stage in [stage for stage in active if stage not in upcoming]:
            active.remove(stage)
            lowered.append(Action(stage, "RESHARD"))
        for stage in [stage for stage in upcoming if stage not in active]:
            active.add(stage)
            lowered.append(Action(stage, "UNSHARD"))
        lowered.append(entry)
        for action in parts(entry):
            remaining[action.stage] -= 1
    lowered.extend(Action(stage, "RESHARD") for stage in active)
    return lowered


def _upcoming_stages(order: Order, start: int, wanted: int, left: int) -> list[int]:
    """The next `wanted` distinct stages from place `start` on; an overlap pair stays together."""
    stages: list[int] = []
    for index in range(start, len(order)):
        for action in parts(order[index]):
            if action.stage not in stages:
                stages.append(action.stage)
        if len(stages) >= min(wanted, left):
            break
    return stages


def _with_reductions(order: Order, microbatches: int) -> Order:
    lowered: Order = []
    finished: Counter[int] = Counter()
    for entry in order:
        lowered.append(entry)
        for action in parts(entry):
            if action.kind in ("W", "B"):
                finished[action.stage] += 1
                if finished[action.stage] == microbatches:
                    lowered.append(Action(action.stage, "REDUCE_GRAD"))
    return lowered


def _transfer(schedule: Schedule, action: Action) -> tuple[Action, Action] | None:
    """The send and the receive that follow an action, if its output leaves the rank."""
    stage, kind, k = action
    if kind == "F" and not schedule.is_last(stage):
        neighbour, letter = stage + 1, "F"
    elif kind in ("I", "B") and not schedule.is_first(stage):
        neighbour, letter = stage - 1, "B"
    else:
        return None
    if schedule.stage_to_rank[neighbour] == schedule.stage_to_rank[stage]:
        return None
    return Action(stage, f"SEND_{letter}", k), Action(neighbour, f"RECV_{letter}", k)


def _with_transfers(schedule: Schedule, orders: list[Order]) -> list[Order]:
    lowered: list[Order] = [[] for _ in orders]
    placed: list[set[Action]] = [set() for _ in orders]
    position = [0] * len(orders)

    def ready(rank: int, action: Action) -> bool:
        for needs in inputs_of(schedule, action):
            need = needs[0]
            if action.kind == "W" or need.stage == action.stage:
                continue  # on this rank, earlier in its order
            letter = "F" if need.kind == "F" else "B"
            received = Action(action.stage, f"RECV_{letter}", action.microbatch)
            if received not in placed[rank] and not any(n in placed[rank] for n in needs):
                return False
        return True

    unfinished = [rank for rank, order in enumerate(orders) if order]
    while unfinished:
        progress = False
        for rank in unfinished:
            entry = orders[rank][position[rank]]
            actions = parts(entry)
            if not all(ready(rank, action) for action in actions):
                continue
            progress = True
            position[rank] += 1
            lowered[rank].append(entry)
            for action in actions:
                placed[rank].add(action)
                transfer = _transfer(schedule, action)
                if transfer is not None:
                    send, receive = transfer
                    receiver = schedule.stage_to_rank[receive.stage]
                    lowered[rank].append(send)
                    lowered[receiver].append(receive)
                    placed[rank].add(send)
                    placed[receiver].add(receive)
        if not progress:
            entry = orders[unfinished[0]][position[unfinished[0]]]
            raise InputError(
                f"deadlock at {entry}: its input never arrives", place=f"rank {unfinished[0]}"
            )
        unfinished = [rank for rank in unfinished if position[rank] < len(orders[rank])]
    return lowered


def _deferred(schedule: Schedule, rank: int, order: Order) -> Order:
    """Receives as late as is safe: between two ranks the lower one receives before it sends."""
    holder = schedule.stage_to_rank
    lowered: Order = []
    held: dict[Action, int] = {}  # receive -> sending rank
    for entry in order:
        if isinstance(entry, Action) and entry.kind in ("RECV_F", "RECV_B"):
            held[entry] = holder[entry.stage + (-1 if entry.kind == "RECV_F" else 1)]
            continue
        for action in parts(entry):
            stage, kind, k = action
            if kind in ("SEND_F", "SEND_B"):
                peer = holder[stage + (1 if kind == "SEND_F" else -1)]
                if rank < peer:
                    for receive in [r for r, source in held.items() if source == peer]:
                        del held[receive]
                        lowered.append(receive)
            elif kind in ("F", "I", "B"):
                receive = Action(stage, "RECV_F" if kind == "F" else "RECV_B", k)
                if held.pop(receive, None) is not None:
                    lowered.append(receive)
        lowered.append(entry)
    lowered.extend(held)
    return lowered
