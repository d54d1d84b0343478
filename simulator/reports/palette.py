"""Kinds of operations: their family, their colour and their order, the same in every figure."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

#: Families in the order in which legends and breakdowns list them, with the kinds they hold.
FAMILIES: dict[str, tuple[str, ...]] = {
    "matrix products": ("gemm", "grouped_gemm"),
    "attention": ("attention",),
    "memory-bound": (
        "norm", "elementwise", "activation", "softmax", "embedding", "cross_entropy", "permute",
        "router", "cast", "memory_bound",
    ),
    "optimizer": ("optimizer",),
    "communication": (
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv",
    ),
    "copies": ("copy", "host_copy"),
}  # fmt: skip

#: sRGB colours; families have hues that the common colour-vision deficiencies keep apart
#: (after Okabe and Ito's set), kinds of one family differ in lightness.
COLOURS: dict[str, str] = {
    "gemm": "#2f6db5",
    "grouped_gemm": "#6b9bd8",
    "attention": "#8356b4",
    "norm": "#3d8f86",
    "elementwise": "#63b0a4",
    "activation": "#2b7a5f",
    "softmax": "#8cc7a8",
    "embedding": "#4f9fb0",
    "cross_entropy": "#1f6f83",
    "permute": "#7fb8c9",
    "router": "#a3ccb5",
    "cast": "#b5d3d0",
    "memory_bound": "#55a39a",
    "optimizer": "#8c6d4f",
    "all_reduce": "#d55e00",
    "all_gather": "#e6952e",
    "reduce_scatter": "#c9487a",
    "all_to_all": "#b8336a",
    "broadcast": "#e0b13c",
    "send_recv": "#c79a00",
    "copy": "#9a9a9a",
    "host_copy": "#7d7d7d",
    # entries of breakdowns that are no kinds
    "tensor": "#d55e00",
    "context": "#e6952e",
    "expert": "#b8336a",
    "data": "#c9487a",
    "pipeline": "#c79a00",
    "host": "#5b5f6b",
    "bubble": "#d9dbe0",
    "idle": "#d9dbe0",
    "other": "#a9adb8",
}

#: Categories of memory, from the bottom of a stack to its top.
MEMORY_COLOURS: dict[str, str] = {
    "parameters": "#2f6db5",
    "gradients": "#c9487a",
    "optimizer": "#8c6d4f",
    "activations": "#e6952e",
    "buffers": "#9a9a9a",
}

#: Groups of ranks by whose communication a breakdown is divided.
MESH_GROUPS: frozenset[str] = frozenset({"tensor", "context", "expert", "data", "pipeline"})
COMMUNICATION_KINDS: frozenset[str] = frozenset(FAMILIES["communication"])
COPY_KINDS: frozenset[str] = frozenset(FAMILIES["copies"])


def colour(kind: str) -> str:
    """The colour of a kind; a kind that is not known gets one from its name, always the same."""
    known = COLOURS.get(kind)
    if known is not None:
        return known
    digest = zlib.crc32(kind.encode("utf-8"))
    red, green, blue = (0x50 + ((digest >> shift) & 0x7F) for shift in (0, 8, 16))
    return f"#{red:02x}{green:02x}{blue:02x}"


def part_label(name: str, exposed: Iterable[str] = ()) -> str:
    """What a part of the step-time breakdown is called; `exposed` are the names of groups whose
    communication is exposed."""
    if name == "host":
        return "waiting for host"
    plain = name.replace("_", " ")
    return f"{plain} communication" if name in MESH_GROUPS or name in set(exposed) else plain


def family(kind: str) -> str:
    """The family of a kind; kinds that are not known are `other`."""
    return next((name for name, kinds in FAMILIES.items() if kind in kinds), "other")


def ordered(kinds: Iterable[str]) -> list[str]:
    """`kinds` without repetition in the order of legends; unknown ones last, by name."""
    rank = {kind: index for index, kind in enumerate(k for ks in FAMILIES.values() for k in ks)}
    meshes = ("memory_bound", "tensor", "context", "expert", "data", "pipeline", "host", "other")
    last = (*meshes, "bubble", "waiting", "idle")
    rank |= {name: 100 + index for index, name in enumerate(last) if name not in rank}
    return sorted(dict.fromkeys(kinds), key=lambda kind: (rank.get(kind, 99), kind))
