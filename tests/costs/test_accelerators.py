"""The accelerator catalogue and the user's own accelerators."""

from __future__ import annotations

import pytest
import yaml

from simulator.catalog.accelerators import (
    accelerator,
    accelerator_from_file,
    accelerator_from_mapping,
    accelerators,
    families,
)
from simulator.costs.kernels import kernel_cost
from simulator.errors import InputError
from simulator.model.operations import Gemm, MemoryBound


@pytest.mark.parametrize(
    "text, name",
    [
        ("H100-80GB-SXM", "H100-80GB-SXM"), ("h100_sxm", "H100-80GB-SXM"),
        ("H100-SXM5", "H100-80GB-SXM"), ("NVIDIA H100 80GB HBM3", "H100-80GB-SXM"),
        ("H100-96GB-HBM2e-500W", "H100-96GB-HBM2e-500W"), ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("A100-SXM4-80GB", "A100-80GB-SXM"), ("a100", "A100-80GB-SXM"),
        ("A100-40GB-SXM", "A100-40GB-SXM"), ("A100-PCIE-80GB", "A100-80GB-PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"), ("A100 80 GB SXM", "A100-80GB-SXM"),
        ("GB200-NVL72", "GB200"), ("b200_sxm", "B200"), ("TPU-v5e", "TPU-v5e"),
        ("v5p", "TPU-v5p"), ("Trillium", "TPU-v6e"), ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("AMD Instinct MI300X", "MI300X"), ("Tesla T4", "T4"), ("h200_sxm", "H200"),
        ("DGX H100", "H100-80GB-SXM"), ("HGX-A100-80GB", "A100-80GB-SXM"), ("DGX-B200", "B200"),
        ("8xH100", "H100-80GB-SXM"), ("8x H100 80GB", "H100-80GB-SXM"),
        ("A100 40GB", "A100-40GB-SXM"),
        ("B200-180GB", "B200"), ("NVIDIA B300 288GB", "B300"), ("RTX 4090 24GB", "RTX-4090"),
        ("A800-80GB", "A800-80GB-SXM"), ("B100", "B100"), ("L20", "L20"), ("RTX-5090", "RTX-5090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"), ("RTX-A6000", "RTX-A6000"),
        ("TPU v5 lite", "TPU-v5e"), ("v5litepod-256", "TPU-v5e"), ("TPUv4", "TPU-v4"),
        ("v5p-128", "TPU-v5p"), ("TPU v4-1024", "TPU-v4"), ("Ironwood", "TPU-v7"),
        ("TPU7x", "TPU-v7"), ("TPU-v7x", "TPU-v7"), ("TPU v6 lite", "TPU-v6e"), ("v3-8", "TPU-v3"),
        ("Trainium", "Trainium1"), ("trn1", "Trainium1"), ("AWS Trainium2", "Trainium2"),
        ("MI250X GCD", "MI250X-GCD"), ("MI300A", "MI300A"), ("MI308X", "MI308X"),
        ("MI300X OAM", "MI300X"), ("Habana Gaudi2", "Gaudi2"), ("GB200 NVL72", "GB200"),
    ],
)  # fmt: skip
def test_names_that_people_write(text, name):
    assert accelerator(text).name == name


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'H100"):
        accelerator("H100-SMX")
    for wrong, meant in (
        ("B150", "B"), ("Trainium3", "Trainium"), ("MI400X", "MI"), ("H1000", "H"),
        ("TPU-v4i", "TPU-v4"), ("A100-64GB", "A100"), ("Gaudi", "Gaudi"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            accelerator(wrong)
        assert f"did you mean '{meant}" in str(caught.value)
    for foreign in ("IPU", "Ascend-910B", "Cerebras WSE2", "Max 1550", "VR200"):
        with pytest.raises(InputError) as caught:
            accelerator(foreign)
        assert "did you mean" not in str(caught.value), "another product is no spelling of ours"
    for wrong in ("", "nothing like it", "   "):
        with pytest.raises(InputError):
            accelerator(wrong)


def test_every_entry_is_complete_sourced_and_costs_something():
    constants = set(families()["ampere"])
    for name, item in accelerators().items():
        assert item.name == name
        assert item.source("memory_bandwidth"), name
        assert item.source("peak_flops.bf16"), name
        assert set(item.constants) == constants, name
        assert item.core_count > 0
        assert item.power_w > item.idle_power_w > 0
        assert all(rate > 1e12 for rate in item.peak_flops.values()), name
        if item.price_usd_per_hour is not None:
            assert item.source("price_usd_per_hour") != item.source("nothing"), name
        assert kernel_cost(Gemm("g", 512, 512, 512), item).duration > 0
        assert kernel_cost(MemoryBound("n", "norm", 1e6, 1e6), item).duration > 0


def test_narrower_formats_have_higher_peaks():
    for item in accelerators().values():
        peaks = item.peak_flops
        if item.kind == "gpu" and "fp8" in peaks and item.vendor == "NVIDIA":
            assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.02), item.name
        assert item.peak("bf16") >= peaks.get("fp32", 0.0) * 0.9


def test_names_and_aliases_are_unambiguous():
    for item in accelerators().values():
        for text in (item.name, *item.aliases):
            assert accelerator(text) is item, text


def test_own_accelerator_from_a_base():
    item = accelerator_from_mapping(
        {"name": "mine", "base": "h100_sxm", "memory_bandwidth": "4 TB/s",
         "peak_flops": {"bf16": "800 TFLOP/s"}, "constants": {"gemm_derate": 0.8}}
    )  # fmt: skip
    base = accelerator("H100-SXM")
    assert item.memory_bandwidth == 4e12
    assert item.peak_flops["bf16"] == 800e12
    assert item.peak_flops["fp8"] == base.peak_flops["fp8"]
    assert item.constants["gemm_derate"] == 0.8
    assert item.constants["gemm_efficiency"] == base.constants["gemm_efficiency"]
    assert base.constants["gemm_derate"] != 0.8


def test_own_accelerator_from_its_datasheet_alone():
    item = accelerator_from_mapping(
        {"name": "next", "family": "blackwell", "peak_flops": {"bf16": "4 PFLOP/s"},
         "core_count": 200, "memory": "288 GiB", "memory_bandwidth": "13 TB/s", "power": "1.8 kW",
         "clock": "2.4 GHz"}
    )  # fmt: skip
    assert dict(item.constants) == families()["blackwell"]
    new, old = (
        kernel_cost(Gemm("g", 8192, 8192, 8192), x).duration for x in (item, accelerator("B200"))
    )
    assert old / 2.5 < new < old


def test_all_errors_of_a_mapping_at_once():
    with pytest.raises(InputError) as error:
        accelerator_from_mapping(
            {"base": "H100", "name": "x", "memmory": 3, "power": "7 horses"}, "f"
        )
    text = str(error.value)
    assert "did you mean 'memory'" in text
    assert "f.power" in text
    with pytest.raises(InputError) as error:
        accelerator_from_mapping(
            {"family": "hoper", "peak_flops": {"bf61": 1e15}, "constants": {"gemm_derat": 1.0}}, "f"
        )
    text = str(error.value)
    for part in (
        "did you mean 'hopper'",
        "bf61",
        "did you mean 'gemm_derate'",
        "core_count",
        "name",
    ):
        assert part in text


@pytest.mark.parametrize(
    "wrong",
    [None, 3, [], "text", {}, {"base": 3}, {"name": "x", "base": "H100", "power": -1},
     {"name": "x", "base": "H100", "memory": float("nan")},
     {"name": "x", "base": "H100", "peak_flops": {}},
     {"name": "x", "base": "H100", "kind": "abacus"},
     {"name": "x", "base": "H100", "core_count": 0},
     {"name": "x", "base": "H100", "constants": {"gemm_p": "high"}}],
)  # fmt: skip
def test_wrong_mappings_are_input_errors(wrong):
    with pytest.raises(InputError):
        accelerator_from_mapping(wrong)


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "A100", "memory": "160 GiB"}))
    assert accelerator(str(path)).memory_bytes == 160 * 2**30
    assert accelerator_from_file(path).name == "mine"
    for text in ("a: [", "\xff\xfe", "- 1", ""):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError):
            accelerator_from_file(path)
    with pytest.raises(InputError, match="cannot read"):
        accelerator_from_file(tmp_path / "none.yaml")


def test_precision_falls_back_to_the_next_wider():
    assert accelerator("A100").compute_precision("fp8") == "bf16"
    assert accelerator("V100").compute_precision("bf16") == "fp16"
    assert accelerator("H100").compute_precision("nvfp4") == "fp8"
    with pytest.raises(InputError, match="bf16"):
        accelerator("A100").compute_precision("bf17")


@pytest.mark.parametrize(("part", "whole"), [("MI250-GCD", "MI250"), ("MI250X-GCD", "MI250X")])
def test_a_die_is_half_of_its_package(part, whole):
    die, package = accelerator(part), accelerator(whole)
    for precision, peak in package.peak_flops.items():
        assert 2 * die.peak_flops[precision] == pytest.approx(peak, rel=0.01)
    assert 2 * die.core_count == package.core_count
    assert 2 * die.memory_bytes == package.memory_bytes
    assert 2 * die.memory_bandwidth == pytest.approx(package.memory_bandwidth, rel=0.01)
    assert 2 * die.power_w == package.power_w


def test_peaks_follow_from_units_and_clock():
    """FLOP per clock and unit of one generation are one number."""
    for names, precision in (
        (("B100", "B200", "GB200"), "bf16"), (("MI300X", "MI300A", "MI308X"), "bf16"),
        (("MI250", "MI250X", "MI250X-GCD", "MI210"), "bf16"), (("L20", "L40"), "bf16"),
    ):  # fmt: skip
        rates = []
        for name in names:
            item = accelerator(name)
            assert item.clock_hz is not None
            rates.append(item.peak_flops[precision] / item.clock_hz / item.core_count)
        assert max(rates) / min(rates) < 1.03, names
