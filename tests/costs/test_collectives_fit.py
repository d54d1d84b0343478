"""The formula that the constants were fitted with is the one that the simulator evaluates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import simulator.costs.collectives_constants as constants
from simulator.catalog.accelerators import accelerator
from simulator.costs.collectives_predict import (
    measured_operation,
    parse_network,
    predict_collective,
)
from simulator.errors import InputError

NDR = "NVLink4 + NDR InfiniBand, one 400G NIC per GPU used"
ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "fit_collectives", ROOT / "benchmarks" / "fit_collectives.py"
)
assert SPEC
assert SPEC.loader
fit = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = fit
SPEC.loader.exec_module(fit)
TABLE = yaml.safe_load(
    (Path(constants.__file__).parents[1] / "catalog" / "collectives.yaml").read_text()
)["scale_up"]


def fitted(gpu, link):
    """(machine, constants of the catalogue as the fit holds them) of a GPU."""
    machine = fit.Machine.of(accelerator(gpu))
    found = {}
    for pattern in ("ring", "all_to_all", "nvls"):
        entry = {**TABLE["NVLink"][pattern], **TABLE[link].get(pattern, {})}
        if pattern != "nvls":
            entry["ramp"] /= machine.ramp_scale
        if "channel_rate" in entry:
            entry["channel_rate"] /= machine.clock
        if pattern == "ring":
            entry["share_ll128"] = entry["rate_ll128"] / machine.ll_max
        found |= {f"{pattern}.{key}": value for key, value in entry.items()}
    return machine, found


@pytest.mark.parametrize(("gpu", "link"), [("A100", "NVLink3"), ("B200", "NVLink5")])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_simulated_equals_fitted_formula(gpu, link, n):
    sizes = np.array([1e3, 1e5, 3e6, 1e8, 1e10])
    many = np.full(len(sizes), float(n))
    machine, p = fitted(gpu, link)
    for op in ("all_gather", "reduce_scatter", "alltoall"):
        if op == "alltoall":
            expected = fit.all_to_all_us(p, machine, many, sizes)
        else:
            expected = fit.ring_us(p, machine, np.full(len(sizes), op), many, sizes)
        ours = [predict_collective(op, gpu, n, 1, n, size) * 1e6 for size in sizes]
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize(("gpu", "link"), [("H100", "NVLink4"), ("B200", "NVLink5")])
def test_nvls_takes_over_from_the_ring(gpu, link):
    sizes = np.array([1e3, 1e6, 1e9])
    machine, p = fitted(gpu, link)
    ring = fit.ring_us(p, machine, np.full(3, "all_reduce"), np.full(3, 8.0), sizes)
    nvls = fit.nvls_us(p, machine, np.full(3, 8.0), sizes)
    ours = [predict_collective("all_reduce", gpu, 8, 1, 8, size) * 1e6 for size in sizes]
    np.testing.assert_allclose(ours, np.minimum(ring, nvls), rtol=1e-9)
    assert nvls[2] < ring[2]


def test_one_rule_predicts_the_measured_generations():
    """The shared constants, with nothing of a generation but its datasheet and NCCL's published
    link constants, stay near the generation's own fit for large messages."""
    sizes = np.array([2.0**27, 2.0**29, 2.0**31])
    rule = TABLE["NVLink"]
    for gpu, link in (("A100", "NVLink3"), ("H100", "NVLink4"), ("B200", "NVLink5")):
        machine, own = fitted(gpu, link)
        shared = {f"{k}.{key}": v for k in ("ring", "all_to_all", "nvls")
                  for key, v in rule[k].items()}  # fmt: skip
        shared["ring.share_ll128"] *= 450 / 141
        for n in (2.0, 8.0):
            many = np.full(3, n)
            for op in ("all_gather", "all_reduce"):
                names = np.full(3, op)
                ratio = fit.ring_us(shared, machine, names, many, sizes) / fit.ring_us(
                    own, machine, names, many, sizes
                )
                assert abs(np.log(ratio)).max() < 0.12
            ratio = fit.all_to_all_us(shared, machine, many, sizes) / fit.all_to_all_us(
                own, machine, many, sizes
            )
            assert abs(np.log(ratio)).max() < 0.12


def test_constants_follow_the_rate_and_the_clock():
    """Cut NVLinks (H800) leave what thread blocks bound; a protocol never exceeds its payload."""
    full = constants.link_constants("NVLink4", 450e9, 1.83e9)
    cut = constants.link_constants("NVLink4", 200e9, 1.83e9)
    for a, b in zip(full.patterns["ring"].protocols, cut.patterns["ring"].protocols, strict=True):
        assert (a.start, a.hop) == (b.start, b.hop)
        assert b.ramp == pytest.approx(a.ramp * 450 / 200)
        if a.name == "Simple":
            assert a.share == b.share
        else:
            assert b.share <= (0.94 if a.name == "LL128" else 0.5)
            assert a.share <= b.share <= a.share * 450 / 200 * (1 + 1e-12)
    quick = constants.link_constants("NVLink4", 450e9, 2 * 1.83e9)
    rate = full.patterns["all_to_all"].channel_rate
    assert cut.patterns["all_to_all"].channel_rate == rate
    assert quick.patterns["all_to_all"].channel_rate == pytest.approx(2 * rate)
    # Unknown generations, and the word alone, take the rule.
    assert constants.link_constants("NVLink9", 3.6e12, 2e9).name == "NVLink"


@pytest.mark.parametrize(
    ("text", "per_node", "expected"),
    [
        ("NVLink4 + EFA v2 32x100G per node", 8, ("EFA", "efa-v2", 32, 12.5e9)),
        ("NVLink3 + EFA v1 4x100G per node", 8, ("EFA", "efa-v1", 4, 12.5e9)),
        (NDR, 2, ("InfiniBand", "infiniband-ndr", 2, 50e9)),
        ("NVLink3 mesh + 2x Slingshot11 200G per node", 4, ("Slingshot", "slingshot", 2, 25e9)),
        ("IB HDR 8x200Gbps/node", 8, ("InfiniBand", "infiniband-hdr", 8, 25e9)),
        ("RoCE 4x100Gbps/node", 8, ("RoCE", "roce", 4, 12.5e9)),
        ("NVLink4 + NDR InfiniBand", 8, ("InfiniBand", "infiniband-ndr", 8, 50e9)),
    ],
)  # fmt: skip
def test_network_descriptions(text, per_node, expected):
    assert parse_network(text, per_node) == pytest.approx(expected)


def test_unknown_words_and_counts_are_clear_errors():
    with pytest.raises(InputError, match="rate"):
        parse_network("carrier pigeons", 8)
    with pytest.raises(InputError, match="are not 15"):
        predict_collective("all_reduce", "H100", 15, 2, 8, 1e6, network="8x400G")
    with pytest.raises(InputError, match="H1000"):
        predict_collective("all_reduce", "H1000", 8, 1, 8, 1e6)


@pytest.mark.parametrize("gpu", ["H200", "B300", "GB200", "H800", "H20", "V100", "MI300X", "L40S"])
@pytest.mark.parametrize("nodes", [1, 2, 16])
def test_accelerators_known_only_by_their_datasheet(gpu, nodes):
    """Bus bandwidth is positive and below the links' rate, and large sizes come nearest to it."""
    from simulator.catalog.accelerators import accelerator

    device = accelerator(gpu)
    rate = device.scale_up_bandwidth or device.host_bandwidth
    n = nodes * 8
    text = "8x400G NDR InfiniBand" if nodes > 1 else None
    busbw = [
        size * (n - 1) / n / predict_collective("all_gather", gpu, n, nodes, 8, size, network=text)
        for size in (1e5, 1e7, 1e9)
    ]
    assert 0 < busbw[0] < busbw[1] < busbw[2] < rate
    assert busbw[2] > 0.3 * min(rate, 400e9 if nodes > 1 else rate)


def test_fabric_efficiency_of_one_measured_point_scales_large_messages():
    text = NDR
    fast, slow = (
        predict_collective("all_gather", "H100", 32, 4, 8, 1e11, network=text, fabric_efficiency=e)
        for e in (0.8, 0.4)
    )
    assert slow / fast == pytest.approx(2, rel=0.02)


def test_large_point_to_point_rings_over_rails_are_slow():
    """Two channels at few nodes; one at many, and streams that cross the spine collide."""

    def seconds(nodes, g):
        return predict_collective("sendrecv", "H100", nodes * g, nodes, g, 1e10, network=NDR)

    rate = {(nodes, g): 1e10 / seconds(nodes, g) for nodes, g in ((2, 8), (10, 1), (10, 8))}
    assert rate[2, 8] > 1.5 * rate[10, 1] > 2 * rate[10, 8]


def test_words_about_the_inside_of_a_node():
    def busbw(gpu, n, nodes, text):
        return (
            1e10
            * (n - 1)
            / n
            / predict_collective("all_gather", gpu, n, nodes, n // nodes, 1e10, network=text)
        )

    # Two of four meshed GPUs have a third of the links to each other.
    pair = busbw("A100-SXM4-40GB", 2, 1, "NVLink3 mesh (4 GPU) + 2x Slingshot11 200G per node")
    four = busbw("A100-SXM4-40GB", 4, 1, "NVLink3 mesh (4 GPU) + 2x Slingshot11 200G per node")
    assert pair == pytest.approx(four / 3, rel=0.1)
    # A rack's NVLink joins its trays; NVLink bridges join no more than two cards.
    assert busbw("GB200", 16, 4, "NVLink5 NVL72") > 400e9
    assert busbw("H100-PCIe", 8, 1, None) < 64e9 < busbw("H100-PCIe", 2, 1, None)


def test_algorithms_as_nccl_names_them():
    def seconds(name, op="all_reduce", nodes=2):
        return predict_collective(op, "H100", 8 * nodes, nodes, 8, 1e9, network=NDR, algorithm=name)

    assert seconds("NVLS") == seconds("NVLSTree") < seconds("Tree") < 2 * seconds("ring")
    assert seconds("CollNetDirect") == seconds("sharp")
    assert (
        seconds("Tree", "all_gather")
        == seconds("ring", "all_gather")
        == seconds(None, "all_gather")
    )
    assert seconds("nccl-default") == seconds(None)
    with pytest.raises(InputError, match="did you mean 'ring'"):
        seconds("rinng")


def test_a_fabric_without_a_rate_has_the_reference_systems():
    assert parse_network("NVLink4 + RoCE", 8, "hopper") == ("RoCE", "roce", 8, 50e9)
    assert parse_network("", 8, "ampere")[3] == 25e9


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("AllReduce", "all_reduce"), ("all_gather_perf", "all_gather"), ("hypercube", "all_gather"),
        ("ncclReduceScatter", "reduce_scatter"), ("alltoallv", "all_to_all"),
        ("gather", "all_to_all"), ("Scatter", "all_to_all"), ("reduce", "broadcast"),
        ("send/recv", "send_recv"), ("collective-permute", "send_recv"),
    ],
)  # fmt: skip
def test_operations_as_benchmarks_name_them(name, operation):
    assert measured_operation(name) == operation


def test_an_unknown_operation_is_a_clear_error():
    with pytest.raises(InputError, match="did you mean 'all_reduce'"):
        measured_operation("all_redcue")


def test_members_of_larger_nodes():
    """Two of the eight GPUs of each of four nodes."""
    given, used = (
        predict_collective("all_gather", "H100", 8, 4, g, 1e8, network=NDR) for g in (8, 2)
    )
    assert given == used


def test_boxes_without_nvlink_between_all_gpus():
    def busbw(gpu, n):
        return 1e9 * (n - 1) / n / predict_collective("all_gather", gpu, n, 1, n, 1e9)

    # A bridge joins two cards; more use PCIe, of two sockets beyond four; GeForce host memory.
    assert busbw("A40", 2) > 40e9 > 31.5e9 > busbw("A40", 4) > busbw("A40", 8) > 15e9
    assert busbw("L40S", 4) == pytest.approx(busbw("A40", 4), rel=0.01)
    assert busbw("RTX-4090", 4) < 0.7 * busbw("L40S", 4)


@pytest.mark.parametrize("gpu", ["TPU-v3", "TPU-v4", "TPU-v5e", "TPU-v5p", "TPU-v6e", "TPU-v7"])
def test_tpu_slices(gpu):
    """All-gather of a slice: between one link and both directions of all of them."""
    device = accelerator(gpu)
    for chips in (4, 16, 64, 256):
        rate = (
            1e10
            * (chips - 1)
            / chips
            / predict_collective("all_gather", gpu, chips, 1, chips, 1e10)
        )
        assert 0.8 < rate / device.scale_up_bandwidth < device.scale_up_links


def test_racks_are_one_domain():
    """GB200 trays are joined by NVLink where the network's text names no fabric."""
    text = "NVLink5+NVSwitch"
    inside = predict_collective("all_gather", "GB200", 16, 4, 4, 1e9, network=text)
    fabric = predict_collective("all_gather", "GB200", 16, 4, 4, 1e9, network="4x400G NDR")
    assert 1.5 * inside < fabric
    # NVLS over the hosts of a rack is slower than in a box.
    rack = predict_collective("all_reduce", "GB200", 8, 2, 4, 8e9, network=text)
    one = predict_collective("all_reduce", "GB200", 8, 1, 8, 8e9)
    assert one < rack
