"""An accelerator of one's own is a file, named where a catalogue name may stand."""

import networkx as nx
import pytest
import yaml

import simulator
from simulator.errors import InputError
from simulator.experiment import load_experiment, parse_experiment
from simulator.topology import load_cluster

ACCELERATOR = {
    "name": "Half-H100",
    "base": "H100-80GB-SXM",
    "peak_flops": {"bf16": "495 TFLOP/s"},
}
EXPERIMENT = {
    "model": {"layers": 2, "hidden": 1024, "heads": 16, "vocab": 1000, "max_seq": 512},
    "cluster": {"topology": "mine.yaml", "nodes": 1},
    "training": {"micro_batch_size": 8},
    # a host that launches kernel by kernel would hide which device is faster
    "framework": {"base": "megatron-core", "cuda_graphs": True},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An experiment, its topology and its accelerator side by side, seen from elsewhere."""
    (tmp_path / "files").mkdir()
    for name, content in {
        "half.yaml": ACCELERATOR,
        "mine.yaml": {"extends": "dgx-h100", "accelerator": "half.yaml"},
        "experiment.yaml": EXPERIMENT,
    }.items():
        (tmp_path / "files" / name).write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "files"


def test_a_topology_file_names_an_accelerator_file_beside_it(folder):
    experiment = load_experiment(folder / "experiment.yaml")
    mine = simulator.run(experiment)
    usual = simulator.run(experiment.replace(**{"cluster.topology": "dgx-h100"}))
    assert mine.summary.accelerator == "Half-H100"
    assert mine.step_time > usual.step_time
    assert mine.summary.model_tflops_per_accelerator < 495.0


def test_an_inline_topology_and_a_topology_that_extends_a_file(folder):
    expected = simulator.run(folder / "experiment.yaml").step_time
    inline = ["cluster.topology={extends: dgx-h100, accelerator: half.yaml}"]
    assert simulator.run(load_experiment(folder / "experiment.yaml", inline)).step_time == expected
    (folder / "child.yaml").write_text("extends: mine.yaml\n")
    child = load_experiment(folder / "experiment.yaml", ["cluster.topology=child.yaml"])
    assert simulator.run(child).step_time == expected


def test_a_graph_names_an_accelerator_file(folder):
    graph = load_cluster("dgx-h100", nodes=1).graph.copy()
    assert isinstance(graph, nx.Graph)
    for _, data in graph.nodes(data=True):
        if data["type"] == "gpu":
            data["accelerator"] = "files/half.yaml"
    result = simulator.run(folder / "experiment.yaml", cluster=graph)
    assert result.summary.accelerator == "Half-H100"


def test_a_missing_file_is_named(folder):
    topology = {"extends": "dgx-h100", "accelerator": "none.yaml"}
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the accelerator file"):
        simulator.run(parse_experiment({**EXPERIMENT, "cluster": {"topology": topology}}))
