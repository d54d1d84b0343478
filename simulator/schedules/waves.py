"""Wave-shaped pipelines: the model goes down the ranks and up again, several times."""

from __future__ import annotations

import heapq

from simulator.schedules.actions import Action, Overlap
from simulator.schedules.registry import RankOrders, register, wave

Order = list[Action | Overlap]


@register(
    "hanayo",
    summary="W waves of 2W chunks per rank; Chimera's bubble without a second copy.",
    reference="Liu et al., Hanayo, SC '23, arXiv:2308.15762",
    constraint="an even number of chunks per rank (2 per wave)",
    chunks="even",
    memory="about p v chunks",
    placement=wave,
)
def hanayo(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """Hanayo's wave pipeline with W = v / 2 waves.

    A block of p micro-batches is placed by a list scheduler: an action runs as soon as its
    inputs are there, a backward before a forward, the earlier micro-batch first, in units of F = 1
    and B = 2 without transfers. Blocks follow each other at the distance of their work per rank,
    so that the head of one fills the gaps in the tail of the one before (Chimera's "direct
    concatenation"). The paper's scheduler is described in words only; treat the order as a reading
    of it.
    """
    slots: list[list[tuple[int, int, Action]]] = [[] for _ in range(ranks)]
    for block, first in enumerate(range(0, microbatches, ranks)):
        size = min(ranks, microbatches - first)
        begin = block * 3 * ranks * virtual
        for at, rank, action in _block(ranks, size, virtual):
            stage, kind, k = action
            assert k is not None
            slots[rank].append((begin + at, block, Action(stage, kind, first + k)))
    return [[action for _, _, action in sorted(rank_slots)] for rank_slots in slots]


def _block(ranks: int, microbatches: int, virtual: int) -> list[tuple[int, int, Action]]:
    """(start, rank, action) of up to p micro-batches under the list scheduler."""
    stages = ranks * virtual
    holder = wave(ranks, virtual)
    # Per rank a queue of ready actions by (backward first, micro-batch, depth).
    ready: list[list[tuple[bool, int, int, str]]] = [[] for _ in range(ranks)]
    busy = [False] * ranks
    events: list[tuple[int, int, int, int, str]] = []  # (end, rank, micro-batch, stage, kind)
    placed: list[tuple[int, int, Action]] = []

    def offer(kind: str, stage: int, k: int) -> None:
        heapq.heappush(ready[holder[stage]], (kind == "F", k, stage, kind))

    for k in range(microbatches):
        offer("F", 0, k)
    now = 0
    while True:
        for rank in range(ranks):
            if busy[rank] or not ready[rank]:
                continue
            _, k, stage, kind = heapq.heappop(ready[rank])
            placed.append((now, rank, Action(stage, kind, k)))
            busy[rank] = True
            heapq.heappush(events, (now + (1 if kind == "F" else 2), rank, k, stage, kind))
        if not events:
            return placed
        now = events[0][0]
        # All ends at one time are handled before any start, so that ties do not depend on ranks.
        while events and events[0][0] == now:
            _, rank, k, stage, kind = heapq.heappop(events)
            busy[rank] = False
            if kind == "F" and stage + 1 < stages:
                offer("F", stage + 1, k)
            elif kind == "F":
                offer("B", stage, k)
            elif stage:
                offer("B", stage - 1, k)
