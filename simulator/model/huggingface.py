"""Models from Hugging Face `config.json` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.library import model_from_mapping
from simulator.model.spec import ModelSpec

#: Largest config.json that is read; real ones have a few kilobytes.
_MAX_BYTES = 4 << 20

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "squared_relu",
    "tanh": "tanh",
}


class _Config:
    """Typed access to a config; collects errors."""

    def __init__(self, raw: Mapping[str, Any], place: str) -> None:
        self.raw, self.place = raw, place
        self.errors: list[InputError] = []

    def integer(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self.errors.append(
                    InputError(
                        f"expected a whole number, got {value!r}", place=f"{self.place}.{key}"
                    )
                )
                return default or 1
            return value
        if default is None:
            self.errors.append(
                InputError(f"{' or '.join(map(repr, keys))} is missing", place=self.place)
            )
            return 1
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.errors.append(
                InputError(f"expected true or false, got {value!r}", place=f"{self.place}.{key}")
            )
            return default
        return value

    def activation(self, *keys: str, default: str) -> str:
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if not isinstance(value, str) or value not in _ACTIVATIONS:
                self.errors.append(
                    unknown_name(
                        "activation", str(value), _ACTIVATIONS, place=f"{self.place}.{key}"
                    )
                )
                return default
            return _ACTIVATIONS[value]
        return default

    def window(self, layers: int) -> dict[str, Any]:
        """Sliding window and its pattern from `layer_types`, `sliding_window_pattern` or a flag."""
        size = self.raw.get("sliding_window")
        if not size or self.raw.get("use_sliding_window") is False:
            return {}
        size = self.integer("sliding_window")
        types = self.raw.get("layer_types")
        if isinstance(types, list) and types:
            marks = [kind == "sliding_attention" for kind in types]
            return {"window": size, "window_pattern": _period(marks[:layers] or [True])}
        every = self.raw.get("sliding_window_pattern")
        if isinstance(every, int) and not isinstance(every, bool) and 1 < every <= layers:
            return {"window": size, "window_pattern": [True] * (every - 1) + [False]}
        return {"window": size}


def _period(marks: list[bool]) -> list[bool]:
    """The shortest prefix whose repetition gives `marks`."""
    for length in range(1, len(marks) + 1):
        if all(mark == marks[i % length] for i, mark in enumerate(marks)):
            return marks[:length]
    return marks


def _llama_like(c: _Config, **extra: Any) -> dict[str, Any]:
    heads = c.integer("num_attention_heads")
    hidden = c.integer("hidden_size")
    layers = c.integer("num_hidden_layers")
    if c.raw.get("head_dim") is None and heads and hidden % heads and not c.errors:
        problem = f"{hidden} is no multiple of num_attention_heads {heads}; there is no head_dim"
        c.errors.append(InputError(problem, place=f"{c.place}.hidden_size"))
    return {
        "family": "llama",
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": c.integer("num_key_value_heads", default=heads),
        "head_dim": c.integer("head_dim", default=hidden // max(1, heads)),
        "ffn": c.integer("intermediate_size"),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("max_position_embeddings", default=2048),
        "activation": c.activation("hidden_act", "hidden_activation", default="silu"),
        "norm": "rmsnorm",
        "positions": "rope",
        "biases": False,
        "gated_mlp": True,
        "tied_embeddings": c.flag("tie_word_embeddings", False),
        **c.window(layers),
        **extra,
    }


def _llama(c: _Config) -> dict[str, Any]:
    return _llama_like(c, qkv_bias=c.flag("attention_bias", False))


def _internlm(c: _Config) -> dict[str, Any]:
    return _llama_like(c, qkv_bias=c.flag("bias", False))


def _qwen2(c: _Config) -> dict[str, Any]:
    return _llama_like(c, qkv_bias=True)


def _qwen3(c: _Config) -> dict[str, Any]:
    values = _llama_like(c, qk_norm="head", qkv_bias=c.flag("attention_bias", False))
    values["head_dim"] = c.integer("head_dim", default=128)
    return values


def _experts(c: _Config, *count: str, top_k: str = "num_experts_per_tok") -> dict[str, Any]:
    return {"family": "moe", "n_experts": c.integer(*count), "top_k": c.integer(top_k)}


def _mixtral(c: _Config) -> dict[str, Any]:
    ffn = c.integer("intermediate_size")
    return _llama_like(c, **_experts(c, "num_local_experts"), expert_ffn=ffn) | {"ffn": 0}


def _qwen2_moe(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        **_experts(c, "num_experts"),
        qkv_bias=True,
        expert_ffn=c.integer("moe_intermediate_size"),
        shared_ffn=c.integer("shared_expert_intermediate_size", default=0),
        shared_gate=True,
        moe_every=c.integer("decoder_sparse_step", default=1),
    )


def _qwen3_moe(c: _Config) -> dict[str, Any]:
    return _qwen3(c) | {
        **_experts(c, "num_experts", "num_local_experts"),
        "expert_ffn": c.integer("moe_intermediate_size"),
        "moe_every": c.integer("decoder_sparse_step", default=1),
    }


def _deepseek(c: _Config) -> dict[str, Any]:
    values = _llama_like(c)
    if c.raw.get("n_routed_experts"):
        width = c.integer("moe_intermediate_size")
        values |= {
            **_experts(c, "n_routed_experts"),
            "expert_ffn": width,
            "shared_ffn": width * c.integer("n_shared_experts", default=0),
            "first_dense_layers": c.integer("first_k_dense_replace", default=0),
            "moe_every": c.integer("moe_layer_freq", default=1),
        }
        if c.raw.get("topk_method", "noaux_tc") != "greedy" and (c.raw.get("n_group") or 1) > 1:
            values["router_groups"] = c.integer("n_group")
            values["router_group_limit"] = c.integer("topk_group")
    if c.raw.get("kv_lora_rank"):
        values |= {
            "kv_heads": values["heads"],
            "q_lora_rank": c.integer("q_lora_rank", default=0),
            "kv_lora_rank": c.integer("kv_lora_rank"),
            "qk_nope_dim": c.integer("qk_nope_head_dim"),
            "qk_rope_dim": c.integer("qk_rope_head_dim"),
            "v_dim": c.integer("v_head_dim"),
            "head_dim": c.integer("v_head_dim"),
        }
    values["mtp_layers"] = c.integer("num_nextn_predict_layers", default=0)
    return values


def _glm4_moe(c: _Config) -> dict[str, Any]:
    values = _deepseek(c)
    values["qkv_bias"] = c.flag("attention_bias", False)
    values["qk_norm"] = "head" if c.flag("use_qk_norm", False) else "none"
    return values


def _gpt_oss(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        **_experts(c, "num_local_experts"),
        expert_ffn=c.integer("intermediate_size"),
        biases=c.flag("attention_bias", True),
        norm_biases=False,
        router_bias=True,
        attention_sinks=True,
    ) | {"ffn": 0, "head_dim": c.integer("head_dim", default=64)}


def _gemma(c: _Config) -> dict[str, Any]:
    return _llama_like(c, activation="gelu", tied_embeddings=True) | {
        "head_dim": c.integer("head_dim", default=256)
    }


def _gemma2(c: _Config) -> dict[str, Any]:
    values = _gemma(c) | {"block_norms": 4}
    if "window" in values and "layer_types" not in c.raw:
        values["window_pattern"] = [True, False]
    return values


def _gemma3(c: _Config) -> dict[str, Any]:
    values = _gemma(c) | {"block_norms": 4, "qk_norm": "head"}
    if "window" in values and not {"layer_types", "sliding_window_pattern"} & set(c.raw):
        values["window_pattern"] = [True] * 5 + [False]
    return values


def _olmo2(c: _Config) -> dict[str, Any]:
    return _llama_like(c, qk_norm="full")


def _olmoe(c: _Config) -> dict[str, Any]:
    values = _llama_like(c, qk_norm="full", **_experts(c, "num_experts"))
    return values | {"expert_ffn": values["ffn"], "ffn": 0}


def _nemotron(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        family="gpt",
        gated_mlp=False,
        norm="layernorm",
        activation=c.activation("hidden_act", default="squared_relu"),
    )


def _gpt2(c: _Config) -> dict[str, Any]:
    hidden = c.integer("n_embd", "hidden_size")
    heads = c.integer("n_head", "num_attention_heads")
    return {
        "family": "gpt",
        "layers": c.integer("n_layer", "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": 1 if c.flag("multi_query", False) else heads,
        "ffn": c.integer("n_inner", default=4 * hidden),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("n_positions", "n_ctx", default=1024),
        "activation": c.activation("activation_function", default="gelu"),
        "tied_embeddings": c.flag("tie_word_embeddings", True),
    }


def _opt(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size")
    embedding = c.integer("word_embed_proj_dim", default=hidden)
    return {
        "family": "gpt",
        "layers": c.integer("num_hidden_layers"),
        "hidden": hidden,
        "heads": c.integer("num_attention_heads"),
        "ffn": c.integer("ffn_dim"),
        "vocab": c.integer("vocab_size"),
        # OPTLearnedPositionalEmbedding keeps two rows for padding
        "max_seq": c.integer("max_position_embeddings") + 2,
        "activation": c.activation("activation_function", default="relu"),
        "embedding_dim": 0 if embedding == hidden else embedding,
        "final_norm": c.flag("do_layer_norm_before", True),
        "tied_embeddings": c.flag("tie_word_embeddings", True),
    }


def _bloom(c: _Config) -> dict[str, Any]:
    return {
        "family": "gpt",
        "layers": c.integer("n_layer", "num_hidden_layers"),
        "hidden": c.integer("hidden_size", "n_embed"),
        "heads": c.integer("n_head", "num_attention_heads"),
        "vocab": c.integer("vocab_size"),
        "positions": "alibi",
        "embedding_norm": True,
        "tied_embeddings": c.flag("tie_word_embeddings", True),
    }


def _neox(c: _Config) -> dict[str, Any]:
    return {
        "family": "gpt",
        "layers": c.integer("num_hidden_layers"),
        "hidden": c.integer("hidden_size"),
        "heads": c.integer("num_attention_heads"),
        "ffn": c.integer("intermediate_size"),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("max_position_embeddings", default=2048),
        "positions": "rope",
        "parallel_blocks": c.flag("use_parallel_residual", True),
        "tied_embeddings": c.flag("tie_word_embeddings", False),
    }


def _falcon(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size")
    heads = c.integer("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture", False)
    if new:
        kv = c.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv = 1 if c.flag("multi_query", True) else heads
    parallel = c.flag("parallel_attn", True)
    return {
        "family": "gpt",
        "layers": c.integer("num_hidden_layers", "n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv,
        "ffn": c.integer("ffn_hidden_size", default=4 * hidden),
        "vocab": c.integer("vocab_size"),
        "positions": "alibi" if c.flag("alibi", False) else "rope",
        "biases": c.flag("bias", False),
        "parallel_blocks": parallel,
        "block_norms": 1 if parallel and not new else 2,
        "tied_embeddings": c.flag("tie_word_embeddings", True),
    }


def _mpt(c: _Config) -> dict[str, Any]:
    hidden = c.integer("d_model")
    attention = c.raw.get("attn_config")
    alibi = isinstance(attention, Mapping) and attention.get("alibi") is True
    biased = not c.flag("no_bias", False)
    return {
        "family": "gpt",
        "layers": c.integer("n_layers"),
        "hidden": hidden,
        "heads": c.integer("n_heads"),
        "ffn": hidden * c.integer("expansion_ratio", default=4),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("max_seq_len", default=2048),
        "positions": "alibi" if alibi else "learned",
        "biases": biased,
        "norm_biases": biased,
        "tied_embeddings": True,
    }


def _starcoder2(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        family="gpt",
        gated_mlp=False,
        norm="layernorm",
        biases=c.flag("use_bias", True),
        activation=c.activation("hidden_act", default="gelu"),
        tied_embeddings=c.flag("tie_word_embeddings", True),
    )


def _cohere(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        norm="layernorm",
        norm_biases=False,
        parallel_blocks=True,
        block_norms=1,
        qkv_bias=c.flag("attention_bias", False),
        tied_embeddings=c.flag("tie_word_embeddings", True),
    )


def _stablelm(c: _Config) -> dict[str, Any]:
    return _llama_like(c, norm="layernorm", qkv_bias=c.flag("use_qkv_bias", False))


def _phi(c: _Config) -> dict[str, Any]:
    return _llama_like(
        c,
        family="gpt",
        gated_mlp=False,
        norm="layernorm",
        biases=True,
        parallel_blocks=True,
        block_norms=1,
        head_bias=True,
        activation=c.activation("hidden_act", default="gelu"),
    )


def _llama4(c: _Config) -> dict[str, Any]:
    width = c.integer("intermediate_size")
    return _llama_like(
        c,
        **_experts(c, "num_local_experts"),
        expert_ffn=width,
        shared_ffn=width,
        moe_every=c.integer("interleave_moe_layer_step", default=1),
    ) | {"ffn": c.integer("intermediate_size_mlp"), "head_dim": c.integer("head_dim", default=128)}


def _distilbert(c: _Config) -> dict[str, Any]:
    return {
        "family": "bert",
        "causal": False,
        "layers": c.integer("n_layers"),
        "hidden": c.integer("dim"),
        "heads": c.integer("n_heads"),
        "ffn": c.integer("hidden_dim"),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("max_position_embeddings", default=512),
        "activation": c.activation("activation", default="gelu"),
        "embedding_norm": True,
        "final_norm": False,
        "lm_head_transform": True,
        "head_bias": True,
        "tied_embeddings": True,
    }


def _bert(c: _Config) -> dict[str, Any]:
    return {
        "family": "bert",
        "causal": False,
        "layers": c.integer("num_hidden_layers"),
        "hidden": c.integer("hidden_size"),
        "heads": c.integer("num_attention_heads"),
        "ffn": c.integer("intermediate_size"),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("max_position_embeddings", default=512),
        "token_types": c.integer("type_vocab_size", default=2),
        "activation": c.activation("hidden_act", default="gelu"),
        "embedding_norm": True,
        "final_norm": False,
        "pooler": c.raw.get("model_type") == "bert",
        "lm_head_transform": True,
        "head_bias": True,
        "tied_embeddings": True,
    }


def _t5(c: _Config) -> dict[str, Any]:
    encoder = c.integer("num_layers")
    decoder = c.integer("num_decoder_layers", default=encoder)
    projection = c.raw.get("feed_forward_proj", "relu")
    text = projection if isinstance(projection, str) else "relu"
    return {
        "family": "t5",
        "layers": encoder + decoder,
        "encoder_layers": encoder,
        "hidden": c.integer("d_model"),
        "heads": c.integer("num_heads"),
        "head_dim": c.integer("d_kv", default=64),
        "ffn": c.integer("d_ff"),
        "vocab": c.integer("vocab_size"),
        "max_seq": c.integer("n_positions", default=512),
        "norm": "rmsnorm",
        "positions": "relative",
        "relative_buckets": c.integer("relative_attention_num_buckets", default=32),
        "biases": False,
        "gated_mlp": text.startswith("gated"),
        "activation": _ACTIVATIONS.get(text.removeprefix("gated-"), "relu"),
        "tied_embeddings": c.flag("tie_word_embeddings", True),
    }


def _vit(c: _Config) -> dict[str, Any]:
    labels = c.raw.get("id2label")
    classes = len(labels) if isinstance(labels, Mapping) and labels else 1000
    return {
        "family": "vit",
        "causal": False,
        "layers": c.integer("num_hidden_layers"),
        "hidden": c.integer("hidden_size"),
        "heads": c.integer("num_attention_heads"),
        "ffn": c.integer("intermediate_size"),
        "vocab": c.integer("num_labels", default=classes),
        "patch_size": c.integer("patch_size"),
        "image_size": c.integer("image_size"),
        "channels": c.integer("num_channels", default=3),
        "activation": c.activation("hidden_act", default="gelu"),
    }


#: How each `model_type` is read.
READERS = {
    "llama": _llama,
    "mistral": _llama,
    "internlm": _internlm,
    "internlm2": _internlm,
    "baichuan": _llama,
    "yi": _llama,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "phi3": _llama,
    "phi": _phi,
    "cohere": _cohere,
    "stablelm": _stablelm,
    "granite": _llama,
    "smollm3": _llama,
    "llama4_text": _llama4,
    "distilbert": _distilbert,
    "nemotron": _nemotron,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "starcoder2": _starcoder2,
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _neox,
    "falcon": _falcon,
    "mpt": _mpt,
    "bert": _bert,
    "roberta": _bert,
    "t5": _t5,
    "mt5": _t5,
    "vit": _vit,
}


def _load(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError("is too large for a model configuration", place=str(file))
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", place=str(file)) from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", place=str(file)) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            place=str(file),
        ) from None
    except (RecursionError, ValueError):
        raise InputError("is not a usable JSON document", place=str(file)) from None


def model_from_hf_config(
    config: str | Path | Mapping[str, Any], *, name: str | None = None
) -> ModelSpec:
    """A model from a `config.json` (its path, its folder, or its content as a mapping).

    `text_config` of multi-modal configurations is read for the language model.

    Raises
    ------
    InputError
        If the file cannot be read or parsed, its `model_type` is of no known family, or keys are
        missing or of the wrong type (all at once).
    """
    if isinstance(config, str | Path):
        place = str(config)
        raw = _load(Path(config))
        path = Path(config)
        default_name = path.parent.name if path.name == "config.json" else path.stem
    else:
        place, raw, default_name = "config.json", config, ""
    if not isinstance(raw, Mapping):
        raise InputError("expected a JSON object", place=place)
    kind = raw.get("model_type")
    inner = raw.get("text_config")
    if isinstance(inner, Mapping) and (kind not in READERS or "hidden_size" not in raw):
        raw, place = inner, f"{place}.text_config"
        kind = raw.get("model_type", kind)
    if not isinstance(kind, str):
        raise InputError("'model_type' is missing or not text", place=place)
    if kind not in READERS:
        raise unknown_name("model_type", kind, READERS, place=place)
    reader = _Config(raw, place)
    values = READERS[kind](reader)
    raise_all(reader.errors)
    label = name or raw.get("_name_or_path") or default_name or kind
    values["name"] = label if isinstance(label, str) else kind
    values["source"] = f"Hugging Face configuration of type {kind}"
    return model_from_mapping(values, place)
