"""Models from rows of a measurements table."""

from __future__ import annotations

import math
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.model.library import model, model_names
from simulator.model.rows import model_from_row


def row_of(name: str, **changes: Any) -> dict[str, Any]:
    """The row that a table would have for a catalogue model."""
    spec = model(name)
    row: dict[str, Any] = {
        "model": name,
        "params_b": round(spec.parameters / 1e9, 2),
        "layers": float(spec.layers),
        "hidden": float(spec.hidden),
        "heads": float(spec.heads),
        "kv_heads": float(spec.kv_heads),
        "ffn": float(spec.ffn) if spec.ffn else "",
        "gated_mlp": float(spec.gated_mlp),
        "vocab": float(spec.vocab),
        "n_experts": float(spec.n_experts) if spec.moe else "",
        "top_k": float(spec.top_k) if spec.moe else "",
        "expert_ffn": float(spec.expert_ffn) if spec.moe else "",
        "seq": 2048,
        "notes": "",
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    "name",
    ["llama3-70b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b", "mpt-7b", "maxtext-22b",
     "gemma2-27b", "t5-11b", "gpt-22b", "nemotron-340b"],
)  # fmt: skip
def test_known_names_bring_what_the_columns_leave_out(name: str) -> None:
    spec, known = model_from_row(row_of(name)), model(name)
    assert spec.parameters == pytest.approx(known.parameters, rel=0.005)
    assert spec.head_dim == known.head_dim
    assert spec.kv_lora_rank == known.kv_lora_rank
    assert spec.window_pattern == known.window_pattern


@pytest.mark.parametrize(
    "name",
    [n for n in model_names() if model(n).family in ("gpt", "llama")
     and model(n).embedding_dim == 0 and not n.startswith("bloom")],
)  # fmt: skip
def test_unknown_names_agree_with_the_stated_count(name: str) -> None:
    """Of a dense decoder the columns and the count are enough, whatever it is called."""
    notes = f"head_dim {model(name).head_dim}"
    spec = model_from_row(row_of(name, model="x", notes=notes, seq=model(name).max_seq))
    stated = row_of(name)["params_b"] * 1e9
    assert spec.parameters == pytest.approx(stated, rel=0.02 if stated > 1e9 else 0.06)
    if name not in ("gpt2-124m", "opt-125m", "gpt3-125m"):
        assert spec.tied_embeddings == model(name).tied_embeddings or stated > 60e9


def test_head_dim_from_the_notes_or_from_the_count() -> None:
    """Qwen3-32B's heads are 128 wide although 5120 / 64 is 80."""
    stated = model_from_row(row_of("qwen3-32b", model="x", notes="dims; head_dim 128"))
    assert stated.head_dim == 128
    inferred = model_from_row(row_of("qwen3-32b", model="x"))
    assert inferred.head_dim == 128


def test_shared_experts_and_dense_blocks_from_the_count() -> None:
    row = row_of("deepseek-moe-16b", model="x", params_b=16.376)
    spec = model_from_row(row)
    assert (spec.first_dense_layers, spec.shared_ffn) == (1, 2 * spec.expert_ffn)


def test_window_from_the_notes() -> None:
    spec = model_from_row(
        row_of("gpt-oss-20b", model="x", notes="head_dim 64, alternating sliding-window 128")
    )
    assert (spec.window, spec.window_pattern) == (128, (True, False))


def test_relatives_lend_their_style() -> None:
    row = row_of("llama3-8b", model="qwen3-proxy", layers=12, params_b=math.nan)
    spec = model_from_row(row)
    assert spec.qk_norm == "head"
    shortened = model_from_row(row_of("deepseek-v3", layers=16.0, params_b=""))
    assert shortened.layers == 16
    assert shortened.mla


def test_learned_positions_follow_the_row() -> None:
    short, long = (model_from_row(row_of("mpt-1b", seq=s)) for s in (512, 65536))
    assert long.parameters - short.parameters == (65536 - 512) * 2048


def test_layers_of_an_encoder_decoder_may_be_counted_per_side() -> None:
    assert model_from_row(row_of("t5-11b", layers=24.0)).layers == 48


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": "many"}, "layers: expected a number"),
        ({"hidden": -1}, "hidden: expected a positive number"),
        ({"heads": 3.5}, "heads: expected a whole number"),
        ({"vocab": "", "model": "x"}, "vocab: is missing"),
        ({"kv_heads": 7, "model": "x"}, "does not divide"),
        ({"params_b": math.inf}, "params_b"),
    ],
)
def test_broken_rows(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_from_row(row_of("llama3-8b", **changes))
