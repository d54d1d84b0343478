"""What a sweep varies: the sweep file, its keys, ranges, zipped lists and filters.

A sweep file has a `base` (an experiment, or the path of one), `sweep` (dotted keys of the
experiment and their values) and, if wanted, `filter` (conditions that a point must meet):

    base: gpt3_175b.yaml
    sweep:
      parallel.tensor: [1, 2, 4, 8]
      parallel.pipeline: {from: 1, to: 16, factor: 2}
      zip:
        cluster.nodes: [16, 32]
        training.global_batch_size: [512, 1024]
    filter:
      - tensor * pipeline <= 64
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simulator.errors import InputError, nearest, raise_all
from simulator.experiment import (
    Experiment,
    load_experiment,
    parse_experiment,
    read_yaml,
    to_mapping,
)
from simulator.studies.expressions import Filter

#: More combinations than this are a mistake in the file, not a sweep.
MAX_COMBINATIONS = 10_000_000
_RANGE_KEYS = frozenset({"from", "to", "step", "factor"})
_FILE_KEYS = ("base", "sweep", "filter", "name", "allow_oom")
_QUANTITY = re.compile(r"^\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*$")
#: Sections whose keys may be written without the section's name in a filter.
_SHORT = ("parallel", "training", "cluster")


@dataclass(frozen=True)
class Axis:
    """One dimension of the sweep: keys that change together, and their values in order."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep."""

    values: Mapping[str, Any]
    """The swept keys and their values here."""
    experiment: Experiment
    key: str
    """Hash of the experiment and the version of the simulator: names the row."""


@dataclass(frozen=True)
class SweepSpec:
    """A base experiment and what to vary in it."""

    base: Mapping[str, Any]
    """The base experiment as a mapping; may lack what is swept."""
    axes: tuple[Axis, ...]
    filters: tuple[Filter, ...] = ()
    name: str = ""
    allow_oom: bool = False
    """Simulate points that do not fit into memory as well."""
    folder: Path = field(default=Path())
    """Relative paths in swept values are relative to it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The swept keys in order."""
        return tuple(key for axis in self.axes for key in axis.keys)

    @property
    def combinations(self) -> int:
        """Points before filtering."""
        return math.prod(len(axis) for axis in self.axes)

    def points(self, version: str | None = None) -> list[Point]:
        """All points that pass the filters, in order (the last axis changes fastest).

        Points that turn out to be the same experiment are one point.

        Raises
        ------
        InputError
            If a value cannot be what its key holds, or a filter cannot be evaluated.
        """
        if version is None:
            from simulator import __version__

            version = __version__
        self._check_values()
        names = _Names(self.base, self.keys)
        for test in self.filters:
            names.check(test)
        points: dict[str, Point] = {}
        for values in self._selected(names):
            experiment = self.experiment(values)
            key = experiment_key(experiment, version, allow_oom=self.allow_oom)
            points.setdefault(key, Point(values, experiment, key))
        if not points:
            raise InputError(
                f"no point is left: the filters reject all {self.combinations} combinations",
                place=self.name or None,
            )
        return list(points.values())

    def experiment(self, values: Mapping[str, Any]) -> Experiment:
        """The base with `values` put in; raises `InputError`."""
        mapping = copy.deepcopy(dict(self.base))
        for key, value in values.items():
            _put(mapping, key, _resolved_path(value, self.folder))
        return parse_experiment(mapping, place=self.name or None)

    def _selected(self, names: _Names) -> Iterator[dict[str, Any]]:
        for combination in itertools.product(*(axis.values for axis in self.axes)):
            values = {
                key: value
                for axis, row in zip(self.axes, combination, strict=True)
                for key, value in zip(axis.keys, row, strict=True)
            }
            if all(test(names.at(test.names, values)) for test in self.filters):
                yield values

    def _check_values(self) -> None:
        """Each value once in an otherwise first point, so that all mistakes come at once."""
        first = {
            key: value
            for axis in self.axes
            for key, value in zip(axis.keys, axis.values[0], strict=True)
        }
        errors: dict[str, InputError] = {}
        for axis in self.axes:
            for row in axis.values:
                try:
                    self.experiment({**first, **dict(zip(axis.keys, row, strict=True))})
                except InputError as error:
                    for single in getattr(error, "errors", (error,)):
                        errors.setdefault(str(single), single)
        raise_all(list(errors.values()))


def experiment_key(experiment: Experiment, version: str, *, allow_oom: bool = False) -> str:
    """Hash that names the row of an experiment under one version of the simulator.

    Files that the experiment names (model, topology, schedule) count with their contents: an
    edited file is another experiment. The experiment's `name` does not count.
    """
    mapping = to_mapping(experiment)
    mapping.pop("name", None)
    files = {
        text: _file_digest(text)
        for text in (
            experiment.model,
            experiment.cluster.topology,
            experiment.parallel.schedule,
            experiment.framework,
        )
        if isinstance(text, str) and "." in text and Path(text).is_file()
    }
    text = json.dumps([version, allow_oom, mapping, files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=256)
def _digest_of(path: str, mtime: int, size: int) -> str:
    del mtime, size
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _file_digest(path: str) -> str:
    status = Path(path).stat()
    return _digest_of(path, status.st_mtime_ns, status.st_size)


# -------------------------------------------------------------------------------- reading


def load_sweep(path: str | Path, *, values: Mapping[str, Any] | None = None) -> SweepSpec:
    """Read a sweep file.

    Parameters
    ----------
    path:
        YAML file.
    values:
        Dotted keys of the base experiment to replace (as `--set` gives them).

    Raises
    ------
    InputError
        All errors of the file at once, with place and what was expected.
    """
    mapping, lines = read_yaml(path)
    place = str(path)
    if not isinstance(mapping, dict) or "sweep" not in mapping:
        raise InputError("expected a mapping with `base` and `sweep`", place=place)
    errors = [
        InputError(
            f"unknown key{_hint(str(key), _FILE_KEYS)} (known: {', '.join(_FILE_KEYS)})",
            place=f"{place}:{lines.get((str(key),), 1)}: {key}",
        )
        for key in mapping
        if key not in _FILE_KEYS
    ]
    raise_all(errors)
    base = mapping.get("base", {})
    folder = Path(path).parent
    if isinstance(base, str):
        base = _base_mapping(base, folder, place)
    elif isinstance(base, dict):
        # resolved here as `load_experiment` resolves the paths of a base file
        base = copy.deepcopy(base)
        for key in ("model", "framework"):
            base[key] = _resolved_path(base.get(key), folder)
        for section, key in (("cluster", "topology"), ("parallel", "schedule")):
            if isinstance(base.get(section), dict) and key in base[section]:
                base[section][key] = _resolved_path(base[section][key], folder)
        base = {key: value for key, value in base.items() if value is not None}
    else:
        raise InputError("expected an experiment or the path of one", place=f"{place}: base")
    return make_spec(
        base,
        mapping["sweep"],
        filters=mapping.get("filter", ()) or (),
        allow_oom=mapping.get("allow_oom", False),
        name=str(mapping.get("name") or Path(path).name),
        folder=folder,
        values=values,
    )


def _base_mapping(base: str, folder: Path, place: str) -> dict[str, Any]:
    path = folder / base
    try:
        if not path.exists() and Path(base).exists():
            path = Path(base)
    except (OSError, ValueError):
        raise InputError(f"no file can have this name: {base[:60]!r}", place=place) from None
    try:
        return to_mapping(load_experiment(path))
    except InputError as error:
        raise error.at(f"{place}: base") from None


def make_spec(
    base: Mapping[str, Any] | Experiment | str | Path,
    over: object,
    *,
    filters: str | Sequence[str] = (),
    allow_oom: object = False,
    name: str = "",
    folder: str | Path = ".",
    values: Mapping[str, Any] | None = None,
) -> SweepSpec:
    """A sweep from Python values; see the module's example for the form of `over`.

    Raises
    ------
    InputError
        All errors at once.
    """
    if isinstance(base, str | Path):
        base = to_mapping(load_experiment(base))
    elif isinstance(base, Experiment):
        base = to_mapping(base)
    base = copy.deepcopy(dict(base))
    for key, value in (values or {}).items():
        _put(base, key, value)
    if not isinstance(allow_oom, bool):
        raise InputError(f"expected true or false, got {allow_oom!r}", place="allow_oom")
    errors: list[InputError] = []
    axes = _axes(over, errors)
    if not axes and not errors:
        errors.append(InputError("nothing is swept: expected keys with lists", place="sweep"))
    seen: dict[str, None] = {}
    for key in (key for axis in axes for key in axis.keys):
        if key in seen:
            errors.append(InputError("swept twice", place=f"sweep.{key}"))
        seen[key] = None
        problem = _key_problem(key)
        if problem:
            errors.append(InputError(problem, place=f"sweep.{key}"))
    tests = []
    if isinstance(filters, str):
        filters = [filters]
    if not isinstance(filters, list | tuple):
        errors.append(InputError("expected a condition or a list of them", place="filter"))
        filters = ()
    for index, text in enumerate(filters):
        try:
            tests.append(Filter.parse(text, place=f"filter[{index}]"))
        except InputError as error:
            errors.append(error)
    count = math.prod(len(axis) for axis in axes)
    if count > MAX_COMBINATIONS:
        errors.append(InputError(f"{count} combinations; at most {MAX_COMBINATIONS} can be swept"))
    raise_all(errors)
    return SweepSpec(base, tuple(axes), tuple(tests), name, allow_oom, Path(folder))


def _axes(over: object, errors: list[InputError]) -> list[Axis]:
    if not isinstance(over, Mapping):
        errors.append(InputError("expected a mapping of keys to lists or ranges", place="sweep"))
        return []
    axes: list[Axis] = []
    for key, value in _flat(over, ""):
        place = f"sweep.{key}"
        try:
            if key == "zip":
                groups = value if isinstance(value, list | tuple) else [value]
                axes.extend(_zipped(group, place) for group in groups)
            else:
                axes.append(Axis((key,), tuple((item,) for item in _values(value, place))))
        except InputError as error:
            errors.append(error)
    return axes


def _flat(over: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested sections become dotted keys; a mapping with `from` or `to` is a range."""
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        nested = (
            isinstance(value, Mapping)
            and dotted != "zip"
            and not _RANGE_KEYS & set(map(str, value))
        )
        if nested:
            yield from _flat(value, f"{dotted}.")
        else:
            yield dotted, value


def _zipped(group: object, place: str) -> Axis:
    if not isinstance(group, Mapping) or not group:
        raise InputError("expected a mapping of keys to lists of equal length", place=place)
    columns = {key: _values(value, f"{place}.{key}") for key, value in _flat(group, "")}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise InputError(f"zipped lists must be equally long: {listing}", place=place)
    return Axis(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _values(value: object, place: str) -> list[Any]:
    if isinstance(value, Mapping):
        return _range(value, place)
    if isinstance(value, range):
        value = list(value)
    if not isinstance(value, list | tuple) or not value:
        raise InputError(
            f"expected a list or a range such as {{from: 1, to: 8, factor: 2}}, got {value!r}",
            place=place,
        )
    unique: list[Any] = []
    for item in value:
        if not any(type(item) is type(other) and item == other for other in unique):
            unique.append(item)
    return unique if len(unique) < len(value) and place.count(".zip") == 0 else list(value)


def _range(value: Mapping[Any, Any], place: str) -> list[Any]:
    """`{from, to, step}` or `{from, to, factor}`, both ends included; quantities keep units."""
    unknown = [str(key) for key in value if key not in _RANGE_KEYS]
    if unknown:
        raise InputError(
            f"unknown key{_hint(unknown[0], _RANGE_KEYS)}; a range has from, to and step or factor",
            place=f"{place}.{unknown[0]}",
        )
    if "from" not in value or "to" not in value or ("step" in value and "factor" in value):
        raise InputError("a range has from, to and one of step or factor", place=place)
    start, unit = _quantity(value["from"], f"{place}.from")
    stop, other = _quantity(value["to"], f"{place}.to")
    if unit != other:
        raise InputError(f"from and to have different units, {unit!r} and {other!r}", place=place)
    if "factor" in value:
        factor, _ = _quantity(value["factor"], f"{place}.factor")
        if factor <= 1 or start <= 0 or stop < start:
            raise InputError("a factor is > 1, and 0 < from <= to", place=place)
        count = math.floor(math.log(stop / start) / math.log(factor) + 1e-9) + 1
        numbers = [start * factor**index for index in range(count)]
    else:
        step, step_unit = _quantity(value.get("step", 1), f"{place}.step")
        if step_unit not in ("", unit):
            raise InputError(f"step has the unit {step_unit!r}, not {unit!r}", place=place)
        if step <= 0 or stop < start:
            raise InputError("a step is > 0, and from <= to", place=place)
        if (stop - start) / step > MAX_COMBINATIONS:
            raise InputError("too many values", place=place)
        count = math.floor((stop - start) / step + 1e-9) + 1
        numbers = [start + step * index for index in range(count)]
    return [f"{number:g} {unit}" if unit else number for number in numbers]


def _quantity(value: object, place: str) -> tuple[Any, str]:
    """Number (int where it is one) and unit text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"expected a finite number, got {value!r}", place=place)
        return value, ""
    match = _QUANTITY.match(value) if isinstance(value, str) else None
    if match is None or not math.isfinite(float(match[1].replace("_", ""))):
        raise InputError(f"expected a number or a quantity, got {value!r}", place=place)
    number = float(match[1].replace("_", ""))
    return (int(number) if number.is_integer() else number), match[2]


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts of `--set`, values in YAML syntax; raises `InputError`."""
    values: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise InputError(f"expected key=value, got {text!r}", place="--set")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"not a YAML value: {value!r}", place=f"--set {key}") from None
    return values


def _hint(name: str, choices: Any) -> str:
    guess = nearest(name, choices)
    return f"; did you mean {guess!r}?" if guess else ""


# ---------------------------------------------------------------------------- keys, names


def _put(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    inner: Any = mapping
    for part in path:
        if isinstance(inner, dict) and (part not in inner or inner[part] is None):
            inner[part] = {}
        inner = inner[part] if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise InputError("goes through a value that is no mapping", place=dotted)
    inner[last] = value


def _resolved_path(value: Any, folder: Path) -> Any:
    """A text that names a file in the sweep file's folder, as that file's path."""
    if not isinstance(value, str) or "." not in value or Path(value).is_absolute():
        return value
    candidate = folder / value
    try:
        return str(candidate) if candidate.is_file() else value
    except (OSError, ValueError):
        return value


@functools.cache
def _schema() -> dict[str, Any]:
    """Dotted keys of an experiment; the value is None for a leaf that takes any mapping."""
    keys: dict[str, Any] = {}

    def visit(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            hint = hints[item.name]
            options = (
                typing.get_args(hint)
                if typing.get_origin(hint) in (types.UnionType, typing.Union)
                else (hint,)
            )
            free = any(typing.get_origin(option) is dict for option in options)
            keys[f"{prefix}{item.name}"] = free
            for option in options:
                if dataclasses.is_dataclass(option) and isinstance(option, type):
                    visit(option, f"{prefix}{item.name}.")

    visit(Experiment, "")
    return keys


def _key_problem(key: str) -> str | None:
    schema = _schema()
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count])
        if prefix not in schema:
            short = [known for known in schema if known.split(".")[-1] == parts[-1]]
            guess = short[0] if short else nearest(key, schema)
            hint = f"; did you mean {guess!r}?" if guess else ""
            return f"an experiment has no key {key!r}{hint}"
        if schema[prefix]:
            return None  # a mapping of anything: model dimensions, schedule options
    return None


class _Names:
    """Values by name for filters: dotted keys, and short names of the common sections.

    `data` is derived where it is left out and the number of accelerators is given.
    """

    def __init__(self, base: Mapping[str, Any], swept: Sequence[str]) -> None:
        self._values: dict[str, Any] = {key: _default(key) for key in _schema()}
        self._values.update(_leaves(base, ""))
        known = [*self._values, *(key for key in swept if key not in self._values)]
        self._keys = {key: key for key in known}
        for section in reversed(_SHORT):
            for key in known:
                name = key.removeprefix(f"{section}.")
                if name != key and "." not in name:
                    self._keys[name] = key

    def check(self, test: Filter) -> None:
        """Raises `InputError` if the filter uses a name that no experiment has."""
        for name in test.names:
            if name not in self._keys and not self._below_swept(name):
                guess = nearest(name, self._keys)
                hint = f"; did you mean {guess!r}?" if guess else ""
                raise InputError(f"unknown name {name!r}{hint} in {test.text!r}", place="filter")

    def _below_swept(self, name: str) -> bool:
        schema = _schema()
        return any(schema.get(".".join(name.split(".")[:n])) for n in range(1, name.count(".") + 1))

    def at(self, names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """The named values of the point that has the swept `values`."""
        found = {name: self._value(self._keys.get(name, name), values) for name in names}
        if "data" in found and found["data"] is None:
            sizes = [
                self._value(key, values)
                for key in ("parallel.tensor", "parallel.pipeline", "parallel.context")
            ]
            total = self._value("cluster.accelerators", values)
            if isinstance(total, int) and all(isinstance(size, int) and size for size in sizes):
                found["data"] = total / math.prod(sizes)
        return found

    def _value(self, key: str, values: Mapping[str, Any]) -> Any:
        if key in values:
            return values[key]
        prefix = key
        inner: list[str] = []
        while "." in prefix:
            prefix, _, last = prefix.rpartition(".")
            inner.insert(0, last)
            if prefix in values:
                value = values[prefix]
                for part in inner:
                    value = value.get(part) if isinstance(value, Mapping) else None
                return value
        return self._values.get(key)


def _leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _default(key: str) -> Any:
    kind: Any = Experiment
    value: Any = None
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        found = next((item for item in dataclasses.fields(kind) if item.name == part), None)
        if found is None:
            return None
        value = None if found.default is dataclasses.MISSING else found.default
        hint = typing.get_type_hints(kind)[part]
        kind = next(
            (
                option
                for option in (hint, *typing.get_args(hint))
                if dataclasses.is_dataclass(option)
            ),
            None,
        )
    return value
