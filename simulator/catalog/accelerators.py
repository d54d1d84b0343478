"""The accelerator catalogue: datasheet figures, and the measured constants of the cost model.

The data lies in `accelerators.yaml` beside this file. An accelerator takes the constants of its
family and overrides those that were measured on it; constants are dimensionless or scale with the
datasheet (docs/kernels.md), so that a new accelerator of a known family needs its datasheet only.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from simulator.errors import InputError, raise_all, unknown_name
from simulator.experiment import too_deep
from simulator.units import no_bool, parse_bandwidth, parse_bytes, parse_flops, parse_power

_CATALOGUE = Path(__file__).with_name("accelerators.yaml")

#: What an accelerator without a precision's own rate computes with instead: the next wider format
#: that its matrix units have (inputs are converted on load), at last plain fp32.
_WIDER: dict[str, tuple[str, ...]] = {
    "nvfp4": ("mxfp8", "fp8", "bf16", "fp16", "fp32"),
    "mxfp8": ("fp8", "bf16", "fp16", "fp32"),
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "tf32": ("fp32",),
    "fp32": ("tf32", "bf16"),
}

_PRECISIONS = tuple(_WIDER)


@dataclass(frozen=True)
class Accelerator:
    """One accelerator type; SI units. Datasheet peaks and measured rates are different fields."""

    name: str
    vendor: str
    family: str
    """`volta`, `ampere`, `hopper`, `blackwell`, `cdna3`, `tpu`, ...: gives the constants."""
    kind: str
    """`gpu` or `tpu`."""
    peak_flops: Mapping[str, float]
    """Dense FLOP/s by precision (fp32, tf32, fp16, bf16, fp8, mxfp8, nvfp4, int8)."""
    core_count: int
    """SMs, CUs or TensorCores."""
    memory_bytes: float
    memory_bandwidth: float
    """Datasheet HBM byte/s."""
    l2_bytes: float
    scale_up_bandwidth: float
    """NVLink / Infinity Fabric byte/s per direction and accelerator; TPU: per ICI link."""
    scale_up_links: int
    host_bandwidth: float
    """PCIe / C2C byte/s per direction."""
    power_w: float
    idle_power_w: float
    price_usd_per_hour: float | None
    constants: Mapping[str, float] = field(default_factory=dict)
    """Constants of the cost model: the family's, with this accelerator's own measured ones."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each figure comes from; `default` covers those not named."""
    clock_hz: float | None = None
    """Clock at which `peak_flops` is quoted; None: unknown (no power limit is modelled)."""
    aliases: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How `constants` were measured: date, software, residuals (`simulator calibrate`)."""

    def __hash__(self) -> int:
        # mappings do not hash; equality still compares every field
        return hash((self.name, self.family, self.core_count, self.memory_bandwidth))

    def supports(self, precision: str) -> bool:
        """Whether the matrix units have a rate of their own for `precision`."""
        return precision in self.peak_flops

    def compute_precision(self, precision: str) -> str:
        """The precision that products of `precision` inputs run in here: itself, or the next wider.

        Raises
        ------
        InputError
            If `precision` is no precision at all.
        """
        if precision in self.peak_flops:
            return precision
        if precision not in _WIDER:
            raise unknown_name("precision", precision, _PRECISIONS)
        for wider in _WIDER[precision]:
            if wider in self.peak_flops:
                return wider
        raise InputError(f"{self.name} has no compute rate for precision {precision!r}")

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of products of `precision` inputs: see `compute_precision`."""
        return self.peak_flops[self.compute_precision(precision)]

    def source(self, name: str) -> str:
        """The source of one figure (a field, `peak_flops.bf16`, or a constant)."""
        return self.sources.get(name) or self.sources.get("default", "")


def _parse_clock(value: float | int | str) -> float:
    """Hz from a number or text such as `1.41 GHz`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([MG])Hz\s*", str(value))
    if match:
        return float(match[1]) * (1e9 if match[2] == "G" else 1e6)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"expected a clock such as '1.41 GHz', got {value!r}") from None


def _quantity(parse: Any) -> Any:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"expected a number or text with a unit, got {value!r}")
        return float(parse(value))

    return BeforeValidator(convert)


_Bytes = Annotated[float, _quantity(parse_bytes)]
_Bandwidth = Annotated[float, _quantity(parse_bandwidth)]
_Flops = Annotated[float, _quantity(parse_flops)]
_Power = Annotated[float, _quantity(parse_power)]
_Clock = Annotated[float, _quantity(_parse_clock)]
_Int = Annotated[int, BeforeValidator(no_bool)]
_Float = Annotated[float, BeforeValidator(no_bool)]
_Positive = Field(gt=0)


class _Entry(BaseModel):
    """One accelerator as written in YAML; every figure may be left out when `base` is given."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    base: str | None = None
    aliases: list[str] = []
    vendor: str | None = None
    family: str | None = None
    kind: str | None = None
    peak_flops: dict[str, Annotated[_Flops, _Positive]] | None = None
    core_count: _Int | None = Field(None, gt=0)
    memory: Annotated[_Bytes, _Positive] | None = None
    memory_bandwidth: Annotated[_Bandwidth, _Positive] | None = None
    l2: _Bytes | None = None
    clock: Annotated[_Clock, _Positive] | None = None
    scale_up_bandwidth: _Bandwidth | None = None
    scale_up_links: _Int | None = Field(None, ge=0)
    host_bandwidth: Annotated[_Bandwidth, _Positive] | None = None
    power: Annotated[_Power, _Positive] | None = None
    idle_power: _Power | None = None
    price_usd_per_hour: _Float | None = Field(None, ge=0, allow_inf_nan=False)
    constants: dict[str, Annotated[_Float, Field(ge=0, allow_inf_nan=False)]] = {}
    sources: dict[str, str] = {}
    calibration: dict[str, Any] = {}


_REQUIRED = ("family", "peak_flops", "core_count", "memory", "memory_bandwidth")


def _problems(error: pydantic.ValidationError, place: str) -> list[InputError]:
    found = []
    for item in error.errors():
        where = ".".join([place, *(str(part) for part in item["loc"])])
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            found.append(unknown_name("key", key, _Entry.model_fields, place=place))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append(InputError(f"{message}, got {item['input']!r}", place=where))
    return found


@functools.cache
def _raw() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with _CATALOGUE.open(encoding="utf-8") as stream:
        data: dict[str, Any] = yaml.load(stream, Loader=loader)
    return data


@functools.cache
def families() -> dict[str, dict[str, float]]:
    """Constants by family, with what a family inherits filled in."""
    raw = _raw()["families"]

    def constants(name: str) -> dict[str, float]:
        entry = raw[name]
        inherited = constants(entry["inherits"]) if "inherits" in entry else {}
        own = {key: float(value) for key, value in entry.get("constants", {}).items()}
        return {**inherited, **own}

    return {name: constants(name) for name in raw}


def _check(entry: _Entry, place: str) -> list[InputError]:
    problems = []
    for precision in entry.peak_flops or {}:
        if precision not in _PRECISIONS:
            problems.append(
                unknown_name("precision", precision, _PRECISIONS, place=f"{place}.peak_flops")
            )
    if entry.peak_flops == {}:
        problems.append(InputError("needs at least one precision", place=f"{place}.peak_flops"))
    if entry.family is not None and entry.family not in families():
        problems.append(unknown_name("family", entry.family, families(), place=f"{place}.family"))
    if entry.kind not in (None, "gpu", "tpu"):
        problems.append(
            InputError(f"expected gpu or tpu, got {entry.kind!r}", place=f"{place}.kind")
        )
    known = {name for table in families().values() for name in table}
    for name in entry.constants:
        if name not in known:
            problems.append(
                unknown_name("constant", name, sorted(known), place=f"{place}.constants")
            )
    if entry.base is None:
        for key in _REQUIRED:
            if getattr(entry, key) is None:
                problems.append(
                    InputError(f"{key} is required (or give a base accelerator)", place=place)
                )
    return problems


def accelerator_from_mapping(
    mapping: Mapping[str, Any], place: str = "accelerator", *, name: str | None = None
) -> Accelerator:
    """An accelerator from the user's own data, checked; all errors at once.

    Keys are those of the catalogue: `name`, `base` (a catalogue entry to start from), `family`,
    `kind`, `peak_flops` (`{bf16: 989 TFLOP/s, ...}`), `core_count`, `memory`, `memory_bandwidth`,
    `l2`, `scale_up_bandwidth`, `scale_up_links`, `host_bandwidth`, `power`, `idle_power`,
    `price_usd_per_hour`, `constants`, `sources`, `calibration`.

    Raises
    ------
    InputError
        For unknown keys, wrong units, values out of range, or missing figures without `base`.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"expected a mapping of figures, got {mapping!r}", place=place)
    try:
        entry = _Entry.model_validate(dict(mapping))
    except pydantic.ValidationError as error:
        problems = _problems(error, place)
        raise_all(problems)
        raise AssertionError from error
    base: Accelerator | None = None
    problems = _check(entry, place)
    if entry.base is not None:
        try:
            base = accelerator(entry.base)
        except InputError as error:
            problems.append(error.at(f"{place}.base"))
    own_name = entry.name or name or (f"{base.name}-custom" if base else None)
    if own_name is None:
        problems.append(InputError("name is required", place=place))
    raise_all(problems)
    return _build(entry, base, own_name or "", {})


def _build(
    entry: _Entry, base: Accelerator | None, name: str, references: Mapping[str, str]
) -> Accelerator:
    def pick(key: str, inherited: str, default: Any) -> Any:
        value = getattr(entry, key)
        if value is not None:
            return value
        return getattr(base, inherited) if base is not None else default

    family = pick("family", "family", "")
    power = pick("power", "power_w", 500.0)
    kept = base is not None and family == base.family
    constants = dict(base.constants if base is not None and kept else families()[family])
    return Accelerator(
        name=name,
        vendor=pick("vendor", "vendor", "unknown"),
        family=family,
        kind=pick("kind", "kind", "tpu" if family == "tpu" else "gpu"),
        peak_flops={**(base.peak_flops if base else {}), **(entry.peak_flops or {})},
        core_count=pick("core_count", "core_count", 0),
        memory_bytes=pick("memory", "memory_bytes", 0.0),
        memory_bandwidth=pick("memory_bandwidth", "memory_bandwidth", 0.0),
        l2_bytes=pick("l2", "l2_bytes", 0.0),
        scale_up_bandwidth=pick("scale_up_bandwidth", "scale_up_bandwidth", 0.0),
        scale_up_links=pick("scale_up_links", "scale_up_links", 0),
        # PCIe 4.0 x16, the least that a training accelerator of today has
        host_bandwidth=pick("host_bandwidth", "host_bandwidth", 31.5e9),
        power_w=power,
        idle_power_w=pick("idle_power", "idle_power_w", 0.12 * power),
        price_usd_per_hour=pick("price_usd_per_hour", "price_usd_per_hour", None),
        constants={**constants, **entry.constants},
        sources={
            "constants": f"family {family}, fitted on measured kernels: docs/kernels.md",
            **(base.sources if base else {}),
            **{key: references.get(value, value) for key, value in entry.sources.items()},
        },
        clock_hz=pick("clock", "clock_hz", None),
        aliases=tuple(entry.aliases),
        calibration=dict(entry.calibration),
    )


def accelerator_from_file(path: str | Path) -> Accelerator:
    """An accelerator from a YAML file (`simulator calibrate` writes one); raises `InputError`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if too_deep(text):
            raise InputError("nested too deep", place=str(path))
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read the accelerator file: {reason}", place=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"not valid YAML{where}", place=str(path)) from None
    return accelerator_from_mapping(data, str(path), name=path.stem)


@functools.cache
def _catalogue() -> dict[str, Accelerator]:
    raw = _raw()
    result = {}
    for name, data in raw["accelerators"].items():
        entry = _Entry.model_validate(data)
        raise_all(_check(entry, name))
        result[name] = _build(entry, None, name, raw["references"])
    return result


def accelerators() -> dict[str, Accelerator]:
    """Every accelerator of the catalogue by name, in the catalogue's order."""
    return dict(_catalogue())


_DROPPED = re.compile(
    r"^(nvidia|tesla|amd|instinct|intel|habana|google|cloud|aws|amazon|dgx|hgx|oam|gpus?|geforce|"
    r"hbm\d?e?|rev\d*|graphics|accelerator|generation|card|chips?)$"
)
_REWRITES = (
    (re.compile(r"(\d+)\s+(g(?:i)?b)\b"), r"\1\2"),  # "80 GB" is one word
    (re.compile(r"\bsxm\d\b"), "sxm"),
    (re.compile(r"\b(\d+)(gib|g)\b"), r"\1gb"),
    (re.compile(r"\bpci-?e\b|\bpci\s+express\b"), "pcie"),
)


def _words(name: str) -> list[str]:
    text = re.sub(r"[\s_/,()-]+", " ", name.casefold()).strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^\d+\s*x\s*(?=[a-z])", "", text)  # "8x H100"
    words = [word for word in text.split() if not _DROPPED.match(word)]
    if words and re.fullmatch(r"v[2-9](\w*)", words[0]):
        words.insert(0, "tpu")  # "v5p" is how Google calls a TPU
    if len(words) > 1 and words[0].startswith("tpu") and words[-1].isdigit():
        words.pop()  # "v5p-128" is a slice
    return words


@functools.cache
def _index() -> dict[str, str]:
    index: dict[str, str] = {}
    for name, item in _catalogue().items():
        for alias in (name, *item.aliases):
            words = _words(alias)
            index.setdefault(" ".join(sorted(words)), name)
            index.setdefault("".join(words), name)
    return index


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name: a catalogue entry, an alias of one, or a path to a YAML file.

    Case, dashes, underscores, word order, vendor words and `SXM4`/`SXM5` make no difference:
    `h100_sxm`, `NVIDIA H100 80GB HBM3` and `H100-80GB-SXM` are one accelerator.

    Raises
    ------
    InputError
        If there is none, with the nearest name.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"expected the name of an accelerator, got {name!r}")
    if name in _catalogue():
        return _catalogue()[name]
    if name.endswith((".yaml", ".yml")):
        return accelerator_from_file(name)
    words = _words(name)
    found = _named(words)
    if found is not None:
        return found
    # a memory size that the entry has anyway ("RTX 4090 24GB", "B200-180GB")
    for word in words:
        size = re.fullmatch(r"(\d+)gb", word)
        found = _named([other for other in words if other != word]) if size else None
        if size and found is not None:
            gib = found.memory_bytes / 2**30
            if abs(float(size[1]) / gib - 1.0) < _MEMORY_ROUNDING:
                return found
    guess = _suggestion(name, words)
    hint = f"; did you mean {guess!r}?" if guess is not None else ""
    listing = f"{len(_catalogue())} known: simulator list accelerators"
    raise InputError(f"unknown accelerator {name!r}{hint} ({listing})")


#: Datasheets count decimal gigabytes and reserve some; beyond this it is another part.
_MEMORY_ROUNDING = 0.08


def _named(words: list[str]) -> Accelerator | None:
    index = _index()
    for key in (" ".join(sorted(words)), "".join(words)):
        if key in index:
            return _catalogue()[index[key]]
    return None


def _line(word: str) -> str:
    """The product line in a word of a name: `mi` of `mi308x`, `trainium` of `trainium3`."""
    match = re.match(r"[a-z]+", word)
    return match[0] if match else ""


def _suggestion(name: str, words: list[str]) -> str | None:
    """The entry that is meant by an unknown name, if there is one that makes sense: one that
    shares the model number, or else the product line, or else nearly all letters."""
    known = {
        text: item.name for item in _catalogue().values() for text in (item.name, *item.aliases)
    }
    own = [word for word in words if not re.fullmatch(r"\d+gb|sxm|pcie", word)]
    numbered = [word for word in own if any(letter.isdigit() for letter in word)]
    same_number = [text for text in known if set(numbered) & set(_words(text))]
    lines = {_line(word) for word in own[:1]} - {""}
    same_line = [text for text in known if lines & {_line(word) for word in _words(text)[:1]}]
    for candidates in (same_number, same_line):
        if candidates:
            text = " ".join(own)
            best = max(
                candidates,
                key=lambda other: difflib.SequenceMatcher(
                    None, text, " ".join(_words(other))
                ).ratio(),
            )
            return known[best]
    folded = {text.casefold(): meant for text, meant in known.items()}
    close = difflib.get_close_matches(name.casefold(), list(folded), 1, 0.8)
    return folded[close[0]] if close else None
