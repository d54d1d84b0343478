"""The rank mesh: Megatron-LM's order, groups as partitions, contradictions."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.plan.mesh import DIMENSIONS, GROUPS, Mesh

SIZES = st.sampled_from([1, 2, 3, 4])


def groups_of(labels: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels) if label >= 0]


def test_example_of_megatron_lm() -> None:
    """16 GPUs, tensor 2, pipeline 4 (docstring of Megatron-LM's `initialize_model_parallel`)."""
    mesh = Mesh(tensor=2, pipeline=4, data=2)
    assert groups_of(mesh.group_labels("data")) == [
        [0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15],
    ]  # fmt: skip
    assert groups_of(mesh.group_labels("tensor")) == [[i, i + 1] for i in range(0, 16, 2)]
    assert groups_of(mesh.group_labels("pipeline")) == [
        [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    ]  # fmt: skip
    assert groups_of(mesh.group_labels("embedding")) == [[0, 12], [1, 13], [2, 14], [3, 15]]
    assert groups_of(mesh.group_labels("model")) == [
        [0, 1, 4, 5, 8, 9, 12, 13],
        [2, 3, 6, 7, 10, 11, 14, 15],
    ]


def test_expert_folding() -> None:
    """Expert dimensions divide the same ranks: consecutive expert-tensor ranks, then experts."""
    mesh = Mesh(tensor=2, data=4, expert=4)
    assert groups_of(mesh.group_labels("expert")) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of(mesh.group_labels("expert_data")) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    folded = Mesh(tensor=2, data=4, expert=2, expert_tensor=2)
    assert groups_of(folded.group_labels("expert_tensor")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups_of(folded.group_labels("expert")) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_hybrid_sharding() -> None:
    mesh = Mesh(data=8, shard_group=4)
    assert groups_of(mesh.group_labels("shard")) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of(mesh.group_labels("replicate")) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    whole = Mesh(data=8)
    assert np.array_equal(whole.group_labels("shard"), whole.group_labels("data_context"))
    assert whole.size("replicate") == 1


@settings(deadline=None, derandomize=True, max_examples=80)
@given(tensor=SIZES, context=SIZES, data=SIZES, pipeline=SIZES, pick=st.integers(0, 1000))
def test_groups_are_partitions(
    tensor: int, context: int, data: int, pipeline: int, pick: int
) -> None:
    per_stage = tensor * context * data
    foldings = [
        (e, et)
        for e, et in itertools.product(range(1, per_stage + 1), repeat=2)
        if per_stage % (e * et) == 0
    ]
    expert, expert_tensor = foldings[pick % len(foldings)]
    shards = [n for n in range(1, data * context + 1) if data * context % n == 0]
    mesh = Mesh(tensor, context, expert, expert_tensor, data, pipeline, shards[pick % len(shards)])
    rank = np.arange(mesh.ranks)
    assert np.array_equal(
        rank,
        mesh.coordinates("tensor")
        + tensor
        * (
            mesh.coordinates("context")
            + context * (mesh.coordinates("data") + data * mesh.coordinates("pipeline"))
        ),
    )
    for name in GROUPS:
        groups = groups_of(mesh.group_labels(name))
        assert {len(group) for group in groups} == {mesh.size(name)}, name
        members = sorted(itertools.chain.from_iterable(groups))
        if name == "embedding":
            ends = mesh.coordinates("pipeline")
            assert members == np.flatnonzero((ends == 0) | (ends == pipeline - 1)).tolist()
        else:
            assert members == rank.tolist(), name
        # the label is the smallest member
        assert all(mesh.group_labels(name)[group[0]] == group[0] for group in groups)
    # a group varies exactly its own coordinate
    dense = ("tensor", "context", "data", "pipeline")
    moe = ("expert_tensor", "expert", "expert_data", "pipeline")
    for dimensions in (dense, moe):
        for name in dimensions:
            others = np.stack([mesh.coordinates(d) for d in dimensions if d != name])
            labels = mesh.group_labels(name)
            for group in groups_of(labels):
                assert (others[:, group] == others[:, group[:1]]).all(), name
                assert len(set(mesh.coordinates(name)[group])) == len(group)
    assert mesh.tensor * mesh.context * mesh.data == (
        mesh.expert * mesh.expert_tensor * mesh.expert_data
    )


@settings(deadline=None, derandomize=True, max_examples=30)
@given(tensor=SIZES, context=SIZES, data=SIZES, pipeline=SIZES)
def test_pipeline_peers(tensor: int, context: int, data: int, pipeline: int) -> None:
    mesh = Mesh(tensor=tensor, context=context, data=data, pipeline=pipeline)
    peers = mesh.pipeline_peer()
    assert peers.shape == (pipeline, mesh.ranks)
    for stage in range(pipeline):
        assert (mesh.coordinates("pipeline")[peers[stage]] == stage).all()
        for name in ("tensor", "context", "data"):
            assert np.array_equal(mesh.coordinates(name)[peers[stage]], mesh.coordinates(name))
    own = peers[mesh.coordinates("pipeline"), np.arange(mesh.ranks)]
    assert np.array_equal(own, np.arange(mesh.ranks))


def test_rank_of_inverts_coordinates() -> None:
    mesh = Mesh(tensor=2, context=3, data=4, pipeline=2)
    for rank in range(mesh.ranks):
        where = {name: int(mesh.coordinates(name)[rank]) for name in DIMENSIONS[:4]}
        assert mesh.rank_of(**where) == rank


def test_a_large_mesh_takes_milliseconds() -> None:
    start = time.perf_counter()
    mesh = Mesh(tensor=8, pipeline=16, data=1024, expert=8)
    assert len(mesh.groups()) == len(GROUPS)
    assert mesh.ranks == 131072
    assert time.perf_counter() - start < 2.0  # 0.03 s on one core


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 0}, r"parallel\.tensor: must be a positive integer"),
        ({"data": 2.5}, r"parallel\.data"),
        ({"expert": 3, "data": 4}, r"parallel\.expert: .*does not divide"),
        ({"data": 6, "shard_group": 4}, r"parallel\.shard_group: 4 does not divide"),
    ],
)
def test_contradictions(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mesh(**sizes)


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="did you mean 'tensor'"):
        Mesh().group_labels("tensors")
    with pytest.raises(InputError, match="unknown mesh dimension"):
        Mesh().coordinates("world")
