"""Topology files: a cluster in a few lines of YAML, checked at the border.

`load_cluster` takes the name of a file of `topologies/`, a path, a mapping with the same keys, or
any networkx graph. See docs/collectives.md for the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import networkx as nx
import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from simulator.errors import InputError, nearest, raise_all, unknown_name
from simulator.experiment import Float, Int, too_deep
from simulator.topology.cluster import KIND_INDEX, LINK_KINDS, Cluster
from simulator.topology.fabric import DomainSpec, FabricSpec, NetworkSpec, build_fabric
from simulator.topology.graphs import from_graph, read_graph_file
from simulator.units import parse_bandwidth, parse_time

#: The topology files. In a checkout this is a link to the top-level `topologies/`, the one place
#: of truth; in an installed package, a copy of it.
DATA = Path(__file__).parent / "data"


def _text(parse: Callable[[Any], float]) -> BeforeValidator:
    def convert(value: Any) -> float:
        try:
            return parse(value)
        except InputError as error:
            raise ValueError(error.problem) from None

    return BeforeValidator(convert)


Bandwidth = Annotated[float, _text(parse_bandwidth), Field(gt=0)]
Time = Annotated[float, _text(parse_time)]


#: Slowest scale-out network, byte/s: less is a number whose unit was forgotten.
_LEAST_RATE = 1e5

#: Most accelerators (and nodes) of a cluster; far beyond any built, below what memory holds.
_MOST = 4_194_304


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ScaleUpFile(_Model):
    """What joins the accelerators of a scale-up domain."""

    kind: Literal["switch", "mesh", "torus", "pcie", "none"]
    link: str = "NVLink"
    bandwidth: Bandwidth | None = None
    """Per direction: per accelerator (switch), per link (mesh, torus); default: the catalogue's."""
    latency: Time = 0.3e-6
    domain: Int | None = Field(default=None, ge=1, le=65536)
    """Accelerators per domain where it spans hosts (NVL72); default: those of one host."""
    switches: Int = Field(default=1, ge=1, le=65536)
    in_network_reduction: bool = False
    links: list[tuple[Int, Int, Annotated[Float, Field(gt=0)]]] | Literal["full"] | None = None
    """Mesh: [a, b, links] triples of accelerators and how many links join them, or `full`."""
    dimensions: Int | None = Field(default=None, ge=1, le=3)
    shape: list[Annotated[Int, Field(ge=1, le=4096)]] | None = None
    shapes: dict[Int, list[Annotated[Int, Field(ge=1, le=4096)]]] = {}
    """Torus: slice shape by number of accelerators."""
    other_shapes: Literal["any", "blocks", "none"] = "any"
    """Torus: slices of numbers that `shapes` does not list: none; blocks, every axis of which is a
    multiple of `wrap_multiple`; or any, as near to a cube as can be."""
    wrap: bool | list[bool] | None = None
    wrap_multiple: Int | None = Field(default=None, ge=1)
    """Torus: an axis closes where its length is a multiple of this."""
    wrap_length: Int | None = Field(default=None, ge=1)
    """Torus: an axis closes only at exactly this length."""
    max_slice: Int | None = Field(default=None, ge=1)


class HostFile(_Model):
    """How a host reaches its accelerators."""

    link: Literal["PCIe", "C2C"] = "PCIe"
    bandwidth: Bandwidth | None = None
    latency: Time = 0.5e-6
    accelerators_per_switch: Int = Field(default=1, ge=1, le=4096)
    """Accelerators behind one PCIe switch, whose link to the host (as fast as theirs) they share;
    1: each has the host to itself."""


class NodeFile(_Model):
    """One host."""

    accelerators: Int = Field(ge=1, le=4096)
    scale_up: ScaleUpFile
    host: HostFile = HostFile()
    nics: Int = Field(default=0, ge=0, le=4096)


class NetworkFile(_Model):
    """The scale-out network."""

    kind: Literal["rail", "fat-tree", "none"]
    link: str = "InfiniBand"
    fabric: str | None = None
    bandwidth: Bandwidth | None = None
    """Line rate of one NIC per direction."""
    latency: Time = 0.5e-6
    fabric_efficiency: Float = Field(default=0.97, gt=0, le=1)
    nodes_per_leaf: Int = Field(default=32, ge=1, le=_MOST)
    oversubscription: Float = Field(default=1.0, gt=0)
    spines: Int = Field(default=0, ge=0, le=4096)
    nodes_per_pod: Int = Field(default=0, ge=0, le=_MOST)
    pod_oversubscription: Float = Field(default=1.0, gt=0)
    ecmp: Literal["ideal", "hash"] = "ideal"
    in_network_reduction: bool = False


class FaultFile(_Model):
    """A slow accelerator, a degraded or a failed link."""

    gpu: Int | str | None = None
    slowdown: Float = Field(default=1.0, ge=1)
    link: tuple[Int | str, Int | str] | None = None
    bandwidth_factor: Float = Field(default=1.0, gt=0, le=1)
    failed: bool = False

    @model_validator(mode="after")
    def _one_target(self) -> FaultFile:
        if (self.gpu is None) == (self.link is None):
            raise ValueError("names either a `gpu` (with `slowdown`) or a `link` of two node names")
        return self


class RouteFile(_Model):
    """A route of the user's choice."""

    source: str
    target: str
    paths: list[list[str]]


class MixFile(_Model):
    """A run of nodes with another accelerator."""

    accelerator: str
    nodes: Int = Field(ge=1, le=_MOST)


class TopologyFile(_Model):
    """A topology file."""

    name: str = "cluster"
    description: str = ""
    extends: str | None = None
    accelerator: str | None = None
    mix: list[MixFile] = []
    nodes: Int = Field(default=1, ge=1, le=_MOST)
    node: NodeFile
    network: NetworkFile = NetworkFile(kind="none")
    faults: list[FaultFile] = []
    routes: list[RouteFile] = []
    sources: dict[str, str] = {}


class GraphBody(_Model):
    """A graph spelt out."""

    nodes: dict[str | Int, str | dict[str, Any]]
    """Name -> type, or a mapping with `type` and other attributes."""
    edges: list[dict[str, Any]] = []
    directed: bool = False


class GraphFile(_Model):
    """A topology file that spells out (or names a file of) an arbitrary graph."""

    name: str = "custom"
    description: str = ""
    accelerator: str | None = None
    graph: str | GraphBody
    fabric: str | None = None
    fabric_efficiency: Float | None = Field(default=None, gt=0, le=1)
    faults: list[FaultFile] = []
    routes: list[RouteFile] = []
    sources: dict[str, str] = {}


def topology_names() -> list[str]:
    """Names of the shipped topologies, sorted."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))


def topology_description(name: str) -> dict[str, Any]:
    """The checked content of a topology, shipped or a YAML file (for `simulator show`).

    What it `extends` is filled in; name and description are its own.

    Raises
    ------
    InputError
        If there is none, it is broken, or it spells out a graph.
    """
    if "graph" in (content := _read_topology(name, None)):
        raise InputError("spells out a graph: nothing to resolve", place=name)
    described = _validated(_resolved(content, name), name).model_dump()
    own = {key: content.get(key) or described[key] for key in ("name", "extends")}
    return {**described, **own, "description": content.get("description", "")}


def _read_topology(text: str, place: str | None) -> dict[str, Any]:
    """The content of the topology file at a path, or of the shipped one of that name."""
    if _is_path(text):
        return {"name": Path(text).stem, **_read_yaml(Path(text))}
    return _read_named(text, place)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if too_deep(text):
            raise InputError("nested too deep", place=str(path))
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError("no such file", place=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", place=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "is not YAML"
        raise InputError(f"is not valid YAML: {problem}", place=where) from None
    if not isinstance(content, dict):
        raise InputError(f"expected a mapping, got {type(content).__name__}", place=str(path))
    for owner in (content, *(content["mix"] if isinstance(content.get("mix"), list) else ())):
        if isinstance(owner, dict) and isinstance(owner.get("accelerator"), str):
            owner["accelerator"] = _beside(owner["accelerator"], path)
    return content


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _is_path(text: str) -> bool:
    """Whether a text is the path of a topology file, not a shipped one's name."""
    return Path(text).suffix.lower() in (".yaml", ".yml") or "/" in text


def _beside(name: str, path: Path) -> str:
    """An accelerator; a file is looked for beside the topology file that names it."""
    if _is_file(name) and not Path(name).is_absolute() and (path.parent / name).exists():
        return str(path.parent / name)
    return name


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    return _read_yaml(DATA / f"{name}.yaml")


def _read_named(name: str, place: str | None) -> dict[str, Any]:
    names = topology_names()
    if name not in names:
        folded = {n.casefold().replace("_", "-"): n for n in names}
        name_folded = name.casefold().replace("_", "-").replace(" ", "-")
        if name_folded not in folded:
            raise unknown_name("topology", name, names, place=place)
        name = folded[name_folded]
    return {"name": name, **_shipped(name)}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _resolved(content: dict[str, Any], place: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """`content` laid over what it `extends`."""
    base = content.get("extends")
    if base is None:
        return content
    if base in seen:
        raise InputError(
            f"`extends` goes in a circle: {' -> '.join((*seen, str(base)))}", place=place
        )
    text = str(base)
    if text.endswith((".yaml", ".yml")):
        parent_path = Path(text)
        if not parent_path.is_absolute() and Path(place).suffix:
            parent_path = Path(place).parent / parent_path
        parent, place = _read_yaml(parent_path), str(parent_path)
    else:
        parent = _read_named(text, f"{place}: extends")
    parent = _resolved(parent, place, (*seen, text))
    over = {key: value for key, value in content.items() if key != "extends"}
    return _merged(parent, over)


def _known_keys(location: Sequence[Any], model: Any) -> list[str]:
    for step in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        field = model.model_fields.get(str(step))
        if field is None:
            return []
        model = field.annotation
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def _input_errors(
    error: ValidationError, place: str, model: type[BaseModel] = TopologyFile
) -> list[InputError]:
    errors = []
    for item in error.errors():
        location = item["loc"]
        key = ".".join(str(step) for step in location)
        if item["type"] == "extra_forbidden":
            choices = _known_keys(location[:-1], model)
            guess = nearest(str(location[-1]), choices)
            hint = f"; did you mean {guess!r}?" if guess else ""
            listing = f" (known: {', '.join(choices)})" if choices else ""
            errors.append(InputError(f"unknown key{hint}{listing}", place=f"{place}: {key}"))
        elif item["type"] == "missing":
            errors.append(InputError("is missing", place=f"{place}: {key}"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = (
                f", got {given!r}"
                if not isinstance(given, Mapping) and "got" not in message
                else ""
            )
            errors.append(
                InputError(
                    message[0].lower() + message[1:] + shown,
                    place=f"{place}: {key}" if key else place,
                )
            )
    return errors


def _validated(content: Mapping[str, Any], place: str) -> TopologyFile:
    try:
        return TopologyFile.model_validate(dict(content))
    except ValidationError as error:
        raise_all(_input_errors(error, place))
        raise AssertionError("unreachable") from error


def load_cluster(
    spec: str | Path | Mapping[str, Any] | nx.Graph | Cluster,
    *,
    nodes: int | None = None,
    accelerators: int | None = None,
    faults: Sequence[Any] = (),
    network: str | float | None = None,
    fabric_efficiency: float | None = None,
    place: str | None = None,
) -> Cluster:
    """Build a cluster.

    Parameters
    ----------
    spec:
        A name of `topologies/` (`"dgx-h100"`), a path of a YAML or GraphML file, a mapping with
        the keys of such a file, any networkx graph, or a `Cluster` (returned as it is).
    nodes:
        Number of nodes (hosts; for tori: slices).
    accelerators:
        Number of accelerators; with domains that span hosts they are spread evenly over as few
        domains as hold them. Tori: the slice shape follows from it.
    faults:
        `{gpu: 17, slowdown: 1.3}`, `{link: [a, b], bandwidth_factor: 0.5}` or
        `{link: [a, b], failed: true}`, added to those of the file.
    network:
        Scale-out line rate per accelerator and direction, byte/s or text ("400 Gb/s"), in place
        of the file's.
    fabric_efficiency:
        Share of the line rate that large messages reach, in place of the file's.
    place:
        Where `spec` stands, for messages.

    Raises
    ------
    InputError
        For an unknown name, unreadable or wrong files (all errors at once), numbers of nodes that
        do not fit, faults without another way.
    """
    if isinstance(spec, Cluster):
        return spec
    asked = place  # where counts and faults stand, also beside a topology file
    inner = f"{place}.network" if place else "network"
    rate = None if network is None else parse_bandwidth(network, place=inner)
    if rate is not None and rate < _LEAST_RATE:
        raise InputError(
            f"expected a bandwidth such as '400 Gb/s' (a bare number is byte/s), got {network!r}",
            place=inner,
        )
    if fabric_efficiency is not None and not 0 < fabric_efficiency <= 1:
        inner = f"{place}.fabric_efficiency" if place else "fabric_efficiency"
        raise InputError(f"expected a share in (0, 1], got {fabric_efficiency!r}", place=inner)
    if isinstance(spec, nx.Graph):
        return _custom(spec, None, {}, nodes, accelerators, faults, rate, fabric_efficiency, place)
    if isinstance(spec, str | Path):
        text = str(spec)
        suffix = Path(text).suffix.lower()
        if suffix in (".graphml", ".gml", ".gexf"):
            graph = read_graph_file(Path(text))
            return _custom(
                graph,
                Path(text).stem,
                {},
                nodes,
                accelerators,
                faults,
                rate,
                fabric_efficiency,
                text,
            )
        content = _read_topology(text, f"{place}.topology" if place else None)
        place = text if _is_path(text) else place or text
    elif isinstance(spec, Mapping):
        content, place = dict(spec), place or "cluster"
    else:
        raise InputError(
            "expected a topology's name, a path, a mapping or a networkx graph, "
            f"got {type(spec).__name__}",
            place=place,
        )
    place = place or "cluster"
    if "graph" in content:
        return _custom_file(content, nodes, accelerators, faults, rate, fabric_efficiency, place)
    checked = _validated(_resolved(content, place), place)
    if faults:
        extra = _checked_faults(faults, asked or place)
        checked = checked.model_copy(update={"faults": [*checked.faults, *extra]})
    asked = asked or place
    return build_fabric(
        _fabric(checked, nodes, accelerators, rate, fabric_efficiency, place, asked)
    )


def _mapping(fault: Any) -> dict[str, Any]:
    """A fault as a mapping; dataclasses are understood."""
    if dataclasses.is_dataclass(fault) and not isinstance(fault, type):
        return {k: v for k, v in dataclasses.asdict(fault).items() if v is not None}
    return dict(fault)


def _checked_faults(faults: Sequence[Any], place: str) -> list[FaultFile]:
    """Faults checked, all errors at once."""
    checked: list[FaultFile] = []
    errors: list[InputError] = []
    for number, fault in enumerate(faults):
        here = f"{place}: faults[{number}]"
        try:
            checked.append(FaultFile.model_validate(_mapping(fault)))
        except ValidationError as error:
            errors.extend(_input_errors(error, here, FaultFile))
        except (TypeError, ValueError):
            errors.append(InputError(f"expected a mapping, got {fault!r}", place=here))
    raise_all(errors)
    return checked


def _custom(
    graph: nx.Graph, name: str | None, options: Mapping[str, Any], nodes: int | None,
    accelerators: int | None, faults: Sequence[Any], rate: float | None,
    fabric_efficiency: float | None, place: str | None,
) -> Cluster:  # fmt: skip
    arguments = dict(options)
    if fabric_efficiency is not None:
        arguments["fabric_efficiency"] = fabric_efficiency
    if rate is not None:
        raise InputError("a rate cannot be given for a graph: its edges state theirs", place=place)
    checked = _checked_faults(faults, place or "graph")
    plain = [fault.model_dump(exclude_none=True) for fault in checked]
    cluster = from_graph(graph, name=name, faults=plain, place=place, **arguments)
    if accelerators is not None and accelerators != len(cluster):
        raise InputError(
            f"accelerators: {accelerators} asked for, but the graph has {len(cluster)}", place=place
        )
    if nodes is not None and nodes != cluster.nodes:
        raise InputError(
            f"nodes: {nodes} asked for, but the graph has {cluster.nodes}", place=place
        )
    return cluster


def _custom_file(
    content: Mapping[str, Any], nodes: int | None, accelerators: int | None,
    faults: Sequence[Any], rate: float | None, fabric_efficiency: float | None,
    place: str,
) -> Cluster:  # fmt: skip
    """A graph spelt out in YAML: `graph: {nodes: {name: {type: …}}, edges: [{from, to, …}]}`."""
    try:
        file = GraphFile.model_validate(dict(content))
    except ValidationError as error:
        raise_all(_input_errors(error, place, GraphFile))
        raise AssertionError("unreachable") from error
    errors: list[InputError] = []
    if isinstance(file.graph, str):
        graph = read_graph_file(Path(file.graph))
    else:
        graph = nx.DiGraph() if file.graph.directed else nx.Graph()
        for node, data in file.graph.nodes.items():
            graph.add_node(str(node), **({"type": data} if isinstance(data, str) else data))
        for number, edge in enumerate(file.graph.edges):
            here = f"{place}: graph.edges[{number}]"
            if "from" not in edge or "to" not in edge:
                errors.append(InputError("expected a mapping with `from` and `to`", place=here))
                continue
            ends = [str(edge["from"]), str(edge["to"])]
            for end in ends:
                if end not in graph:
                    guess = nearest(end, [str(n) for n in graph])
                    hint = f"; did you mean {guess!r}?" if guess else ""
                    errors.append(InputError(f"there is no node {end!r}{hint}", place=here))
            if all(end in graph for end in ends):
                graph.add_edge(*ends, **{k: v for k, v in edge.items() if k not in ("from", "to")})
    raise_all(errors)
    options: dict[str, Any] = {
        "accelerator": file.accelerator,
        "fabric": file.fabric,
        "fabric_efficiency": file.fabric_efficiency,
    }
    options = {key: value for key, value in options.items() if value is not None}
    if file.routes:
        options["routes"] = {(r.source, r.target): r.paths for r in file.routes}
    return _custom(
        graph, file.name, options, nodes, accelerators,
        [*(f.model_dump(exclude_none=True) for f in file.faults), *faults],
        rate, fabric_efficiency, place,
    )  # fmt: skip


def _slice_shape(up: ScaleUpFile, chips: int, place: str) -> tuple[int, ...]:
    """Shape of a torus slice: as listed, else the factorisation nearest to a cube."""
    if up.shape is not None:
        if math.prod(up.shape) != chips:
            raise InputError(
                f"shape {'x'.join(map(str, up.shape))} holds {math.prod(up.shape)} accelerators, "
                f"not {chips}",
                place=f"{place}: node.scale_up.shape",
            )
        return tuple(up.shape)
    if chips in up.shapes:
        return tuple(up.shapes[chips])
    dimensions = up.dimensions or 2
    # Axes that close to rings come first in preference, then the smallest sum of lengths.
    candidates: list[tuple[int, ...]] = []

    def factor(rest: int, left: int, least: int, so_far: tuple[int, ...]) -> None:
        if left == 1:
            if rest >= least:
                candidates.append((*so_far, rest))
            return
        for value in range(least, int(rest ** (1 / left) + 1e-9) + 1):
            if rest % value == 0:
                factor(rest // value, left - 1, value, (*so_far, value))

    factor(chips, dimensions, 1, ())
    multiple = up.wrap_multiple or 1
    return min(candidates, key=lambda s: (-sum(v % multiple == 0 for v in s), sum(s)))


def _check_slices(up: ScaleUpFile, total: int, slices: int | None, place: str) -> None:
    """`total` accelerators must make slices of sizes that are built.

    `slices`: how many; None: as few as hold them.

    Raises
    ------
    InputError
        Naming the nearest possible numbers of accelerators below and above.
    """
    if up.other_shapes == "any" or up.shape is not None:
        return
    most = up.max_slice or max(up.shapes, default=1)
    listed = sorted(size for size in up.shapes if size <= most)
    block = (up.wrap_multiple or 1) ** (up.dimensions or 2)
    blocks = range(block, most + 1, block) if up.other_shapes == "blocks" else ()
    sizes = sorted({*listed, *blocks})
    count = slices or -(-total // most)
    if total % count == 0 and total // count in sizes:
        return
    counts = (count,) if slices else range(max(1, count - 1), count + 2)
    totals = [n * size for n in counts for size in sizes if slices or -(-n * size // most) == n]
    ends = (
        max((n for n in totals if n < total), default=None),
        min((n for n in totals if n > total), default=None),
    )
    known = ", ".join(str(size) for size in listed if size not in blocks)
    if blocks:
        known += f" or a multiple of {block} up to {most}"
    problem = f"{total} accelerators are not {count} slices of a size that is built"
    raise InputError(
        f"{problem if count > 1 else f'there is no slice of {total} accelerators'}; nearest: "
        f"{' or '.join(str(n) for n in ends if n is not None)} (a slice has {known}; a topology "
        "mapping with its own node.scale_up.shape may have any)",
        place=place,
    )


def _multiples(number: int, of: int) -> str:
    """The multiples of `of` next to `number`, which is none."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _wraps(up: ScaleUpFile, shape: tuple[int, ...]) -> tuple[bool, ...]:
    if isinstance(up.wrap, bool):
        return (up.wrap,) * len(shape)
    if up.wrap is not None:
        return tuple(up.wrap)
    if up.wrap_length is not None:
        return tuple(length == up.wrap_length for length in shape)
    if up.wrap_multiple is not None:
        return tuple(length % up.wrap_multiple == 0 for length in shape)
    return (True,) * len(shape)


def _fabric(
    file: TopologyFile, nodes: int | None, accelerators: int | None, rate: float | None,
    fabric_efficiency: float | None, place: str, asked: str,
) -> FabricSpec:  # fmt: skip
    from simulator.catalog.accelerators import accelerator

    errors: list[InputError] = []
    if file.accelerator is None and not file.mix:
        errors.append(
            InputError(
                "is missing (a name of the accelerator catalogue)", place=f"{place}: accelerator"
            )
        )
    type_names = [m.accelerator for m in file.mix] or [file.accelerator or ""]
    types = []
    for name in type_names:
        try:
            types.append(accelerator(name))
        except InputError as error:
            errors.append(error.at(f"{place}: accelerator"))
    for number in (nodes, accelerators):
        if number is not None and number < 1:
            errors.append(
                InputError(
                    f"expected a positive number of nodes or accelerators, got {number}",
                    place=place,
                )
            )
    raise_all(errors)
    up, net = file.node.scale_up, file.network
    first = types[0]
    per_host = file.node.accelerators
    link_kind = next((k for k in LINK_KINDS if up.link.lower().startswith(k.lower())), None)
    if link_kind is None:
        errors.append(
            unknown_name("link", up.link, LINK_KINDS, place=f"{place}: node.scale_up.link")
        )
    if net.link not in KIND_INDEX:
        errors.append(unknown_name("link", net.link, LINK_KINDS, place=f"{place}: network.link"))
    if net.kind != "none":
        if net.bandwidth is None and rate is None:
            errors.append(InputError("is missing", place=f"{place}: network.bandwidth"))
        if not file.node.nics:
            errors.append(
                InputError(
                    "must be at least 1 where there is a network", place=f"{place}: node.nics"
                )
            )
    raise_all(errors)

    type_of = None
    used = 0
    if up.kind == "torus":
        slices = nodes or file.nodes
        if accelerators is not None:
            if nodes is None and up.max_slice:
                slices = -(-accelerators // up.max_slice)
            _check_slices(up, accelerators, nodes, f"{asked}: accelerators")
            if accelerators % slices:
                raise InputError(
                    f"{accelerators} accelerators do not divide into {slices} slices; nearest: "
                    f"{_multiples(accelerators, slices)}",
                    place=f"{asked}: accelerators",
                )
            chips = accelerators // slices
        else:
            chips = math.prod(up.shape) if up.shape else (up.domain or per_host)
        shape = _slice_shape(up, chips, place)
        wrap = _wraps(up, shape)
        if len(wrap) != len(shape):
            raise InputError(
                f"expected one value per axis of {'x'.join(map(str, shape))}",
                place=f"{place}: node.scale_up.wrap",
            )
        size, total = chips, chips * slices
        per_host = min(per_host, chips)
    else:
        shape, wrap = (), ()
        size = up.domain or per_host
        if size % per_host:
            raise InputError(
                f"domain of {size} is not a multiple of {per_host} accelerators per node",
                place=f"{place}: node.scale_up.domain",
            )
        mixed = sum(m.nodes for m in file.mix)
        if mixed and nodes is not None and nodes != mixed:
            raise InputError(f"`mix` has {mixed} nodes, not {nodes}", place=f"{place}: nodes")
        total = (
            accelerators if accelerators is not None else (mixed or nodes or file.nodes) * per_host
        )
        if accelerators is not None and nodes is not None:
            if accelerators > nodes * per_host:
                raise InputError(
                    f"{accelerators} accelerators do not fit {nodes} nodes of {per_host}; expected "
                    f"at most {nodes * per_host}, or {-(-accelerators // per_host)} nodes",
                    place=f"{asked}: accelerators",
                )
            if accelerators % nodes:
                raise InputError(
                    f"{accelerators} accelerators do not spread evenly over {nodes} nodes; "
                    f"nearest: {_multiples(accelerators, nodes)}",
                    place=f"{asked}: accelerators",
                )
            if size == per_host:
                used = accelerators // nodes
        if not used:
            if total >= size:
                # Evenly over as few domains as hold them, in whole hosts where that divides.
                domains = -(-total // size)
                used = -(-total // domains)
                if size > per_host:
                    used = min(size, -(-used // per_host) * per_host)
                elif total % size:
                    used = size
            else:
                used = total
        if file.mix:
            type_of = np.repeat(np.arange(len(file.mix)), [m.nodes * per_host for m in file.mix])[
                :total
            ]
    if total > _MOST:
        raise InputError(f"{total} accelerators; at most {_MOST} are supported", place=place)
    if up.kind == "mesh" and size > 1024:
        raise InputError(
            f"a mesh joins at most 1024 accelerators, not {size}",
            place=f"{place}: node.scale_up.kind",
        )
    links: list[tuple[int, int, float]] = []
    per_link = up.bandwidth
    if up.kind == "mesh":
        pairs = up.links
        if pairs is None or pairs == "full":
            pairs = [(i, j, 1.0) for i in range(size) for j in range(i + 1, size)]
        if per_link is None:
            per_link = first.scale_up_bandwidth / max(1, first.scale_up_links)
        bad = [p for p in pairs if not (0 <= p[0] < size and 0 <= p[1] < size and p[0] != p[1])]
        if bad:
            raise InputError(
                f"link {list(bad[0])} does not join two of {size} accelerators",
                place=f"{place}: node.scale_up.links",
            )
        # A node of which only some accelerators are used keeps all its links.
        merged: dict[tuple[int, int], float] = {}
        for i, j, count in pairs:
            ends = (min(i, j), max(i, j))
            merged[ends] = merged.get(ends, 0.0) + per_link * count
        links = [(i, j, r) for (i, j), r in merged.items()]
        if total < size or (used and used < size):
            used = used if used < size else total
            links = [(i, j, r) for i, j, r in links if i < used and j < used]
            size = used
    bandwidth = per_link if per_link is not None else first.scale_up_bandwidth
    if file.node.host.accelerators_per_switch > 1 and up.kind in ("pcie", "none"):
        raise InputError(
            f"scale-up of kind {up.kind!r} goes over the host's links, which `host` describes as "
            "each accelerator's own; expected 1 (a .graphml file has any PCIe tree)",
            place=f"{place}: node.host.accelerators_per_switch",
        )
    host_bandwidth = file.node.host.bandwidth
    nic = net.bandwidth or 0.0
    if rate is not None and net.kind != "none":
        nic = rate * file.node.accelerators / file.node.nics
    fabric = net.fabric or f"{net.link.lower()}"
    nics = file.node.nics
    if net.kind != "none" and nics > per_host:
        # More NICs than accelerators: each accelerator's bundle is one NIC of the summed rate.
        if nics % per_host:
            raise InputError(
                f"{nics} NICs do not divide among {per_host} accelerators",
                place=f"{place}: node.nics",
            )
        nic, nics = nic * (nics // per_host), per_host
    return FabricSpec(
        name=file.name,
        accelerators=total,
        # What `accelerator` finds again: the catalogue does not know the name in a file.
        accelerator_type_names=tuple(
            given if _is_file(given) else t.name for given, t in zip(type_names, types, strict=True)
        ),
        accelerator_type_of=type_of,
        accelerator_kind=first.kind if first.kind in ("gpu", "tpu") else "gpu",
        per_host=per_host,
        domain=DomainSpec(
            kind=up.kind, size=size, link=up.link, link_kind=link_kind or "Other",
            bandwidth=bandwidth, latency=up.latency, switches=up.switches,
            in_network_reduction=up.in_network_reduction, links=tuple(links), shape=shape,
            wrap=wrap,
        ),
        network=NetworkSpec(
            kind=net.kind, link_kind=net.link, fabric=fabric, bandwidth=nic, nics=nics,
            latency=net.latency,
            efficiency=net.fabric_efficiency if fabric_efficiency is None else fabric_efficiency,
            hosts_per_leaf=net.nodes_per_leaf, oversubscription=net.oversubscription,
            spines=net.spines, hosts_per_pod=net.nodes_per_pod,
            pod_oversubscription=net.pod_oversubscription, ecmp=net.ecmp,
            in_network_reduction=net.in_network_reduction,
        ),
        host_link_kind=file.node.host.link,
        host_bandwidth=host_bandwidth if host_bandwidth is not None else first.host_bandwidth,
        host_latency=file.node.host.latency,
        per_host_switch=file.node.host.accelerators_per_switch,
        memory_bandwidth=first.memory_bandwidth,
        used_per_domain=used,
        faults=tuple(f.model_dump(exclude_none=True) for f in file.faults),
        routes=tuple((r.source, r.target, tuple(tuple(p) for p in r.paths)) for r in file.routes),
        place=place,
        sources=file.sources,
    )  # fmt: skip
