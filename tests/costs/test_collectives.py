"""Collectives: closed forms, contention on the routes, monotonicity, bad input."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.cli.collective import command, parse_sizes
from simulator.costs.collectives import (
    ALGORITHMS,
    OPERATIONS,
    binary_tree,
    bus_factor,
    collective_traffic,
)
from simulator.costs.collectives_constants import fabric_constants, link_constants
from simulator.errors import InputError
from simulator.topology import load_cluster

GIB = 2**30


def seconds(cluster, op, ranks, nbytes, **options):
    traffic = collective_traffic(cluster, op, ranks, nbytes, **options)
    return float(traffic.duration(cluster)[0])


def work_on(cluster, traffic, part):
    """Total work on links whose name contains `part`."""
    return sum(
        w for link, w in zip(traffic.link, traffic.work, strict=True)
        if part in cluster.link_name(int(link))
    )  # fmt: skip


# --------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("op", "factor", "rounds"),
    [("all_reduce", 2, 2), ("all_gather", 1, 1), ("reduce_scatter", 1, 1)],
)
def test_ring_is_alpha_beta(n, op, factor, rounds):
    """latency + 2(n-1)/n b / rate; steps times hop latency."""
    cluster = load_cluster("dgx-a100")
    traffic = collective_traffic(cluster, op, np.arange(n), GIB, algorithm="ring", protocol="LL")
    protocol = next(
        p for p in link_constants("NVLink3").patterns["ring"].protocols if p.name == "LL"
    )
    beta = factor * (n - 1) / n * GIB / (300e9 * protocol.share)
    alpha = protocol.start + rounds * (n - 1) * protocol.hop
    assert traffic.duration(cluster)[0] == pytest.approx(alpha + beta)
    assert len(traffic.link) == 2 * n  # up and down of each member, nothing else


def test_all_reduce_is_reduce_scatter_and_all_gather():
    cluster = load_cluster("dgx-a100", nodes=4)
    parts = [
        collective_traffic(cluster, op, np.arange(32), GIB, algorithm="ring", protocol="LL128")
        for op in ("all_reduce", "reduce_scatter", "all_gather")
    ]
    assert parts[0].work.sum() == pytest.approx(parts[1].work.sum() + parts[2].work.sum())


@pytest.mark.parametrize(("nodes", "g"), [(2, 8), (4, 8), (4, 4), (8, 1), (4, 2)])
def test_ring_across_nodes_uses_the_members_nics(nodes, g):
    """Bus bandwidth: g NICs' (derated) line rate where the network is the slowest part."""
    cluster = load_cluster("dgx-a100", nodes=nodes)
    ranks = (np.arange(nodes)[:, None] * 8 + np.arange(g)).ravel()
    n = len(ranks)
    traffic = collective_traffic(
        cluster, "all_gather", ranks, GIB, algorithm="ring", protocol="Simple"
    )
    busy = traffic.duration(cluster)[0] - traffic.latency[0]
    expected = (n - 1) / n * GIB / (g * 25e9 * cluster.scale_out.efficiency)
    assert busy == pytest.approx(expected)


def test_ring_stays_on_its_rail():
    cluster = load_cluster("dgx-h100", nodes=32)
    rail = np.arange(32) * 8 + 3
    for op in ("all_reduce", "all_gather"):
        traffic = collective_traffic(cluster, op, rail, GIB, algorithm="ring")
        names = [cluster.link_name(int(i)) for i in traffic.link]
        assert not any("spine" in name for name in names)
        assert all("leaf3" in name or "gpu3" in name for name in names)


def test_oversubscribed_spine_shows_across_leaves_only():
    """An all-gather within a leaf keeps its time; across leaves it waits for the trunk."""
    options = {"algorithm": "ring", "protocol": "Simple"}
    full = load_cluster({"extends": "hgx-h100"}, nodes=16)
    tapered = load_cluster(
        {"extends": "hgx-h100", "network": {"oversubscription": 8}}, nodes=16
    )  # fmt: skip
    leaf_local = np.arange(32)
    for ranks in (leaf_local, np.arange(128)):
        assert seconds(full, "all_gather", ranks, GIB, **options) <= seconds(
            tapered, "all_gather", ranks, GIB, **options
        )
    assert seconds(full, "all_gather", leaf_local, GIB, **options) == pytest.approx(
        seconds(tapered, "all_gather", leaf_local, GIB, **options)
    )
    # A ring crosses each trunk once: 4 nodes of 8 NICs share 4 NICs' worth of uplink, of which a
    # ring with all 8 rails needs 8.
    slow = collective_traffic(tapered, "all_gather", np.arange(128), GIB, **options)
    busy = slow.duration(tapered)[0] - slow.latency[0]
    assert busy == pytest.approx(127 / 128 * GIB / (4 * 50e9 * tapered.scale_out.efficiency))


def test_incast_shares_the_last_link():
    """k senders to one receiver load its links k times; groups are separate activities."""
    cluster = load_cluster("dgx-h100", nodes=5)
    pairs = np.array([[8 * k, 0] for k in range(1, 5)])
    traffic = collective_traffic(cluster, "send_recv", pairs, GIB)
    load = np.bincount(traffic.link, weights=traffic.work, minlength=cluster.links)
    into = [i for i in range(cluster.links) if cluster.link_name(i) == "leaf0 -> node0/nic0"]
    out = [i for i in range(cluster.links) if cluster.link_name(i) == "node1/nic0 -> leaf0"]
    assert load[into[0]] == pytest.approx(4 * load[out[0]])


def test_tree_has_logarithmic_latency_and_carries_the_buffer_both_ways():
    cluster = load_cluster("dgx-a100", nodes=64)
    rail = np.arange(64) * 8

    def latency(n):
        return collective_traffic(
            cluster, "all_reduce", rail[:n], 1e6, algorithm="tree", protocol="LL"
        ).latency[0]

    step = latency(16) - latency(8)
    assert step == pytest.approx(latency(64) - latency(32))
    assert step == pytest.approx(2 * fabric_constants("infiniband-hdr").hop_ll)
    two = collective_traffic(
        cluster, "all_reduce", rail[:2], GIB, algorithm="tree", protocol="Simple"
    )
    share = (
        cluster.scale_out.efficiency
        * fabric_constants("infiniband-hdr").tree_share
        * fabric_constants("infiniband-hdr").tree_pair
    )
    assert two.duration(cluster)[0] - two.latency[0] == pytest.approx(GIB / (25e9 * share))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 16, 33])
def test_double_binary_trees(n):
    """Both are trees; every rank is a leaf in at least one of them (NCCL's property), n even."""
    degree = []
    for mirrored in (False, True):
        parent = binary_tree(n, mirrored=mirrored)
        assert (parent < 0).sum() == 1
        graph = nx.Graph((i, int(p)) for i, p in enumerate(parent) if p >= 0)
        assert nx.is_tree(graph)
        children = np.bincount(parent[parent >= 0], minlength=n)
        assert children.max() <= 2
        degree.append(children)
    if n % 2 == 0:
        assert (np.minimum(*degree) == 0).all()


def test_nvls_moves_each_buffer_once():
    cluster = load_cluster("dgx-h100")
    traffic = collective_traffic(
        cluster, "all_reduce", np.arange(8), GIB, algorithm="nvls", protocol="Simple"
    )
    share = link_constants("NVLink4").patterns["nvls"].protocols[0].share
    assert work_on(cluster, traffic, "gpu0 -> ") == pytest.approx(GIB * (1 + 1 / 8) / share)
    ring = collective_traffic(cluster, "all_reduce", np.arange(8), GIB, algorithm="ring")
    assert traffic.duration(cluster)[0] < ring.duration(cluster)[0]


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("topology", "limit"), [("dgx-h100", "link"), ("dgx-b200", "channels")])
def test_all_to_all_in_a_node(topology, limit, n):
    """The link's rate, or 32 channels shared by the members: between the slower and 8 % above."""
    cluster = load_cluster(topology)
    traffic = collective_traffic(cluster, "all_to_all", np.arange(n), GIB, protocol="Simple")
    rate, up = cluster.scale_up.bandwidth, cluster.scale_up.link
    constants = link_constants(up).patterns["all_to_all"]
    busy = traffic.duration(cluster)[0] - traffic.latency[0]
    link = (n - 1) / n * GIB / (rate * constants.protocols[0].share)
    channels = GIB / (32 * constants.channel_rate)
    assert max(link, channels) <= busy <= 1.1 * max(link, channels)
    if n == 2:
        assert (link < channels) == (limit == "channels")


def test_only_the_remote_share_of_an_all_to_all_crosses_the_nic():
    """Bus bandwidth (NIC/g)(n-1)/(n-g) of the rule; same result when counted pair by pair."""
    cluster = load_cluster("dgx-h100", nodes=4)
    traffic = collective_traffic(cluster, "all_to_all", np.arange(32), GIB)
    fabric = fabric_constants("infiniband-ndr")
    share = fabric.all_to_all_share * (1 - fabric.peer_loss / 24)
    nic = 50e9 * cluster.scale_out.efficiency * share
    busy = traffic.duration(cluster)[0] - traffic.latency[0]
    assert busy == pytest.approx(24 / 32 * GIB / nic)
    assert work_on(cluster, traffic, "spine") == 0  # PXN keeps to the rails
    plain = load_cluster("hgx-h100", nodes=4)
    assert work_on(
        plain, collective_traffic(plain, "all_to_all", np.arange(32), GIB), "nic0 -> leaf"
    ) == (pytest.approx(work_on(cluster, traffic, "nic0 -> leaf")))


@pytest.mark.parametrize(
    ("name", "chips", "axes"), [("tpu-v5e", 256, 2), ("tpu-v4", 64, 3), ("tpu-v5p", 4096, 3)]
)
def test_torus_all_gather_is_bytes_over_twice_the_links(name, chips, axes):
    cluster = load_cluster(name, accelerators=chips)
    traffic = collective_traffic(cluster, "all_gather", np.arange(chips), GIB)
    share = link_constants("ICI").patterns["torus"].protocols[0].share
    link = cluster.scale_up.link_bandwidth
    busy = traffic.duration(cluster)[0] - traffic.latency[0]
    assert traffic.algorithm == "torus"
    assert busy == pytest.approx((chips - 1) / chips * GIB / (2 * axes * link * share))


def test_torus_axis_without_wrap_has_half_the_rate():
    whole = load_cluster("tpu-v5e", accelerators=256)
    axis = np.arange(16)  # one wrapped axis
    part = np.arange(8)  # half of it: an open line
    wrapped = collective_traffic(whole, "all_gather", axis, GIB)
    line = collective_traffic(whole, "all_gather", part, GIB)
    rate = [
        GIB * (n - 1) / n / (t.duration(whole)[0] - t.latency[0])
        for n, t in ((16, wrapped), (8, line))
    ]
    assert rate[1] == pytest.approx(rate[0] / 2)


def test_slices_reduce_hierarchically_over_dcn():
    cluster = load_cluster("tpu-v5e", accelerators=512)
    traffic = collective_traffic(cluster, "all_reduce", np.arange(512), GIB)
    assert traffic.algorithm == "hierarchical"
    # Every host's NIC carries 2 (N-1)/N of its 8 chips' 1/256 shares.
    nic = work_on(cluster, traffic, "slice0/nic0 -> leaf") * cluster.scale_out.efficiency
    assert nic == pytest.approx(2 * 0.5 * GIB * 8 / 256)


def test_mesh_uses_all_direct_links():
    """Rings over a full mesh: the sum of all links, as RCCL's rings on MI300X."""
    cluster = load_cluster("mi300x")
    traffic = collective_traffic(cluster, "all_gather", np.arange(8), GIB, protocol="Simple")
    share = link_constants("XGMI").patterns["ring"].protocols[0].share
    busy = traffic.duration(cluster)[0] - traffic.latency[0]
    assert busy == pytest.approx(7 / 8 * GIB / (7 * 64e9 * share))
    hybrid = load_cluster("dgx1-v100")
    ring = collective_traffic(hybrid, "all_gather", np.arange(8), GIB, protocol="Simple")
    assert all("gpu" in hybrid.link_name(int(i)).split(" -> ")[1] for i in ring.link)


def test_custom_graph_collective_equals_the_regular_cluster():
    regular = load_cluster("dgx-a100", nodes=2)
    custom = load_cluster(regular.graph, fabric_efficiency=regular.scale_out.efficiency)
    a = collective_traffic(
        regular, "all_gather", np.arange(16), GIB, algorithm="ring", protocol="Simple"
    )
    b = collective_traffic(
        custom, "all_gather", np.arange(16), GIB, algorithm="ring", protocol="Simple"
    )
    assert b.duration(custom)[0] - b.latency[0] == pytest.approx(
        a.duration(regular)[0] - a.latency[0]
    )


# --------------------------------------------------------------------------- groups


@settings(max_examples=25, deadline=None, derandomize=True)
@given(op=st.sampled_from(OPERATIONS), seed=st.integers(0, 1000), n=st.sampled_from([2, 3, 4, 6]))
def test_many_groups_at_once_equal_one_by_one(op, seed, n):
    cluster = load_cluster("dgx-h100-oversubscribed", nodes=12)
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(96)[: 12 * n].reshape(12, n)
    together = collective_traffic(cluster, op, ranks, 1e7)
    for g in range(12):
        alone = collective_traffic(cluster, op, ranks[g], 1e7)
        mine = together.group == g
        assert together.latency[g] == pytest.approx(alone.latency[0])
        np.testing.assert_array_equal(np.sort(together.link[mine]), np.sort(alone.link))
        order, other = np.argsort(together.link[mine]), np.argsort(alone.link)
        np.testing.assert_allclose(together.work[mine][order], alone.work[other])


def test_order_of_members_does_not_matter():
    cluster = load_cluster("dgx-h100", nodes=4)
    shuffled = np.random.default_rng(1).permutation(32)
    for op in ("all_reduce", "all_gather", "all_to_all"):
        assert seconds(cluster, op, shuffled, GIB) == seconds(cluster, op, np.arange(32), GIB)


def test_uneven_domains_make_one_ring():
    cluster = load_cluster("dgx-h100", nodes=2)
    traffic = collective_traffic(cluster, "all_gather", [0, 1, 2, 8], GIB)
    assert np.isfinite(traffic.duration(cluster)[0])
    assert work_on(cluster, traffic, "-> leaf") > 0


# --------------------------------------------------------------------------- invariants


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(OPERATIONS),
    nodes=st.sampled_from([1, 2, 4]),
    size=st.floats(1e3, 1e10),
    factor=st.floats(1.0, 8.0),
)
def test_monotone_in_bytes_and_bandwidth(op, nodes, size, factor):
    ranks = [0, nodes * 8 - 1] if op == "send_recv" else np.arange(nodes * 8)
    base = load_cluster("dgx-a100", nodes=nodes)
    t = seconds(base, op, ranks, size)
    assert seconds(base, op, ranks, size * factor) >= t * (1 - 1e-12)
    faster = load_cluster("dgx-a100", nodes=nodes, network=25e9 * factor)
    assert seconds(faster, op, ranks, size) <= t * (1 + 1e-12)
    wide = load_cluster(
        {"extends": "dgx-a100", "node": {"scale_up": {"bandwidth": 300e9 * factor}}}, nodes=nodes
    )
    assert seconds(wide, op, ranks, size) <= t * (1 + 1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(op=st.sampled_from(OPERATIONS), nodes=st.sampled_from([1, 2, 8]), size=st.floats(1e5, 1e10))
def test_never_faster_than_the_wire(op, nodes, size):
    """No algorithm beats the bytes that must leave a member through its links."""
    n = nodes * 8
    ranks = [0, n - 1] if op == "send_recv" else np.arange(n)
    cluster = load_cluster("dgx-h100", nodes=nodes)
    least = {
        "all_reduce": size, "all_gather": size * (n - 1) / n, "reduce_scatter": size * (n - 1) / n,
        "all_to_all": size * (n - 1) / n, "broadcast": size, "send_recv": size,
    }[op]  # fmt: skip
    assert seconds(cluster, op, ranks, size) >= least / (450e9 + 50e9)


@pytest.mark.parametrize("op", OPERATIONS)
def test_default_is_the_fastest_of_its_choices(op):
    cluster = load_cluster("dgx-h100", nodes=2)
    ranks = [0, 15] if op == "send_recv" else np.arange(16)
    for size in (1e4, 1e6, 1e9):
        best = seconds(cluster, op, ranks, size)
        for name, ops in ALGORITHMS.items():
            if op in ops and name not in ("pat", "hierarchical", "collnet"):
                try:
                    other = seconds(cluster, op, ranks, size, algorithm=name)
                except InputError:
                    continue
                assert best <= other


def test_resources_of_the_communication_kernel():
    cluster = load_cluster("dgx-h100", nodes=2)
    inside = collective_traffic(cluster, "all_gather", np.arange(8), GIB)
    assert 0.05 < inside.sm_fraction < 0.4
    assert inside.hbm_bytes >= GIB * 7 / 8
    tpu = load_cluster("tpu-v5p", accelerators=64)
    assert collective_traffic(tpu, "all_gather", np.arange(64), GIB).sm_fraction == 0


def test_thread_blocks_write_the_own_part_too():
    """Of two members each writes as much to itself as to the other, which then is the limit; a
    reduction does so in place as well, an all-gather in place need not."""
    cluster = load_cluster("dgx-h100")
    constants = link_constants("NVLink4").patterns["ring"]
    options = {"algorithm": "ring", "protocol": "Simple"}

    def busy(op, n, in_place):
        traffic = collective_traffic(
            cluster, op, np.arange(n), GIB, in_place=in_place, **options
        )  # fmt: skip
        return traffic.duration(cluster)[0] - traffic.latency[0]

    written = GIB / (450e9 * constants.write)
    for op, in_place in (
        ("all_gather", False),
        ("reduce_scatter", True),
        ("reduce_scatter", False),
    ):
        assert written < busy(op, 2, in_place) < 1.02 * written
    wire = GIB / 2 / (450e9 * constants.protocols[0].share)
    assert wire < busy("all_gather", 2, True) < 1.02 * wire
    # Of eight the link is the limit.
    assert busy("all_gather", 8, False) < 1.08 * busy("all_gather", 8, True)


def test_point_to_point_messages_take_more_channels_as_they_grow():
    """NCCL shares 32 channels among the members, and one carries at most 16 MiB of a message."""
    cluster = load_cluster("dgx-h100")
    channel = link_constants("NVLink4").patterns["send_recv"].channel_rate

    def rate(n, size):
        traffic = collective_traffic(cluster, "send_recv", np.arange(n), size)
        return size / (traffic.duration(cluster)[0] - traffic.latency[0])

    assert rate(8, 2**26) == pytest.approx(4 * channel, rel=0.01)
    assert rate(8, 2**27) == pytest.approx(8 * channel, rel=0.01)
    assert rate(4, 2**26) == pytest.approx(8 * channel, rel=0.01)
    assert rate(8, 2**32) == pytest.approx(rate(4, 2**32))


def test_a_protocol_that_a_fabric_lacks_is_left_to_the_node():
    """LL128 does not cross EFA of the first generation; inside a node it stays."""
    cluster = load_cluster("aws-p4d", nodes=2)
    for op, algorithm in (("all_gather", "ring"), ("all_reduce", "tree")):
        inside = collective_traffic(
            cluster, op, np.arange(8), 1e6, algorithm=algorithm, protocol="LL128"
        )
        assert np.isfinite(inside.duration(cluster)).all()
        with pytest.raises(InputError, match="LL128"):
            collective_traffic(
                cluster, op, np.arange(16), 1e6, algorithm=algorithm, protocol="LL128"
            )
        for size in (1e3, 1e6, 1e9):
            traffic = collective_traffic(cluster, op, np.arange(16), size)
            assert traffic.protocol != "LL128"


def test_nothing_to_do():
    cluster = load_cluster("dgx-h100")
    assert seconds(cluster, "all_reduce", [3], GIB) == 0
    assert seconds(cluster, "all_reduce", [0, 1], 0) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "all_reduc"}, "did you mean 'all_reduce'"),
        ({"algorithm": "rin"}, "did you mean 'ring'"),
        ({"algorithm": "nvlstree"}, "cannot run"),
        ({"protocol": "LL64"}, "protocol"),
        ({"ranks": [0, 9]}, "0..7"),
        ({"nbytes": float("nan")}, "bytes"),
        ({"nbytes": -1}, "bytes"),
    ],
)
def test_bad_input(arguments, words):
    call = {"op": "all_reduce", "ranks": [0, 1], "nbytes": 1e6, **arguments}
    op, ranks, nbytes = call.pop("op"), call.pop("ranks"), call.pop("nbytes")
    with pytest.raises(InputError, match=words):
        collective_traffic(load_cluster("dgx-h100"), op, ranks, nbytes, **call)


# --------------------------------------------------------------------------- command


def test_command_prints_json_and_a_table():
    run = CliRunner()
    options = ["all-reduce", "--topology", "dgx-h100", "--nodes", "2", "--bytes", "1MiB:4MiB:x2"]
    result = run.invoke(command, [*options, "--json"])
    rows = json.loads(result.output)
    assert [row["bytes"] for row in rows] == [2**20, 2**21, 2**22]
    for row in rows:
        assert row["algbw_bytes_per_s"] == pytest.approx(row["bytes"] / row["time_s"])
        assert row["busbw_bytes_per_s"] == pytest.approx(
            row["algbw_bytes_per_s"] * bus_factor("all_reduce", 16)
        )
    table = run.invoke(command, options)
    assert "busbw" in table.output
    assert "1048576" in table.output


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1KiB", [1024]),
        ("1,2,4", [1, 2, 4]),
        ("1MB:8MB:x2", [1000000, 2000000, 4000000, 8000000]),
        ("1MB:3MB:+1MB", [1000000, 2000000, 3000000]),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "1:2", "8:1:x2", "1:8:x1", "1:8:+0", "1:1e18:+1", "0", "x", "1:8:xy"]
)
def test_bad_sizes(text):
    with pytest.raises(InputError):
        parse_sizes(text)


@pytest.mark.parametrize("name", ["tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e"])
def test_transfers_between_slices_of_a_torus_leave_by_the_network(name):
    """A pipeline over slices sends from chip to chip over DCN, slower than inside a slice."""
    cluster = load_cluster(name, nodes=2)
    half = len(cluster) // 2
    inside = collective_traffic(cluster, "send_recv", [0, 1], GIB)
    across = collective_traffic(cluster, "send_recv", [0, half], GIB)
    assert across.algorithm == "pairwise"
    assert float(across.duration(cluster)[0]) > float(inside.duration(cluster)[0])
