"""Expert all-to-all with node-limited traffic (DeepEP, HybridEP).

A token crosses the network once for every *node* that any of its experts is on, to the rank of the
same rail there, which hands copies on over NVLink (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
A plain all-to-all sends one copy to every *rank*.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from simulator.costs.collectives import CollectiveTraffic, collective_traffic
from simulator.model.routing import Routing
from simulator.topology.cluster import IS_SCALE_UP, Cluster

#: SMs that a dispatch or combine kernel occupies (DeepEP's default in training; its published
#: measurements use 20 to 24).
EXCHANGE_SMS = 20.0


@dataclasses.dataclass(frozen=True)
class ExpertExchange:
    """Traffic model of a run: every all-to-all is an expert exchange of node-limited kind.

    Called like `collective_traffic`; other operations pass through unchanged.
    """

    routing: Routing

    def __call__(
        self, cluster: Cluster, op: str, ranks: np.ndarray, nbytes: float, **options: Any
    ) -> CollectiveTraffic:
        """See `simulator.costs.collectives.collective_traffic`."""
        if op == "all_to_all":
            return self._with_sms(cluster, self._traffic(cluster, op, ranks, nbytes, options))
        return collective_traffic(cluster, op, ranks, nbytes, **options)

    @staticmethod
    def _with_sms(cluster: Cluster, traffic: CollectiveTraffic) -> CollectiveTraffic:
        cores = min(chip.core_count for chip in cluster.accelerator_types)
        share = max(traffic.sm_fraction, min(1.0, EXCHANGE_SMS / cores))
        return dataclasses.replace(traffic, sm_fraction=share)

    def _traffic(
        self, cluster: Cluster, op: str, ranks: np.ndarray, nbytes: float, options: dict[str, Any]
    ) -> CollectiveTraffic:
        nodes = len(np.unique(np.asarray(cluster.node_of)[ranks[0]])) if len(ranks) else 1
        members = ranks.shape[1]
        if nodes == 1 or members == nodes or options.get("algorithm"):
            return collective_traffic(cluster, op, ranks, nbytes, **options)
        traffic = collective_traffic(
            cluster, op, ranks, nbytes, algorithm="hierarchical", **options
        )
        copies = (members - members / nodes) * self.routing.reached(members)
        tokens = (nodes - 1) * self.routing.reached(nodes)
        loads = traffic.loads
        on_network = ~IS_SCALE_UP[np.asarray(cluster.link_kind)[loads.link]]
        work = np.where(on_network, loads.work * (tokens / copies), loads.work)
        return dataclasses.replace(traffic, loads=dataclasses.replace(loads, work=work))
