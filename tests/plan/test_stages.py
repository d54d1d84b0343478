"""Blocks to pipeline stages."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.plan.stages import assign_stages


def sizes(stages: tuple[tuple[int, ...], ...]) -> list[int]:
    return [len(stage) for stage in stages]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    layers=st.integers(1, 200),
    pipeline=st.integers(1, 16),
    virtual=st.integers(1, 4),
    embedding=st.sampled_from([None, True, False]),
    loss=st.sampled_from([None, True, False]),
)
def test_every_block_once_in_order(
    layers: int, pipeline: int, virtual: int, embedding: bool | None, loss: bool | None
) -> None:
    try:
        stages = assign_stages(
            layers, pipeline, virtual, count_embedding=embedding, count_loss=loss
        )
    except InputError:
        assert layers < 2 * pipeline * virtual
        return
    assert len(stages) == pipeline * virtual
    assert list(itertools.chain.from_iterable(stages)) == list(range(layers))
    assert max(sizes(stages)) - min(sizes(stages)) <= 2


def test_even() -> None:
    assert assign_stages(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    # global stage 4 is the second chunk of rank 0
    assert assign_stages(8, 4, 2)[4] == (4,)


def test_embedding_and_loss_as_layers() -> None:
    """Llama-3 405B: 126 blocks over 16 x 8 chunks, the first and the last without a block (arXiv
    2407.21783, section 3.3.2)."""
    stages = assign_stages(126, 16, 8)
    assert sizes(stages) == [0] + [1] * 126 + [0]
    assert sizes(assign_stages(126, 16)) == [7] + [8] * 14 + [7]
    assert sizes(assign_stages(62, 8, count_embedding=True, count_loss=True)) == [7] + [8] * 6 + [7]
    # 95 + loss = 96
    assert sizes(assign_stages(95, 8)) == [12] * 7 + [11]


def test_multi_token_prediction_takes_the_room_of_blocks() -> None:
    """Megatron-Bridge, set_deepseek_v3_pipeline_model_parallel_layout: 61 blocks, MTP and loss."""
    for pipeline, virtual in ((16, 1), (8, 2), (4, 4)):
        found = assign_stages(61, pipeline, virtual, mtp_layers=1)
        assert sizes(found) == [4] * 15 + [1]
    assert sizes(assign_stages(61, 4, mtp_layers=1)) == [16, 16, 16, 13]
    # a tail longer than a stage takes from the one before, too
    assert sizes(assign_stages(61, 8, 4, mtp_layers=1)) == [2] * 30 + [1, 0]
    # as asked, and without a pipeline
    assert sizes(assign_stages(61, 8, mtp_layers=1, count_loss=False)) == sizes(
        assign_stages(61, 8, count_loss=False)
    )
    assert assign_stages(61, 1, mtp_layers=1) == assign_stages(61, 1)


def test_as_even_as_can_be() -> None:
    assert sizes(assign_stages(61, 8)) == [7, 8, 8, 8, 8, 8, 7, 7]
    assert sizes(assign_stages(10, 4, count_embedding=False, count_loss=False)) == [2, 3, 3, 2]


def test_as_given() -> None:
    assert sizes(assign_stages(10, 4, layers_per_stage=[1, 3, 4, 2])) == [1, 3, 4, 2]
    # per rank, spread over its chunks
    assert sizes(assign_stages(10, 2, 2, layers_per_stage=[5, 5])) == [3, 3, 2, 2]
    assert sizes(assign_stages(10, 2, 2, layers_per_stage=[1, 2, 3, 4])) == [1, 2, 3, 4]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=9),
    pipeline=st.integers(1, 3),
    embedding=st.integers(0, 9),
    loss=st.integers(0, 9),
)
def test_balanced_is_the_best_of_all(
    weights: list[int], pipeline: int, embedding: int, loss: int
) -> None:
    def largest(cuts: list[int]) -> float:
        bounds = [0, *cuts, len(weights)]
        cost = [float(sum(weights[a:b])) for a, b in itertools.pairwise(bounds)]
        cost[0] += embedding
        cost[-1] += loss
        return max(cost)

    stages = assign_stages(
        len(weights),
        pipeline,
        weights=[float(w) for w in weights],
        embedding_weight=embedding,
        loss_weight=loss,
    )
    best = min(
        largest(list(cuts)) for cuts in itertools.combinations(range(1, len(weights)), pipeline - 1)
    )
    assert largest(list(itertools.accumulate(sizes(stages)[:-1]))) == best


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"layers": 2, "pipeline": 8}, "fewer than 8 pipeline stages"),
        ({"layers": 8, "pipeline": 4, "layers_per_stage": [4, 4]}, "expected 4"),
        ({"layers": 8, "pipeline": 2, "layers_per_stage": [4, 5]}, "add up to 9"),
        ({"layers": 8, "pipeline": 2, "layers_per_stage": [9, -1]}, "list of layer counts"),
    ],
)
def test_contradictions(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign_stages(**kwargs)  # type: ignore[arg-type]
