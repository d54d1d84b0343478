"""The catalogue: parameter counts against the authors', names, and models of one's own."""

from __future__ import annotations

import time

import pytest

from simulator.errors import InputError, InputErrors
from simulator.model.library import (
    find_model,
    model,
    model_from_mapping,
    model_names,
    parse_count,
    published_text,
)
from simulator.model.spec import count_parameters


def _rounding(text: str) -> float:
    """Half a unit of the last digit of a published count, relative: '1.7B' is 1.65..1.75."""
    digits = text.rstrip("KMBT")
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits) if digits != text else 0.0


@pytest.mark.parametrize("name", model_names())
def test_parameter_counts_match_the_published_ones(name: str) -> None:
    spec = model(name)
    assert spec.source
    text = published_text(name)
    if text is None:
        pytest.skip("no published count of the model as simulated")
    published = parse_count(text if not text.isdigit() else int(text))
    tolerance = max(0.005, _rounding(text))
    assert spec.parameters == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    "name, exact",
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gemma2-27b", 27_227_128_320),
        ("bloom-176b", 176_247_271_424),
        ("t5-11b", 11_307_321_344),
        ("vit-b-16", 86_567_656),
    ],
)
def test_counts_of_released_checkpoints_are_exact(name: str, exact: int) -> None:
    # relative-position tables of T5's two stacks are 2 * 32 * heads elements
    assert model(name).parameters == exact


def test_active_parameters_of_mixtures() -> None:
    # published: Mixtral 12.9B, Qwen3 3.3B and 22B, DeepSeek-V3 37B, gpt-oss 5.1B (without the
    # input table, 0.58B)
    assert model("mixtral-8x7b").active_parameters == pytest.approx(12.9e9, rel=0.01)
    assert model("qwen3-30b-a3b").active_parameters == pytest.approx(3.3e9, rel=0.02)
    assert model("qwen3-235b-a22b").active_parameters == pytest.approx(22e9, rel=0.02)
    assert model("deepseek-v3").active_parameters == pytest.approx(37e9, rel=0.02)
    oss = model("gpt-oss-120b")
    assert oss.active_parameters - oss.vocab * oss.hidden == pytest.approx(5.1e9, rel=0.02)


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("Llama-3-70B", "llama3-70b"),
        ("meta-llama/Llama-3.1-70B", "llama3-70b"),
        ("meta-llama/Meta-Llama-3-8B", "llama3-8b"),
        ("llama3_405b", "llama3.1-405b"),
        ("GPT2", "gpt2-124m"),
        ("gpt-3", "gpt3-175b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("mistralai/Mixtral-8x7B-Instruct", "mixtral-8x7b"),
        ("DeepSeek-V3", "deepseek-v3"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert model(spelling).name == name


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'llama3-70b'"):
        model("lama3-70b")
    assert find_model("no such thing") is None


def test_loading_one_model_is_fast() -> None:
    from simulator.model import library

    library._entries.cache_clear()
    start = time.perf_counter()
    library._entries()
    assert time.perf_counter() - start < 0.5  # 0.03 s on one core


def test_own_model_from_a_mapping() -> None:
    spec = model_from_mapping({"layers": 2, "hidden": 64, "heads": 4, "vocab": 1000})
    assert (spec.head_dim, spec.kv_heads, spec.ffn, spec.family) == (16, 4, 256, "gpt")
    blocks = count_parameters(spec, 0)
    assert blocks == 12 * 64 * 64 + 13 * 64  # Shoeybi et al.: 12 h^2 + 13 h per layer


def test_own_model_from_a_base() -> None:
    spec = model_from_mapping({"base": "llama3-8b", "layers": 4, "name": "short"})
    full = model("llama3-8b")
    assert spec.layers == 4
    assert full.parameters - spec.parameters == 28 * count_parameters(full, 0)
    wider = model_from_mapping({"base": "gpt3-125m", "hidden": 1536})
    assert wider.head_dim == 128  # follows hidden / heads as in its base


def test_all_errors_of_a_mapping_at_once() -> None:
    with pytest.raises(InputErrors) as caught:
        model_from_mapping(
            {"layers": "two", "hidden": 64, "heads": 4, "vocab": 10, "kv_head": 2, "norm": 3}
        )
    text = str(caught.value)
    assert "model.layers: expected a whole number" in text
    assert "did you mean 'kv_heads'" in text
    assert "model.norm: expected text" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "does not divide"),
        ({"layers": 0}, "layers"),
        ({"activation": "gelo"}, "did you mean 'gelu'"),
        ({"n_experts": 4, "top_k": 8, "expert_ffn": 64}, "more than the 4 experts"),
        ({"top_k": 2}, "n_experts"),
        ({"hidden": True}, "whole number"),
        ({"hidden": 10**30}, "number up to"),
        ({"window_pattern": []}, "must not be empty"),
        ({"window_pattern": [1, 0]}, "true and false"),
    ],
)
def test_contradictions(changes: dict[str, object], message: str) -> None:
    base: dict[str, object] = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 1000}
    with pytest.raises(InputError, match=message):
        model_from_mapping({**base, **changes})


def test_missing_dimensions_are_named() -> None:
    with pytest.raises(InputErrors) as caught:
        model_from_mapping({"layers": 2})
    assert {error.place for error in caught.value.errors} == {
        "model.hidden",
        "model.heads",
        "model.vocab",
    }


def test_plain_network() -> None:
    spec = model_from_mapping({"dense_sizes": [784, 128, 10], "activation": "relu"})
    assert spec.family == "mlp"
    assert spec.layers == 2
    assert spec.parameters == 784 * 128 + 128 + 128 * 10 + 10
