"""Groups of a mesh on a torus."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.plan.mesh import Mesh
from simulator.plan.placement import torus_placement


def test_an_aligned_mesh_stays_in_order() -> None:
    placement = torus_placement(Mesh(tensor=8, data=16), (4, 4, 8))
    assert placement is not None
    np.testing.assert_array_equal(placement, np.arange(128))


def test_tensor_parallelism_takes_the_axis_of_its_length() -> None:
    """PaLM's 12-way model parallelism on a 12x16x16 pod, twice."""
    mesh = Mesh(tensor=12, data=512, shard_group=256)
    placement = torus_placement(mesh, (12, 16, 16), slices=2)
    assert placement is not None
    groups = placement.reshape(512, 12)
    np.testing.assert_array_equal(np.diff(groups, axis=1), 256)


def test_no_assignment() -> None:
    assert torus_placement(Mesh(tensor=3, data=5), (4, 4)) is None
    assert torus_placement(Mesh(tensor=2, data=8), (4, 4)) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=3),
    cut=st.integers(0, 3),
    slices=st.sampled_from([1, 2, 3]),
    order=st.randoms(use_true_random=False),
)
def test_groups_are_boxes_and_every_accelerator_has_one_rank(
    shape: list[int], cut: int, slices: int, order: object
) -> None:
    axes = sorted(range(len(shape)), key=lambda _: order.random())  # type: ignore[attr-defined]
    tensor = math.prod(shape[axis] for axis in axes[:cut])
    size = math.prod(shape)
    assume(size > 1)
    mesh = Mesh(tensor=tensor, data=slices * size // tensor)
    placement = torus_placement(mesh, shape, slices)
    assert placement is not None
    assert sorted(placement.tolist()) == list(range(size * slices))
    for group in placement.reshape(-1, tensor):
        coordinates = np.stack(np.unravel_index(group % size, shape))
        spans = [len(np.unique(axis)) for axis in coordinates]
        assert math.prod(spans) == tensor
        assert all(span in (1, length) for span, length in zip(spans, shape, strict=True))


@pytest.mark.parametrize("tensor", [1, 2])
def test_one_chip_or_a_line(tensor: int) -> None:
    placement = torus_placement(Mesh(tensor=tensor), (1, tensor))
    assert placement is not None
    np.testing.assert_array_equal(placement, np.arange(tensor))
