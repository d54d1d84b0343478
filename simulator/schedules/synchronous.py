"""Schedules with an unsplit backward pass: GPipe, 1F1B and their interleaved forms."""

from __future__ import annotations

from typing import Annotated

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.registry import RankOrders, check_rounds, register

Order = list[Action | Overlap]


@register(
    "gpipe",
    summary="All forward passes, then all backward passes.",
    reference="Huang et al., GPipe, arXiv:1811.06965",
    pytorch="GPipe",
    memory="m",
)
def gpipe(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """All forwards in order, then all backwards in the same order (as PyTorch's ScheduleGPipe)."""
    del virtual
    return [
        [Action(rank, kind, k) for kind in ("F", "B") for k in range(microbatches)]
        for rank in range(ranks)
    ]


def _one_f_one_b(stage: int, microbatches: int, warmup: int) -> Order:
    """`warmup` forwards, then one backward and one forward in turn, then the last backwards."""
    warmup = min(warmup, microbatches)
    order: Order = [Action(stage, "F", k) for k in range(warmup)]
    for k in range(microbatches - warmup):
        order.append(Action(stage, "B", k))
        order.append(Action(stage, "F", warmup + k))
    order.extend(Action(stage, "B", k) for k in range(microbatches - warmup, microbatches))
    return order


@register(
    "1f1b",
    summary="One forward, one backward in turn after a warm-up of p - r forwards.",
    reference="Narayanan et al., PipeDream-Flush, arXiv:2006.09503; DAPPLE, arXiv:2007.01045",
    constraint="none (PyTorch: m >= p)",
    pytorch="1F1B",
    memory="min(m, p - r)",
    aliases=("pipedream-flush", "dapple"),
)
def one_f_one_b(
    ranks: int,
    microbatches: int,
    virtual: int,
    forwards_ahead: Annotated[
        int,
        "Forwards more in the warm-up; with one, every backward follows another micro-batch's "
        "forward, so that their expert exchanges overlap.",
    ] = 0,
) -> RankOrders:
    """1F1B as PyTorch's runtime and Megatron execute it; with m < p every warm-up is cut to m.

    One forward ahead is what Megatron-LM's --overlap-moe-expert-parallel-comm does.
    """
    del virtual
    if forwards_ahead < 0:
        raise InputError(f"1f1b: forwards_ahead must not be negative, got {forwards_ahead}")
    return [
        _one_f_one_b(rank, microbatches, ranks - rank + forwards_ahead) for rank in range(ranks)
    ]


@register(
    "eager-1f1b",
    summary="1F1B with a warm-up of 2(p - r) - 1 forwards, which hides transfers.",
    reference="Fan et al., DAPPLE (policy B), arXiv:2007.01045",
    memory="min(m, 2(p - r) - 1)",
)
def eager_one_f_one_b(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """DAPPLE's policy B: twice the forwards in flight, so that a transfer delays nobody."""
    del virtual
    return [_one_f_one_b(rank, microbatches, 2 * (ranks - rank) - 1) for rank in range(ranks)]


@register(
    "pipedream-2bw",
    summary="1F1B without a flush between steps, on two versions of the weights.",
    reference="Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, arXiv:2006.09503",
    constraint="m >= p",
    memory="min(m, p - r)",
    weight_copies=2,
    flush=False,
    aliases=("2bw",),
)
def pipedream_2bw(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """1F1B's order; the next step's forwards follow at once, so there is no bubble after fill.

    Two weight versions suffice when a step has at least as many micro-batches as the pipeline has
    stages (section 3.1 of the paper).
    """
    if microbatches < ranks:
        raise InputError(
            f"pipedream-2bw needs at least as many micro-batches as stages for two weight "
            f"versions to suffice, got {microbatches} micro-batches and {ranks} stages"
        )
    return one_f_one_b(ranks, microbatches, virtual)


def interleaved_table(microbatches: int, virtual: int, group: int) -> list[tuple[int, int]]:
    """Megatron's schedule table: (chunk, micro-batch) of every forward, in order.

    Groups of `group` micro-batches pass through all chunks, one group after another; the last
    group may be smaller. Backward passes go through the same table with the chunks reversed.
    """
    return [
        (chunk, k)
        for first in range(0, microbatches, group)
        for chunk in range(virtual)
        for k in range(first, min(first + group, microbatches))
    ]


@register(
    "interleaved-1f1b",
    summary="1F1B over v chunks per rank: bubble divided by v, v times the transfers.",
    reference="Narayanan et al., Megatron-LM, arXiv:2104.04473",
    constraint="m mod max(1, m // p) = 0, or a group g in [p, m] with m mod g = 0 or >= p",
    chunks="any",
    pytorch="Interleaved1F1B",
    memory="min(m v, (v - 1) g + 2 (p - 1 - r) + 1)",
    aliases=("interleaved",),
)
def interleaved_one_f_one_b(
    ranks: int,
    microbatches: int,
    virtual: int,
    microbatch_group_size: Annotated[
        int | None,
        "Micro-batches g that go through one chunk in a row, p <= g <= m, with m mod g zero or at "
        "least p; m / max(1, m // p) if not given.",
    ] = None,
) -> RankOrders:
    """Megatron's and PyTorch's interleaved 1F1B.

    The group is Megatron's `--microbatch-group-size-per-virtual-pipeline-stage`; its default is
    PyTorch's, which is p if m is a multiple of p.
    """
    if microbatch_group_size is None:
        group = check_rounds("interleaved-1f1b", ranks, microbatches)
    else:
        group = microbatch_group_size
        if not ranks <= group <= microbatches:
            raise InputError(
                f"interleaved-1f1b: the micro-batch group size must be between the number of "
                f"stages ({ranks}) and of micro-batches ({microbatches}), got {group}"
            )
        if 0 < microbatches % group < ranks:
            raise InputError(
                f"interleaved-1f1b: the last group of {microbatches} % {group} = "
                f"{microbatches % group} micro-batches must be empty or at least as large as the "
                f"number of stages ({ranks})"
            )
    table = interleaved_table(microbatches, virtual, group)
    orders: RankOrders = []
    for rank in range(ranks):
        forwards = [Action(chunk * ranks + rank, "F", k) for chunk, k in table]
        backwards = [Action((virtual - 1 - chunk) * ranks + rank, "B", k) for chunk, k in table]
        warmup = min((virtual - 1) * group + 2 * (ranks - 1 - rank), len(table))
        order: Order = list(forwards[:warmup])
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            order += (forward, backward)
        order.extend(backwards[len(table) - warmup :])
        orders.append(order)
    return orders


@register(
    "looped-bfs",
    summary="GPipe over v chunks per rank: all micro-batches through one chunk, then the next.",
    reference="Lamy-Poirier, Breadth-First Pipeline Parallelism, arXiv:2211.05953",
    chunks="any",
    pytorch="LoopedBFS",
    memory="m v",
)
def looped_bfs(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """Breadth first; the backward takes chunks and micro-batches in descending order."""
    orders: RankOrders = []
    for rank in range(ranks):
        stages = range(rank, ranks * virtual, ranks)
        order: Order = [Action(stage, "F", k) for stage in stages for k in range(microbatches)]
        order += [
            Action(stage, "B", k)
            for stage in reversed(stages)
            for k in reversed(range(microbatches))
        ]
        orders.append(order)
    return orders


@register(
    "forward-only",
    summary="Forward passes alone: inference and evaluation.",
    reference="Megatron-LM forward_only, torch.distributed.pipelining eval",
    chunks="any",
    memory="1",
    aliases=("inference",),
)
def forward_only(ranks: int, microbatches: int, virtual: int) -> RankOrders:
    """Groups of p micro-batches pass through all chunks; nothing is kept for a backward pass."""
    table = interleaved_table(microbatches, virtual, ranks)
    return [[Action(chunk * ranks + rank, "F", k) for chunk, k in table] for rank in range(ranks)]
