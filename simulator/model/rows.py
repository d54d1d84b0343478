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

from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.library import find_model, model_names
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
    return found


#: What a model takes over from a relative in the catalogue.
_STYLE = (
    "family", "activation", "norm", "positions", "biases", "qkv_bias", "norm_biases", "qk_norm",
    "parallel_blocks", "block_norms", "final_norm", "embedding_norm", "causal", "window",
    "window_pattern", "attention_sinks", "router_bias", "shared_gate", "tied_embeddings",
    "q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim", "v_dim", "token_types", "pooler",
    "lm_head_transform", "head_bias", "relative_buckets",
)  # fmt: skip


def _relative(name: str, values: Mapping[str, Any]) -> ModelSpec | None:
    """The catalogue's model with the longest common start of the name, among those with the same
    kind of MLP; None if it is shorter than three letters."""
    folded = re.sub(r"[^a-z0-9]", "", name.casefold())
    best, best_length = None, 2
    for candidate in model_names():
        other = re.sub(r"[^a-z0-9]", "", candidate)
        length = next(
            (i for i, (a, b) in enumerate(zip(folded, other, strict=False)) if a != b),
            min(len(folded), len(other)),
        )
        if length > best_length:
            spec = find_model(candidate)
            if (
                spec is not None
                and spec.family not in ("mlp", "vit", "t5")
                and spec.gated_mlp == bool(values.get("gated_mlp"))
                and spec.moe == bool(values.get("n_experts"))
            ):
                best, best_length = spec, length
    return best


def _style(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Architecture of a model that is not in the catalogue: a relative's by name; otherwise gated
    MLPs come with rmsnorm, rotary positions and no biases (the Llama line), others are GPT-style.
    """
    relative = _relative(name, values)
    if relative is not None:
        return {key: getattr(relative, key) for key in _STYLE}
    if values.get("gated_mlp"):
        return {
            "family": "moe" if values.get("n_experts") else "llama",
            "activation": "silu",
            "norm": "rmsnorm",
            "positions": "rope",
            "biases": False,
        }
    return {"family": "moe" if values.get("n_experts") else "gpt", "tied_embeddings": True}


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
        changes = {k: v for k, v in values.items() if v != getattr(known, k)}
        if known.encoder_layers and changes.get("layers") == known.encoder_layers:
            changes.pop("layers")  # an encoder-decoder's layers counted per side
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

    if name and not any(values.get(key) for key in ("layers", "hidden", "heads")):
        raise unknown_name("model", name, model_names(), place="model")
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
    values |= _style(values, name)
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


def _rounding(published: float) -> float:
    """Relative half unit of the last digit of a count given in billions, at most 3 %."""
    digits = f"{published / 1e9:.10g}"
    decimals = len(digits.partition(".")[2])
    return min(0.03, 0.5 * 10.0**-decimals * 1e9 / published)


def _fit(spec: ModelSpec, published: float, *, fixed_head_dim: bool) -> ModelSpec:
    """The alternative whose parameter count agrees with the stated one.

    Embeddings are tied or not, whichever is nearer; the usual reading stays if it agrees to the
    stated digits. A mixture's dense first blocks and shared experts are looked for; unusual
    widths of a head only where nothing else comes within 5 %.
    """

    def distance(candidate: ModelSpec) -> float:
        return abs(candidate.parameters / published - 1.0)

    first_dense = [(spec.first_dense_layers, spec.moe_every)]
    shared = [spec.shared_ffn]
    if spec.moe:
        if spec.ffn:
            # a dense ffn beside experts: first blocks are dense (DeepSeek), or every other one is
            first_dense = [(1, 1), (3, 1), (0, 2)]
        shared = [0, spec.expert_ffn, 2 * spec.expert_ffn]
    candidates = [
        replace(
            spec,
            first_dense_layers=first,
            moe_every=every,
            shared_ffn=width,
            tied_embeddings=tied,
        )
        for first, every in first_dense
        for width in shared
        for tied in (spec.tied_embeddings, not spec.tied_embeddings)
    ]
    tolerance = max(0.002, _rounding(published))
    if not spec.ffn or not spec.moe:
        usual = candidates[0]
        if distance(usual) <= tolerance:
            return usual
    best = min(candidates, key=distance)
    if distance(best) <= 0.05 or fixed_head_dim or spec.mla:
        return best
    widths = [
        replace(candidate, head_dim=width)
        for width in (64, 80, 96, 128, 192, 256)
        for candidate in candidates
    ]
    return min([best, *widths], key=distance)
