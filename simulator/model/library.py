"""The model catalogue (`catalog/models/*.yaml`), and models from mappings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.spec import ModelSpec

FOLDER = Path(__file__).parent.parent / "catalog" / "models"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FIELDS: dict[str, Field[Any]] = {
    field.name: field for field in fields(ModelSpec) if field.name != "traced"
}
_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_COUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMBT]?)$", re.IGNORECASE)

#: Upper bound of any dimension; beyond it a file is broken, not ambitious.
_LARGEST = 10**12


def parse_count(value: object, *, place: str | None = None) -> float:
    """A count such as 124439808, `"1.3B"` or `"350M"`; raises `InputError`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    match = _COUNT.match(value) if isinstance(value, str) else None
    if match is None:
        raise InputError(f"expected a count such as '1.3B', got {value!r}", place=place)
    return float(match[1]) * _SUFFIXES[match[2].upper()]


# -- mappings ------------------------------------------------------------------------------------


def _typed(key: str, value: object, place: str) -> Any:
    """`value` as the type of field `key`, or an `InputError`."""
    kind = str(_FIELDS[key].type)
    where = f"{place}.{key}" if place else key

    def wrong(expected: str) -> InputError:
        return InputError(f"expected {expected}, got {value!r}", place=where)

    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple[bool"):
        if not isinstance(value, list | tuple) or not all(isinstance(v, bool) for v in value):
            raise wrong("a list of true and false")
        return tuple(value)
    if kind.startswith("tuple[int"):
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int) and not isinstance(v, bool) for v in value
        ):
            raise wrong("a list of whole numbers")
        return tuple(value)
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind.startswith("int"):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
        if abs(value) > _LARGEST:
            raise wrong(f"a number up to {_LARGEST:g}")
        return value
    if kind.startswith("float"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong("a number")
        return float(value)
    if not isinstance(value, str):
        raise wrong("text")
    return value


def _positive(values: Mapping[str, Any], key: str) -> bool:
    return isinstance(values.get(key), int) and values[key] > 0


def _defaults(values: dict[str, Any]) -> None:
    """Fill dimensions that follow from others."""
    if values.get("family") == "mlp":
        sizes = values.get("dense_sizes") or ()
        values.setdefault("layers", max(0, len(sizes) - 1))
        values.setdefault("max_seq", 1)
        for key in ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab"):
            values.setdefault(key, 0)
        return
    image, patch = values.get("image_size"), values.get("patch_size")
    if values.get("family") == "vit" and isinstance(image, int) and isinstance(patch, int):
        # patches and the class token
        values.setdefault("max_seq", (image // max(1, patch)) ** 2 + 1)
    heads, hidden = values.get("heads"), values.get("hidden")
    if isinstance(heads, int) and heads > 0:
        values.setdefault("kv_heads", heads)
        if isinstance(hidden, int):
            values.setdefault("head_dim", hidden // heads)
    if isinstance(hidden, int):
        values.setdefault("ffn", 0 if values.get("n_experts") else 4 * hidden)


def model_from_mapping(mapping: Mapping[str, Any], place: str = "model") -> ModelSpec:
    """A model described by `ModelSpec`'s fields, or by `base` (a catalogue name) and changes.

    `kv_heads` defaults to `heads`, `head_dim` to hidden / heads, `ffn` to 4 hidden, `family` to
    `moe` where there are experts, `mlp` where there are `dense_sizes`, and `gpt` otherwise;
    `published` (or `published_parameters`) may be written as `1.3B`.

    Raises
    ------
    InputError
        Every unknown key, wrong type, missing dimension and contradiction at once.
    """
    errors: list[InputError] = []
    if not isinstance(mapping, Mapping):
        raise InputError(f"expected a mapping of model dimensions, got {mapping!r}", place=place)
    raw = dict(mapping)
    values: dict[str, Any] = {}
    base = raw.pop("base", None)
    if base is not None:
        parent = model(str(base), place=f"{place}.base")
        values = {name: getattr(parent, name) for name in _FIELDS}
        values["published_parameters"] = None
        values["source"] = f"{parent.name}, changed"
        # derived dimensions follow the changed ones unless they are given
        for key, follows in (("head_dim", ("hidden", "heads")), ("kv_heads", ("heads",))):
            if key not in raw and any(k in raw for k in follows):
                derived = {
                    "head_dim": parent.heads * parent.head_dim == parent.hidden,
                    "kv_heads": parent.kv_heads == parent.heads,
                }
                if derived[key]:
                    values.pop(key)
    published = raw.pop("published", None)
    raw.pop("aliases", None)
    if published is not None:
        try:
            values["published_parameters"] = parse_count(published, place=f"{place}.published")
        except InputError as error:
            errors.append(error)
    for key, value in raw.items():
        if key not in _FIELDS:
            errors.append(unknown_name("key", str(key), _FIELDS, place=place))
            continue
        try:
            values[key] = _typed(key, value, place)
        except InputError as error:
            errors.append(error)
    values.setdefault("name", "custom")
    if "family" not in values:
        if values.get("n_experts"):
            values["family"] = "moe"
        else:
            values["family"] = "mlp" if values.get("dense_sizes") else "gpt"
    sizes = _positive(values, "heads") and _positive(values, "hidden")
    if "head_dim" not in values and sizes and values["hidden"] % values["heads"]:
        errors.append(
            InputError(
                f"{values['hidden']} is no multiple of the {values['heads']} heads; change one "
                "or give head_dim",
                place=f"{place}.hidden",
            )
        )
    _defaults(values)
    broken = {str(error.place).rsplit(".", 1)[-1] for error in errors}
    for name, field in _FIELDS.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in values and name not in broken:
            derived_from = {"kv_heads": "heads", "head_dim": "heads", "ffn": "hidden"}
            if derived_from.get(name) not in {None, *values}:
                continue  # its source is reported
            errors.append(InputError("is missing", place=f"{place}.{name}"))
    raise_all(errors)
    return ModelSpec(**values).check(place)


# -- catalogue -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _entries() -> dict[str, dict[str, Any]]:
    """Raw entries by name, templates included, in file order."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for name, entry in yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER).items():
            if name in entries:
                raise InputError(f"model {name!r} is defined twice", place=path.name)
            entries[name] = entry
    return entries


def _resolved(name: str) -> dict[str, Any]:
    entry = dict(_entries()[name])
    base = entry.pop("base", None)
    if base is None:
        return entry
    inherited = _resolved(base)
    inherited.pop("aliases", None)
    inherited.pop("published", None)
    return {**inherited, **entry}


def _key(name: str) -> str:
    """What stays the same among spellings: case, punctuation, an organisation's prefix."""
    name = name.casefold().rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9.]", "", name).replace("metallama", "llama")


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    names: dict[str, str] = {}
    for name, entry in _entries().items():
        if name.startswith("_"):
            continue
        for alias in (name, *entry.get("aliases", ())):
            names.setdefault(alias.casefold(), name)
    for alias, name in list(names.items()):
        names.setdefault(_key(alias), name)
    return names


def model_names() -> tuple[str, ...]:
    """Names of the catalogue, in file order."""
    return tuple(name for name in _entries() if not name.startswith("_"))


def find_model(name: str) -> ModelSpec | None:
    """The catalogue's model called `name` in any usual spelling, or None."""
    aliases = _aliases()
    folded = name.casefold().strip()
    key = _key(folded)
    trimmed = re.sub(r"(instruct|chat|base|hf|it|pretrain|preview)$", "", key)
    for candidate in (folded, key, trimmed, trimmed.replace("llama31", "llama3.1")):
        if candidate in aliases:
            return _load(aliases[candidate])
    return None


@lru_cache(maxsize=512)
def _load(name: str) -> ModelSpec:
    return model_from_mapping({"name": name, **_resolved(name)}, f"models.{name}")


def model(name: str, *, place: str | None = None) -> ModelSpec:
    """The catalogue's model called `name`: case, punctuation and an organisation's prefix do not
    matter (`meta-llama/Llama-3-70B`).

    Raises
    ------
    InputError
        If there is none; names the nearest.
    """
    found = find_model(name)
    if found is None:
        raise unknown_name("model", name, model_names(), place=place)
    return found


def published_text(name: str) -> str | None:
    """The published count as its authors write it (`175B`), or None."""
    value = _entries()[name].get("published")
    return None if value is None else str(value)
