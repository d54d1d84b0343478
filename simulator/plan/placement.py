"""Where ranks go on a torus, so that the groups of a mesh dimension are boxes of whole axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from simulator.plan.mesh import Mesh


def torus_placement(mesh: Mesh, shape: Sequence[int], slices: int = 1) -> NDArray[np.int64] | None:
    """Accelerator of every rank, shape [ranks]; None: no assignment of axes fits.

    Each dimension of the mesh takes axes of the torus whose lengths multiply to its size, as
    `jax.experimental.mesh_utils.create_device_mesh` assigns them; the later axes first, in which
    neighbours are numbered consecutively. Slices hold the outermost part of the mesh.
    """
    size = math.prod(shape)
    inside = _inside(mesh, size)
    if inside is None or mesh.ranks != size * slices:
        return None
    axes = _assign(inside, list(shape))
    if axes is None:
        return None
    # the outermost dimension varies slowest: its axes come first
    order = [axis for taken in reversed(axes) for axis in taken]
    order = [axis for axis in range(len(shape)) if axis not in order] + order
    position = np.arange(size, dtype=np.int64).reshape(shape).transpose(order).ravel()
    return (np.arange(slices, dtype=np.int64)[:, None] * size + position).ravel()


def _inside(mesh: Mesh, size: int) -> list[int] | None:
    """Sizes of the mesh's dimensions inside a slice, innermost first; None: a slice cuts one."""
    shard = mesh.shard // mesh.context if mesh.shard % mesh.context == 0 else 0
    data = [shard, mesh.data // shard] if shard and mesh.data % shard == 0 else [mesh.data]
    sizes: list[int] = []
    for dimension in (mesh.tensor, mesh.context, *data, mesh.pipeline):
        part = math.gcd(dimension, size)
        if part != min(dimension, size):
            return None
        sizes.append(part)
        size //= part
    return sizes if size == 1 else None


def _assign(sizes: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Axes per dimension, whose lengths multiply to its size; the later axes first."""

    def fill(index: int, free: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        if index == len(sizes):
            return []
        for count in range(len(free) + 1):
            for taken in combinations(reversed(free), count):
                if math.prod(lengths[axis] for axis in taken) != sizes[index]:
                    continue
                rest = fill(index + 1, tuple(axis for axis in free if axis not in taken))
                if rest is not None:
                    return [tuple(sorted(taken)), *rest]
        return None

    return fill(0, tuple(axis for axis, length in enumerate(lengths) if length > 1))
