"""`true` is no number, wherever a number is read; Python would take it for 1."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from simulator import experiment as module
from simulator.catalog.accelerators import accelerator_from_mapping
from simulator.catalog.frameworks import framework_from_mapping
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.model.huggingface import model_from_hf_config
from simulator.model.library import model_from_mapping
from simulator.schedules import Durations, build
from simulator.studies.sweep_file import make_spec
from simulator.testing.comparison import compare
from simulator.topology import Cluster, load_cluster
from simulator.units import parse_bandwidth, parse_bytes, parse_time

BASE: dict[str, Any] = {"model": "llama3-8b", "cluster": {"topology": "dgx-h100"}}

#: Every key of the experiment file whose type is a number, as (section, key, listed).
SECTIONS = {
    "cluster": module.Cluster,
    "parallel": module.Parallel,
    "training": module.Training,
    "jitter": module.Jitter,
}


def numeric_keys() -> list[tuple[str, bool]]:
    found = []
    for section, cls in SECTIONS.items():
        for name, hint in typing.get_type_hints(cls).items():
            parts = typing.get_args(hint) or (hint,)
            kinds = {part for part in parts if isinstance(part, type)}
            listed = any(typing.get_origin(part) is tuple for part in parts)
            inner = {arg for part in parts for arg in typing.get_args(part)}
            if kinds & {int, float} and bool not in kinds:
                found.append((f"{section}.{name}", False))
            elif listed and int in inner:
                found.append((f"{section}.{name}", True))
    return found


def test_all_numeric_keys_are_found() -> None:
    keys = dict(numeric_keys())
    assert {"cluster.nodes", "cluster.network", "training.global_batch_size"} <= set(keys)
    assert keys["cluster.placement"]
    assert keys["parallel.stage_layers"]
    assert len(keys) >= 23
    assert "training.gradient_clipping" not in keys


@pytest.mark.parametrize(("key", "listed"), numeric_keys())
@pytest.mark.parametrize("value", [True, False])
def test_no_number_of_an_experiment_is_true_or_false(key: str, listed: bool, value: bool) -> None:
    section, name = key.split(".")
    mapping = {**BASE, section: {**BASE.get(section, {}), name: [value] if listed else value}}
    with pytest.raises(InputError, match=rf"{key}.*expected a number, got {value}"):
        parse_experiment(mapping)


def test_faults_and_jobs_too() -> None:
    for fault in ({"gpu": True, "slowdown": 2}, {"gpu": 0, "slowdown": True}):
        with pytest.raises(InputError, match="expected a number, got True"):
            parse_experiment({**BASE, "cluster": {"topology": "dgx-h100", "faults": [fault]}})
    job = {"name": "other", "model": "llama3-8b", "placement": [True]}
    with pytest.raises(InputError, match="expected a number, got True"):
        parse_experiment({**BASE, "jobs": [job]})


def test_in_python() -> None:
    cluster = module.Cluster("dgx-h100", nodes=True)
    with pytest.raises(InputError, match=r"cluster\.nodes: expected a number"):
        dataclasses.replace(parse_experiment(BASE), cluster=cluster).replace()


SMALL = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 100, "max_seq": 128}
TOPOLOGY = {
    "accelerator": "H100-SXM",
    "node": {"accelerators": 8, "scale_up": {"kind": "switch"}, "nics": 8},
    "network": {"kind": "rail", "bandwidth": "400 Gb/s"},
}
HF = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128,
      "num_hidden_layers": True, "num_attention_heads": 4}  # fmt: skip


def with_(mapping: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    inner = with_(mapping.get(head, {}), rest, value) if rest else value
    return {**mapping, head: inner}


def weighted_graph() -> Cluster:
    graph = nx.Graph()
    for name in ("a", "b"):
        graph.add_node(name, type="gpu", accelerator="H100-SXM")
    graph.add_edge("a", "b", link="NVLink", bandwidth=1e9, weight=True)
    return load_cluster(graph)


READERS: dict[str, Callable[[], Any]] = {
    **{
        f"topology {path}": lambda path=path: load_cluster(with_(TOPOLOGY, path, True))  # type: ignore[misc]
        for path in (
            "node.accelerators", "node.nics", "node.scale_up.switches", "node.scale_up.bandwidth",
            "network.nodes_per_leaf", "network.oversubscription", "network.latency",
            "node.host.bandwidth", "network.fabric_efficiency", "nodes",
        )
    },
    "topology fault": lambda: load_cluster("dgx-h100", faults=[{"gpu": True, "slowdown": 2}]),
    "graph weight": weighted_graph,
    "accelerator core_count": lambda: accelerator_from_mapping(
        {"name": "x", "base": "H100-SXM", "core_count": True}),
    "accelerator price": lambda: accelerator_from_mapping(
        {"name": "x", "base": "H100-SXM", "price_usd_per_hour": True}),
    "accelerator constant": lambda: accelerator_from_mapping(
        {"name": "x", "base": "H100-SXM", "constants": {"launch_s": True}}),
    "model": lambda: model_from_mapping({**SMALL, "layers": True}),
    "Hugging Face": lambda: model_from_hf_config(HF),
    "framework": lambda: framework_from_mapping({"base": "megatron-core",
                                                 "step_host_time": True}),
    "sweep range": lambda: make_spec(parse_experiment(BASE),
                                     {"parallel.tensor": {"from": True, "to": 4}}),
    "schedule option": lambda: build("interleaved-1f1b", 1, 4, 2, microbatch_group_size=True),
    "schedule option with halves": lambda: build("auto", 2, 4, effort=True),
    "durations": lambda: Durations(F=True),
    "tolerance": lambda: compare(None, None, True),  # type: ignore[arg-type]
    "bytes": lambda: parse_bytes(True),
    "bandwidth": lambda: parse_bandwidth(True),
    "time": lambda: parse_time(True),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_no_other_reader_takes_true_for_one(reader: str) -> None:
    with pytest.raises(InputError, match=r"True|number"):
        READERS[reader]()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("interleaved-1f1b", {"microbatch_group_size": "four"}, "expected a whole number"),
        ("interleaved-1f1b", {"microbatch_group_size": 2.5}, "expected a whole number"),
        ("auto", {"objective": 3}, "expected text"),
        ("auto", {"durations": 3}, "expected a mapping"),
        ("auto", {"durations": {"F": 1, "X": 2}}, "unknown key 'X'"),
        ("auto", {"durations": {"F": "long"}}, "duration F"),
        ("auto", {"memory_limit": "all"}, "expected a number or a list"),
        ("zb-1p", {"kept_for_weights": "x"}, "expected a number"),
    ],
)
def test_options_of_a_schedule_are_checked(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(name, 2, 4, 2 if name == "interleaved-1f1b" else None, **options)


def test_durations_of_a_schedule_may_be_a_mapping() -> None:
    given = build("auto", 2, 4, durations={"F": 2, "I": 1, "W": 3})
    assert given.actions == build("auto", 2, 4, durations=Durations(F=2, I=1, W=3)).actions


def test_lines_of_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("model: llama3-8b\ncluster:\n  topology: dgx-h100\n  nodes: true\n")
    with pytest.raises(InputError, match=r"experiment.yaml:4: cluster.nodes: expected a number"):
        module.load_experiment(path)
