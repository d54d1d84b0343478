"""Models from rows of a table of published measurements.

A row states the common dimensions (layers, hidden, heads, kv_heads, ffn, gated_mlp, vocab,
n_experts, top_k, expert_ffn). What it leaves out comes, in this order, from the catalogue's model
of the same name, from the row's notes, and from the alternatives (tied or untied embeddings, width
of a head) that bring the parameter count nearest to the stated one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simulator.errors import InputError, raise_all
from simulator.model.library import find_model
from simulator.model.spec import ModelSpec

_HEAD_DIM = re.compile(r"head[_ ]dim(?:ension)?\s*[=:]?\s*(\d+)", re.IGNORECASE)
_WINDOW = re.compile(r"(alternating\s+)?sliding[- ]window(?:\s+of)?\s*[=:]?\s*(\d+)", re.IGNORECASE)

#: Columns of a row that describe the model.
COLUMNS = (
    "model", "params_b", "layers", "hidden", "heads", "kv_heads", "ffn", "gated_mlp", "vocab",
    "n_experts", "top_k", "expert_ffn", "seq", "notes",
)  # fmt: skip


def _number(row: Mapping[str, Any], key: str, errors: list[InputError]) -> float | None:
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        errors.append(InputError(f"expected a number, got {value!r}", place=key))
        return None
    if math.isnan(number):
        return None
    if math.isinf(number) or number < 0:
        errors.append(InputError(f"expected a positive number, got {value!r}", place=key))
        return None
    return number


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def _catalogue_match(name: str, values: Mapping[str, Any]) -> ModelSpec | None:
    """The catalogue's model of that name if it is the same architecture."""
    found = find_model(name)
    if found is None:
        return None
    for key in ("hidden", "heads"):
        if values.get(key) and values[key] != getattr(found, key):
            return None
    layers = values.get("layers")
    # an encoder-decoder's layers are also counted per side
    if layers and layers not in (found.layers, found.encoder_layers or found.layers):
        return None
    return found


def _guess_template(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Architecture of an unnamed model: gated MLPs come with rmsnorm, rotary positions and no
    biases (the Llama line), others are GPT-style."""
    lowered = name.casefold()
    if values.get("gated_mlp"):
        style: dict[str, Any] = {
            "family": "moe" if values.get("n_experts") else "llama",
            "activation": "silu",
            "norm": "rmsnorm",
            "positions": "rope",
            "biases": False,
            "tied_embeddings": False,
        }
        if "qwen3" in lowered:
            style["qk_norm"] = "head"
        elif "qwen" in lowered:
            style["qkv_bias"] = True
        elif "gemma" in lowered:
            style |= {"activation": "gelu", "tied_embeddings": True}
        return style
    if "bert" in lowered:
        return {
            "family": "bert", "causal": False, "token_types": 2, "embedding_norm": True,
            "final_norm": False, "pooler": True, "lm_head_transform": True, "head_bias": True,
            "tied_embeddings": True,
        }  # fmt: skip
    style = {"family": "moe" if values.get("n_experts") else "gpt"}
    if "mpt" in lowered:
        style |= {"biases": False, "norm_biases": False}
    if "nemotron" in lowered:
        style |= {"biases": False, "positions": "rope", "activation": "squared_relu"}
    return style


def model_from_row(row: Mapping[str, Any]) -> ModelSpec:
    """The model of one row of a measurements table.

    Parameters
    ----------
    row:
        Column name to value; empty text, None and NaN mean "not stated".

    Raises
    ------
    InputError
        For columns that are missing or no numbers, all at once.
    """
    errors: list[InputError] = []
    name = _text(row, "model").strip()
    values: dict[str, Any] = {}
    for key in (
        "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "n_experts", "top_k", "expert_ffn",
    ):  # fmt: skip
        number = _number(row, key, errors)
        if number is None:
            continue
        if not number.is_integer():
            errors.append(InputError(f"expected a whole number, got {number}", place=key))
            continue
        values[key] = int(number)
    gated = _number(row, "gated_mlp", errors)
    params_b = _number(row, "params_b", errors)
    seq = _number(row, "seq", errors)
    raise_all(errors)
    if gated is not None:
        values["gated_mlp"] = bool(gated)
    known = _catalogue_match(name, values) if name else None
    notes = _text(row, "notes")
    head_dim = _HEAD_DIM.search(notes)
    published = params_b * 1e9 if params_b else None

    if known is not None:
        changes = {k: v for k, v in values.items() if v != getattr(known, k) and k != "layers"}
        if not values.get("n_experts"):
            # zeros and blanks of dense rows say nothing about experts
            for key in ("n_experts", "top_k", "expert_ffn"):
                changes.pop(key, None)
        if known.moe and not known.ffn:
            changes.pop("ffn", None)  # every block is an MoE block
        if head_dim and not known.mla:
            changes["head_dim"] = int(head_dim[1])
        if known.positions == "learned" and known.family != "bert" and seq:
            changes["max_seq"] = max(int(seq), 1)
        if published:
            changes["published_parameters"] = published
        return replace(known, **changes).check(name)

    missing = [
        InputError("is missing", place=key)
        for key in ("layers", "hidden", "heads", "vocab")
        if not values.get(key)
    ]
    raise_all(missing)
    if not values.get("n_experts"):
        for key in ("n_experts", "top_k", "expert_ffn"):
            values.pop(key, None)
    heads, hidden = values["heads"], values["hidden"]
    values.setdefault("kv_heads", heads)
    values.setdefault("gated_mlp", False)
    if values.get("n_experts"):
        values.setdefault("top_k", 1)
        values.setdefault("expert_ffn", values.get("ffn") or 4 * hidden)
        values.setdefault("ffn", 0)
    else:
        values.setdefault("ffn", 4 * hidden)
    values |= _guess_template(values, name)
    window = _WINDOW.search(notes)
    if window:
        values["window"] = int(window[2])
        values["window_pattern"] = (True, False) if window[1] else (True,)
    spec = ModelSpec(
        name=name or "unnamed",
        head_dim=int(head_dim[1]) if head_dim else max(1, hidden // heads),
        max_seq=int(seq) if seq else 2048,
        published_parameters=published,
        source="row of a measurements table",
        **values,
    ).check(name or None)
    if published is None:
        return spec
    return _fit(spec, published, fixed_head_dim=head_dim is not None)


def _fit(spec: ModelSpec, published: float, *, fixed_head_dim: bool) -> ModelSpec:
    """The alternative whose parameter count is nearest to the stated one.

    The first candidate (the usual reading) wins unless another is clearly nearer: published
    counts are rounded, and a rounding must not change an architecture.
    """

    def distance(candidate: ModelSpec) -> float:
        return abs(candidate.parameters / published - 1.0)

    dims = [spec.head_dim]
    if not fixed_head_dim:
        dims += [d for d in (64, 80, 96, 128, 192, 256) if d != spec.head_dim]
    dense_ffn = [(spec.ffn, spec.first_dense_layers)]
    shared = [spec.shared_ffn]
    if spec.moe:
        if spec.ffn:
            # a dense ffn beside experts: the first blocks are dense (DeepSeek-V2, V3)
            dense_ffn = [(spec.ffn, 1), (spec.ffn, 3), (spec.ffn, 0)]
        shared += [spec.expert_ffn, 2 * spec.expert_ffn]
    best, best_score = spec, distance(spec)
    if best_score <= 0.01:
        return spec
    for dim in dims:
        for ffn, first in dense_ffn:
            for width in shared:
                for tied in (spec.tied_embeddings, not spec.tied_embeddings):
                    candidate = replace(
                        spec,
                        head_dim=dim,
                        ffn=ffn,
                        first_dense_layers=first,
                        shared_ffn=width,
                        tied_embeddings=tied,
                    )
                    score = distance(candidate)
                    if score < best_score - 0.005:
                        best, best_score = candidate, score
    return best
