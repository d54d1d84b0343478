"""Copies between an accelerator and its host's memory that load the links between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from simulator.costs.collectives import CollectiveTraffic
from simulator.costs.kernels import HOST_COPY_LATENCY, host_copy_rate
from simulator.topology.cluster import Cluster
from simulator.topology.loads import LinkLoads

#: Operations of the group `host`, of which every rank is the only member.
HOST_GROUP = "host"
TO_HOST, FROM_HOST = "device_to_host", "host_to_device"


@dataclasses.dataclass(frozen=True)
class WithHostCopies:
    """A traffic model that also knows `device_to_host` and `host_to_device`.

    Called like `simulator.costs.collectives.collective_traffic`; other operations are `others`'.
    A copy runs at the rate of the accelerator's host link (PCIe, NVLink-C2C), at most at what the
    accelerator's copy engine reaches of its datasheet rate (`host_copy_fraction`), and shares
    what lies between: links of a PCIe switch that several accelerators are behind. On the device
    it reads or writes HBM once and needs no SMs (copy engines).
    """

    others: Callable[..., CollectiveTraffic]

    def __call__(
        self, cluster: Cluster, op: str, ranks: np.ndarray, nbytes: float, **options: Any
    ) -> CollectiveTraffic:
        """Traffic of one operation, see `collective_traffic`."""
        if op not in (TO_HOST, FROM_HOST):
            return self.others(cluster, op, ranks, nbytes, **options)
        chips = np.asarray(ranks, dtype=np.int64)[:, 0]
        kinds = np.asarray(cluster.accelerator_type_of)[chips]
        rate = np.array([host_copy_rate(kind) for kind in cluster.accelerator_types])[kinds]
        link = (cluster.host_link_out if op == TO_HOST else cluster.host_link_in)[chips]
        known = link >= 0
        capacity = np.where(known, cluster.link_capacity[link], rate)
        # byte-equivalents: what the protocol and the copy engine lose of the link
        work = nbytes * np.maximum(1.0, capacity / rate)
        groups = np.arange(len(chips))
        parts = [(groups[known], link[known], work[known])]
        for shared in cluster.host_shared_out if op == TO_HOST else cluster.host_shared_in:
            beyond = shared[chips]
            also = beyond >= 0
            parts.append((groups[also], beyond[also], work[also]))
        group, links, amount = (np.concatenate(column) for column in zip(*parts, strict=True))
        # without a link in the topology nothing is shared: the catalogue's rate as a fixed time
        latency = np.where(known, HOST_COPY_LATENCY, HOST_COPY_LATENCY + nbytes / rate)
        return CollectiveTraffic(
            latency=latency,
            loads=LinkLoads.of(len(chips), group, links, amount),
            hbm_bytes=nbytes,
            sm_fraction=0.0,
            algorithm="copy engine",
            protocol="",
        )
