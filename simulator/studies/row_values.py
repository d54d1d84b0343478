"""What the cells of a table of published steps may say, as one table of synonyms.

Tables are written by people and by logs: `BF16`, `amp_bf16` and `bfloat16` are one precision,
`FSDP` and `ZeRO-3` one sharding, `n/a` and an empty cell both say nothing. `MEANINGS` lists every
spelling of a choice that is understood, beside the names that the experiment itself has;
`read_values` rewrites a row in those names. What is in neither is an error that names the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from simulator.errors import unknown_name
from simulator.experiment import PrecisionName, Recompute, Sharding
from simulator.model.context import RECOMPUTE_MODULES

#: Nothing is stated; letters and digits only, as `_fold` leaves them.
BLANK = frozenset(
    ("", "nan", "na", "null", "unknown", "unspecified", "notstated", "unstated", "tbd")
)  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """Spellings of one value of one column."""

    column: str
    value: str
    spellings: tuple[str, ...]
    """Case, spaces, dashes, underscores, dots and slashes do not matter."""
    meaning: str
    note: str = ""
    """Words added to the row's notes: what the value says beyond the column."""


MEANINGS: tuple[Meaning, ...] = (
    Meaning(
        "precision",
        "bf16",
        ("bfloat16", "bf16-mixed", "bf16-true", "amp_bf16", "mixed bf16", "bf16 mixed precision"),
        "matrix products in bfloat16",
    ),
    Meaning(
        "precision",
        "fp16",
        ("float16", "half", "amp_fp16", "fp16-mixed", "16-mixed", "mixed fp16", "amp"),
        "matrix products in IEEE half precision",
    ),
    Meaning("precision", "fp32", ("float32", "float", "single", "32-true"), "single precision"),
    Meaning("precision", "tf32", ("tensorfloat32",), "single precision, products in TF32"),
    Meaning(
        "precision",
        "fp8",
        ("float8", "amp_fp8", "fp8-mixed", "fp8_hybrid", "hybrid fp8", "fp8_e4m3"),
        "matrix products in fp8 with a scale per tensor, as the framework has it",
    ),
    Meaning(
        "precision",
        "fp8",
        ("fp8-cs", "fp8 current scaling", "fp8 tensorwise", "float8 tensorwise"),
        "... whose scales are the tensors' own maxima (Megatron-Bridge's FP8-CS, TorchAO)",
        note="fp8 current scaling",
    ),
    Meaning(
        "precision",
        "fp8",
        ("fp8-ds", "fp8 delayed", "fp8 delayed scaling"),
        "... whose scales come from earlier steps (Megatron-Bridge's FP8-DS)",
        note="fp8 delayed scaling",
    ),
    Meaning(
        "precision",
        "fp8",
        ("fp8-sc", "fp8-subchannel", "fp8-blockwise", "fp8 blockwise", "deepseek fp8"),
        "... with a scale per block of the tensor itself (DeepSeek-V3): cast like current scaling",
        note="fp8 current scaling",
    ),
    Meaning("precision", "mxfp8", ("fp8-mx", "mx-fp8", "amp_mxfp8"), "fp8 with a scale per 32"),
    Meaning("precision", "nvfp4", ("fp4", "nv-fp4", "amp_nvfp4"), "NVIDIA's fp4"),
    Meaning("precision", "int8", ("aqt_int8", "int8 aqt"), "products in int8"),
    Meaning(
        "sharding",
        "none",
        ("ddp", "dp", "data parallel", "no_shard", "zero-0", "stage 0", "replicated", "0", "no",
         "false"),
        "every replica holds all of the state",
    ),
    Meaning(
        "sharding",
        "zero1",
        ("zero-1", "zero stage 1", "stage 1", "1", "distributed optimizer", "distributed optimiser",
         "dist opt", "distopt", "distributed adam"),
        "the optimizer's state is shared out",
    ),
    Meaning(
        "sharding",
        "zero2",
        ("zero-2", "zero stage 2", "stage 2", "2", "shard_grad_op", "fsdp shard_grad_op"),
        "... and the gradients",
    ),
    Meaning(
        "sharding",
        "zero3",
        ("zero-3", "zero stage 3", "stage 3", "3", "fsdp", "fsdp1", "fsdp2", "full_shard",
         "fsdp full_shard", "fully sharded", "zero-infinity"),
        "... and the parameters",
    ),
    Meaning(
        "sharding",
        "zero3",
        ("hsdp", "hybrid_shard", "fsdp hybrid_shard", "hybrid sharding"),
        "... within a node where `shard_group` is empty (PyTorch HYBRID_SHARD's default)",
        note="hybrid sharding",
    ),
    Meaning(
        "recompute",
        "none",
        ("false", "no", "off", "0", "disabled", "0.0"),
        "all activations are stored",
    ),
    Meaning(
        "recompute",
        "full",
        ("true", "yes", "on", "1", "1.0", "uniform", "block", "layer", "whole layer",
         "full layer"),
        "layers are run again; uniform and block are Megatron-LM's methods of full granularity, "
        "block with the notes' num_layers=N of a stage",
    ),
    Meaning(
        "recompute",
        "selective",
        ("custom", "minimal", "attention core", "core attention", "op", "selective op",
         "selective activation checkpointing", "sac"),
        "what is cheap to compute is run again: what that is, the framework says (MaxText's custom "
        "and minimal policies keep the matrix products)",
    ),
    Meaning(
        "schedule", "", ("none", "no", "0", "no pipeline"), "no pipeline, or the framework's own"
    ),
    Meaning(
        "schedule",
        "gpipe",
        ("afab", "f-then-b", "fthenb", "all forward all backward", "fill drain"),
        "all forward passes, then all backward passes",
    ),
    Meaning(
        "schedule",
        "interleaved-1f1b",
        ("interleaved", "1f1b interleaved", "virtual pipeline", "vpp", "interleaved schedule",
         "looped 1f1b"),
        "1F1B over several model chunks of a rank",
    ),
)  # fmt: skip

#: Columns that hold a number; thousands may be separated by commas.
NUMBERS = (
    "canonical", "params_b", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq",
    "n_experts", "top_k", "expert_ffn", "gpus_per_node", "n_gpus", "network_gbps_per_gpu", "dp",
    "tp", "pp", "vpp", "cp", "ep", "shard_group", "micro_batch", "global_batch", "grad_accum",
    "step_time_s", "year",
)  # fmt: skip
#: Columns that hold yes or no.
FLAGS = ("canonical", "gated_mlp", "seq_parallel")
_YES = ("true", "yes", "on", "y", "t")
_NO = ("false", "no", "off", "n", "f")

#: Names that the experiment itself has; a schedule may also be the path of an action file.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "precision": get_args(PrecisionName),
    "sharding": get_args(Sharding),
    "recompute": get_args(Recompute),
}
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


def _fold(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())


def _spellings() -> dict[tuple[str, str], Meaning]:
    table: dict[tuple[str, str], Meaning] = {}
    for meaning in MEANINGS:
        for text in (meaning.value, *meaning.spellings):
            table.setdefault((meaning.column, _fold(text)), meaning)
    return table


_TABLE = _spellings()


def _choice(column: str, text: str, extra: list[str]) -> str:
    """The experiment's name for the words of a cell."""
    names = _CHOICES.get(column, ())
    if text in names:
        return text
    found = _TABLE.get((column, _fold(text)))
    if found is not None:
        if found.note:
            extra.append(found.note)
        return found.value
    if column == "recompute":
        modules = [part for part in re.split(r"[\s,+;|]+", text.strip("[]").casefold()) if part]
        if all(module in RECOMPUTE_MODULES for module in modules):
            extra.append(f"recompute modules [{', '.join(modules)}]")
            return "selective"
    if names:
        raise unknown_name(column, text, names, place=column)
    return text


def read_values(row: Mapping[str, str]) -> dict[str, str]:
    """`row` with its cells in the experiment's own words; reading it twice changes nothing.

    Raises
    ------
    InputError
        If a cell of `precision`, `sharding` or `recompute` holds no name that is known.
    """
    read = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    extra: list[str] = []
    for column in dict.fromkeys((*NUMBERS, *FLAGS, *_CHOICES, "schedule")):
        text = read.get(column)
        if not isinstance(text, str) or not text:
            continue
        folded = _fold(text)
        if folded in BLANK and not any(character.isdigit() for character in text):
            read[column] = ""
            continue
        if column in FLAGS and folded in (*_YES, *_NO):
            read[column] = "1" if folded in _YES else "0"
        elif column in NUMBERS and folded == "none":
            read[column] = ""
        elif column in NUMBERS and _THOUSANDS.fullmatch(text):
            read[column] = text.replace(",", "")
        elif column in _CHOICES or column == "schedule":
            read[column] = _choice(column, text, extra)
    if extra:
        notes = read.get("notes", "")
        read["notes"] = "; ".join([notes, *extra] if notes else extra)
    if "hybrid sharding" in extra and not read.get("shard_group"):
        read["shard_group"] = read.get("gpus_per_node", "")
    return read
