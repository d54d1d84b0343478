"""Behaviours that the notes of a published row state, as one table.

Tables of published steps have a column for every size, but none for behaviours that only some
frameworks have: those stand in words in the column `notes` (and in `framework`, as in
`torchtitan + AsyncTP`). `NOTES` is all that is understood of them: a pattern, the key of the
experiment that it sets, the value, and why. Whatever else the notes say changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulator.catalog.frameworks import GRAPH_MODULES


@dataclass(frozen=True)
class Note:
    """One thing that notes may state."""

    pattern: str
    """Regular expression, searched in the folded notes and framework of a row."""
    key: str
    """Dotted key of the experiment."""
    value: Any
    """Value of the key, or a function from the match to it."""
    meaning: str

    def value_of(self, match: re.Match[str]) -> Any:
        """The value that this match of the pattern sets."""
        return self.value(match) if callable(self.value) else self.value


def _number(match: re.Match[str]) -> int:
    return int(match[1])


def _names(match: re.Match[str]) -> tuple[str, ...]:
    return tuple(part.strip() for part in match[1].split(",") if part.strip())


#: In this order; of several that set one key, the first found counts.
NOTES: tuple[Note, ...] = (
    Note(
        r"full_iteration|(?<!no )(?<!without )cuda graphs\b",
        "framework.cuda_graphs",
        True,
        "the whole iteration is replayed from CUDA graphs",
    ),
    Note(
        r"cuda graph \[((?!full_iteration)[^\]]*)\]",
        "framework.graphed_modules",
        lambda match: " ".join(name for name in _names(match) if name in GRAPH_MODULES),
        "these modules are replayed from CUDA graphs, the others launched by the host",
    ),
    Note(r"deepep|hybridep", "framework.moe_dispatcher", "deepep", "DeepEP's token exchange"),
    Note(
        r"all-?to-?all dispatcher",
        "framework.moe_dispatcher",
        "alltoall",
        "tokens are exchanged by an all-to-all",
    ),
    Note(
        r"allgather dispatcher",
        "framework.moe_dispatcher",
        "allgather",
        "tokens are gathered by all expert ranks",
    ),
    Note(
        r"pre-flash|no flash",
        "framework.fused_attention",
        False,
        "attention writes its scores: measured before FlashAttention, or without it",
    ),
    Note(
        r"asynctp|tp comm overlap on|tp overlap",
        "parallel.overlap.tensor",
        True,
        "tensor-parallel collectives run beside the matrix product they feed",
    ),
    Note(
        r"all-to-all overlap|a2a overlap|ep overlap",
        "parallel.overlap.expert",
        True,
        "the experts' all-to-all runs beside another micro-batch's computation",
    ),
    Note(
        r"(?:expert (?:tp|tensor(?: parallel(?:ism)?)?)|\betp)\s*[=:x]?\s*(\d+)",
        "parallel.expert_tensor",
        _number,
        "tensor parallelism inside an expert (Megatron-LM's expert_tensor_parallel_size)",
    ),
    Note(
        r"current scaling",
        "framework.fp8_recipe",
        "current",
        "the scale of an fp8 cast is the tensor's own maximum",
    ),
    Note(
        r"delayed scaling",
        "framework.fp8_recipe",
        "delayed",
        "the scale of an fp8 cast comes from earlier steps",
    ),
    Note(
        r"no gradient all-reduce overlap",
        "parallel.overlap.grad_reduce",
        False,
        "gradients are reduced after the backward pass",
    ),
    Note(
        r"num_layers=(\d+)",
        "training.recompute_layers",
        _number,
        "with full recomputation: how many layers of a stage (Megatron's recompute_num_layers)",
    ),
    Note(
        r"recompute modules \[([^\]]*)\]",
        "training.recompute_modules",
        _names,
        "with selective recomputation: which modules",
    ),
    Note(
        r"recompute norm\+act",
        "training.recompute_modules",
        ("layernorm", "moe_act"),
        "with selective recomputation: norms and the experts' activation",
    ),
    Note(
        r"activation cpu offload",
        "training.activation_offload",
        True,
        "stored activations are kept in host memory",
    ),
    Note(
        r"activation cpu offload of (\d+) layers",
        "training.activation_offload_layers",
        _number,
        "... of so many layers of a stage",
    ),
    Note(
        r"layout (e[etml|()*\d, ]*l)\b",
        "parallel.pipeline_layout",
        lambda match: match[1],
        "what every pipeline stage holds (Megatron-Core's --pipeline-model-parallel-layout)",
    ),
    Note(
        r"(?:w/o|without|no) mtp",
        "model.mtp_layers",
        0,
        "the model is trained without its multi-token prediction",
    ),
    Note(
        r"tokendrop",
        "training.expert_capacity_factor",
        1.0,
        "tokens beyond the mean of an expert are dropped",
    ),
    Note(
        r"tokendrop",
        "framework.moe_dispatcher",
        "alltoall",
        "only this dispatcher of Megatron-Core drops tokens (its moe_expert_capacity_factor)",
    ),
)


def stated(row: Mapping[str, str]) -> dict[str, Any]:
    """Keys of the experiment that the notes of a row set, in the order of `NOTES`."""
    text = f"{row.get('notes', '')} {row.get('framework', '')}".casefold()
    found: dict[str, Any] = {}
    for note in NOTES:
        match = re.search(note.pattern, text)
        if match and note.key not in found:
            found[note.key] = note.value_of(match)
    return found


def section(keys: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keys below `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)
    }
