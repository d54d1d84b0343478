"""Spellings of the cells of a table of published steps."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.experiment import PrecisionName, Recompute, Sharding
from simulator.model.rows import model_from_row
from simulator.schedules import registry
from simulator.studies.row_notes import stated
from simulator.studies.row_values import MEANINGS, NUMBERS, read_values
from simulator.studies.validation import (
    cluster_of_row,
    device_of_row,
    experiment_from_row,
    read_rows,
    simulate_row,
    unstated_network,
)

ROW = {
    "id": "own-1", "model": "llama3-8b", "seq": "2048", "gpu": "H100", "n_gpus": "16",
    "gpus_per_node": "8", "network_gbps_per_gpu": "400", "internode_network": "", "tp": "2",
    "pp": "1", "vpp": "1", "cp": "1", "ep": "1", "seq_parallel": "1", "sharding": "zero1",
    "shard_group": "", "schedule": "", "micro_batch": "1", "global_batch": "64",
    "recompute": "none", "precision": "bf16", "framework": "NeMo", "step_time_s": "1.0",
    "layers": "", "hidden": "", "heads": "", "ffn": "", "vocab": "", "notes": "", "year": "2024",
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        *(("precision", text, "bf16") for text in ("BF16", "bfloat16", "amp_bf16", "bf16-mixed")),
        *(("precision", text, "fp16") for text in ("FP16", "float16", "half", "Float 16")),
        *(("precision", text, "fp8") for text in ("FP8", "FP8-CS", "amp_fp8", "fp8_hybrid")),
        *(("precision", text, "mxfp8") for text in ("FP8-MX", "MXFP8", "mx-fp8")),
        *(("sharding", text, "zero3") for text in ("fsdp", "FSDP2", "ZeRO-3", "hsdp", "stage 3")),
        *(("sharding", text, "none") for text in ("ddp", "DDP", "None", "zero0")),
        *(("sharding", text, "zero1") for text in ("zero-1", "distributed optimizer", "ZeRO 1")),
        *(("recompute", text, "full") for text in ("True", "uniform", "block", "FULL")),
        *(("recompute", text, "none") for text in ("False", "None", "off")),
        *(("recompute", text, "selective") for text in ("custom", "Selective", "moe_act")),
        *(("schedule", text, "gpipe") for text in ("afab", "GPipe", "F-then-B")),
        *(("schedule", text, "interleaved-1f1b") for text in ("interleaved", "VPP")),
        ("schedule", "none", ""),
        *(("seq_parallel", text, "1") for text in ("True", "yes", "1")),
        *(("seq_parallel", text, "0") for text in ("False", "no", "0")),
        *((column, text, "") for column in ("ep", "recompute", "sharding", "precision")
          for text in ("nan", "NA", "n/a", "N/A", "-", "?", "")),
        ("ep", "none", ""), ("n_gpus", "1,024", "1024"), ("n_gpus", "12,288", "12288"),
        ("params_b", "1,008.5", "1008.5"),
    ],
)  # fmt: skip
def test_cells_are_read_as_what_they_mean(column: str, text: str, value: str) -> None:
    assert read_values({column: text})[column] == value


@pytest.mark.parametrize("column", ["precision", "sharding", "recompute"])
def test_an_unknown_word_is_one_error_with_the_nearest_choice(column: str) -> None:
    wrong = {"precision": "mxfp9", "sharding": "zero9", "recompute": "selectif"}[column]
    nearest = {"precision": "mxfp8", "sharding": "zero", "recompute": "selective"}[column]
    with pytest.raises(InputError, match=f"{column}: unknown .*did you mean '{nearest}") as caught:
        read_values({column: wrong})
    assert "\n" not in str(caught.value)
    assert nearest in simulate_row({**ROW, column: wrong}).reason


@pytest.mark.parametrize("text", ["1,02", "12,3456", "1.5.2", "eight"])
def test_what_is_no_number_stays_an_error(text: str) -> None:
    assert "expected a number" in simulate_row({**ROW, "n_gpus": text}).reason


def test_every_meaning_leads_to_a_name_of_the_experiment() -> None:
    names = {
        "precision": get_args(PrecisionName), "sharding": get_args(Sharding),
        "recompute": get_args(Recompute), "schedule": ("", *registry.names()),
    }  # fmt: skip
    spellings: dict[tuple[str, str], str] = {}
    for meaning in MEANINGS:
        assert meaning.value in names[meaning.column]
        for text in meaning.spellings:
            assert read_values({meaning.column: text})[meaning.column] == meaning.value
            assert spellings.setdefault((meaning.column, text), meaning.value) == meaning.value
            if meaning.note not in ("", "hybrid sharding"):
                assert stated(read_values({meaning.column: text, "notes": "x"})), meaning.note


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "precision": st.sampled_from(["BF16", "FP8-CS", "mxfp8", "nan", ""]),
            "sharding": st.sampled_from(["hsdp", "FSDP", "zero1", "-"]),
            "recompute": st.sampled_from(["moe_act, layernorm", "True", "custom", "none"]),
            "schedule": st.sampled_from(["afab", "1F1B", "zb-h1", "none"]),
            "gpus_per_node": st.sampled_from(["8", "4", ""]),
            "notes": st.sampled_from(["", "as published"]),
        }
    ),
    st.sampled_from(NUMBERS),
    st.one_of(st.integers(0, 10**9).map(lambda x: f"{x:,}"), st.just("n/a")),
)
def test_reading_twice_changes_nothing(row: dict[str, str], column: str, text: str) -> None:
    once = read_values({**row, column: text})
    assert read_values(once) == once


def test_the_shipped_table_means_what_it_says() -> None:
    for row in read_rows(everything=True):
        assert read_values(row) == row


def test_words_reach_the_experiment() -> None:
    row = {
        **ROW, "precision": "FP8-CS", "sharding": "hsdp", "seq_parallel": "True",
        "n_gpus": "1,024", "global_batch": "2,048", "ep": "n/a", "recompute": "mlp, layernorm",
        "tp": "1",
    }  # fmt: skip
    experiment = experiment_from_row(row)
    assert experiment.training.precision == "fp8"
    assert experiment.training.recompute == "selective"
    assert experiment.training.recompute_modules == ("mlp", "layernorm")
    assert experiment.framework["fp8_recipe"] == "current"
    assert experiment.parallel.sharding == "zero3"
    assert experiment.parallel.shard_group == 8
    assert experiment.parallel.sequence_parallel
    assert experiment.parallel.data == 1024


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt3-175B", 96), ("GPT3 175B", 96), ("GPT-3 175B", 96), ("Mixtral 8x7B", 32),
        ("DeepSeek V3", 61), ("DeepSeekV3", 61), ("falcon-180b", 80), ("PaLM-540B", 118),
        ("meta-llama/Llama-3.1-8B", 32), ("OPT-175B", 96), ("bloom", 70), ("Yi-34B", 60),
    ],
)  # fmt: skip
def test_a_model_of_the_catalogue_needs_its_name_alone(name: str, layers: int) -> None:
    row = {key: value for key, value in ROW.items() if key not in ("layers", "hidden", "heads")}
    experiment = experiment_from_row({**row, "model": name}, recompute="full", share=0.5)
    assert isinstance(experiment.model, dict)
    assert experiment.model["layers"] == layers
    assert experiment.training.recompute_layers is None  # the row says `none`
    open_row = {**row, "model": name, "recompute": ""}
    experiment = experiment_from_row(open_row, recompute="full", share=0.5)
    assert experiment.training.recompute_layers == -(-layers // 2)


def test_an_open_recompute_without_layers_runs() -> None:
    result = simulate_row({**ROW, "recompute": "", "n_gpus": "8"})
    assert result.error is not None, result.reason


def test_a_model_of_no_catalogue_without_dimensions_is_one_error() -> None:
    with pytest.raises(InputError, match="unknown model 'lama3-8b'; did you mean 'llama3-8b'"):
        model_from_row({"model": "lama3-8b", "vocab": "32000"})


@pytest.mark.parametrize("rate", ["", "0", "nan"])
def test_an_unstated_network_is_the_reference_system_and_said(rate: str) -> None:
    unstated = {**ROW, "network_gbps_per_gpu": rate}
    result = simulate_row(unstated)
    assert "network not stated: InfiniBand 400G per GPU" in result.assumed
    stated_rate = simulate_row({**ROW, "internode_network": "InfiniBand"})
    assert stated_rate.assumed == ""
    assert result.simulated_step_time_s == pytest.approx(stated_rate.simulated_step_time_s)
    assert simulate_row({**unstated, "n_gpus": "8"}).assumed == "", "one node needs no network"
    spelt = {**unstated, "internode_network": "IB NDR 8x400Gbps/node"}
    assert simulate_row(spelt).assumed == ""


def test_reference_networks_by_family() -> None:
    for family, rate in (("volta", 100), ("ampere", 200), ("hopper", 400), ("gaudi", 200)):
        assert f"{rate}G" in unstated_network(family)
    cluster = cluster_of_row({**ROW, "network_gbps_per_gpu": "", "gpu": "V100"}, 16)
    assert cluster.topology["network"]["bandwidth"] == pytest.approx(12.5e9)


def test_a_table_with_blank_words(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    keys = ["canonical", *ROW]
    lines = [",".join(keys)]
    for canonical in ("1", "True", "0", "False", "", "n/a"):
        lines.append(",".join([canonical, *ROW.values()]))
    path.write_text("\n".join(lines))
    assert len(read_rows(path)) == 4
    assert len(read_rows(path, everything=True)) == 6


@pytest.mark.parametrize(
    ("gpu", "per_node", "name"),
    [
        ("MI250X", "8", "MI250X-GCD"), ("MI250X", "", "MI250X-GCD"), ("MI250X", "4", "MI250X"),
        ("MI250", "4", "MI250"), ("MI250", "8", "MI250-GCD"), ("MI300X", "8", "MI300X"),
        ("AMD Instinct MI250X", "8", "MI250X-GCD"),
    ],
)  # fmt: skip
def test_dies_of_a_package_are_counted_as_devices(gpu: str, per_node: str, name: str) -> None:
    assert device_of_row({"gpu": gpu, "gpus_per_node": per_node}).name == name


@pytest.mark.parametrize(("gpu", "topology"), [("trn1", "trn1"), ("Trainium2", "trn2")])
def test_trainium_instances(gpu: str, topology: str) -> None:
    row = {**ROW, "gpu": gpu, "n_gpus": "32", "network_gbps_per_gpu": "", "gpus_per_node": "16"}
    assert cluster_of_row(row, 32).topology == topology
    result = simulate_row({**row, "tp": "8", "recompute": "full"})
    assert result.error is not None, result.reason


@pytest.mark.parametrize("gpu", ["TPU-v2", "TPU-v3", "TPU7x"])
def test_tpu_slices(gpu: str) -> None:
    row = {**ROW, "gpu": gpu, "n_gpus": "64", "framework": "MaxText", "sharding": "fsdp", "tp": "1"}
    result = simulate_row(row)
    assert result.error is not None, result.reason
