"""Errors say where they stand: file, line and key, and what would be right."""

import json
import re

import pytest
from click.testing import CliRunner

import simulator
from simulator.cli import group
from simulator.errors import InputError
from simulator.experiment import Training, parse_experiment
from simulator.experiment_reference import attribute_docs
from simulator.model.context import RECOMPUTE_MODULES
from simulator.topology import load_cluster

LINES = [
    "model: llama3-8b",
    "framework: megatron-core",
    "cluster:",
    "  topology: dgx-h100",
    "  nodes: 2",
    "  network: 400 Gb/s",
    "  faults:",
    "    - {gpu: 9, slowdown: 2}",
    "parallel:",
    "  data: 16",
    "training:",
    "  global_batch_size: 32",
    "  recompute: selective",
    "  recompute_modules: [core_attn]",
]


@pytest.mark.parametrize(
    ("line", "wrong", "key"),
    [
        (1, "model: llamma3-8b", "model"),
        (2, "framework: megatronn", "framework"),
        (4, "  topology: dgx-h1000", "cluster.topology"),
        (5, "  accelerators: 13\n  nodes: 2", "cluster.accelerators"),
        (6, "  network: 400", "cluster.network"),
        (8, "    - {gpu: 99, slowdown: 2}", "cluster.faults.0"),
        (10, "  data: 3", "parallel.data"),
        (12, "  global_batch_size: 7", "training.global_batch_size"),
        (14, "  recompute_modules: [attn]", "training.recompute_modules"),
    ],
)
def test_what_only_resolving_finds_has_file_line_and_key(tmp_path, line, wrong, key):
    path = tmp_path / "experiment.yaml"
    path.write_text("\n".join([*LINES[: line - 1], wrong, *LINES[line:]]) + "\n")
    place = f"{path}:{line}: {key}: "
    with pytest.raises(InputError, match="^" + re.escape(place)):
        simulator.run(path)
    shown = CliRunner().invoke(group, ["run", str(path)])
    assert isinstance(shown.exception, InputError)  # which `main` prints
    assert str(shown.exception).startswith(place)


@pytest.mark.parametrize(
    "override",
    [
        "model=llamma3-8b",
        "training.global_batch_size=7",
        "training.sequence_length=4k",
        "parallel.data=3",
    ],
)
def test_a_key_of_the_command_line_has_no_line_of_the_file(tmp_path, override):
    path = tmp_path / "experiment.yaml"
    path.write_text("\n".join(LINES) + "\n")
    shown = CliRunner().invoke(group, ["run", str(path), "--set", override])
    assert isinstance(shown.exception, InputError)
    assert str(shown.exception).startswith(f"{path}: --set {override.partition('=')[0]}: ")


def test_an_error_of_another_file_keeps_its_place(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("\n".join(["model: own.yaml", *LINES[1:]]) + "\n")
    (tmp_path / "own.yaml").write_text("- a list\n")
    with pytest.raises(InputError, match="^" + re.escape(str(tmp_path / "own.yaml"))):
        simulator.run(path)


BASE = {"model": "llama3-8b", "cluster": {"topology": "dgx-h100", "nodes": 2}}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tensor", 4, "did you mean 'parallel.tensor'"),
        ("global_batch_size", 4, "did you mean 'training.global_batch_size'"),
        ("parallel.sharding", "fsdp", "FSDP is zero3"),
        ("parallel.sharding", "DDP", "none$"),
        ("parallel.sharding", "hsdp", "zero3 with parallel.shard_group"),
        ("training.sequence_length", "4k", "expected a whole number, such as 4096, got '4k'"),
        ("parallel.tensor", 2.5, "expected a whole number, such as 8, got 2.5"),
        ("cluster.variability", "much", "expected a number, got 'much'"),
        ("training.inference", "perhaps", "expected true or false, got 'perhaps'"),
    ],
)
def test_what_is_suggested(key, value, said):
    with pytest.raises(InputError, match=said):
        parse_experiment(BASE).replace(**{key: value})


def test_the_documented_recompute_modules_are_those_that_are_accepted():
    text = attribute_docs(Training)["recompute_modules"]
    listed = re.sub(r"\([^)]*\)", "", text.split(":")[1].split(".")[0])
    assert [name.strip() for name in listed.split(",")] == list(RECOMPUTE_MODULES)


@pytest.mark.parametrize(
    ("topology", "nodes", "accelerators", "near"),
    [
        ("tpu-v6e", None, 7, "4 or 8"),
        ("tpu-v6e", None, 100, "64 or 128"),
        ("tpu-v5e", None, 300, "256 or 512"),
        ("tpu-v6e", 2, 15, "8 or 16"),
        ("tpu-v2", None, 250, "128 or 256"),
        ("tpu-v5p", None, 100, "64 or 128"),
        ("tpu-v4", None, 2, "4"),
        ("trn1", None, 20, "16 or 32"),
        ("dgx-h100", 2, 13, "12 or 14"),
        ("dgx-h100", 3, 2, "3"),
    ],
)
def test_numbers_that_cannot_be_had_and_the_nearest_that_can(topology, nodes, accelerators, near):
    with pytest.raises(InputError, match=f"nearest: {near}( |$)"):
        load_cluster(topology, nodes=nodes, accelerators=accelerators)
    for number in near.split(" or "):
        assert len(load_cluster(topology, nodes=nodes, accelerators=int(number))) == int(number)


def test_more_accelerators_than_the_nodes_have():
    with pytest.raises(InputError, match="at most 16, or 3 nodes"):
        load_cluster("dgx-h100", nodes=2, accelerators=18)


def test_a_part_of_every_node():
    cluster = load_cluster("dgx-h100", nodes=2, accelerators=12)
    assert cluster.node_of.tolist() == [0] * 6 + [1] * 6


def test_a_shape_of_ones_own_is_no_shape_that_is_listed():
    spec = {"extends": "tpu-v6e", "node": {"scale_up": {"shape": [10, 10]}}}
    assert load_cluster(spec, accelerators=100).scale_up.shape == (10, 10)


def test_a_reduce_is_said_to_be_timed_as_a_broadcast():
    given = ["--topology", "dgx-h100", "--bytes", "1MiB"]
    shown, other = (
        CliRunner().invoke(group, ["collective", op, *given]).output
        for op in ("reduce", "broadcast")
    )
    assert "timed as a broadcast" in shown
    assert "timed as" not in other
    (row,) = json.loads(
        CliRunner().invoke(group, ["collective", "reduce", *given, "--json"]).output
    )
    assert row["operation"] == "broadcast"
