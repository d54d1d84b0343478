"""Schedules that keep two parts of the model on each rank and run both directions at once."""

from __future__ import annotations

from collections import deque

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.registry import RankOrders, opposite, register, wave

Order = list[Action | Overlap]


class _Direction:
    """The passes of one stage of a rank, numbered as they are taken."""

    def __init__(self, stage: int, first_microbatch: int) -> None:
        self.stage = stage
        self.forwards = self.backwards = first_microbatch

    def forward(self) -> Action:
        self.forwards += 1
        return Action(self.stage, "F", self.forwards - 1)

    def backward(self, kind: str) -> Action:
        self.backwards += 1
        return Action(self.stage, kind, self.backwards - 1)


def _dual_order(
    ranks: int, rank: int, microbatches: int, near: _Direction, far: _Direction
) -> Order:
    """The eight phases of DeepSeek's DualPipe and DualPipeV on one rank.

    Parameters
    ----------
    ranks, rank:
        Ranks of one half of the V (all ranks of DualPipeV, half of DualPipe's), and the distance
        of this rank from its open end.
    microbatches:
        Micro-batches of each direction.
    near, far:
        The stage close to the input and the one close to the loss (the other direction's).
    """
    order: Order = []
    pending: deque[Action] = deque()
    inner = ranks - 1 - rank  # hops to the turning point of the V

    def backward(direction: _Direction, split: bool) -> None:
        action = direction.backward("I" if split else "B")
        order.append(action)
        if split:
            pending.append(Action(action.stage, "W", action.microbatch))

    def weight() -> None:
        if pending:
            order.append(pending.popleft())

    def overlap(forward: _Direction, other: _Direction) -> None:
        order.append(Overlap(forward.forward(), other.backward("B")))

    order.extend(near.forward() for _ in range(2 * inner))
    for _ in range(rank + 1):
        order += (near.forward(), far.forward())
    for _ in range(inner):
        backward(far, split=True)
        weight()
        order.append(far.forward())
    for index in range(microbatches - 2 * ranks + rank + 1):
        if index == 0 and inner == 0:
            # At the turning point the first pair is not overlapped: its parts need each other.
            order.append(near.forward())
            backward(far, split=False)
        else:
            overlap(near, far)
        overlap(far, near)
    for _ in range(inner):
        backward(far, split=False)
        overlap(far, near)
    # The second half of what is left is split, so that weight gradients fill the cool-down.
    for index in range(rank + 1):
        half = (rank + 1) // 2
        backward(far, split=index > half or (index == half and rank % 2 == 1))
        backward(near, split=index >= half)
    for _ in range(inner):
        weight()
        backward(near, split=True)
    for _ in range(rank + 1):
        weight()
    return order


@register(
    "dualpipe",
    summary="Both directions at once, each rank's forward overlapped with a backward.",
    reference="DeepSeek-V3, arXiv:2412.19437; github.com/deepseek-ai/DualPipe",
    constraint="p even, m even, m >= 2p",
    splits_backward=True,
    memory="p + 1",
    weight_copies=2,
    placement=opposite,
)
def dualpipe(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """DualPipe: micro-batches [0, m/2) enter at rank 0, [m/2, m) at rank p - 1."""
    del virtual
    if ranks % 2:
        raise InputError(f"dualpipe requires an even number of stages, got {ranks}")
    if microbatches % 2:
        raise InputError(f"dualpipe requires an even number of micro-batches, got {microbatches}")
    if microbatches < 2 * ranks:
        raise InputError(
            f"dualpipe requires at least two micro-batches per stage ({2 * ranks}), "
            f"got {microbatches}"
        )
    half = microbatches // 2
    orders: RankOrders = []
    for rank in range(ranks):
        down = _Direction(rank, 0)
        up = _Direction(2 * ranks - 1 - rank, half)
        near, far = (down, up) if rank < ranks // 2 else (up, down)
        distance = min(rank, ranks - 1 - rank)
        orders.append(_dual_order(ranks // 2, distance, half, near, far))
    return orders


@register(
    "dualpipe-v",
    summary="DualPipe cut in half: a V over the ranks, without the second copy of the weights.",
    reference="github.com/deepseek-ai/DualPipe; PyTorch ScheduleDualPipeV",
    constraint="exactly 2 chunks per rank, m >= 2p",
    chunks="2",
    splits_backward=True,
    pytorch="DualPipeV",
    memory="2 p + 1 chunks",
    placement=wave,
)
def dualpipe_v(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """DualPipeV: stage r on the way down and stage 2p - 1 - r on the way up are on rank r."""
    stages = virtual * ranks
    if microbatches < stages:
        raise InputError(
            f"dualpipe-v requires at least as many micro-batches as stages, but got "
            f"{microbatches} micro-batches and {stages} stages"
        )
    return [
        _dual_order(
            ranks, rank, microbatches, _Direction(rank, 0), _Direction(stages - 1 - rank, 0)
        )
        for rank in range(ranks)
    ]


@register(
    "chimera",
    summary="Two pipelines in opposite directions, each with half of the micro-batches.",
    reference="Li and Hoefler, Chimera, arXiv:2107.06925",
    constraint="p even, m a multiple of p",
    memory="p/2 + 1 + min(r, p - 1 - r)",
    weight_copies=2,
    placement=opposite,
)
def chimera(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """Chimera with direct concatenation of blocks of p micro-batches.

    In slots of F = B = 1, stage s of either direction does the forward of the j-th of its p/2
    micro-batches of a block at s + 2j and the backward at 2p - 1 - s + 2j. The passes of one
    direction fall on the slots that the other leaves free, and a block of 2p slots follows the
    one before without a gap. Micro-batches are numbered by block, the down direction first.
    """
    del virtual
    if ranks % 2:
        raise InputError(f"chimera requires an even number of stages, got {ranks}")
    if microbatches % ranks:
        raise InputError(
            f"chimera requires the number of micro-batches to be a multiple of the number of "
            f"stages ({ranks}), got {microbatches}"
        )
    orders: RankOrders = []
    for rank in range(ranks):
        slots: list[tuple[int, Action]] = []
        for block in range(microbatches // ranks):
            for direction, position in enumerate((rank, ranks - 1 - rank)):
                stage = direction * ranks + position
                for index in range(ranks // 2):
                    k = block * ranks + direction * (ranks // 2) + index
                    at = 2 * ranks * block + 2 * index
                    slots.append((at + position, Action(stage, "F", k)))
                    slots.append((at + 2 * ranks - 1 - position, Action(stage, "B", k)))
        slots.sort(key=lambda slot: slot[0])
        orders.append([action for _, action in slots])
    return orders
