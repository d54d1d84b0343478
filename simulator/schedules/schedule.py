"""A pipeline schedule: which rank holds which stage, and the order of each rank's actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from simulator.schedules.actions import COMPUTE_KINDS, Action, Overlap, flatten

#: Per rank, the actions in execution order.
Orders = tuple[tuple[Action | Overlap, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """An order of actions for every pipeline rank; durations are not part of it.

    Attributes
    ----------
    name:
        Registered name, or the file it was read from.
    ranks:
        Number of pipeline ranks p.
    stages:
        Number of global stages (chunks over all ranks and both directions).
    microbatches:
        Micro-batches of one step, over all directions.
    stage_to_rank:
        The rank that holds each stage.
    actions:
        Per rank, its actions in order.
    chain_len:
        Stages of one pass through the model. A bidirectional schedule has
        `stages == 2 * chain_len`: stages `[0, chain_len)` are one copy of the model and
        `[chain_len, 2 * chain_len)` the other; the copies exchange no activations.
    flush:
        False when the next step's forward passes enter the pipeline without waiting for this
        step's last backward pass (PipeDream, PipeDream-2BW).
    weight_copies:
        Versions or copies of the parameters of one stage that the schedule keeps in total, in
        units of what 1F1B keeps.
    """

    name: str
    ranks: int
    stages: int
    microbatches: int
    stage_to_rank: tuple[int, ...]
    actions: Orders
    chain_len: int
    flush: bool = True
    weight_copies: int = 1

    @property
    def virtual(self) -> int:
        """Stages held by one rank, both directions counted (the largest number if unequal)."""
        return max(len(stages) for stages in self.rank_to_stages)

    @property
    def replicas(self) -> int:
        """Independent copies of the pipeline: 2 for DualPipe and Chimera, else 1."""
        return self.stages // self.chain_len

    @property
    def parts(self) -> int:
        """Parts that the model is cut into."""
        return self.chain_len

    @property
    def stage_layer_part(self) -> tuple[int, ...]:
        """For each stage the index of the part of the model that it holds, 0 is the embedding's."""
        return tuple(stage % self.chain_len for stage in range(self.stages))

    @cached_property
    def rank_to_stages(self) -> tuple[tuple[int, ...], ...]:
        """For each rank its stages in ascending order."""
        held: list[list[int]] = [[] for _ in range(self.ranks)]
        for stage, rank in enumerate(self.stage_to_rank):
            held[rank].append(stage)
        return tuple(tuple(stages) for stages in held)

    @property
    def has_backward(self) -> bool:
        """Whether any backward action is in the schedule."""
        return any(
            isinstance(action, Overlap) or action.kind in ("B", "I", "W")
            for order in self.actions
            for action in order[-1:]
        )

    def is_first(self, stage: int) -> bool:
        """Whether the stage reads the model's input."""
        return stage % self.chain_len == 0

    def is_last(self, stage: int) -> bool:
        """Whether the stage computes the loss."""
        return stage % self.chain_len == self.chain_len - 1

    def action_texts(self) -> list[list[str]]:
        """Per rank, the actions in PyTorch's text."""
        return [[str(action) for action in order] for order in self.actions]

    def without_overlap(self) -> Schedule:
        """The same schedule with every overlap pair replaced by its forward, then its backward."""
        return replace(self, actions=tuple(tuple(flatten(order)) for order in self.actions))

    def compute_only(self) -> Schedule:
        """The same schedule without communication and sharding actions."""
        kinds = frozenset(COMPUTE_KINDS)
        if all(len(a) == 2 or a[1] in kinds for order in self.actions for a in order):
            return self
        kept = tuple(
            tuple(a for a in order if isinstance(a, Overlap) or a.kind in kinds)
            for order in self.actions
        )
        return replace(self, actions=kept)
