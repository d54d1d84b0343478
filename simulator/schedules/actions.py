"""What a pipeline rank does, one action at a time, in PyTorch's vocabulary and text.

The text of an action is `<stage><kind><microbatch>`, as `torch.distributed.pipelining` writes it:
`2F0` is the forward pass of micro-batch 0 on global stage 2, `1UNSHARD` gathers the parameters of
stage 1, `(3F2;0B0)OVERLAP_F_B` is a forward and a backward pass executed as one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from simulator.errors import InputError, nearest

#: Kinds that occupy a rank's compute engine: forward, input-gradient, weight-gradient and the
#: unsplit backward pass.
COMPUTE_KINDS = ("F", "I", "W", "B")
#: Kinds that move an activation (F) or a gradient of it (B) between stages.
TRANSFER_KINDS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
#: Kinds of fully sharded data parallelism; they carry no micro-batch.
SHARDING_KINDS = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
KINDS = (*COMPUTE_KINDS, *TRANSFER_KINDS, *SHARDING_KINDS)

OVERLAP_KIND = "OVERLAP_F_B"

_ACTION = re.compile(r"(\d+)(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B|F|I|B|W)(\d*)")


class Action(NamedTuple):
    """One action of one stage; immutable and hashable.

    Attributes
    ----------
    stage:
        Global stage index, from 0.
    kind:
        One of `KINDS`.
    microbatch:
        Index of the micro-batch, or None for the kinds of `SHARDING_KINDS`.
    """

    stage: int
    kind: str
    microbatch: int | None = None

    def __str__(self) -> str:
        suffix = "" if self.microbatch is None else self.microbatch
        return f"{self.stage}{self.kind}{suffix}"


class Overlap(NamedTuple):
    """A forward and a backward pass of one rank executed as one block (`OVERLAP_F_B`)."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward}){OVERLAP_KIND}"


def parts(action: Action | Overlap) -> tuple[Action, ...]:
    """The plain actions that `action` consists of: itself, or the pair of an overlap."""
    return (action.forward, action.backward) if isinstance(action, Overlap) else (action,)


def flatten(actions: tuple[Action | Overlap, ...] | list[Action | Overlap]) -> Iterator[Action]:
    """All plain actions of a rank's order, overlap pairs taken apart."""
    for action in actions:
        if isinstance(action, Overlap):
            yield action.forward
            yield action.backward
        else:
            yield action


def parse_action(text: str, *, place: str | None = None) -> Action | Overlap:
    """Read one action from PyTorch's text; the inverse of `str`.

    Raises
    ------
    InputError
        If the text is not `<stage><kind><microbatch>` or an overlap pair, if the micro-batch is
        missing from a kind that needs one, or is given with a kind that has none.
    """
    stripped = text.strip()
    if stripped.startswith("("):
        return _parse_overlap(stripped, place)
    match = _ACTION.fullmatch(stripped)
    if match is None:
        kind = re.sub(r"^\d+|\d+$", "", stripped)
        guess = nearest(kind, KINDS) if kind and kind not in KINDS else None
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise InputError(
            f"expected an action such as 2F0, 1SEND_B3 or (3F2;0B0)OVERLAP_F_B, got {text!r}{hint}",
            place=place,
        )
    stage, kind, microbatch = match.groups()
    if (kind in SHARDING_KINDS) == bool(microbatch):
        wanted = "no micro-batch" if kind in SHARDING_KINDS else "a micro-batch index"
        raise InputError(f"{kind} takes {wanted}, got {text!r}", place=place)
    return Action(int(stage), kind, int(microbatch) if microbatch else None)


def _parse_overlap(text: str, place: str | None) -> Overlap:
    match = re.fullmatch(r"\(([^;()]*);([^;()]*)\)(\w+)", text)
    if match is None or match[3] != OVERLAP_KIND:
        raise InputError(f"expected (<forward>;<backward>)OVERLAP_F_B, got {text!r}", place=place)
    pair = [parse_action(part, place=place) for part in match.groups()[:2]]
    forward, backward = pair
    assert isinstance(forward, Action)
    assert isinstance(backward, Action)
    if forward.kind != "F" or backward.kind not in ("B", "I"):
        raise InputError(
            f"an overlap pair is a forward and a backward action, got {text!r}", place=place
        )
    return Overlap(forward, backward)
