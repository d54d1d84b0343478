"""Pipeline layouts in Megatron-Core's notation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.plan.stages import parse_layout
from simulator.simulation import Result, plan_memory, resolve, run

MODEL: dict[str, Any] = {
    "family": "gpt", "layers": 6, "hidden": 512, "heads": 8, "vocab": 32000, "max_seq": 512,
    "mtp_layers": 1,
}  # fmt: skip


def simulate(**parallel: Any) -> Result:
    return run(
        parse_experiment(
            {
                "model": MODEL,
                "cluster": {"topology": "dgx-h100", "nodes": 1},
                "parallel": {"pipeline": 4, **parallel},
                "training": {"micro_batch_size": 1, "global_batch_size": 16},
                "framework": {"base": "megatron-core", "cuda_graphs": True},
            }
        )
    )


def test_layouts_of_megatron_core_read_as_it_reads_them() -> None:
    """Its own examples (tests/unit_tests, pipeline layout)."""
    deepseek = parse_layout("Et*3|(tt|)*29,m|L", 61, 8, 4, mtp_layers=1)
    assert deepseek[0] == ("embedding", 0, 1, 2)
    assert deepseek[1:30] == tuple((3 + 2 * i, 4 + 2 * i) for i in range(29))
    assert deepseek[30:] == (("mtp",), ("head",))
    together = parse_layout("Et*2|(tt|)*29,t|mL", 61, 16, 2, mtp_layers=1)
    assert together[-2:] == ((60,), ("head", "mtp"))
    empty = parse_layout("E|t|t*2|t||(t|)*2,t*2,L", 8, 4, 2)
    assert empty == (("embedding",), (0,), (1, 2), (3,), (), (4,), (5,), (6, 7, "head"))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), st.booleans())
def test_every_layer_is_on_one_stage_in_order(counts: list[int], unrolled: bool) -> None:
    if not counts[0]:
        counts[0] = 1
    parts = ["t" * n if unrolled else f"t*{n}" * (n > 0) for n in counts]
    stages = parse_layout("E" + "|".join(parts) + "L", sum(counts), len(counts))
    assert [len([x for x in stage if isinstance(x, int)]) for stage in stages] == counts
    flat = [layer for stage in stages for layer in stage]
    assert flat == ["embedding", *range(sum(counts)), "head"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et*6|L|", "L last"),
        ("t*6EL", "E first"),
        ("Etx|t|t|t*3mL", "expected E, t, m, L"),
        ("Et|t|t|t*2mL", "has 5 blocks, the model 6"),
        ("Et|t|t|t*3L", "has 0 depths of MTP, the model 1"),
        ("Et|t|t*4mL", "has 3 stages, expected 4 pipeline x 1 virtual"),
        ("E(t*9999)*9999L", "expected E, t, m, L"),
    ],
)  # fmt: skip
def test_what_is_no_layout_of_the_model_is_one_error(text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"parallel\.pipeline_layout") as caught:
        simulate(pipeline_layout=text)
    assert message in str(caught.value)


def test_it_says_what_every_stage_holds() -> None:
    with pytest.raises(InputError, match="expected no `stage_layers` beside it"):
        simulate(pipeline_layout="Et*2|t*2|t|tmL", stage_layers=[2, 2, 1, 1])


def test_the_same_stages_are_the_same_step() -> None:
    given_layout = simulate(pipeline_layout="Et*2|t*2|t|tmL")
    given_counts = simulate(stage_layers=[2, 2, 1, 1])
    assert given_layout.summary.step_time_s == given_counts.summary.step_time_s
    assert given_layout.summary.memory == given_counts.summary.memory


def test_prediction_apart_from_the_loss_keeps_the_work() -> None:
    """Its logits and loss stay with the head's; all operations are there once more or less."""
    apart, together = (
        simulate(pipeline_layout="Et*3|t*3|m|L"),
        simulate(pipeline_layout="Et*3|t*2|t|mL"),
    )
    work = [r.frame().groupby("operation", observed=True)["flops"].sum() for r in (apart, together)]
    heads = [w[[name for name in w.index if ".logits" in name]].sum() for w in work]
    assert heads[0] == pytest.approx(heads[1])
    assert work[0].sum() == pytest.approx(work[1].sum())
    frame = apart.frame()
    stages = frame[frame["operation"].astype(str).str.startswith("mtp.head")]["stage"]
    assert set(stages) == {3}


def test_logits_are_stored_where_they_are_computed() -> None:
    def stored(layout: str) -> list[float]:
        experiment = parse_experiment(
            {
                "model": MODEL,
                "cluster": {"topology": "dgx-h100", "nodes": 1},
                "parallel": {"pipeline": 4, "pipeline_layout": layout},
                "training": {"micro_batch_size": 1, "global_batch_size": 16},
            }
        )
        plan, _ = resolve(experiment)
        return [stage.activations for stage in plan_memory(plan).stages]

    apart, together = stored("Et*3|t*2|tm|L"), stored("Et*3|t*2|t|mL")
    assert apart[2] > together[2]
    assert apart[3] < together[3]
