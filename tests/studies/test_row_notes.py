"""What the notes of a published row say, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from simulator.catalog.frameworks import FrameworkProfile
from simulator.experiment import Overlap, Parallel, Training
from simulator.model.spec import ModelSpec
from simulator.studies.row_notes import NOTES, section, stated
from simulator.studies.validation import experiment_from_row, framework_of_row

#: Words of a row, and all the keys that they set. Every alternative of every pattern is here.
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("CUDA graphs: full_iteration", {"framework.cuda_graphs": True}),
    ("cuda graph [full_iteration]", {"framework.cuda_graphs": True}),
    ("EP 8 in CUDA graphs", {"framework.cuda_graphs": True}),
    ("no CUDA graphs", {}),
    ("layout Et*3|(tt|)*29,m|L", {"parallel.pipeline_layout": "et*3|(tt|)*29,m|l"}),
    ("the layout is not stated", {}),
    ("DeepSeekV3 (w/o MTP)", {"model.mtp_layers": 0}),
    ("DeepSeekV3 without MTP", {"model.mtp_layers": 0}),
    ("no MTP", {"model.mtp_layers": 0}),
    ("DeepSeekV3 (w/ MTP)", {}),
    ("without CUDA graphs", {}),
    ("cuda graph [mlp]", {"framework.graphed_modules": "mlp"}),
    ("cuda graph [attn, mlp]", {"framework.graphed_modules": "attn mlp"}),
    ("cuda graph [moe_router, attn]", {"framework.graphed_modules": "moe_router attn"}),
    ("cuda graph [attn, mamba]", {"framework.graphed_modules": "attn"}),
    ("DeepEP", {"framework.moe_dispatcher": "deepep"}),
    ("HybridEP dispatcher", {"framework.moe_dispatcher": "deepep"}),
    ("all-to-all dispatcher", {"framework.moe_dispatcher": "alltoall"}),
    ("alltoall dispatcher", {"framework.moe_dispatcher": "alltoall"}),
    ("deepep, not the alltoall dispatcher", {"framework.moe_dispatcher": "deepep"}),
    ("allgather dispatcher", {"framework.moe_dispatcher": "allgather"}),
    ("pre-flash attention", {"framework.fused_attention": False}),
    ("no Flash attention", {"framework.fused_attention": False}),
    ("flash attention", {}),
    ("AsyncTP", {"parallel.overlap.tensor": True}),
    ("TP comm overlap on", {"parallel.overlap.tensor": True}),
    ("TP overlap", {"parallel.overlap.tensor": True}),
    ("tp comm overlap off", {}),
    ("all-to-all overlap", {"parallel.overlap.expert": True}),
    ("A2A overlap", {"parallel.overlap.expert": True}),
    ("EP overlap", {"parallel.overlap.expert": True}),
    ("expert TP 1", {"parallel.expert_tensor": 1}),
    ("EP 8 x ETP 4", {"parallel.expert_tensor": 4}),
    ("expert tensor parallelism 2", {"parallel.expert_tensor": 2}),
    ("expert tensor parallel = 2", {"parallel.expert_tensor": 2}),
    ("expert tensor 2", {"parallel.expert_tensor": 2}),
    ("fp8 current scaling", {"framework.fp8_recipe": "current"}),
    ("delayed scaling", {"framework.fp8_recipe": "delayed"}),
    ("no gradient all-reduce overlap", {"parallel.overlap.grad_reduce": False}),
    ("recompute_num_layers=5", {"training.recompute_layers": 5}),
    ("recompute modules [mla_up_proj, mlp]",
     {"training.recompute_modules": ("mla_up_proj", "mlp")}),
    ("recompute norm+act", {"training.recompute_modules": ("layernorm", "moe_act")}),
    ("activation CPU offload", {"training.activation_offload": True}),
    ("activation CPU offload of 12 layers",
     {"training.activation_offload": True, "training.activation_offload_layers": 12}),
    ("tokendrop",
     {"training.expert_capacity_factor": 1.0, "framework.moe_dispatcher": "alltoall"}),
    ("256 nodes, measured on a quiet cluster", {}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "keys"), EXAMPLES)
@pytest.mark.parametrize("column", ["notes", "framework"])
def test_words_set_their_keys(words: str, keys: dict[str, Any], column: str) -> None:
    assert stated({column: words}) == keys
    assert stated({column: f"x; {words.upper()}; y"}) == keys


def test_every_pattern_has_an_example() -> None:
    texts = [words.casefold() for words, _ in EXAMPLES]
    for note in NOTES:
        assert any(re.search(note.pattern, text) for text in texts), note.pattern
        for alternative in note.pattern.split("|") if "(" not in note.pattern else ():
            assert any(re.search(alternative, text) for text in texts), alternative


def test_every_key_is_one_of_the_experiment() -> None:
    known = {
        "framework": FrameworkProfile, "parallel": Parallel, "parallel.overlap": Overlap,
            "training": Training, "model": ModelSpec,
    }  # fmt: skip
    for note in NOTES:
        head, _, name = note.key.rpartition(".")
        assert name in {field.name for field in dataclasses.fields(known[head])}
        assert note.meaning


def test_sections() -> None:
    keys = {"training.a": 1, "training.b": 2, "framework.a": 3}
    assert section(keys, "training.") == {"a": 1, "b": 2}
    assert section(keys, "parallel.") == {}


ROW = {
    "id": "row", "model": "mixtral-8x7b", "layers": "32", "hidden": "4096", "heads": "32",
    "kv_heads": "8", "n_experts": "8", "top_k": "2", "expert_ffn": "14336", "vocab": "32000",
    "gated_mlp": "1", "seq": "4096", "gpu": "H100-SXM", "n_gpus": "16", "gpus_per_node": "8",
    "ep": "8", "micro_batch": "1", "global_batch": "64", "step_time_s": "1.0",
    "framework": "Megatron-Core", "recompute": "selective",
}  # fmt: skip


def test_they_reach_the_experiment() -> None:
    notes = ("alltoall dispatcher; EP overlap; recompute modules [moe_act]; tokendrop; "
             "recompute_num_layers=3; activation CPU offload of 4 layers")  # fmt: skip
    row = {**ROW, "notes": notes}
    experiment = experiment_from_row(row)
    assert framework_of_row(row) == {"base": "megatron-core", "moe_dispatcher": "alltoall"}
    assert experiment.framework == framework_of_row(row)
    assert experiment.parallel.overlap == Overlap(expert=True)
    assert experiment.training.recompute_modules == ("moe_act",)
    assert experiment.training.recompute_layers is None  # of full recomputation only
    assert experiment.training.activation_offload_layers == 4
    assert experiment.training.expert_capacity_factor == 1.0
    full = experiment_from_row({**row, "recompute": "full"}).training
    assert (full.recompute_layers, full.recompute_modules) == (3, None)


def test_a_table_without_notes_is_read() -> None:
    assert experiment_from_row(ROW).training.expert_capacity_factor is None


def test_nemos_recipes_drop_tokens_of_experts() -> None:
    nemo = {**ROW, "framework": "NeMo 25.02/Megatron-Core"}
    experts = {"n_experts": "8", "top_k": "2", "expert_ffn": "14336"}
    assert experiment_from_row({**nemo, **experts}).training.expert_capacity_factor == 1.0
    dense = dict.fromkeys(experts, "")
    assert experiment_from_row({**nemo, **dense}).training.expert_capacity_factor is None


def test_nemos_recipe_of_deepseek_v3_leaves_room_at_both_ends() -> None:
    row = {**ROW, "framework": "NeMo 25.x", "model": "deepseek-v3", "layers": "61", "pp": "4",
           "n_gpus": "64"}  # fmt: skip
    assert experiment_from_row(row).parallel.stage_layers == (15, 16, 16, 14)
    assert experiment_from_row({**row, "pp": "1"}).parallel.stage_layers is None
