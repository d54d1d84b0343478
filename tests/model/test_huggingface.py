"""Hugging Face configurations against the catalogue, and broken ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.model.huggingface import READERS, model_from_hf_config
from simulator.model.library import model

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu",
    "tie_word_embeddings": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
}  # fmt: skip

#: Facts of the published configurations: model type and the keys that matter.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3-8b": LLAMA3_8B,
    "gpt2-1.5b": {
        "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
        "vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "sliding_window": None,
    },
    "qwen2-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "sliding_window": 131072, "use_sliding_window": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "max_position_embeddings": 40960,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
        "num_hidden_layers": 61, "vocab_size": 129280, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_hidden_layers": 24, "vocab_size": 201088, "num_local_experts": 32,
        "num_experts_per_tok": 4, "attention_bias": True, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
    },
    "gemma2-9b": {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "num_hidden_layers": 42, "vocab_size": 256000, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
    },
    "bloom-7b1": {
        "model_type": "bloom", "hidden_size": 4096, "n_head": 32, "n_layer": 30,
        "vocab_size": 250880,
    },
    "falcon-40b": {
        "model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "new_decoder_architecture": True,
        "vocab_size": 65024, "bias": False, "alibi": False, "parallel_attn": True,
    },
    "opt-6.7b": {
        "model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_attention_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
        "activation_function": "relu", "do_layer_norm_before": True, "word_embed_proj_dim": 4096,
    },
    "bert-large": {
        "model_type": "bert", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 30522,
        "type_vocab_size": 2, "max_position_embeddings": 512, "hidden_act": "gelu",
    },
    "t5-11b": {
        "model_type": "t5", "d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_heads": 128,
        "num_layers": 24, "vocab_size": 32128, "relative_attention_num_buckets": 32,
        "n_positions": 512,
    },
    "vit-l-16": {
        "model_type": "vit", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 224, "patch_size": 16,
        "num_channels": 3, "hidden_act": "gelu",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_gives_the_catalogue_model(name: str) -> None:
    spec, known = model_from_hf_config(CONFIGS[name], name=name), model(name)
    assert spec.parameters == known.parameters
    assert spec.active_parameters == known.active_parameters
    assert (spec.layers, spec.window, spec.window_pattern) == (
        known.layers,
        known.window,
        known.window_pattern,
    )


@pytest.mark.parametrize(
    "config, parameters",
    [
        (  # microsoft/phi-2
            {
                "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
                "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 51200,
                "hidden_act": "gelu_new", "tie_word_embeddings": False,
            },
            2_779_683_840,
        ),
        (  # CohereForAI/c4ai-command-r-v01
            {
                "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528,
                "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 40,
                "vocab_size": 256000,
            },
            34_980_831_232,
        ),
        (  # stabilityai/stablelm-2-1_6b
            {
                "model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632,
                "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 24,
                "vocab_size": 100352, "use_qkv_bias": True,
            },
            1_644_515_328,
        ),
        (  # distilbert-base-uncased, masked-LM head
            {
                "model_type": "distilbert", "dim": 768, "hidden_dim": 3072, "n_heads": 12,
                "n_layers": 6, "vocab_size": 30522, "max_position_embeddings": 512,
            },
            66_985_530,
        ),
    ],
)  # fmt: skip
def test_counts_of_further_checkpoints(config: dict[str, Any], parameters: int) -> None:
    assert model_from_hf_config(config).parameters == parameters


def test_file_folder_and_mapping(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    for source in (folder, folder / "config.json", str(folder / "config.json")):
        assert model_from_hf_config(source).name == "my-llama"
    assert model_from_hf_config(LLAMA3_8B).parameters == 8_030_261_248


def test_text_part_of_a_multimodal_configuration() -> None:
    outer = {"model_type": "llava", "text_config": LLAMA3_8B}
    assert model_from_hf_config(outer).parameters == 8_030_261_248


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "big"}, "expected a whole number"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_key_value_heads": 5}, "does not divide"),
        ({"hidden_act": "sine"}, "unknown activation"),
        ({"tie_word_embeddings": 3}, "true or false"),
    ],
)
def test_broken_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_from_hf_config({**LLAMA3_8B, **changes})


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", '{"model_type": "llama"', "[" * 100000]
)
def test_broken_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        model_from_hf_config(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        model_from_hf_config(tmp_path / "none.json")
    binary = tmp_path / "config.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        model_from_hf_config(binary)


def test_mutated_configurations_are_models_or_clean_errors() -> None:
    draw = random.Random(7)
    values: list[Any] = [None, -1, 0, 1, 3, 2.5, "x", True, [], {}, 10**15, float("nan"), [None]]
    for _ in range(2000):
        config = dict(draw.choice(list(CONFIGS.values())))
        for _ in range(draw.randint(1, 3)):
            config[draw.choice(list(config))] = draw.choice(values)
        try:
            assert model_from_hf_config(config).parameters > 0
        except InputError:
            continue


def test_every_reader_reports_what_is_missing() -> None:
    for kind in READERS:
        with pytest.raises(InputError, match="missing"):
            model_from_hf_config({"model_type": kind})
