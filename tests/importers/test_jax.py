"""JAX functions and Keras models as traced models."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")
jnp = jax.numpy

from simulator.errors import InputError  # noqa: E402
from simulator.experiment import parse_experiment  # noqa: E402
from simulator.importers import model_from_jax, model_from_keras  # noqa: E402
from simulator.importers.traced import traced_from_mapping  # noqa: E402
from simulator.simulation import run  # noqa: E402

LAYERS, WIDTH, VOCAB, TOKENS = 4, 64, 100, 16


def shape(*sizes: int, dtype: Any = "float32") -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlp(params: Any, x: Any) -> Any:
    for number, (weight, bias) in enumerate(params):
        with jax.named_scope(f"layer_{number}"):
            x = jax.nn.relu(x @ weight + bias)
    return x


MLP = [(shape(8, 16), shape(16)), (shape(16, 4), shape(4))]


def block(x: Any, params: Any) -> tuple[Any, None]:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    query, key, value = jnp.split(normed @ params["qkv"], 3, -1)
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key))
    x = x + jnp.einsum("bqk,bkd->bqd", weights, value) @ params["out"]
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"], None


def transformer(params: Any, ids: Any) -> Any:
    x, _ = jax.lax.scan(block, params["table"][ids], params["layers"])
    return x @ params["table"].T


TRANSFORMER = {
    "table": shape(VOCAB, WIDTH),
    "layers": {
        "qkv": shape(LAYERS, WIDTH, 3 * WIDTH), "out": shape(LAYERS, WIDTH, WIDTH),
        "up": shape(LAYERS, WIDTH, 4 * WIDTH), "down": shape(LAYERS, 4 * WIDTH, WIDTH),
    },
}  # fmt: skip


def test_named_scopes_are_layers() -> None:
    traced = model_from_jax(mlp, MLP, shape(32, 8))
    assert [layer.name for layer in traced.layers] == ["layer_0", "layer_1"]
    assert [layer.parameters for layer in traced.layers] == [8 * 16 + 16, 16 * 4 + 4]
    assert traced.forward_flops == 2 * 32 * (8 * 16 + 16 * 4)
    # both weight gradients, and the input gradient of the second layer alone
    assert traced.backward_flops == traced.forward_flops + 2 * 32 * 16 * 4
    phases = [
        [str(op.operation.phase) for op in layer.backward if op.operation.kind == "gemm"]
        for layer in traced.layers
    ]
    assert phases == [["W"], ["W", "I"]]


def test_a_scanned_transformer() -> None:
    traced = model_from_jax(transformer, TRANSFORMER, shape(2, TOKENS, dtype="int32"))
    assert [layer.role for layer in traced.layers] == ["embedding", *["block"] * LAYERS, "head"]
    assert traced.parameters == VOCAB * WIDTH + LAYERS * 12 * WIDTH**2
    assert {layer.parameters for layer in traced.blocks} == {12 * WIDTH**2}
    # 24 s h^2 per layer and sample, 4 s^2 h for scores and values, 2 s h V for the head
    per_sample = LAYERS * (24 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH)
    per_sample += 2 * TOKENS * WIDTH * VOCAB
    assert traced.forward_flops == 2 * per_sample
    assert traced.backward_flops == 2 * traced.forward_flops
    assert traced.sequence == TOKENS
    first, *_, last = (layer.stored_bytes for layer in traced.blocks)
    assert {layer.stored_bytes for layer in traced.blocks[:-1]} == {first}
    assert last - first == 2 * TOKENS * WIDTH * 4  # the last block's output, which the head reads
    assert [item.get("repeat", 1) for item in traced.to_mapping()["layers"]] == [
        1,
        LAYERS - 1,
        1,
        1,
    ]


def test_agrees_with_xla_on_the_flops() -> None:
    traced = model_from_jax(mlp, MLP, shape(4096, 8))
    compiled = jax.jit(mlp).lower(MLP, shape(4096, 8)).compile()
    cost = compiled.cost_analysis()
    # XLA counts the bias and the activation as well
    assert traced.forward_flops <= cost["flops"] <= 1.5 * traced.forward_flops


def test_a_trace_at_one_batch_predicts_another() -> None:
    traced = model_from_jax(transformer, TRANSFORMER, shape(2, TOKENS, dtype="int32"))
    direct = model_from_jax(transformer, TRANSFORMER, shape(7, TOKENS, dtype="int32"))
    for ours, theirs in zip(traced.layers, direct.layers, strict=True):
        for a, b in zip(
            (*ours.forward, *ours.backward), (*theirs.forward, *theirs.backward), strict=True
        ):
            assert a.at(5) == b.operation


def test_convolution_flops() -> None:
    def convolve(kernel: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")

    traced = model_from_jax(convolve, shape(16, 3, 3, 3), shape(2, 3, 10, 10))
    assert traced.forward_flops == 2 * 2 * 10 * 10 * 16 * 3 * 9


def test_runs_as_an_experiment() -> None:
    traced = model_from_jax(transformer, TRANSFORMER, shape(2, TOKENS, dtype="int32"))
    mapping = traced.to_mapping()
    assert traced_from_mapping(mapping).to_mapping() == mapping
    result = run(
        parse_experiment(
            {
                "model": mapping,
                "cluster": {"topology": "dgx-h100", "nodes": 1},
                "parallel": {"pipeline": 2},
                "training": {"global_batch_size": 32, "micro_batch_size": 4},
            }
        )
    )
    assert result.summary.model_flops_per_step == pytest.approx(16 * traced.flops)


def test_clear_errors() -> None:
    with pytest.raises(InputError, match="cannot be traced"):
        model_from_jax(mlp, MLP, shape(32, 9))
    with pytest.raises(InputError, match="cannot be traced"):
        model_from_jax(lambda p, x: x if x.sum() > 0 else p, shape(3), shape(3))
    with pytest.raises(InputError, match="batch"):
        model_from_jax(mlp, MLP)


def test_keras() -> None:
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    model = keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    traced = model_from_keras(model, np.zeros((4, 32), "float32"))
    assert traced.parameters == model.count_params()
    assert len(traced.blocks) == 3
    assert traced.forward_flops == 2 * 4 * (32 * 64 + 64 * 64 + 64 * 10)
    with pytest.raises(InputError, match=r"keras\.Model"):
        model_from_keras(3)
