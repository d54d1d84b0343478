"""Zero-bubble schedules: the backward pass split into input (I) and weight (W) gradients."""

from __future__ import annotations

from simulator.schedules.actions import Action, Overlap
from simulator.schedules.registry import RankOrders, check_rounds, register, wave
from simulator.schedules.synchronous import interleaved_table

Order = list[Action | Overlap]

_PAPER = "Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241"


def _forward_input_weight(
    forwards: list[Action], backwards: list[Action], warmup: int, deferred: int
) -> Order:
    """`warmup` forwards, then F and I in turn with W once more than `deferred` I are done."""
    warmup = min(warmup, len(forwards))
    weights = [Action(stage, "W", k) for stage, _, k in backwards]
    order: Order = list(forwards[:warmup])
    done = 0
    for index, backward in enumerate(backwards):
        if warmup + index < len(forwards):
            order.append(forwards[warmup + index])
        order.append(backward)
        if index >= deferred:
            order.append(weights[done])
            done += 1
    order.extend(weights[done:])
    return order


@register(
    "interleaved-zb",
    summary="Interleaved 1F1B with split backward; W fills the cool-down (ZB-1P).",
    reference=_PAPER + "; PyTorch ScheduleInterleavedZeroBubble",
    constraint="m a multiple of max(1, m // p)",
    chunks="any",
    splits_backward=True,
    pytorch="InterleavedZeroBubble",
    memory="min(m v, (v - 1) g + p)",
)
def interleaved_zb(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """PyTorch's ScheduleInterleavedZeroBubble: one forward less in flight per hop than 1F1B."""
    group = check_rounds("interleaved-zb", ranks, microbatches)
    table = interleaved_table(microbatches, virtual, group)
    return [
        _forward_input_weight(
            [Action(chunk * ranks + rank, "F", k) for chunk, k in table],
            [Action((virtual - 1 - chunk) * ranks + rank, "I", k) for chunk, k in table],
            warmup=(virtual - 1) * group + ranks - 1 - rank,
            deferred=rank,
        )
        for rank in range(ranks)
    ]


@register(
    "zb-h1",
    summary="1F1B's memory with a third of its bubble: W fills the cool-down.",
    reference=_PAPER + ", section 2.1",
    splits_backward=True,
    pytorch="InterleavedZeroBubble",
    memory="min(m, p)",
    aliases=("zb1p-handcrafted",),
)
def zb_h1(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """ZB-H1: rank r defers r weight gradients, so that it holds no more than 1F1B's first rank."""
    del virtual
    return [
        _forward_input_weight(
            [Action(rank, "F", k) for k in range(microbatches)],
            [Action(rank, "I", k) for k in range(microbatches)],
            warmup=ranks - 1 - rank,
            deferred=rank,
        )
        for rank in range(ranks)
    ]


@register(
    "zb-h2",
    summary="No bubble between steps for F = I = W, at twice 1F1B's memory.",
    reference=_PAPER + ", section 2.2",
    splits_backward=True,
    memory="min(m, 2 p - 1)",
)
def zb_h2(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """ZB-H2: warm-up of 2(p - r) - 1 forwards, and rank r defers 2r weight gradients.

    The optimizer step must not synchronise the ranks (the paper's post-validation) for the
    parallelogram of one step to fit to the next.
    """
    del virtual
    return [
        _forward_input_weight(
            [Action(rank, "F", k) for k in range(microbatches)],
            [Action(rank, "I", k) for k in range(microbatches)],
            warmup=2 * (ranks - 1 - rank),
            deferred=2 * rank,
        )
        for rank in range(ranks)
    ]


def _index(action: Action | Overlap) -> int:
    assert isinstance(action, Action)
    assert action.microbatch is not None
    return action.microbatch


class _Chunk:
    """One stage of a rank during construction: counts its passes and numbers micro-batches."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.next = {"F": 0, "I": 0, "W": 0}

    def take(self, kind: str) -> Action:
        k = self.next[kind]
        self.next[kind] = k + 1
        return Action(self.stage, kind, k)


@register(
    "zb-v",
    summary="Two chunks in a V: zero bubble for F = I = W at 1F1B's memory.",
    reference="Qi et al., arXiv:2401.10241, section 6; PyTorch ScheduleZBVZeroBubble",
    constraint="exactly 2 chunks per rank (m < 2p - 1 works, but is not zero bubble)",
    chunks="2",
    splits_backward=True,
    pytorch="ZBVZeroBubble",
    memory="2 p chunks",
    placement=wave,
    aliases=("zbv",),
)
def zb_v(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """The handcrafted ZB-V order; for m < 2p - 1 it is that of 2p - 1 without the surplus."""
    count = max(2 * ranks - 1, microbatches)
    orders: RankOrders = []
    for rank in range(ranks):
        down, up = _Chunk(rank), _Chunk(virtual * ranks - 1 - rank)
        order: Order = [down.take("F") for _ in range(2 * (ranks - rank) - 1)]
        for _ in range(rank):
            order += (up.take("F"), down.take("F"))
        for _ in range(ranks - rank):
            order += (up.take("F"), up.take("I"), up.take("W"))
        while up.next["F"] < down.next["F"] or down.next["F"] < count:
            if down.next["F"] < count:
                order.append(down.take("F"))
            order += (down.take("I"), down.take("W"))
            order += (up.take("F"), up.take("I"), up.take("W"))
        for _ in range(rank):
            order += (down.take("I"), up.take("I"))
        for _ in range(ranks - rank):
            order += (down.take("I"), down.take("W"))
        for chunk in (up, down):
            order.extend(chunk.take("W") for _ in range(chunk.next["I"] - chunk.next["W"]))
        orders.append(
            [a for a in order if isinstance(a, Action) and (a.microbatch or 0) < microbatches]
        )
    return orders
