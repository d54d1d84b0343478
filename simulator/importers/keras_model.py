"""Models from Keras 3, by way of the framework that it runs on (JAX or PyTorch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulator.errors import InputError
from simulator.importers.files import optional
from simulator.importers.jax_function import model_from_jax
from simulator.importers.torch_module import model_from_torch
from simulator.importers.traced import TracedModel


def model_from_keras(
    model: Any,
    *example_inputs: Any,
    name: str | None = None,
    blocks: Sequence[str] = (),
    sequence_length: int | None = None,
) -> TracedModel:
    """Trace a built Keras model's forward and the gradient of its trainable weights.

    Parameters
    ----------
    example_inputs:
        Arrays as the model is called with; dimension 0 is the batch.
    blocks:
        Names (or patterns) of the Keras layers that are layers of the traced model; when left
        out, all that have weights.

    Raises
    ------
    InputError
        If Keras is not installed, runs on another backend than JAX or PyTorch, or the model
        cannot be traced.
    """
    keras = optional("keras", "keras", "tracing a Keras model")
    if not isinstance(model, keras.Model):
        raise InputError(f"expected a keras.Model, got {type(model).__name__}")
    if not model.built:
        raise InputError("is not built; call it once or give it an Input", place=str(model.name))
    title = name or str(model.name)
    backend = keras.backend.backend()
    chosen = tuple(blocks) or tuple(str(layer.name) for layer in model.layers if layer.weights)
    if backend == "torch":
        torch = optional("torch", "torch", "tracing a Keras model")
        tensors = tuple(torch.as_tensor(value) for value in example_inputs)
        with keras.device("meta"):
            return model_from_torch(model, tensors, name=title, sequence_length=sequence_length)
    if backend != "jax":
        raise InputError(
            f"Keras runs on {backend}; expected the JAX or the PyTorch backend "
            "(set KERAS_BACKEND=jax)",
            place=title,
        )
    jax = optional("jax", "jax", "tracing a Keras model")
    fixed = [jax.ShapeDtypeStruct(v.shape, v.value.dtype) for v in model.non_trainable_variables]
    constants = [jax.numpy.zeros(v.shape, v.dtype) for v in fixed]

    def call(trainable: Any, *inputs: Any) -> Any:
        argument = inputs[0] if len(inputs) == 1 else list(inputs)
        output, _ = model.stateless_call(trainable, constants, argument, training=True)
        return output

    trainable = [jax.ShapeDtypeStruct(v.shape, v.value.dtype) for v in model.trainable_variables]
    return model_from_jax(
        call,
        trainable,
        *example_inputs,
        name=title,
        blocks=chosen,
        sequence_length=sequence_length,
    )
