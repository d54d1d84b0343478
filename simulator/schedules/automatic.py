"""The automatic scheduler of the Zero Bubble paper: ZB-1p and ZB-2p.

A greedy list scheduler with three switches, run with all eight settings; the best window wins
(Qi et al., arXiv:2401.10241, section 3.1). It handles one micro-batch after the other: one forward
on each stage (unless the next stage is too far behind), then its backward from the last stage to
the first. Gaps are filled with weight gradients, and weight gradients are forced where memory is
short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any

from simulator.errors import InputError
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.registry import RankOrders, register
from simulator.schedules.timing import Durations

#: Share of an activation that is kept from I to W if nothing else is said. The Zero Bubble paper
#: has M_W / M_B = 32 h / (34 h + 5 a s) (its table 1), 0.366 to 0.432 for its four models.
DEFAULT_KEPT_FOR_WEIGHTS = 0.4

#: Options that several schedules take.
GivenDurations = Annotated[
    Durations | None,
    "What it optimises for, a mapping of F, I, W, B and comm; F = I = W = 1 if not given.",
]
KeptForWeights = Annotated[float, "Share of an activation that stays from I to W."]


@dataclass(frozen=True)
class MemoryModel:
    """Bytes (or any unit) of one activation per stage, and what W still needs of it after I.

    Attributes
    ----------
    forward:
        Taken by a forward pass.
    kept:
        Still held between I and W; all of it is released by W. In the ZB paper's notation
        `forward` is M_B and `kept` is M_W.
    """

    forward: tuple[Any, ...]
    kept: tuple[Any, ...]


class DoesNotFit(Exception):
    """No order of this shape stays below the memory limit."""


@dataclass
class _State:
    """A partial schedule of one chunk per rank."""

    durations: dict[str, list[Any]]
    comm: list[Any]
    memory: MemoryModel
    limits: Sequence[Any]
    microbatches: int
    orders: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        stages = len(self.limits)
        self.orders = [[] for _ in range(stages)]
        self.count = {kind: [0] * stages for kind in "FIW"}
        self.end: dict[str, list[list[Any]]] = {k: [[] for _ in range(stages)] for k in "FI"}
        self.clock: list[Any] = [0] * stages
        self.held: list[Any] = [0] * stages
        self.bubble: list[Any] = [0] * stages
        self.first: list[Any] = [0] * stages
        self.delta = {
            "F": list(self.memory.forward),
            "I": [k - f for f, k in zip(self.memory.forward, self.memory.kept, strict=True)],
            "W": [-k for k in self.memory.kept],
        }

    def arrival(self, stage: int, kind: str) -> Any:
        """When the input of the stage's next action of that kind arrives."""
        k = self.count[kind][stage]
        if kind == "F" and stage > 0:
            ends, delay = self.end["F"][stage - 1], self.comm[stage - 1]
        elif kind == "I" and stage + 1 < len(self.limits):
            ends, delay = self.end["I"][stage + 1], self.comm[stage]
        else:
            return 0
        if k >= len(ends):
            raise DoesNotFit  # unequal limits let a stage get ahead of its neighbour
        return ends[k] + delay

    def put(self, stage: int, kind: str) -> None:
        if kind == "I" and self.count["I"][stage] >= self.count["F"][stage]:
            raise DoesNotFit
        start = max(self.clock[stage], self.arrival(stage, kind))
        if self.count["F"][stage]:
            self.bubble[stage] += start - self.clock[stage]
        else:
            self.first[stage] = start
        self.clock[stage] = start + self.durations[kind][stage]
        if kind != "W":
            self.end[kind][stage].append(self.clock[stage])
        self.held[stage] += self.delta[kind][stage]
        self.count[kind][stage] += 1
        self.orders[stage].append(kind)

    def pending_weights(self, stage: int) -> int:
        return self.count["I"][stage] - self.count["W"][stage]

    def make_room(self, stage: int, kind: str) -> None:
        while self.held[stage] + self.delta[kind][stage] > self.limits[stage]:
            if not self.pending_weights(stage):
                raise DoesNotFit
            self.put(stage, "W")

    def fill_gap(self, stage: int, kind: str, greedy: bool) -> None:
        """Weight gradients until the input arrives; one beyond it if the bubble is worth more."""
        arrival = self.arrival(stage, kind)
        weight = self.durations["W"][stage]
        while self.pending_weights(stage) and self.clock[stage] + weight <= arrival:
            self.put(stage, "W")
        gap = arrival - self.clock[stage]
        if self.pending_weights(stage) and gap > 0:
            affordable = gap <= max(self.bubble) - self.bubble[stage]
            if greedy or not affordable:
                self.put(stage, "W")


def _order(
    state: _State, bubble_before_backward: bool, prioritise_backward: bool, greedy: bool
) -> None:
    """Run the greedy scheduler on an empty state with one setting of its switches."""
    stages, m = len(state.limits), state.microbatches
    for stage in range(stages):
        state.make_room(stage, "F")
        state.put(stage, "F")
    for stage, count in enumerate(_warmup(state, bubble_before_backward)):
        for _ in range(count):
            state.put(stage, "F")
    for stage in reversed(range(stages)):
        state.put(stage, "I")
    forwards = state.count["F"]
    for _ in range(1, m):
        wanted = [
            forwards[stage] < m and not (prioritise_backward and _backward_first(state, stage))
            for stage in range(stages)
        ]
        for stage in reversed(range(stages - 1)):
            wanted[stage] = wanted[stage] and wanted[stage + 1]
        for stage in range(stages):
            if not wanted[stage]:
                continue
            state.make_room(stage, "F")
            if stage:
                state.fill_gap(stage, "F", greedy)
            state.put(stage, "F")
        for stage in reversed(range(stages)):
            state.make_room(stage, "I")
            if stage + 1 < stages:
                state.fill_gap(stage, "I", greedy)
            if stage == 0 and forwards[stage] == m:
                while state.pending_weights(stage):
                    state.put(stage, "W")
            state.put(stage, "I")
    for stage in range(stages):
        while state.pending_weights(stage):
            state.put(stage, "W")


def _warmup(state: _State, bubble_before_backward: bool) -> list[int]:
    """Forwards on each stage after the first one and before the first gradient arrives."""
    stages, m = len(state.limits), state.microbatches
    extra = [0] * stages
    gradient: Any = state.clock[-1] + state.durations["I"][-1]
    for stage in reversed(range(stages - 1)):
        arrival = gradient + state.comm[stage]
        clock, held = state.clock[stage], state.held[stage]
        duration, taken = state.durations["F"][stage], state.delta["F"][stage]
        while 1 + extra[stage] < m and held + taken <= state.limits[stage]:
            if clock + duration > arrival if bubble_before_backward else clock >= arrival:
                break
            held += taken
            clock += duration
            extra[stage] += 1
        gradient = max(clock, arrival) + state.durations["I"][stage]
    for stage in range(1, stages):
        # A stage cannot have more forwards than the one before it could send.
        while extra[stage] > 0 and extra[stage] >= extra[stage - 1] and 1 + extra[stage] < m:
            extra[stage] -= 1
        extra[stage] = min(extra[stage], extra[stage - 1])
    return extra


def _backward_first(state: _State, stage: int) -> bool:
    """Whether a forward here would only delay the backward that is due, and can wait."""
    forwards = state.count["F"]
    if stage + 1 >= len(state.limits) or forwards[stage] < forwards[stage + 1] + 2:
        return False
    due = (
        state.clock[stage + 1]
        + state.durations["F"][stage + 1]
        + state.durations["I"][stage + 1]
        + state.comm[stage]
    )
    clock = state.clock[stage]
    if clock >= due:
        return True
    held = state.held[stage] + state.delta["F"][stage]
    forced = 0
    while held > state.limits[stage] and forced < state.pending_weights(stage):
        held += state.delta["W"][stage]
        forced += 1
    if clock + state.durations["F"][stage] + forced * state.durations["W"][stage] <= due:
        return False
    return bool(due - clock <= max(state.bubble) - state.bubble[stage])


def automatic_orders(
    stages: int,
    microbatches: int,
    durations: Durations,
    memory: MemoryModel,
    limits: Sequence[Any],
) -> RankOrders | None:
    """The best of the eight greedy orders by longest window, or None if none fits."""
    tables = {kind: durations.per_stage(kind, stages) for kind in "FIW"}
    comm = durations.per_stage("comm", stages)
    best: tuple[Any, list[list[str]]] | None = None
    for switches in product((True, False), repeat=3):
        state = _State(tables, comm, memory, limits, microbatches)
        try:
            _order(state, *switches)
        except DoesNotFit:
            continue
        window = max(end - start for start, end in zip(state.first, state.clock, strict=True))
        if best is None or window < best[0]:
            best = (window, state.orders)
    return None if best is None else [numbered(s, kinds) for s, kinds in enumerate(best[1])]


def numbered(stage: int, kinds: Sequence[str]) -> list[Action | Overlap]:
    """Actions from a sequence of kinds: each kind takes micro-batches in ascending order."""
    count = dict.fromkeys("FIWB", 0)
    order: list[Action | Overlap] = []
    for kind in kinds:
        order.append(Action(stage, kind, count[kind]))
        count[kind] += 1
    return order


def _limited(
    name: str,
    ranks: int,
    microbatches: int,
    limit: Any,
    durations: Durations | None,
    kept_for_weights: Any,
) -> RankOrders:
    orders = automatic_orders(
        ranks,
        microbatches,
        durations or Durations(),
        MemoryModel((1,) * ranks, (kept_for_weights,) * ranks),
        [limit] * ranks,
    )
    if orders is None:
        raise InputError(
            f"{name}: the automatic scheduler finds no order within {limit} activations; "
            "synthesise searches further"
        )
    return orders


@register(
    "zb-1p",
    summary="The Zero Bubble paper's automatic schedule at 1F1B's memory.",
    reference="Qi et al., arXiv:2401.10241, section 3.1",
    splits_backward=True,
    memory="p",
    aliases=("zb1p",),
)
def zb_1p(
    ranks: int,
    microbatches: int,
    virtual: int,
    durations: GivenDurations = None,
    kept_for_weights: KeptForWeights = DEFAULT_KEPT_FOR_WEIGHTS,
) -> RankOrders:
    """The automatic scheduler with a limit of p activations on every rank.

    `kept_for_weights` is M_W / M_B of the paper.
    """
    del virtual
    return _limited("zb-1p", ranks, microbatches, ranks, durations, kept_for_weights)


@register(
    "zb-2p",
    summary="The Zero Bubble paper's automatic schedule at twice 1F1B's memory.",
    reference="Qi et al., arXiv:2401.10241, section 3.1",
    splits_backward=True,
    memory="2p",
    aliases=("zb2p",),
)
def zb_2p(
    ranks: int,
    microbatches: int,
    virtual: int,
    durations: GivenDurations = None,
    kept_for_weights: KeptForWeights = DEFAULT_KEPT_FOR_WEIGHTS,
) -> RankOrders:
    """The automatic scheduler with a limit of 2p activations; see `zb_1p`."""
    del virtual
    return _limited("zb-2p", ranks, microbatches, 2 * ranks, durations, kept_for_weights)
