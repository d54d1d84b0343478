"""The planner: bounds that never exclude the best, and the best of small spaces."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from simulator.errors import InputError
from simulator.experiment import Experiment, parse_experiment
from simulator.model.lookup import resolve_model
from simulator.schedules import build
from simulator.schedules.memory import peak_in_flight
from simulator.simulation import plan_memory, resolve, run
from simulator.studies.lower_bounds import _canonical, _in_flight, program_bound
from simulator.studies.plan_space import Choice, PlanSpace, enumerate_choices
from simulator.studies.planner import (
    DOES_NOT_FIT,
    SELECTS_NOTHING,
    _Base,
    _bound_chunk,
    _programs_key,
    plan,
)
from simulator.studies.sweep import shared_cluster

DENSE: dict[str, Any] = {
    "model": {"family": "llama", "name": "small", "layers": 4, "hidden": 1024, "heads": 16,
              "kv_heads": 8, "ffn": 4096, "vocab": 32000, "max_seq": 2048},
    "cluster": {"topology": "dgx-a100", "nodes": 2},
    "training": {"global_batch_size": 16},
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE,
    "model": "mixtral-8x7b",
    "cluster": {"topology": "dgx-h100", "nodes": 2},
}
EVERY = {"schedule": ["1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "looped-bfs"],
         "micro_batch_size": [1, 2]}  # fmt: skip


def choices_of(base: Experiment, space: dict[str, Any] | None = None) -> list[Choice]:
    model = resolve_model(base.model, place="model")
    count = len(shared_cluster(base))
    return enumerate_choices(base, model, count, PlanSpace.from_mapping(space or {})).choices


def some(base: Experiment, count: int, seed: int, space: dict[str, Any]) -> list[Choice]:
    return random.Random(seed).sample(choices_of(base, space), count)


@pytest.mark.parametrize(
    ("mapping", "count"),
    [
        (DENSE, 24),
        (MOE, 6),
        ({**DENSE, "parallel": {"overlap": {"grad_reduce": False, "p2p": False}}}, 6),
        ({**DENSE, "cluster": {"topology": "dgx1-v100", "nodes": 2},
          "training": {"global_batch_size": 16, "precision": "fp16"}}, 6),
        ({**DENSE, "parallel": {"vocabulary_parallel": True}}, 8),
        ({**DENSE, "training": {"global_batch_size": 16, "activation_offload": True}}, 8),
        ({**DENSE, "framework": "torchtitan"}, 6),
        ({**MOE, "framework": "torchtitan"}, 4),
        ({**DENSE, "framework": "deepspeed", "parallel": {"overlap": {"param_gather": False}}}, 6),
        ({**DENSE, "cluster": {"topology": "dgx-a100", "nodes": 2,
                               "faults": [{"gpu": 3, "slowdown": 1.5}]}}, 4),
    ],
)  # fmt: skip
def test_bounds_are_below_what_is_simulated(mapping: dict[str, Any], count: int) -> None:
    """Time, energy, memory; passes alone <= programs without contention <= simulated."""
    base = parse_experiment(mapping)
    cluster = shared_cluster(base)
    checked = 0
    for choice in some(base, count, 1, {**EVERY, "recompute": ["none", "full"]}):
        try:
            resolved, _ = resolve(choice.experiment(base), cluster=cluster)
        except InputError:
            continue
        result = run(choice.experiment(base), cluster=cluster)
        bound = program_bound(result.timeline.quotient)
        label = f"{choice.label()} {choice.schedule}"
        step = result.summary.step_time_s
        assert bound.seconds <= step * (1 + 1e-9), label
        ((seconds, reason),) = _bound_chunk((base, "time", [0], [choice]))
        if reason == SELECTS_NOTHING:
            without = choice.experiment(base).replace(**{"training.recompute": "none"})
            assert run(without, cluster=cluster).summary.step_time_s == pytest.approx(step)
            continue
        if reason == DOES_NOT_FIT:
            assert not plan_memory(resolved).fits, label
            continue
        assert reason is None, label
        assert seconds <= step * (1 + 1e-9), label
        ((joules, _),) = _bound_chunk((base, "energy", [0], [choice]))
        assert joules <= result.summary.energy_j_per_step * (1 + 1e-9), label
        checked += 1
    assert checked >= count // 4


def test_the_bound_of_passes_is_the_ideal_time_of_1f1b() -> None:
    """(m + p - 1)(F + B) for equal stages, and (m + (p - 1)/v)(F + B) interleaved."""
    from simulator.studies.lower_bounds import StageCosts, pass_bound

    def stages(pipeline: int, virtual: int) -> StageCosts:
        count = pipeline * virtual
        each = np.full(count, 1.0 / virtual)
        zero = np.zeros(pipeline)
        return StageCosts(np.arange(count) % pipeline, count, False, each, each, each, 0.0,
                          zero, zero, zero, zero, 0.0, zero, each, each, each)  # fmt: skip

    assert pass_bound(stages(4, 1), 4, 8) == pytest.approx(3 * (8 + 3))
    assert pass_bound(stages(4, 2), 4, 8) == pytest.approx(3 * (8 + 3 / 2))


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("pipeline", [2, 4])
def test_activations_in_flight_are_at_least_the_bound(name: str, pipeline: int) -> None:
    for microbatches in (pipeline, 2 * pipeline, 4 * pipeline):
        virtual = 2 if name == "interleaved-1f1b" else 1
        peaks = peak_in_flight(build(name, pipeline, microbatches, virtual))
        assert (_in_flight(name, pipeline, virtual, microbatches) <= np.array(peaks)).all()


SMALL = {"tensor": [1, 2, 4], "context": [1], "pipeline": [1, 2, 4], "micro_batch_size": [1, 2],
         "sharding": ["none", "zero1"], "recompute": ["none", "full"]}  # fmt: skip


@pytest.fixture(scope="module")
def everything() -> Any:
    """Every plan of a small space, simulated."""
    return plan(parse_experiment(DENSE), 8, space=SMALL, top=10_000, jobs=1, exhaustive=True)


@pytest.mark.parametrize(
    ("objective", "figure"),
    [("time", "step_time_s"), ("cost", "cost_usd_per_step"), ("energy", "energy_j_per_step")],
)
def test_the_planner_equals_exhaustive_search(everything: Any, objective: Any, figure: str) -> None:
    fast = plan(
        parse_experiment(DENSE), 8, objective=objective, space=SMALL, top=5, gap=0.0, jobs=1
    )
    expected = sorted(everything.best, key=lambda r: (r.summary[figure], r.choice))[:5]
    assert [ranked.choice for ranked in fast.best] == [ranked.choice for ranked in expected]
    assert [r.objective for r in fast.best] == [r.summary[figure] for r in expected]
    assert fast.valid == everything.valid
    assert fast.simulated < everything.simulated / 2
    assert fast.simulated + sum(fast.dropped.values()) == fast.valid
    assert everything.simulated + sum(everything.dropped.values()) == everything.valid


def test_a_gap_never_costs_the_best(everything: Any) -> None:
    fast = plan(parse_experiment(DENSE), 8, space=SMALL, top=5, gap=0.9, jobs=1)
    assert fast.best[0] == everything.best[0]
    assert fast.simulated < everything.simulated / 3


def test_processes_change_nothing() -> None:
    base = parse_experiment(DENSE)
    space = {"tensor": [2, 4], "context": [1], "recompute": "none", "sharding": "zero1"}
    one = plan(base, 8, space=space, top=3, gap=0.0, jobs=1)
    two = plan(base, 8, space=space, top=3, gap=0.0, jobs=2)
    assert one.best == two.best


def test_plans_that_do_not_fit_are_not_proposed() -> None:
    """Llama-2 70B on eight 80 GB accelerators needs sharding of some kind."""
    base = parse_experiment(
        {"model": "llama2-70b", "cluster": {"topology": "dgx-a100", "nodes": 4},
         "training": {"global_batch_size": 32}}
    )  # fmt: skip
    space = {"tensor": [8], "context": [1], "schedule": "1f1b", "micro_batch_size": [1]}
    result = plan(base, 32, space=space, top=3, jobs=1)
    assert result.dropped[DOES_NOT_FIT] > 0
    for index, ranked in enumerate(result.best):
        summary = run(result.experiment(base, index)).summary
        assert summary.fits
        assert summary.step_time_s == ranked.objective
        assert ranked.choice.sharding != "none" or ranked.choice.pipeline > 1
        assert ranked.limited_by
        assert all(0 < share < 1 for _, share in ranked.limited_by)


def test_every_enumerated_plan_can_be_resolved() -> None:
    for mapping in (DENSE, MOE):
        base = parse_experiment(mapping)
        cluster = shared_cluster(base)
        for choice in some(base, 60, 3, EVERY):
            resolve(choice.experiment(base), cluster=cluster)


def test_groups_that_lie_alike_have_the_same_pattern() -> None:
    labels = np.array([[5, 5, 7, 5], [2, 2, 9, 2], [2, 9, 2, 2]])
    patterns = _canonical(labels)
    assert (patterns[0] == patterns[1]).all()
    assert not (patterns[0] == patterns[2]).all()


def test_plans_that_are_simulated_once_have_the_same_step() -> None:
    """ZeRO-2 keeps gradients elsewhere than ZeRO-1, but sends the same; not so with FSDP."""
    for framework, same in (("megatron-lm", True), ("torchtitan", False)):
        base = parse_experiment({**DENSE, "framework": framework})
        cluster = shared_cluster(base)
        space = {"tensor": 2, "context": 1, "sharding": ["zero1", "zero2"], "recompute": "none"}
        pairs: dict[Choice, list[Any]] = {}
        for choice in choices_of(base, space)[:12]:
            summary = run(choice.experiment(base), cluster=cluster).summary
            pairs.setdefault(_programs_key(choice, not same), []).append(summary)
        for alike in pairs.values():
            assert len(alike) == (2 if same else 1)
            assert len({summary.step_time_s for summary in alike}) == 1
        if same:
            assert any(a.peak_memory_bytes > b.peak_memory_bytes for a, b in pairs.values())


def test_a_base_is_a_key() -> None:
    a, b = (
        parse_experiment(DENSE),
        parse_experiment({**DENSE, "training": {"global_batch_size": 32}}),
    )
    assert _Base.of(a) == _Base.of(parse_experiment(DENSE))
    assert _Base.of(a) != _Base.of(b)


@pytest.mark.parametrize(
    ("change", "options", "wanted"),
    [
        ({"training": {}}, {}, "global_batch_size"),
        ({}, {"objective": "tim"}, "did you mean 'time'"),
        ({}, {"space": {"tensr": [1]}}, "did you mean 'tensor'"),
        ({}, {"space": {"tensor": [0]}}, "positive integers"),
        ({}, {"space": {"schedule": ["1f2b"]}}, "unknown schedule"),
        ({}, {"space": {"sharding": ["zero9"]}}, "unknown sharding"),
        ({}, {"space": {"tensor": [3]}}, "no plan is valid"),
        ({}, {"gap": 1.0}, "share"),
    ],
)
def test_mistakes_are_input_errors(
    change: dict[str, Any], options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(InputError) as error:
        plan(parse_experiment({**DENSE, **change}), 8, jobs=1, **options)
    assert wanted in str(error.value)


def test_the_command_prints_plans_and_reasons(tmp_path: Any) -> None:
    import yaml

    from simulator.cli.plan import command

    file, best = tmp_path / "base.yaml", tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(DENSE))
    options = [str(file), "-n", "8", "--space", "tensor=[2,4]", "--space", "context=1",
               "--space", "sharding=zero1", "--top", "2", "-j", "1"]  # fmt: skip
    shown = CliRunner().invoke(command, [*options, "--out", str(best)])
    assert shown.exit_code == 0, shown.output + repr(shown.exception)
    assert "Best plans on 8 accelerators by time" in shown.output
    assert "dropped: cannot beat the plans shown" in shown.output
    printed = CliRunner().invoke(command, [*options, "--json"])
    document = json.loads(printed.output)
    assert len(document["best"]) == 2
    assert document["valid"] == document["simulated"] + sum(document["dropped"].values())
    assert run(best).summary.step_time_s == document["best"][0]["objective"]
