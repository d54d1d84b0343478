"""Baselines of real results, and what a comparison of two of them says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.simulation import run
from simulator.testing.baseline import SAME, Baseline
from simulator.testing.comparison import compare, tolerances

EXPERIMENT: dict[str, Any] = {
    "model": "llama2-7b",
    "cluster": {"topology": "dgx-a100", "nodes": 2},
    "parallel": {"tensor": 2, "pipeline": 4},
    "training": {"global_batch_size": 16},
}


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    return Baseline.of(run(parse_experiment(EXPERIMENT)))


def changed(**values: Any) -> Baseline:
    return Baseline.of(run(parse_experiment(EXPERIMENT).replace(**values)))


def test_a_baseline_reads_back(baseline: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "baseline.yaml"
    baseline.write(path)
    read = Baseline.read(path)
    assert compare(baseline, read).message() == ""
    assert compare(read, baseline, 2 * SAME).equal
    assert read.orders == baseline.orders
    assert read.experiment == baseline.experiment
    assert read.to_yaml() == path.read_text()
    assert {item.key for item in read.operations} == {item.key for item in baseline.operations}
    assert list(path.parent.iterdir()) == [path]


def test_a_baseline_is_the_same_text_every_time(baseline: Baseline) -> None:
    assert Baseline.of(run(parse_experiment(EXPERIMENT))).to_yaml() == baseline.to_yaml()


def test_a_baseline_is_plain_yaml_of_numbers_that_are_numbers(baseline: Baseline) -> None:
    document = yaml.safe_load(baseline.to_yaml())

    def leaves(value: Any) -> Any:
        if isinstance(value, dict):
            for inner in value.values():
                yield from leaves(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(inner)
        else:
            yield value

    for part in ("summary", "memory_bytes", "operations", "microbatches"):
        values = list(leaves(document[part]))
        assert values
        assert all(isinstance(value, int | float) for value in values)


def test_operations_account_for_the_compute_stream(baseline: Baseline) -> None:
    """Count x duration over all operations of a pipeline rank is what its micro-batches sum to."""
    for (stage, phase), series in baseline.microbatches.items():
        total = sum(
            item.count * item.seconds
            for item in baseline.operations
            if item.stage == stage and item.phase == phase and item.stream == "compute"
        )
        assert np.nansum(series) == pytest.approx(total, rel=2e-3)


def test_a_slow_link_is_named(baseline: Baseline) -> None:
    link = ["node0/gpu3", "node0/nvswitch"]
    comparison = compare(
        baseline, changed(**{"cluster.faults": [{"link": link, "bandwidth_factor": 0.1}]})
    )
    assert not comparison.equal
    first = comparison.culprits[0]
    assert "NVLink links" in first
    assert "node0/gpu3 -> node0/nvswitch" in first
    assert any(
        "all_reduce" in text and "only on some of the ranks" in text
        for text in comparison.operations
    )
    assert any("step time" in text for text in comparison.figures)


def test_a_slow_accelerator_is_named(baseline: Baseline) -> None:
    comparison = compare(baseline, changed(**{"cluster.faults": [{"gpu": 5, "slowdown": 1.5}]}))
    assert "accelerators" in comparison.culprits[0]
    assert "5: 1.5" in comparison.culprits[0]


def test_a_slower_operation_is_named_with_stages_and_factor(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, "mlp.fc2", 1.3)
    comparison = compare(baseline, changed())
    assert comparison.given == ()
    assert comparison.order == ()
    cause = comparison.culprits[0]
    assert cause.startswith("slower operation: mlp.fc2 forward (gemm, compute stream)")
    assert "on stages 0-3" in cause
    assert "+30.0 %" in cause
    assert all("mlp.fc2" in text for text in comparison.operations if "+30" in text)
    assert {text.split(":")[0] for text in comparison.stages} >= {
        f"stage {stage}, forward" for stage in range(4)
    }
    assert any("micro-batches all" in text for text in comparison.microbatches)


def test_a_slower_operation_on_one_stage_is_placed(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, "head.logits", 1.5)
    comparison = compare(baseline, changed())
    assert "head.logits forward (gemm, compute stream) on stage 3:" in comparison.culprits[0]
    assert [text for text in comparison.stages if not text.startswith("stage 3")] == []


def slow_down(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    from simulator import programs

    original = programs.kernel_cost

    def slower(op: Any, *arguments: Any, **options: Any) -> Any:
        cost = original(op, *arguments, **options)
        if op.name != name:
            return cost
        return dataclasses.replace(
            cost,
            latency=factor * cost.latency,
            compute=factor * cost.compute,
            hbm_bytes=factor * cost.hbm_bytes,
        )

    monkeypatch.setattr(programs, "kernel_cost", slower)


def test_another_order_of_passes_is_named(baseline: Baseline) -> None:
    comparison = compare(baseline, changed(**{"parallel.schedule": "gpipe"}))
    assert any("schedule changed" in text for text in comparison.culprits)
    assert "pipeline rank 0" in comparison.order[0]
    assert not any("slower operation" in text for text in comparison.culprits)


def test_a_slow_micro_batch_is_found(baseline: Baseline) -> None:
    series = {key: values.copy() for key, values in baseline.microbatches.items()}
    series[(2, "F")][[3, 4, 5]] *= 1.4
    comparison = compare(baseline, dataclasses.replace(baseline, microbatches=series))
    assert len(comparison.microbatches) == 1
    assert "stage 2, forward: micro-batches 3-5 changed" in comparison.microbatches[0]
    assert "+40.0 %" in comparison.microbatches[0]


def test_memory_is_compared_per_pipeline_rank_and_part(baseline: Baseline) -> None:
    comparison = compare(baseline, changed(**{"training.micro_batch_size": 2}))
    text = "\n".join(comparison.figures)
    assert "memory of pipeline rank 0, activations" in text
    assert "parameters" not in text


def test_tolerances_decide(baseline: Baseline) -> None:
    slower = dict(baseline.figures)
    slower["step_time_s"] *= 1.03
    other = dataclasses.replace(baseline, figures=slower)
    assert not compare(baseline, other).equal
    assert not compare(baseline, other, 0.02).equal
    assert compare(baseline, other, 0.04).equal
    assert compare(baseline, other, {"step_time": 0.04}).equal
    assert "+3.0 %" in compare(baseline, other).message()
    assert "-2.9 %" in compare(other, baseline).message()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({"step": 0.1}, "did you mean 'step_time'"), ({"memory": -1}, ">= 0"), ("x", ">= 0")],
)
def test_wrong_tolerances_are_input_errors(given: Any, wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        tolerances(given)


@pytest.mark.parametrize("text", ["", "[]", "format: 99", "format: 1", "format: 1\nsummary: 3"])
def test_a_broken_baseline_is_an_input_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        Baseline.read(path)
