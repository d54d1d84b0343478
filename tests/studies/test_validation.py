"""Published steps against simulated ones: reading tables, general rules, statistics."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.catalog.frameworks import framework
from simulator.cli.validate import command, to_json
from simulator.errors import InputError
from simulator.studies.leave_one_out import leave_one_out, leave_one_out_host
from simulator.studies.validation import (
    _FRAMEWORKS,
    FURTHER,
    RowResult,
    by_family,
    coverage,
    experiment_from_row,
    framework_of_row,
    overall,
    ranking,
    read_rows,
    sharding_of_row,
    simulate_row,
    suspected_causes,
    validate,
    weighted_quantile,
)

ROW = {
    "id": "own-1",
    "family": "own",
    "model": "my-gpt",
    "layers": "4",
    "hidden": "1024",
    "heads": "16",
    "ffn": "4096",
    "vocab": "32000",
    "seq": "1024",
    "gpu": "A100-80GB-SXM",
    "n_gpus": "8",
    "micro_batch": "2",
    "global_batch": "16",
    "precision": "bf16",
    "recompute": "none",
    "framework": "PyTorch FSDP",
    "sharding": "zero3",
    "step_time_s": "0.05",
}


def test_every_shipped_row_is_an_experiment() -> None:
    rows = read_rows(everything=True)
    assert len(rows) > 400
    for row in rows:
        experiment = experiment_from_row(row, micro_batch=1, recompute="none")
        assert experiment.parallel.data is not None


def test_an_unknown_model_on_unknown_rows_runs_from_its_columns_alone() -> None:
    result = simulate_row(ROW)
    assert result.reason == ""
    assert result.simulated_step_time_s is not None
    assert 0.001 < result.simulated_step_time_s < 1.0
    assert result.low_s is not None
    assert result.low_s < result.simulated_step_time_s


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "H1000"}, "did you mean"),
        ({"n_gpus": "7.5"}, "n_gpus"),
        ({"hidden": "wide"}, "hidden"),
        ({"step_time_s": "-1"}, "step_time_s"),
        ({"sharding": "zero9"}, "sharding"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_a_row_that_cannot_run_comes_back_with_the_reason(
    change: dict[str, str], reason: str
) -> None:
    result = simulate_row({**ROW, **change})
    assert result.error is None
    assert reason in result.reason


@pytest.mark.parametrize(
    ("name", "year", "base"),
    [
        ("Megatron-LM", "2021", "megatron-lm-2021"),
        ("Megatron-LM", "2024", "megatron-lm"),
        ("NeMo 24.07/Megatron-Core", "2024", "nemo"),
        ("Megatron-Bridge/Megatron-Core", "2026", "megatron-bridge"),
        ("torchtitan (PyTorch FSDP2) + torch.compile", "2024", "torchtitan-compile"),
        ("MaxText/JAX", "2024", "maxtext"),
        ("PyTorch FSDP2 + torch.compile", "2024", "torchtitan-compile"),
        ("PyTorch DDP + torch.compile", "2024", "pytorch-compile"),
        ("PyTorch FSDP", "2023", "pytorch-fsdp1"),
        ("PyTorch FSDP2", "2025", "torchtitan"),
        ("PyTorch DDP", "2024", "pytorch"),
        ("PyTorch + TransformerEngine", "2024", "pytorch-te"),
        ("Megatron-DeepSpeed", "2021", "megatron-deepspeed-2021"),
        ("GPT-NeoX", "2022", "megatron-deepspeed-2021"),
        ("GPT-NeoX (Megatron + DeepSpeed)", "2023", "megatron-deepspeed-2023"),
        ("DeepSpeed ZeRO-3", "2021", "deepspeed-zero3"),
        ("DeepSpeed ZeRO-3", "2024", "deepspeed-stage3"),
        ("DeepSpeed", "2024", "deepspeed"),
        ("Colossal-AI", "2023", "colossalai"),
        ("nanotron", "2024", "nanotron"),
        ("LitGPT", "2024", "litgpt"),
        ("PyTorch Lightning", "2023", "litgpt"),
        ("Lightning DDP", "2023", "pytorch"),
        ("HF Transformers + Accelerate", "2024", "huggingface"),
        ("Axolotl", "2024", "huggingface"),
        ("EasyLM", "2023", "maxtext"),
        ("AXLearn", "2024", "maxtext"),
        ("Levanter", "2023", "maxtext"),
        ("MosaicML", "2023", "llm-foundry"),
        ("T5X/JAX", "2022", "xla-unfused"),
        ("T5X + TransformerEngine", "2023", "t5x-te"),
        ("Alpa", "2022", "xla-unfused"),
        ("Mesh-TensorFlow", "2020", "xla-unfused"),
        ("Mesh Transformer JAX", "2021", "xla-unfused"),
        ("TF2 BERT", "2020", "tensorflow"),
        ("TensorFlow XLA + Horovod", "2019", "tensorflow-xla"),
        ("NeMo AutoModel (PyTorch FSDP2)", "2025", "nemo-automodel"),
        ("Primus/Megatron-LM", "2025", "megatron-core"),
        ("Primus/torchtitan", "2025", "torchtitan"),
        ("OLMo", "2024", "pytorch-fsdp1"),
        ("OLMo-core", "2025", "torchtitan-compile"),
        ("NeuronX Distributed (NxD)", "2024", "neuronx-distributed"),
        ("HAI-LLM", "2024", "hai-llm"),
        ("something nobody knows", "2025", "megatron-core"),
    ],
)
def test_frameworks_are_known_by_their_names(name: str, year: str, base: str) -> None:
    assert framework_of_row({"framework": name, "year": year})["base"] == base


def test_every_profile_that_a_name_stands_for_exists() -> None:
    for item in _FRAMEWORKS:
        profile = framework(item.profile)
        assert profile.source
        assert profile.description


@pytest.mark.parametrize(
    ("row", "sharding"),
    [
        ({"framework": "PyTorch FSDP2"}, "zero3"),
        ({"framework": "DeepSpeed ZeRO-2"}, "zero2"),
        ({"framework": "DeepSpeed ZeRO stage 1"}, "zero1"),
        ({"framework": "GPT-NeoX"}, "zero1"),
        ({"framework": "GPT-NeoX", "sharding": "none"}, "none"),
        ({"framework": "PyTorch DDP"}, "none"),
        ({}, "none"),
    ],
)
def test_sharding_that_a_row_leaves_open(row: dict[str, str], sharding: str) -> None:
    assert sharding_of_row(row) == sharding


def test_gradients_of_deepspeed_are_in_the_type_of_its_optimizer() -> None:
    row = {"framework": "Megatron-DeepSpeed", "year": "2023"}
    assert framework_of_row({**row, "precision": "fp16"})["grad_reduce_bytes"] == 2.0
    assert "grad_reduce_bytes" not in framework_of_row({**row, "precision": "bf16"})


def test_attention_is_unfused_before_its_kernels_came() -> None:
    for name in ("megatron-deepspeed-2021", "xla-unfused", "tensorflow", "tensorflow-xla"):
        assert not framework(name).fused_attention
    for name in ("megatron-deepspeed", "pytorch-compile", "nanotron", "colossalai", "litgpt"):
        assert framework(name).fused_attention
    assert framework("tensorflow-xla").compiled
    assert not framework("tensorflow").compiled
    assert framework("pytorch-compile").compiled
    assert not framework("pytorch").compiled


def results(errors: dict[str, list[float]]) -> list[RowResult]:
    return [
        RowResult(
            f"{family}-{i}", family, 1.0, 1.0 + error, low_s=0.9, high_s=1.1,
            breakdown_s={"gemm": 0.8 * (1.0 + error), "data": 0.2 * (1.0 + error)},
            accelerator_family="ampere",
        )
        for family, values in errors.items()
        for i, error in enumerate(values)
    ]  # fmt: skip


def test_families_weigh_equally() -> None:
    table = results({"many": [0.1] * 99, "one": [0.3]})
    assert overall(table).median_abs_error == pytest.approx(0.2, abs=0.1)
    assert by_family(table)["many"].median_abs_error == pytest.approx(0.1)
    assert overall(table).p90_abs_error == pytest.approx(0.3, abs=0.01)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0.05, 0.95))
def test_weighted_quantile_lies_within_the_sample(values: list[float], quantile: float) -> None:
    sample = np.array(values)
    found = weighted_quantile(sample, np.ones(len(values)), quantile)
    assert sample.min() - 1e-9 <= found <= sample.max() + 1e-9


def test_ranking_of_layouts() -> None:
    good = [
        RowResult(f"r{i}", "f", measured, 2.0 * measured, group="g", layout=f"tp{i}")
        for i, measured in enumerate((1.0, 1.5, 2.0))
    ]
    assert ranking(good).kendall_tau == 1.0
    assert ranking(good).regret == 0.0
    bad = [
        RowResult(f"r{i}", "f", measured, 1.0 / measured, group="g", layout=f"tp{i}")
        for i, measured in enumerate((1.0, 1.5, 2.0))
    ]
    assert ranking(bad).kendall_tau == -1.0
    assert ranking(bad).regret == pytest.approx(1.0)
    repeated = [*good, RowResult("again", "f", 5.0, 2.0, group="g", layout="tp0")]
    assert ranking(repeated) == ranking(good), "a slower repeat of a layout is no layout"
    equal = [RowResult(f"r{i}", "f", 1.0 + i, 3.0, group="g", layout=f"tp{i}") for i in range(3)]
    assert ranking(equal).kendall_tau == 0.0
    noise = [RowResult(f"r{i}", "f", 1 + i / 50, 3.0, group="g", layout=f"{i}") for i in range(2)]
    assert ranking(noise).sweeps == 0


def test_a_wrong_part_is_suspected() -> None:
    """Rows whose error is proportional to their communication blame the communication."""
    rows = []
    for i, share in enumerate(np.linspace(0.0, 0.5, 9)):
        simulated = {"gemm": 1.0 - share, "data": 0.5 * share}
        total = sum(simulated.values())
        rows.append(RowResult(f"r{i}", "f", 1.0, total, breakdown_s=simulated))
    blame = suspected_causes(rows)["f"]
    assert min(blame, key=lambda name: blame[name]) == "DP"


def test_leaving_out_a_family_that_agrees_changes_nothing() -> None:
    table = leave_one_out(results({"a": [0.1, 0.1], "b": [0.1, 0.1], "c": [0.1, 0.1]}))
    assert {item.family for item in table} == {"a", "b", "c"}
    for item in table:
        assert item.factor_left_out == item.factor_fitted
        assert item.error_left_out < 0.01


def test_host_time_is_refitted_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured time made with a factor on the constant gives the factor back; rows that the
    constant cannot change take no part."""
    ids = {"a": "moezoo-005", "b": "mbridge-249"}
    table = {row["id"]: row for row in read_rows()}
    dense = {**table["mbridge-267"], "family": "dense"}
    truth = 1.4 * framework("megatron-core").host_time_per_expert_operation
    rows = [dense]
    for family, identity in ids.items():
        row = table[identity]
        made = simulate_row(row, {"host_time_per_expert_operation": truth})
        assert made.simulated_step_time_s is not None
        rows.append({**row, "family": family, "step_time_s": repr(made.simulated_step_time_s)})
    monkeypatch.setattr("simulator.studies.leave_one_out.HOST_GRID", (1.0, 1.4))
    found = leave_one_out_host(rows, validate(rows))
    assert {item.family for item in found} == set(ids)
    for item in found:
        assert item.factor_fitted == item.factor_left_out == 1.4
        assert item.error_fitted == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"graphed_modules": "attn moe_router moe_preprocess"}),
        ({"notes": "tokendrop"}, {"cuda_graphs": True, "moe_dispatcher": "alltoall"}),
        ({"notes": "cuda graph [attn]"}, {"graphed_modules": "attn"}),
        ({"gpu": "H100-80GB-SXM"}, {}),
        ({"n_experts": ""}, {}),
        ({"framework": "Megatron-Core"}, {}),
        ({"model": "gpt-oss-120b"}, {"moe_dispatcher": "alltoall"}),
        (
            {"model": "gpt-oss-20b", "gpu": "GB300-NVL72"},
            {"moe_dispatcher": "alltoall", "graphed_modules": "attn moe_router moe_preprocess"},
        ),
        (
            {"model": "deepseek-v3", "gpu": "B200", "precision": "mxfp8"},
            {"moe_overlap": True, "graphed_modules": "attn moe_router moe_preprocess"},
        ),
        (
            {"model": "deepseek-v3", "gpu": "B200", "precision": "mxfp8",
             "notes": "NeMo container 26.02"},
            {},
        ),
        (
            {"model": "qwen3-235b-a22b", "gpu": "H100-80GB-SXM"},
            {"moe_dispatcher": "alltoall", "moe_overlap": True},
        ),
    ],
)  # fmt: skip
def test_recipes_of_experts_differ(changes: dict[str, str], expected: dict[str, object]) -> None:
    row = {
        "framework": "Megatron-Bridge/Megatron-Core", "model": "qwen3-30b-a3b", "n_experts": "128",
        "gpu": "GB200-NVL72", "precision": "bf16", "notes": "", **changes,
    }  # fmt: skip
    found = framework_of_row(row)
    assert {key: value for key, value in found.items() if key != "base"} == expected


def test_coverage_counts_rows_in_their_band() -> None:
    assert coverage(results({"a": [0.0]})) == 1.0
    table = [RowResult("r", "f", 2.0, 1.0, low_s=0.9, high_s=1.1)]
    assert coverage(table) == 0.0


def test_json_has_the_documented_keys() -> None:
    output = to_json(results({"a": [0.1, -0.2]}))
    assert {"rows", "families", "overall", "ran", "total"} <= set(output)
    row = output["rows"][0]
    assert {"id", "family", "measured_step_time_s", "simulated_step_time_s", "error"} <= set(row)
    json.dumps(output)


def test_command_reads_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        file.write("# my measurements\n")
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerow(ROW)
        writer.writerow({**ROW, "id": "own-2", "gpu": "unknown-chip"})
    outcome = CliRunner().invoke(command, ["--data", str(path), "--json", "--jobs", "1"])
    assert outcome.exit_code == 0, outcome.output
    output = json.loads(outcome.stdout)
    assert (output["ran"], output["total"]) == (1, 2)
    assert output["rows"][1]["simulated_step_time_s"] is None


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x00\x01"])
def test_what_is_no_table_is_one_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"bad\.csv"):
        read_rows(path)


def test_further_steps_are_other_rows_with_sources() -> None:
    further, published = read_rows(FURTHER, everything=True), read_rows(everything=True)
    assert len({row["id"] for row in further}) == len(further) > 150
    assert not {row["id"] for row in further} & {row["id"] for row in published}
    assert all(row["source"] and row["source_kind"] for row in further)
    hardware = {row["gpu"] for row in further} - {row["gpu"] for row in published}
    assert len(hardware) >= 10, "most of it on hardware that the other table lacks"


@pytest.mark.parametrize("row_id", ["tpu-old-002", "mi300x-001", "gh200-001"])
def test_further_hardware_is_simulated(row_id: str) -> None:
    row = next(row for row in read_rows(FURTHER) if row["id"] == row_id)
    result = simulate_row(row)
    assert result.error is not None
    assert abs(result.error) < 0.3
