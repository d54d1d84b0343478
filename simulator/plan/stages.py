"""Assignment of a model's blocks to pipeline stages.

A *global stage* s of `pipeline * virtual` is chunk s // pipeline of rank s % pipeline (interleaved
1F1B, Narayanan et al., arXiv 2104.04473, section 2.2). The first stage also holds the embedding,
the last the head.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from simulator.errors import InputError
from simulator.model.spec import LayerId

PLACE = "parallel"


def assign_stages(
    layers: int,
    pipeline: int,
    virtual: int = 1,
    *,
    layers_per_stage: Sequence[int] | None = None,
    count_embedding: bool | None = None,
    count_loss: bool | None = None,
    mtp_layers: int = 0,
    weights: Sequence[float] | None = None,
    embedding_weight: float = 0.0,
    loss_weight: float = 0.0,
) -> tuple[tuple[int, ...], ...]:
    """Block indices of every global stage, in order.

    Parameters
    ----------
    layers_per_stage:
        Blocks per global stage, or per rank (each rank's are then spread over its chunks); None:
        spread evenly.
    count_embedding, count_loss:
        Count the embedding and the loss as one layer each (Megatron-LM's
        `--account-for-embedding-in-pipeline-split`, `--account-for-loss-in-pipeline-split`). None:
        only where the blocks alone do not divide and this makes them divide.
    mtp_layers:
        Multi-token prediction on the last stage: each a block and a head. Unless the embedding or
        the loss is counted as asked, the head counts as one layer and each of these as two, and
        what lies before them is shared evenly (Megatron-Bridge's pipeline layouts of DeepSeek-V3).
    weights, embedding_weight, loss_weight:
        Cost of each block, of the embedding and of the head: stages are cut so that the largest
        stage's cost is least.

    Raises
    ------
    InputError
        If there are fewer blocks than stages, or the given numbers do not add up.
    """
    stages = pipeline * virtual
    if layers_per_stage is not None:
        return _as_given(layers, pipeline, virtual, tuple(layers_per_stage))
    extra = (count_embedding is not False) + (count_loss is not False)
    if layers + extra < stages:
        raise InputError(
            f"{layers} layers are fewer than {pipeline} pipeline stages x {virtual} virtual stages",
            place=f"{PLACE}.pipeline",
        )
    if weights is not None:
        sizes = _balanced(tuple(weights), stages, embedding_weight, loss_weight)
    elif mtp_layers and stages > 1 and count_embedding is None and count_loss is None:
        sizes = _before_tail(layers, stages, 1 + 2 * mtp_layers)
    else:
        sizes = _even(layers, stages, count_embedding, count_loss)
    return _slices(sizes)


def parse_layout(
    text: str, layers: int, pipeline: int, virtual: int = 1, *, mtp_layers: int = 0
) -> tuple[tuple[LayerId, ...], ...]:
    """Layers of every global stage as Megatron-Core's `--pipeline-model-parallel-layout` says.

    `E` is the embedding, `t` a block, `m` a depth of multi-token prediction, `L` head and loss, `|`
    ends a stage; `x*3` repeats a letter, `(tt|)*29` a group; commas and spaces mean nothing. Case
    does not matter.

    Raises
    ------
    InputError
        If it is no such text, or does not hold the model's layers in order and a stage for each of
        the schedule.
    """
    place = f"{PLACE}.pipeline_layout"

    def wrong(problem: str) -> InputError:
        return InputError(f"{problem}, got {text!r}", place=place)

    unrolled = re.sub(r"[\s,]", "", text).casefold()
    for pattern in (r"\(([^()]*)\)\*(\d{1,4})", r"([etml|])\*(\d{1,4})"):
        while (match := re.search(pattern, unrolled)) and len(unrolled) <= _LONGEST_LAYOUT:
            whole = match[1] * int(match[2])
            unrolled = unrolled[: match.start()] + whole + unrolled[match.end() :]
    if len(unrolled) > _LONGEST_LAYOUT or not re.fullmatch(r"[etml|]*", unrolled):
        raise wrong("expected E, t, m, L and |, with *n behind a letter or a group (...)")
    if not re.fullmatch(r"e\|*t[t|]*[m|]*l", unrolled):
        raise wrong("expected E first, then the blocks t, multi-token prediction m, and L last")
    stages = unrolled.split("|")
    for letter, name, expected in (("t", "blocks", layers), ("m", "depths of MTP", mtp_layers)):
        if unrolled.count(letter) != expected:
            raise wrong(f"has {unrolled.count(letter)} {name}, the model {expected}")
    if len(stages) != pipeline * virtual:
        raise wrong(
            f"has {len(stages)} stages, expected {pipeline} pipeline x {virtual} virtual stages"
        )
    if sum("m" in stage for stage in stages) > 1:
        raise wrong("expected all multi-token prediction in one stage")
    blocks = iter(range(layers))
    ids: list[tuple[LayerId, ...]] = []
    for stage in stages:
        row: list[LayerId] = ["embedding"] if "e" in stage else []
        row += [next(blocks) for _ in range(stage.count("t"))]
        row += [layer for layer, letter in _ENDS.items() if letter in stage]
        ids.append(tuple(row))
    return tuple(ids)


#: A layout that unrolls to more than this is a mistake.
_LONGEST_LAYOUT = 20_000
#: What may follow the blocks, in this order, with its letter in a layout.
_ENDS: dict[LayerId, str] = {"head": "l", "mtp": "m"}


def with_ends(
    blocks: Sequence[Sequence[int]], special: Container[LayerId] | Container[str]
) -> tuple[tuple[LayerId, ...], ...]:
    """Layers of every stage: the embedding before the first block, what there is of head and
    multi-token prediction after the last."""
    stages: list[list[LayerId]] = [list(part) for part in blocks]
    stages[0].insert(0, "embedding")
    stages[-1] += [layer for layer in _ENDS if layer in special]
    return tuple(tuple(stage) for stage in stages)


def _slices(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    stages = []
    start = 0
    for size in sizes:
        stages.append(tuple(range(start, start + size)))
        start += size
    return tuple(stages)


def _even(
    layers: int, stages: int, count_embedding: bool | None, count_loss: bool | None
) -> list[int]:
    """As even as can be; the remainder goes to the middle stages, away from embedding and loss."""
    embedding, loss = bool(count_embedding), bool(count_loss)
    if layers % stages and count_embedding is None and count_loss is None:
        # both (Llama 3 405B: 126 + 2 over 128 stages), the loss alone, the embedding alone
        for embedding, loss in ((True, True), (False, True), (True, False), (False, False)):
            if (layers + embedding + loss) % stages == 0:
                break
    total = layers + embedding + loss
    base, left = divmod(total, stages)
    sizes = [base] * stages
    first = (stages - left) // 2
    for stage in range(first, first + left):
        sizes[stage] += 1
    sizes[0] -= embedding
    sizes[-1] -= loss
    if min(sizes) < 0:
        raise InputError(
            f"{layers} layers cannot be spread over {stages} stages with embedding and loss "
            "counted as layers",
            place=f"{PLACE}.pipeline",
        )
    return sizes


def _before_tail(layers: int, stages: int, tail: int) -> list[int]:
    """Blocks per stage where the last stages also hold `tail` layers' worth of other work."""
    base, left = divmod(layers + tail, stages)
    sizes = [base + (stage < left) for stage in range(stages)]
    for stage in reversed(range(stages)):
        taken = min(tail, sizes[stage])
        sizes[stage] -= taken
        tail -= taken
    return sizes


def _balanced(weights: tuple[float, ...], stages: int, embedding: float, loss: float) -> list[int]:
    """Contiguous partition with the least largest stage (dynamic program, O(stages layers^2)).

    Among partitions with the same largest stage, the one whose sum of squares is least.
    """
    n = len(weights)
    if n < stages:
        raise InputError(f"{n} layers are fewer than {stages} stages", place=f"{PLACE}.pipeline")
    prefix = [0.0]
    for weight in weights:
        prefix.append(prefix[-1] + weight)
    best: list[tuple[float, float]] = [(0.0, 0.0)] + [(float("inf"), 0.0)] * n
    cuts: list[list[int]] = []
    for stage in range(stages):
        extra = (embedding if stage == 0 else 0.0) + (loss if stage == stages - 1 else 0.0)
        following: list[tuple[float, float]] = [(float("inf"), 0.0)] * (n + 1)
        cut = [0] * (n + 1)
        for end in range(stage + 1, n - (stages - 1 - stage) + 1):
            for start in range(stage, end):
                largest, squares = best[start]
                if largest == float("inf"):
                    continue
                cost = prefix[end] - prefix[start] + extra
                candidate = (max(largest, cost), squares + cost * cost)
                if candidate < following[end]:
                    following[end], cut[end] = candidate, start
        best = following
        cuts.append(cut)
    sizes: list[int] = []
    end = n
    for cut in reversed(cuts):
        sizes.append(end - cut[end])
        end = cut[end]
    return sizes[::-1]


def _as_given(
    layers: int, pipeline: int, virtual: int, given: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    place = f"{PLACE}.stage_layers"
    stages = pipeline * virtual
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in given):
        raise InputError("expected a list of layer counts", place=place)
    if sum(given) != layers:
        raise InputError(
            f"the counts add up to {sum(given)}, the model has {layers} layers", place=place
        )
    if len(given) == stages:
        return _slices(given)
    if len(given) != pipeline:
        expected = f"{pipeline} (ranks)"
        if virtual > 1:
            expected += f" or {stages} (global stages)"
        raise InputError(f"expected {expected} counts, got {len(given)}", place=place)
    # per rank: its blocks spread over its chunks, the earlier chunks taking the remainder
    sizes = [0] * stages
    for rank, size in enumerate(given):
        base, left = divmod(size, virtual)
        for chunk in range(virtual):
            sizes[chunk * pipeline + rank] = base + (chunk < left)
    return _slices(sizes)
