"""Megatron-Bridge's recipes: every line of the table says something, and rows count more."""

from __future__ import annotations

import math

import pytest

from simulator.catalog.frameworks import framework_from_mapping
from simulator.studies.recipes import MEGATRON_BRIDGE, UNNAMED, Recipe, bridge_recipe
from simulator.studies.row_notes import stated
from simulator.studies.validation import (
    FURTHER,
    experiment_from_row,
    framework_of_row,
    read_rows,
)

MODELS = ("deepseek-v3", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "kimi-k2", "mixtral")
DEVICES = ("GB300", "GB200", "B300", "B200", "H100-80GB-SXM")
RELEASES = (25.09, 25.11, 26.02, 26.04, 26.06)


@pytest.mark.parametrize("recipe", MEGATRON_BRIDGE, ids=lambda recipe: str(recipe)[:90])
def test_every_recipe_is_a_profile(recipe: Recipe) -> None:
    framework_from_mapping({"base": "megatron-bridge", **recipe.keys})
    assert 0.0 <= recipe.since < recipe.before <= math.inf


def test_no_recipe_is_hidden_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the answer to something: without it some mixture would be simulated differently."""

    def answers() -> list[dict[str, object]]:
        return [
            bridge_recipe(model, device, precision, release, drops=drops)
            for model in MODELS
            for device in DEVICES
            for precision in ("bf16", "fp8", "mxfp8")
            for release in RELEASES
            for drops in (False, True)
        ]

    all_of_them = answers()
    for index, recipe in enumerate(MEGATRON_BRIDGE):
        rest = MEGATRON_BRIDGE[:index] + MEGATRON_BRIDGE[index + 1 :]
        monkeypatch.setattr("simulator.studies.recipes.MEGATRON_BRIDGE", rest)
        if recipe.model or recipe.keys:  # the last that drops tokens only says: nothing
            assert answers() != all_of_them, recipe


def test_whole_iterations_are_replayed_from_the_release_that_says_so() -> None:
    def base(release: float | None, model: str = "qwen3-30b-a3b", device: str = "GB300") -> object:
        return bridge_recipe(model, device, "mxfp8", release, drops=False).get("base")

    assert base(26.06) == "megatron-bridge-fused-moe"
    assert base(26.04) is None
    assert base(None) == base(UNNAMED) is None
    assert base(26.06, "kimi-k2") is None
    assert base(26.06, "deepseek-v3", "B200") is None


def test_what_a_row_states_counts_more_than_its_recipe() -> None:
    row = {
        "framework": "Megatron-Bridge", "model": "qwen3-30b-a3b", "n_experts": "128",
        "gpu": "B200", "precision": "mxfp8", "notes": "NeMo container 26.02; HybridEP",
    }  # fmt: skip
    assert framework_of_row({**row, "notes": "NeMo container 26.02"})["moe_dispatcher"] == (
        "alltoall"
    )
    assert framework_of_row(row)["moe_dispatcher"] == "deepep"


def test_a_model_may_be_trained_without_multi_token_prediction() -> None:
    assert stated({"notes": "DeepSeekV3 (w/o MTP)"}) == {"model.mtp_layers": 0}
    (row,) = (r for r in read_rows(FURTHER) if r["id"] == "mbridge-dsv3-001")
    assert experiment_from_row(row).model["mtp_layers"] == 0
    kept = experiment_from_row({**row, "notes": ""}).model
    assert kept["mtp_layers"] == 1
