"""Activation offloading: what a rank keeps in host memory, and how much stays on the device.

As in Transformer Engine's double-buffered CPU offloading, Megatron-Core's fine-grained activation
offloading and XLA's host offloading of saved activations: after the forward of a transformer
layer its stored activations are copied to host memory, before its backward they are copied back,
both beside the computation. Embedding, head and multi-token prediction keep theirs on the device.

`WINDOW` layers at most are leaving at a time (the one that runs and the one being copied), and as
many returning (the one whose backward runs and the next): a forward waits until the layer
`WINDOW` before it has left, a fetch until the layer `WINDOW` before it has been used up (the first
fetches, before which there is none, follow as soon as their layers have left). Where only the
first layers of a stage are offloaded, the room for those that keep their activations is
used as long as they do not need it: the copies are spread over the whole stage's passes (as by
Transformer Engine's `layer_window_map`). Where a rank's backward follows its forward of the same
micro-batch at once (the last stage, or no pipeline), the last `WINDOW` layers never leave: their
backward comes before they were gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from simulator.errors import InputError
from simulator.model.spec import LayerId
from simulator.schedules.actions import flatten

#: Layers whose activations leave, or return, at the same time: the two buffers of Transformer
#: Engine's `AsyncDoubleBufferGroupOffloadHandler`.
WINDOW = 2


def turns_at_once(actions: Sequence[Any]) -> frozenset[tuple[int, int]]:
    """(stage, micro-batch) whose unsplit backward directly follows its forward on the rank."""
    found = []
    for first, second in pairwise(a for a in flatten(list(actions)) if a.kind in "FBIW"):
        same = (first.stage, first.microbatch) == (second.stage, second.microbatch)
        if same and first.kind == "F" and second.kind == "B":
            found.append((first.stage, int(first.microbatch or 0)))
    return frozenset(found)


def offloaded_layers(
    layers: Sequence[LayerId], *, at_once: bool, limit: int | None = None
) -> tuple[LayerId, ...]:
    """Of a stage's layers, in forward order, those whose activations go to the host.

    `at_once`: the micro-batch's backward directly follows its forward, see `turns_at_once`;
    `limit`: at most so many, the first ones (Megatron-LM --cpu-offloading-num-layers).
    """
    blocks = tuple(layer for layer in layers if isinstance(layer, int))
    most = max(0, len(blocks) - WINDOW) if at_once else len(blocks)
    return blocks[: most if limit is None else min(most, limit)]


def check_offload_layers(limit: int | None, stage_layers: Sequence[Sequence[LayerId]]) -> None:
    """Refuse a limit that no stage reaches; a stage with fewer layers offloads all that it has.

    Raises
    ------
    InputError
        If `limit` is more than the transformer layers of the largest stage.
    """
    most = max((sum(isinstance(x, int) for x in layers) for layers in stage_layers), default=0)
    if limit is not None and limit > most:
        raise InputError(
            f"expected at most {most}, the layers of the largest stage, got {limit}",
            place="training.activation_offload_layers",
        )


@dataclass(slots=True)
class _Held:
    """A layer's activations of one micro-batch; times are positions in the rank's passes."""

    size: float
    begin: int
    """The forward that stores them."""
    copy: int = -1
    """Number of their copy out, -1 where they stay."""
    until: int | None = None
    """First pass that they no longer occupy memory in since their forward; None: not known yet."""
    used: int = 0
    """Pass after the one that last fetched them: a second fetch needs no second room before it."""


def peak_on_device(
    actions: Sequence[Any],
    stage_layers: Mapping[int, Sequence[LayerId]],
    stored: Callable[[LayerId], float],
    limit: int | None = None,
) -> float:
    """Most bytes of stored activations on the device at one time, with offloading.

    The most that the waits of the program (`simulator.programs`) allow, however fast the link is:
    every copy out ends as late, and every copy back begins as early, as they let it. A layer
    occupies memory from its forward until a pass waits for its copy out (copies leave in order),
    and from the end of the pass that its copy back waits for until the end of its backward. A
    stage of L equal layers, alone on its rank, of which n leave (never the last `WINDOW`), needs
    L - n + `WINDOW` layers' room: those that stay and `WINDOW` that are leaving still or back
    already. The first `WINDOW` copies back wait for no backward, so that these layers occupy
    memory at the end of the forward whatever the link's speed. What several micro-batches in
    flight keep adds up, and their copies out and back take room at the same time.

    Parameters
    ----------
    actions:
        The rank's actions in order.
    stage_layers:
        Layers of each of the rank's stages.
    stored:
        Bytes that a layer stores for one micro-batch.
    limit:
        Layers per stage that are offloaded at most.
    """
    order = [a for a in flatten(list(actions)) if a.kind in "FBIW" and a.stage in stage_layers]
    at_once = turns_at_once(order)
    splits = any(action.kind == "W" for action in order)
    sizes = {layer: stored(layer) for layers in stage_layers.values() for layer in layers}
    buffered = {
        stage: offloaded_layers(layers, at_once=False, limit=limit)
        for stage, layers in stage_layers.items()
    }
    held: dict[tuple[int, int, LayerId], _Held] = {}
    out: list[_Held] = []  # copies out, in order
    left = 0  # so many of them are known to have ended
    leaving: list[int] = []  # per forward of a block, its copy out
    returning: list[int] = []  # per backward that leaves room, its pass
    earliest = 0  # no further copy back begins before this pass: they are in order
    spans: list[tuple[int, int, float]] = []  # first pass, the one after the last, bytes
    now = -1
    for action in order:
        stage, kind, microbatch = action.stage, action.kind, int(action.microbatch or 0)
        layers = stage_layers[stage]
        turns = (stage, microbatch) in at_once
        away = offloaded_layers(layers, at_once=turns, limit=limit)
        blocks = sum(isinstance(layer, int) for layer in layers)
        room = WINDOW + blocks - len(buffered[stage])
        for layer in layers if kind == "F" else reversed(layers):
            now += 1
            waited = -1
            key = (stage, microbatch, layer)
            if kind == "F":
                held[key] = _Held(sizes[layer], now)
                if isinstance(layer, int):
                    if len(leaving) >= room:
                        waited = leaving[-room]
                    if layer in away:
                        held[key].copy = len(out)
                        out.append(held[key])
                    leaving.append(held[key].copy)
            else:
                item = held[key]
                if item.copy >= 0:
                    lag = WINDOW if splits else room
                    after = returning[-lag] if len(returning) >= lag else -1
                    earliest = max(earliest, item.begin + 1, after + 1)
                    waited = item.copy
                    # what has not left yet cannot be on its way back: one copy of the two
                    if item.until is None or item.until > earliest:
                        item.until = min(earliest, now)
                    spans.append((min(max(earliest, item.used), now), now + 1, item.size))
                    item.used = now + 1
                elif kind in ("B", "W"):
                    item.until = now + 1
                frees = kind == "B" and not splits and isinstance(layer, int)
                if item.copy >= 0 or (frees and layer not in buffered[stage]):
                    returning.append(now)
            for gone in out[left : waited + 1]:
                gone.until = now if gone.until is None else min(gone.until, now)
            left = max(left, waited + 1)
            if kind in ("B", "W"):
                item = held.pop(key)
                spans.append((item.begin, item.until or now + 1, item.size))
    for item in held.values():
        spans.append((item.begin, item.until or now + 1, item.size))
    change = np.zeros(now + 2)
    for begin, end, size in spans:
        change[begin] += size
        change[end] -= size
    return float(np.cumsum(change).max())
