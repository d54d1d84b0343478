"""What vendors' performance recipes set for mixtures of experts, by model, accelerator and release.

Tables of published steps name a recipe, not what it sets: which modules are replayed from CUDA
graphs, how tokens are exchanged, whether that hides behind another micro-batch. `MEGATRON_BRIDGE`
is that, from the project's own files: `scripts/performance/configs/*/*_workload_base_configs.py`
(and, for releases before 26, the `*_llm_pretrain.py` and `workload_base_configs.py` before them).
Whatever a row states counts more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GRAPHS = {"graphed_modules": "attn moe_router moe_preprocess"}
_ROUTER_GRAPHS = {"graphed_modules": "moe_router moe_preprocess"}
_ALLTOALL = {"moe_dispatcher": "alltoall"}
_FUSED = {"base": "megatron-bridge-fused-moe"}


@dataclass(frozen=True)
class Recipe:
    """Behaviours (keys of a framework profile) that one recipe sets."""

    model: str
    """Regular expressions of the model, the accelerator and the precision; empty: any."""
    device: str = ""
    precision: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    since: float = 0.0
    """First release (year.month of the NeMo container) that it is of."""
    before: float = math.inf
    drops: bool = False
    """Whether it is the recipe that drops tokens."""


#: First match wins. Releases: token drop was the default of 25.09; 26.06 replays whole iterations
#: of MXFP8 mixtures from graphs. A release that is not named is taken as the last before that.
MEGATRON_BRIDGE: tuple[Recipe, ...] = (
    # cuda_graph_scope full_iteration, on B200 of the 30B model only
    Recipe("qwen3", "^GB", keys={"cuda_graphs": True}, drops=True),
    Recipe("qwen3-30b", "^B200", keys={"cuda_graphs": True}, drops=True),
    Recipe("", drops=True),
    # cuda_graph_impl full_iteration, moe_a2a_overlap, cutedsl_fused_grouped_mlp
    Recipe("qwen3-30b", "^G?B[23]00", "mxfp8", _FUSED, since=26.06),
    Recipe("qwen3-235b|gpt-oss", "^GB", "mxfp8", _FUSED, since=26.06),
    Recipe("deepseek-v3", "^GB300", "mxfp8", _FUSED, since=26.06),
    Recipe("deepseek-v3", "^GB200", "mxfp8", {**_FUSED, "fp8_attention": False}, since=26.06),
    Recipe(
        "gpt-oss", "^B300", "mxfp8",
        {**_GRAPHS, "moe_overlap": True, "fused_grouped_mlp": True, "grouped_cast": "fused",
         "fp8_attention": True},
        since=26.06,
    ),
    # gpt-oss keeps its provider's moe_token_dispatcher_type; on B300 HybridEP came with 8-way EP
    Recipe("gpt-oss", "^B300", keys=_GRAPHS, since=26.04),
    Recipe("gpt-oss", "^G?B300", keys={**_ALLTOALL, **_GRAPHS}),
    Recipe("gpt-oss", keys=_ALLTOALL),
    Recipe("qwen3-235b", "^GB", keys=_GRAPHS),
    # Qwen3's provider exchanges by an all-to-all where no moe_flex_dispatcher_backend is set
    Recipe("qwen3-235b", "^B300", keys={**_ALLTOALL, "moe_overlap": True}, before=26.04),
    Recipe("qwen3-235b", "^B[23]00", keys=_ALLTOALL),
    Recipe("qwen3-235b", "^H100", keys={**_ALLTOALL, "moe_overlap": True}),
    Recipe("qwen3-30b", "^GB200", "mxfp8", _ROUTER_GRAPHS),
    Recipe("qwen3-30b", "^GB200", keys=_GRAPHS),
    Recipe("qwen3-30b", "^G?B300", keys=_ROUTER_GRAPHS),
    Recipe("qwen3-30b", "^B200", keys=_GRAPHS, since=26.04),
    Recipe("qwen3-30b", "^B200", keys={**_ALLTOALL, **_ROUTER_GRAPHS}, since=26.02),
    Recipe("qwen3-30b", "^B200", keys=_ALLTOALL),
    # two sequences per micro-batch on GB300: cuda_graph_scope [], as Kimi-K2
    Recipe("deepseek-v3", "^GB300", "fp8", since=26.02),
    Recipe("deepseek-v3", "^GB", keys=_GRAPHS, since=25.11),
    Recipe("deepseek-v3", "^B300", keys=_GRAPHS, since=26.04),
    Recipe("deepseek-v3", "^B200", "mxfp8", {**_GRAPHS, "moe_overlap": True}, since=26.04),
    Recipe("kimi-k2", "^GB200", keys=_ROUTER_GRAPHS),
)  # fmt: skip
#: Release of a row that names none.
UNNAMED = 26.04


def bridge_recipe(
    model: str, device: str, precision: str, release: float | None, *, drops: bool
) -> dict[str, Any]:
    """Keys that Megatron-Bridge's recipe of a mixture of experts sets in its framework profile.

    Parameters
    ----------
    model, device, precision:
        Names as the catalogue has them.
    release:
        Of the NeMo container, 26.04; None if it is not known.
    drops:
        Whether tokens beyond an expert's capacity are dropped.
    """
    when = UNNAMED if release is None else release
    for recipe in MEGATRON_BRIDGE:
        if (
            recipe.drops == drops
            and recipe.since <= when < recipe.before
            and re.search(recipe.model, model)
            and re.search(recipe.device, device)
            and re.search(recipe.precision, precision)
        ):
            return dict(recipe.keys)
    return {}


def nemo_expert_recipe(model: str, pipeline: int, virtual: int) -> dict[str, Any]:
    """Keys of an experiment that NeMo's performance scripts set for a mixture of experts.

    They add MegatronTokenDropCallback to Mixtral, Grok and DeepSeek-V3 (moe_expert_capacity_factor
    1, moe_pad_expert_input_to_capacity); pretrain_deepseek_v3.py shortens the first stage by one
    layer and the last by two (num_layers_in_first_pipeline_stage, in_last).
    """
    recipe: dict[str, Any] = {"training.expert_capacity_factor": 1.0}
    if "deepseek-v3" in model and pipeline > 1 == virtual and 64 % pipeline == 0:
        each = 64 // pipeline
        recipe["parallel.stage_layers"] = (each - 1, *(each,) * (pipeline - 2), each - 2)
    return recipe
