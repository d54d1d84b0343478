"""The `model` of an experiment: a catalogue name, a Hugging Face config.json, or dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from simulator.errors import InputError
from simulator.experiment import read_yaml
from simulator.model.huggingface import model_from_hf_config
from simulator.model.library import model, model_from_mapping
from simulator.model.rows import model_from_row
from simulator.model.spec import ModelSpec


def resolve_model(value: str | Mapping[str, Any], *, place: str = "model") -> ModelSpec:
    """The model that an experiment names.

    A text ending in `.json` is the path of a Hugging Face config, one ending in `.yaml` that of a
    file with such a mapping as may stand here; a mapping with `model_type` is a Hugging Face config
    itself, one with `family: traced` a traced model; another mapping holds `ModelSpec` fields, or
    `base` and changes.

    Raises
    ------
    InputError
        If there is no such model, or its dimensions contradict each other.
    """
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml")):
            content, _ = read_yaml(value)
            if not isinstance(content, Mapping):
                raise InputError("expected a mapping that describes a model", place=value)
            return resolve_model(content, place=value)
        return model_from_hf_config(value) if value.endswith(".json") else model(value, place=place)
    if value.get("family") == "traced":
        from simulator.importers.traced import traced_from_mapping

        return traced_from_mapping(value, place=place).to_spec()
    if "model_type" in value or "architectures" in value:
        return model_from_hf_config(value)
    return model_from_mapping(value, place)


def model_to_mapping(spec: ModelSpec) -> dict[str, Any]:
    """Fields of `spec` that differ from their defaults; `resolve_model` inverts it."""
    if spec.traced is not None:
        mapping: dict[str, Any] = spec.traced.to_mapping()
        return mapping
    values: dict[str, Any] = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.default is dataclasses.MISSING or value != item.default:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def mapping_from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a row of a published-steps table as an experiment's `model`."""
    return model_to_mapping(model_from_row(row))
