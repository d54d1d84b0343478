"""`simulator import`: models, clusters and traces from other tools' files."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from simulator.errors import InputError

if TYPE_CHECKING:
    import networkx as nx

    from simulator.importers.trace import Trace

_FILE = click.Path(dir_okay=False, path_type=Path)
_ANY = click.Path(path_type=Path)


@click.group("import")
def command() -> None:
    """Import a model, a cluster or a trace from another tool's files.

    Clusters become topology files (.yaml) or graphs (.graphml), models a .yaml for an experiment's
    `model`, traces a timeline (.parquet, .csv) or Chakra files (a folder). The output appears
    complete or not at all.
    """


# ------------------------------------------------------------------------------- clusters


def _cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--out", type=_FILE, required=True, help="A .yaml or .graphml file."),
        click.option("--nodes", type=click.IntRange(1), default=1, show_default=True,
                     help="Copies of the host, joined NIC by NIC (.graphml), or nodes (.yaml)."),
        click.option("--network", help="Line rate of a NIC, e.g. '400 Gb/s'."),
        click.option("--accelerator", help="Catalogue name of the accelerators."),
    ):  # fmt: skip
        function = option(function)
    return function


@command.command("topo")
@click.argument("file", type=_FILE)
@_cluster_options
def topo(file: Path, accelerator: str | None, network: str | None, nodes: int, out: Path) -> None:
    """A host from the output of `nvidia-smi topo -m`."""
    from simulator.importers.topo_matrix import read_topo_matrix

    graph = read_topo_matrix(file, accelerator=accelerator, network=_rate(network))
    _write_cluster(graph, out, nodes, _rate(network))


@command.command("nccl-xml")
@click.argument("file", type=_FILE)
@_cluster_options
def nccl_xml(
    file: Path, accelerator: str | None, network: str | None, nodes: int, out: Path
) -> None:
    """A host from NCCL's topology file (NCCL_TOPO_DUMP_FILE)."""
    from simulator.importers.nccl_xml import read_nccl_xml

    _write_cluster(read_nccl_xml(file, accelerator=accelerator), out, nodes, _rate(network))


@command.command("graphml")
@click.argument("file", type=_FILE)
@_cluster_options
def graphml(
    file: Path, accelerator: str | None, network: str | None, nodes: int, out: Path
) -> None:
    """A cluster's graph from GraphML (checked, and normalised)."""
    from simulator.importers.graphml import read_graphml

    graph = read_graphml(file)
    if accelerator is not None:
        for _, data in graph.nodes(data=True):
            if data.get("type") in ("gpu", "tpu"):
                data.setdefault("accelerator", accelerator)
    _write_cluster(graph, out, nodes, _rate(network))


def _rate(text: str | None) -> float | None:
    from simulator.units import parse_bandwidth

    if text is None:
        return None
    rate = parse_bandwidth(text, place="--network")
    if rate <= 0:
        raise InputError("must be positive", place="--network")
    return rate


def _write_cluster(graph: nx.Graph, out: Path, nodes: int, network: float | None) -> None:
    from simulator.importers.files import write_bytes
    from simulator.importers.graphml import write_graphml
    from simulator.importers.hosts import replicate, topology_mapping
    from simulator.topology import Cluster, load_cluster

    if out.suffix in (".yaml", ".yml"):
        mapping = topology_mapping(graph, bandwidth=network)
        if nodes > 1:
            mapping["nodes"] = nodes
        cluster = load_cluster(mapping)
        write_bytes(out, yaml.safe_dump(mapping, sort_keys=False).encode())
    elif out.suffix == ".graphml":
        if nodes > 1 or network is not None:
            graph = replicate(graph, nodes, bandwidth=network)
        cluster = Cluster.from_graph(graph)
        write_graphml(graph, out)
    else:
        raise InputError("expected a .yaml or .graphml file", place=f"--out {out}")
    kinds = ", ".join(cluster.accelerator_type_names)
    click.echo(f"{out}: {len(cluster.accelerators)} accelerators ({kinds})")


# --------------------------------------------------------------------------------- traces


def _trace_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--out", type=_ANY, required=True,
                     help="A .parquet or .csv timeline, or a folder for Chakra files."),
        click.option("--replay", metavar="TOPOLOGY",
                     help="Replay on this cluster: measured compute, simulated communication."),
        click.option("--nodes", type=click.IntRange(1), help="Nodes of that cluster."),
        click.option("--ranks", type=click.IntRange(1),
                     help="Ranks that a single rank's trace stands for."),
    ):  # fmt: skip
        function = option(function)
    return function


@command.command("kineto")
@click.argument("files", type=_ANY, nargs=-1, required=True)
@click.option("--step", type=click.IntRange(0), help="Keep only ProfilerStep#STEP.")
@_trace_options
def kineto(
    files: tuple[Path, ...], step: int | None, ranks: int | None, nodes: int | None,
    replay: str | None, out: Path,
) -> None:  # fmt: skip
    """A timeline from PyTorch profiler traces, one file per rank (or a folder)."""
    from simulator.importers.kineto import read_kineto

    trace = read_kineto(files[0] if len(files) == 1 else list(files), step=step)
    _write_trace(trace, out, replay, nodes, ranks)


@command.command("chakra")
@click.argument("files", type=_ANY, nargs=-1, required=True)
@_trace_options
def chakra(
    files: tuple[Path, ...], ranks: int | None, nodes: int | None, replay: str | None, out: Path
) -> None:
    """A timeline from MLCommons Chakra execution traces (a folder, or its files)."""
    from simulator.importers.chakra import read_chakra

    trace = read_chakra(files[0] if len(files) == 1 else list(files))
    _write_trace(trace, out, replay, nodes, ranks)


def _write_trace(
    trace: Trace, out: Path, replay: str | None, nodes: int | None, ranks: int | None
) -> None:
    from simulator.importers.files import replacing
    from simulator.units import format_time

    duration = trace.duration
    frame = None
    if replay is not None:
        from simulator.importers.export import as_trace
        from simulator.importers.replaying import replay as run
        from simulator.topology import load_cluster

        timeline = run(trace, load_cluster(replay, nodes=nodes), world_size=ranks)
        click.echo(
            f"measured {format_time(duration)}, replayed {format_time(timeline.step_time)} "
            f"on {replay}"
        )
        if not out.suffix:
            trace = as_trace(timeline)
        else:
            frame = timeline.frame("representatives")
    elif nodes is not None:
        raise InputError("only with --replay", place="--nodes")
    elif ranks is not None:
        trace = trace.spread(ranks)
    if out.suffix in (".parquet", ".csv"):
        frame = trace.frame() if frame is None else frame
        with replacing(out) as stream:
            if out.suffix == ".csv":
                stream.write(frame.to_csv(index=False).encode())
            else:
                buffer = io.BytesIO()
                frame.to_parquet(buffer, index=False)
                stream.write(buffer.getvalue())
        click.echo(f"{out}: {len(frame)} operations")
    elif not out.suffix:
        from simulator.importers.chakra import write_chakra

        files = write_chakra(trace, out)
        click.echo(f"{out}: {len(files) - 1} ranks")
    else:
        raise InputError("expected a .parquet or .csv file, or a folder", place=f"--out {out}")


# --------------------------------------------------------------------------------- models

_OUT_MODEL = click.option("--out", type=_FILE, required=True, help="A .yaml file.")


@command.command("hf")
@click.argument("file", type=_FILE)
@_OUT_MODEL
def hf(file: Path, out: Path) -> None:
    """A model from a Hugging Face config.json."""
    from simulator.model.huggingface import model_from_hf_config
    from simulator.model.lookup import model_to_mapping

    spec = model_from_hf_config(str(file))
    _write_model(model_to_mapping(spec), out, spec.parameters)


def _traced_command(framework: str, what: str) -> None:
    @command.command(framework, help=what)
    @click.argument("target", metavar="MODULE:FUNCTION")
    @_OUT_MODEL
    def traced(target: str, out: Path) -> None:
        import simulator.importers as importers

        result = _call(target)
        if not isinstance(result, importers.TracedModel):
            maker = getattr(importers, f"model_from_{framework}")
            if not isinstance(result, tuple) or len(result) < 2:
                raise InputError(
                    f"expected a tuple of what model_from_{framework} takes, or a TracedModel, "
                    f"got {type(result).__name__}",
                    place=target,
                )
            result = maker(*result)
        _write_model(result.to_mapping(), out, result.parameters)


_traced_command(
    "torch",
    "A model from PyTorch: FUNCTION returns (module, example inputs). Runs that function's code.",
)
_traced_command(
    "jax",
    "A model from JAX: FUNCTION returns (function, params, *inputs). Runs that function's code.",
)
_traced_command(
    "keras",
    "A model from Keras: FUNCTION returns (model, *inputs). Runs that function's code.",
)


def _call(target: str) -> Any:
    """The result of `MODULE:FUNCTION` or `FILE.py:FUNCTION`, whose code the user asks to run."""
    module_name, separator, function_name = target.rpartition(":")
    if not separator or not module_name or not function_name:
        raise InputError(
            f"expected MODULE:FUNCTION or FILE.py:FUNCTION, got {target!r}", place="MODULE:FUNCTION"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        if module_name.endswith(".py"):
            if not Path(module_name).is_file():
                raise InputError("no such file", place=module_name)
            spec = importlib.util.spec_from_file_location("imported_model", module_name)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["imported_model"] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"has no function {function_name!r}", place=module_name)
        return function()
    except InputError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"{type(error).__name__}: {error}", place=target) from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _write_model(mapping: dict[str, Any], out: Path, parameters: int) -> None:
    from simulator.importers.files import write_bytes
    from simulator.model.lookup import resolve_model
    from simulator.units import format_count

    if out.suffix not in (".yaml", ".yml"):
        raise InputError("expected a .yaml file", place=f"--out {out}")
    resolve_model(mapping, place=str(out))
    write_bytes(out, yaml.dump(mapping, Dumper=_Plain, sort_keys=False, width=120).encode())
    click.echo(f"{out}: {mapping.get('name', 'model')}, {format_count(parameters)} parameters")


class _Plain(yaml.SafeDumper):
    """Inner lists of operations in one line each; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        items = dict(mapping)
        return super().represent_mapping(tag, items, flow_style="type" in items or flow_style)


_Plain.add_representer(dict, lambda dumper, data: dumper.represent_mapping(_MAP, data.items()))
_MAP = "tag:yaml.org,2002:map"
