"""Slow memory, and what an error says of the links that can be named."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest

from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.simulation import run
from simulator.topology import load_cluster

EXPERIMENT: dict[str, Any] = {
    "model": {"family": "gpt", "layers": 4, "hidden": 256, "heads": 4, "vocab": 1024,
              "max_seq": 128},
    "cluster": {"topology": "dgx-h100", "nodes": 1, "variability": 0},
    "parallel": {"tensor": 2, "pipeline": 2},
    "training": {"global_batch_size": 8},
}  # fmt: skip
HALF = {"link": ["node0/gpu3", "node0/hbm3"], "bandwidth_factor": 0.5}


def with_faults(*faults: dict[str, Any], **changes: Any) -> Any:
    return parse_experiment(EXPERIMENT).replace(**{"cluster.faults": list(faults), **changes})


@pytest.mark.parametrize("link", [["node0/gpu3", "node0/hbm3"], ["node0/hbm3", "node0/gpu3"]])
def test_a_slow_memory_is_that_of_one_accelerator(link: list[str]) -> None:
    healthy = load_cluster("dgx-h100", nodes=1)
    cluster = load_cluster("dgx-h100", nodes=1, faults=[{**HALF, "link": link}])
    ratio = cluster.memory_bandwidth / healthy.memory_bandwidth
    assert ratio.tolist() == [1.0] * 3 + [0.5] + [1.0] * 4
    assert (cluster.link_capacity == healthy.link_capacity).all()
    before, after = (
        c.graph.edges["node0/gpu3", "node0/hbm3"]["bandwidth"] for c in (healthy, cluster)
    )
    assert after == 0.5 * before
    assert cluster.graph.edges["node0/gpu2", "node0/hbm2"]["bandwidth"] == before
    assert healthy.memory_share is None


def test_memory_bound_operations_take_longer_in_proportion_and_folding_is_exact() -> None:
    healthy = run(with_faults())
    slow = run(with_faults(HALF))
    unfolded = run(with_faults(HALF, fold=False))
    assert slow.step_time > healthy.step_time
    assert slow.step_time == pytest.approx(unfolded.step_time, rel=1e-12)
    frames = [result.frame([3]).set_index(["operation", "microbatch", "layer", "phase"])
              for result in (healthy, slow)]  # fmt: skip
    lengths = [frame["end"] - frame["start"] for frame in frames]
    norms = frames[0]["kind"] == "norm"
    # launch latency stays, the transfer takes twice as long
    ratio = (lengths[1] / lengths[0])[norms.to_numpy()]
    assert (ratio > 1.0).all()
    assert (ratio < 2.0 + 1e-9).all()


def test_two_faults_of_one_memory_multiply() -> None:
    cluster = load_cluster("dgx-h100", nodes=1, faults=[HALF, HALF])
    assert cluster.memory_share is not None
    assert cluster.memory_share[3] == 0.25


def test_the_host_link_can_be_named() -> None:
    healthy = load_cluster("dgx-h100", nodes=1)
    fault = {"link": ["node0/gpu3", "node0/host"], "bandwidth_factor": 0.5}
    cluster = load_cluster("dgx-h100", nodes=1, faults=[fault])
    ratio = cluster.link_capacity / healthy.link_capacity
    changed = [int(cluster.host_link_in[3]), int(cluster.host_link_out[3])]
    assert ratio[changed].tolist() == [0.5, 0.5]
    assert np.count_nonzero(ratio != 1.0) == 2


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (["node0/gpu3", "node0/hbm2"], r"no link .*'node0/gpu3' has links to .*'node0/hbm3'"),
        (["node0/gpu3", "node1/nvswitch"], r"has links to .*'node0/nvswitch'.*'node0/host'"),
        (["node0/hmb3", "node0/gpu3"], r"no node 'node0/hmb3'; did you mean 'node0/hbm3'"),
        (["leaf0", "node0/gpu0"], r"'leaf0' has links to 'node0/nic0', .*…"),
    ],
)  # fmt: skip
def test_an_error_lists_what_can_be_named(link: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_cluster("dgx-h100", nodes=64, faults=[{"link": link, "failed": True}])


def test_memory_cannot_fail() -> None:
    fault = {"link": HALF["link"], "failed": True}
    with pytest.raises(InputError, match="cannot fail, only slow down"):
        load_cluster("dgx-h100", nodes=1, faults=[fault])


def graph() -> nx.Graph:
    made = nx.Graph()
    for i in range(2):
        made.add_node(f"g{i}", type="gpu", accelerator="H100-SXM")
        made.add_node(f"m{i}", type="hbm")
        made.add_edge(f"g{i}", f"m{i}", link="HBM", bandwidth=3e12)
    made.add_edge("g0", "g1", link="NVLink", bandwidth=1e11)
    return made


def test_memories_of_a_graph_of_ones_own() -> None:
    cluster = load_cluster(graph(), faults=[{"link": ["m1", "g1"], "bandwidth_factor": 0.25}])
    assert cluster.memory_share is not None
    assert cluster.memory_share.tolist() == [1.0, 0.25]
    with pytest.raises(InputError, match="cannot fail"):
        load_cluster(graph(), faults=[{"link": ["m1", "g1"], "failed": True}])
    with pytest.raises(InputError, match=r"'m0' has links to 'g0'"):
        load_cluster(graph(), faults=[{"link": ["m0", "g1"], "failed": True}])
