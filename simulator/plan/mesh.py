"""The rank mesh: which ranks form a group, in Megatron-LM's order.

Dense layers order ranks tp-cp-dp-pp, tensor fastest (with the expert dimension folded into data
and context parallelism): rank = tp + T (cp + C (dp + D pp)). Expert layers divide the same ranks of
a pipeline stage as etp-ep-edp ("MoE parallel folding", arXiv 2504.14960):
rank = etp + ET (ep + EP (edp + EDP pp)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from simulator.errors import InputError, raise_all, unknown_name

IntArray = npt.NDArray[np.int64]

DIMENSIONS = ("tensor", "context", "data", "pipeline", "expert", "expert_tensor", "expert_data")
GROUPS = (
    "tensor",
    "context",
    "data",
    "data_context",
    "expert",
    "expert_tensor",
    "expert_data",
    "shard",
    "replicate",
    "embedding",
    "pipeline",
    "model",
    "world",
    "host",
)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the parallel dimensions.

    Parameters
    ----------
    tensor, context, data, pipeline:
        Dense dimensions; their product is the number of ranks.
    expert, expert_tensor:
        How expert layers divide the tensor x context x data ranks of a stage; what is left is
        `expert_data`.
    shard_group:
        Ranks over which sharded data parallelism shards (hybrid sharding); 0: all of
        data x context. Consecutive ranks of data x context form a group.

    Raises
    ------
    InputError
        If sizes are not positive or contradict each other.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    pipeline: int = 1
    shard_group: int = 0

    def __post_init__(self) -> None:
        raise_all(list(self._contradictions()))

    def _contradictions(self) -> Iterator[InputError]:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "shard_group" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield InputError(
                    f"must be a positive integer, got {value!r}", place=f"parallel.{field.name}"
                )
                return
        per_stage = self.tensor * self.context * self.data
        if per_stage % (self.expert * self.expert_tensor):
            yield InputError(
                f"expert {self.expert} x expert_tensor {self.expert_tensor} does not divide "
                f"tensor {self.tensor} x context {self.context} x data {self.data} = {per_stage}",
                place="parallel.expert",
            )
        if self.shard_group and (self.data * self.context) % self.shard_group:
            yield InputError(
                f"{self.shard_group} does not divide data {self.data} x context {self.context} "
                f"= {self.data * self.context}",
                place="parallel.shard_group",
            )

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_data(self) -> int:
        """Replicas of an expert."""
        return self.tensor * self.context * self.data // (self.expert * self.expert_tensor)

    @property
    def shard(self) -> int:
        """Ranks that share one sharded copy of the dense parameters."""
        return self.shard_group or self.data * self.context

    def size(self, name: str) -> int:
        """Ranks in one group `name`."""
        sizes = {
            "tensor": self.tensor,
            "context": self.context,
            "data": self.data,
            "data_context": self.data * self.context,
            "expert": self.expert,
            "expert_tensor": self.expert_tensor,
            "expert_data": self.expert_data,
            "shard": self.shard,
            "replicate": self.data * self.context // self.shard,
            "embedding": min(2, self.pipeline),
            "pipeline": self.pipeline,
            "model": self.tensor * self.pipeline,
            "world": self.ranks,
            "host": 1,
        }
        if name not in sizes:
            raise unknown_name("group", name, GROUPS)
        return sizes[name]

    # -- coordinates ---------------------------------------------------------------------------

    @cached_property
    def _rank(self) -> IntArray:
        return np.arange(self.ranks, dtype=np.int64)

    def coordinates(self, dimension: str) -> IntArray:
        """Coordinate of every rank along `dimension`, shape [ranks]."""
        rank, t, c = self._rank, self.tensor, self.context
        stage = t * c * self.data
        et, ep = self.expert_tensor, self.expert
        match dimension:
            case "tensor":
                return rank % t
            case "context":
                return rank // t % c
            case "data":
                return rank // (t * c) % self.data
            case "pipeline":
                return rank // stage
            case "expert_tensor":
                return rank % stage % et
            case "expert":
                return rank % stage // et % ep
            case "expert_data":
                return rank % stage // (et * ep)
        raise unknown_name("mesh dimension", dimension, DIMENSIONS)

    def rank_of(
        self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0
    ) -> int:
        """Rank with these dense coordinates."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def group_labels(self, name: str) -> IntArray:
        """Label of each rank's group `name`, shape [ranks]; equal labels = same group, -1 = none.

        A group's label is its smallest rank, so that labels of one name are unique.
        """
        rank = self._rank
        t, c, d = self.tensor, self.context, self.data
        tp, cp = self.coordinates("tensor"), self.coordinates("context")
        dp, pp = self.coordinates("data"), self.coordinates("pipeline")
        stage = t * c * d
        match name:
            case "tensor":
                return rank - tp
            case "context":
                return rank - t * cp
            case "data":
                return rank - t * c * dp
            case "data_context":
                return pp * stage + tp
            case "expert_tensor":
                return rank - self.coordinates("expert_tensor")
            case "expert":
                return rank - self.expert_tensor * self.coordinates("expert")
            case "expert_data":
                step = self.expert_tensor * self.expert
                return rank - step * self.coordinates("expert_data")
            case "shard" | "replicate":
                index = cp + c * dp  # position among data x context, consecutive ranks first
                group = self.shard
                first = index // group * group if name == "shard" else index % group
                return pp * stage + tp + t * first
            case "embedding":
                at_end = (pp == 0) | (pp == self.pipeline - 1)
                return np.where(at_end, rank - stage * pp, -1)
            case "pipeline":
                return rank - stage * pp
            case "model":
                return t * (cp + c * dp)
            case "world":
                return np.zeros_like(rank)
            case "host":  # a rank and its host's memory
                return rank
        raise unknown_name("group", name, GROUPS)

    def groups(self) -> dict[str, IntArray]:
        """Labels of all groups by name."""
        return {name: self.group_labels(name) for name in GROUPS}

    def pipeline_peer(self) -> npt.NDArray[np.int32]:
        """`peer[p, rank]`: the rank with the same coordinates but pipeline coordinate p."""
        stage = self.tensor * self.context * self.data
        same = np.arange(stage * self.pipeline, dtype=np.int32).reshape(self.pipeline, stage)
        return np.tile(same, self.pipeline)
