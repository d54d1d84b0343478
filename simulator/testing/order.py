"""The order of a pipeline rank's passes as a short text, for baselines that people review.

Passes of one stage are written `F0 F1 B0`, those of several stages per rank with the stage in
front: `2F0`. Repetition is folded: `3x[F0]+1` is `F0 F1 F2`, `2x[B0 F4]+1` is `B0 F4 B1 F5`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: (kind, stage, micro-batch) of one pass.
Pass = tuple[str, int, int]

#: Longest repeated pattern that is looked for: two passes of 16 chunks in groups of 8.
_LONGEST = 256
_GROUP = re.compile(r"(\d+)x\[([^\]]*)\]\+(\d+)|(\S+)")
_PASS = re.compile(r"(\d+)?([FBIW])(\d+)")


def order_text(passes: Sequence[Pass]) -> str:
    """The order as text; `order_of` reads it back."""
    stages = {stage for _, stage, _ in passes}
    single = len(stages) <= 1

    def word(item: Pass) -> str:
        kind, stage, microbatch = item
        return f"{kind}{microbatch}" if single else f"{stage}{kind}{microbatch}"

    words: list[str] = []
    at = 0
    while at < len(passes):
        length, count, step = _repetition(passes, at)
        pattern = " ".join(word(item) for item in passes[at : at + length])
        words.append(f"{count}x[{pattern}]+{step}" if count > 1 else pattern)
        at += length * count
    head = f"stage {next(iter(stages))}: " if single and stages else ""
    return head + " ".join(words)


def _repetition(passes: Sequence[Pass], at: int) -> tuple[int, int, int]:
    """(length, count, step) of the pattern at `at` that covers most; (1, 1, 0) if none pays."""
    best = (1, 1, 0)
    covered = 2  # a pattern pays from three passes on
    left = len(passes) - at
    for length in range(1, min(_LONGEST, left // 2) + 1):
        step = passes[at + length][2] - passes[at][2]
        if step < 1 or passes[at][:2] != passes[at + length][:2]:
            continue
        same = 0
        while same + length < left:
            kind, stage, microbatch = passes[at + same]
            if passes[at + same + length] != (kind, stage, microbatch + step):
                break
            same += 1
        count = same // length + 1
        if count > 1 and count * length > covered:
            covered = count * length
            best = (length, count, step)
            if covered == left:
                break
    return best


def order_of(text: str, *, most: int = 10_000_000) -> list[Pass]:
    """The passes of a text that `order_text` wrote; raises ValueError for anything else, and for
    more than `most` passes."""
    match = re.match(r"stage (\d+): ", text)
    default = int(match[1]) if match else 0
    body = text[match.end() :] if match else text
    passes: list[Pass] = []
    for group in _GROUP.finditer(body):
        count, pattern, step, single = group.groups()
        items = [_pass(word, default) for word in (single or pattern).split()]
        if len(passes) + int(count or 1) * len(items) > most:
            raise ValueError(f"more than {most} passes")
        for index in range(int(count or 1)):
            passes.extend((kind, stage, mb + index * int(step or 0)) for kind, stage, mb in items)
    return passes


def _pass(word: str, default: int) -> Pass:
    match = _PASS.fullmatch(word)
    if match is None:
        raise ValueError(f"not a pass: {word!r}")
    return match[2], int(match[1] or default), int(match[3])


def first_difference(old: Sequence[Pass], new: Sequence[Pass]) -> tuple[int, str, str] | None:
    """Position and the passes there (a few from it on) where two orders part; None if equal."""
    if list(old) == list(new):
        return None
    at = 0
    while at < min(len(old), len(new)) and old[at] == new[at]:
        at += 1

    def shown(passes: Sequence[Pass]) -> str:
        words = [f"{stage}{kind}{microbatch}" for kind, stage, microbatch in passes[at : at + 6]]
        return " ".join(words) + (" …" if len(passes) > at + 6 else "") if words else "the end"

    return at, shown(old), shown(new)
