"""The `model` of an experiment: a catalogue name, a Hugging Face config.json, or dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from simulator.model.huggingface import model_from_hf_config
from simulator.model.library import model, model_from_mapping
from simulator.model.rows import model_from_row
from simulator.model.spec import ModelSpec


def resolve_model(value: str | Mapping[str, Any], *, place: str = "model") -> ModelSpec:
    """The model that an experiment names.

    A text ending in `.json` is the path of a Hugging Face config; a mapping with `model_type` is
    such a config itself; another mapping holds `ModelSpec` fields, or `base` and changes.

    Raises
    ------
    InputError
        If there is no such model, or its dimensions contradict each other.
    """
    if isinstance(value, str):
        return model_from_hf_config(value) if value.endswith(".json") else model(value, place=place)
    if "model_type" in value or "architectures" in value:
        return model_from_hf_config(value)
    return model_from_mapping(value, place)


def model_to_mapping(spec: ModelSpec) -> dict[str, Any]:
    """Fields of `spec` that differ from their defaults; `resolve_model` inverts it."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.default is dataclasses.MISSING or value != item.default:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def mapping_from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a row of a published-steps table as an experiment's `model`."""
    return model_to_mapping(model_from_row(row))
