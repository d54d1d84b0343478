"""Activation offloading: what a rank keeps in host memory, and how much stays on the device.

As in Transformer Engine's double-buffered CPU offloading, Megatron-Core's fine-grained activation
offloading and XLA's host offloading of saved activations: after the forward of a transformer
layer its stored activations are copied to host memory, before its backward they are copied back,
both beside the computation. Embedding, head and multi-token prediction keep theirs on the device.

`WINDOW` layers at most are leaving at a time (the one that runs and the one being copied), and as
many returning (the one whose backward runs and the next): a forward waits until the layer
`WINDOW` before it has left, a fetch until the layer `WINDOW` before it has been used up. Where
only the first layers of a stage are offloaded, the room for those that keep their activations is
used as long as they do not need it: the copies are spread over the whole stage's passes (as by
Transformer Engine's `layer_window_map`). Where a rank's backward follows its forward of the same
micro-batch at once (the last stage, or no pipeline), the last `WINDOW` layers never leave: their
backward comes before they were gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

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


def peak_on_device(
    actions: Sequence[Any],
    stage_layers: Mapping[int, Sequence[LayerId]],
    stored: Callable[[LayerId], float],
    limit: int | None = None,
) -> float:
    """Most bytes of stored activations on the device at one time, with offloading.

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
    blocks = [stored(x) for layers in stage_layers.values() for x in layers if isinstance(x, int)]
    buffers = 2.0 * WINDOW * max(blocks, default=0.0)
    now = peak = whole = most = 0.0
    held = {}
    for stage, layers in stage_layers.items():
        away = offloaded_layers(layers, at_once=False, limit=limit)
        held[stage] = sum(stored(layer) for layer in layers if layer not in away)
    every = {stage: sum(map(stored, layers)) for stage, layers in stage_layers.items()}
    for action in flatten(list(actions)):
        if action.kind == "F":
            now += held.get(action.stage, 0.0)
            whole += every.get(action.stage, 0.0)
        elif action.kind in ("B", "W"):
            now -= held.get(action.stage, 0.0)
            whole -= every.get(action.stage, 0.0)
        peak, most = max(peak, now), max(most, whole)
    return min(peak + buffers, most)
