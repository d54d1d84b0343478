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
    ],
)  # fmt: skip
def test_names_that_people_write(text, name):
    assert accelerator(text).name == name


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'H100"):
        accelerator("H100-SMX")
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
