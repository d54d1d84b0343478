"""Node-limited expert exchange: what crosses the network, and when nothing changes."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.costs.collectives import collective_traffic
from simulator.costs.expert_exchange import ExpertExchange
from simulator.model.routing import Routing
from simulator.topology import load_cluster
from simulator.topology.cluster import IS_NETWORK

SIZE = 64e6


def network_bytes(traffic, cluster) -> float:  # type: ignore[no-untyped-def]
    on_network = IS_NETWORK[np.asarray(cluster.link_kind)[traffic.link]]
    return float(traffic.work[on_network].sum())


def test_a_token_crosses_once_per_node_and_not_once_per_rank() -> None:
    cluster = load_cluster("dgx-h100", nodes=4)
    ranks = np.arange(32)[None, :]
    plain = collective_traffic(cluster, "all_to_all", ranks, SIZE, algorithm="hierarchical")
    limited = ExpertExchange(Routing(128, 8))(cluster, "all_to_all", ranks, SIZE)
    copies = 24 * Routing(128, 8).reached(32)
    tokens = 3 * Routing(128, 8).reached(4)
    assert network_bytes(limited, cluster) == pytest.approx(
        network_bytes(plain, cluster) * tokens / copies
    )
    assert tokens < copies


@pytest.mark.parametrize(("op", "nodes"), [("all_reduce", 2), ("all_to_all", 1)])
def test_everything_else_passes_unchanged(op: str, nodes: int) -> None:
    cluster = load_cluster("dgx-h100", nodes=nodes)
    ranks = np.arange(8 * nodes)[None, :]
    same = ExpertExchange(Routing(128, 8))(cluster, op, ranks, SIZE)
    expected = collective_traffic(cluster, op, ranks, SIZE)
    assert np.array_equal(same.work, expected.work)
    assert same.algorithm == expected.algorithm
