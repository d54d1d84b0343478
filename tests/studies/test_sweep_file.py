"""What a sweep varies: keys, ranges, zipped lists, filters, and the errors of a sweep file."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.experiment import load_experiment, parse_experiment
from simulator.studies.expressions import Filter
from simulator.studies.sweep_file import (
    experiment_key,
    load_sweep,
    make_spec,
    parse_overrides,
)

BASE: dict[str, Any] = {
    "model": "gpt3-175b",
    "cluster": {"topology": "dgx-a100", "accelerators": 64},
}


def values(over: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [dict(point.values) for point in make_spec(BASE, over, **more).points()]


def test_axes_multiply_and_the_last_changes_fastest() -> None:
    found = values({"parallel.tensor": [1, 2], "training.micro_batch_size": [1, 4]})
    assert found == [
        {"parallel.tensor": t, "training.micro_batch_size": b} for t in (1, 2) for b in (1, 4)
    ]


def test_ranges_include_both_ends() -> None:
    assert values({"parallel.tensor": {"from": 1, "to": 8, "factor": 2}}) == [
        {"parallel.tensor": n} for n in (1, 2, 4, 8)
    ]
    assert values({"parallel.tensor": {"from": 2, "to": 8, "step": 3}}) == [
        {"parallel.tensor": n} for n in (2, 5, 8)
    ]


def test_ranges_of_quantities_keep_their_unit() -> None:
    found = values({"cluster.network": {"from": "100 Gb/s", "to": "400 Gb/s", "factor": 2}})
    assert [point["cluster.network"] for point in found] == ["100 Gb/s", "200 Gb/s", "400 Gb/s"]


def test_zipped_lists_change_together() -> None:
    found = values(
        {
            "training.precision": ["bf16", "fp16"],
            "zip": {"cluster.accelerators": [8, 16], "training.global_batch_size": [64, 128]},
        }
    )
    assert [tuple(point.values()) for point in found] == [
        ("bf16", 8, 64),
        ("bf16", 16, 128),
        ("fp16", 8, 64),
        ("fp16", 16, 128),
    ]


def test_nested_sections_are_dotted_keys() -> None:
    assert values({"parallel": {"tensor": [1, 2], "overlap": {"tensor": [True]}}}) == [
        {"parallel.tensor": n, "parallel.overlap.tensor": True} for n in (1, 2)
    ]


def test_filters_see_short_names_defaults_and_derived_data() -> None:
    over = {"parallel.tensor": [1, 2, 4, 8, 16], "parallel.pipeline": [1, 2, 4, 8, 16]}
    found = values(over, filters=["tensor * pipeline <= 64", "tensor >= 4 or pipeline == 1"])
    assert found == [
        {"parallel.tensor": t, "parallel.pipeline": p}
        for t in (1, 2, 4, 8, 16)
        for p in (1, 2, 4, 8, 16)
        if t * p <= 64 and (t >= 4 or p == 1)
    ]
    assert len(values(over, filters="data >= 16")) == 6
    assert len(values(over, filters="parallel.context == 1 and virtual_stages == 1")) == 25
    assert len(values(over, filters="not sequence_parallel and precision in ['bf16']")) == 25


def test_equal_experiments_are_one_point() -> None:
    assert len(values({"zip": {"parallel.tensor": [1, 1, 2]}})) == 2


def test_the_key_names_the_experiment_and_the_version() -> None:
    a, b = parse_experiment(BASE), parse_experiment({**BASE, "parallel": {"tensor": 2}})
    named = parse_experiment({**BASE, "name": "other"})
    spelled = parse_experiment({**BASE, "parallel": {"tensor": 1}})
    keys = [experiment_key(a, "1"), experiment_key(b, "1"), experiment_key(a, "2")]
    assert len(set(keys)) == 3
    assert experiment_key(named, "1") == experiment_key(spelled, "1") == keys[0]


def test_the_key_changes_with_the_files_that_an_experiment_names(tmp_path: Any) -> None:
    model = tmp_path / "config.json"
    model.write_text("{}")
    experiment = parse_experiment({**BASE, "model": str(model)})
    before = experiment_key(experiment, "1")
    model.write_text('{"hidden_size": 1}')
    assert experiment_key(experiment, "1") != before


def test_a_file_may_name_its_base_and_files_beside_it(tmp_path: Any) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: config.json\ncluster: {topology: dgx-a100, nodes: 1}\n"
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "sweep.yaml").write_text(
        "base: base.yaml\nsweep: {model: [config.json, other.json]}\n"
    )
    points = load_sweep(tmp_path / "sweep.yaml").points()
    assert [point.experiment.model for point in points] == [
        str(tmp_path / "config.json"),
        str(tmp_path / "other.json"),
    ]
    assert points[0].experiment == load_experiment(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sweep: {parallel.tensr: [1]}", "did you mean 'parallel.tensor'"),
        ("sweep: {tensor: [1]}", "did you mean 'parallel.tensor'"),
        ("sweep: {parallel.tensor: []}", "expected a list or a range"),
        ("sweep: {parallel.tensor: 4}", "expected a list or a range"),
        ("sweep: {parallel.tensor: [1, two]}", "parallel.tensor"),
        ("sweep: {parallel.tensor: {from: 1, to: 8, factr: 2}}", "did you mean 'factor'"),
        ("sweep: {parallel.tensor: {from: 1, to: 8, factor: 1}}", "a factor is > 1"),
        ("sweep: {parallel.tensor: {from: 8, to: 1}}", "from <= to"),
        ("sweep: {cluster.network: {from: 1 Gb/s, to: 2 GB/s}}", "different units"),
        ("sweep: {zip: {parallel.tensor: [1, 2], parallel.pipeline: [1]}}", "equally long"),
        ("sweep: {parallel.tensor: [1], zip: {parallel.tensor: [1]}}", "swept twice"),
        ("sweep: {}", "nothing is swept"),
        ("sweep: [1]", "expected a mapping"),
        ("filters: []\nsweep: {parallel.tensor: [1]}", "did you mean 'filter'"),
        ("filter: tensr < 2\nsweep: {parallel.tensor: [1]}", "did you mean 'tensor'"),
        ("filter: data < 2\nsweep: {parallel.tensor: [1]}", "has no value"),
        ("filter: tensor < 1\nsweep: {parallel.tensor: [1]}", "no point is left"),
        ("allow_oom: 3\nsweep: {parallel.tensor: [1]}", "true or false"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(tmp_path: Any, text: str, wanted: str) -> None:
    path = tmp_path / "sweep.yaml"
    base = "base: {model: gpt3-175b, cluster: {topology: dgx-a100, nodes: 8}}\n"
    path.write_text(base + text)
    with pytest.raises(InputError) as error:
        load_sweep(path).points()
    assert wanted in str(error.value)


def test_all_mistakes_are_reported_at_once() -> None:
    over = {"parallel.tensr": [1], "parallel.pipeline": [], "cluster.nodes": {"from": 2, "to": 1}}
    with pytest.raises(InputError) as error:
        make_spec(BASE, over, filters=["1 +"])
    assert len(str(error.value).splitlines()) == 4


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["a.b=[1, 2]", "c=x"]) == {"a.b": [1, 2], "c": "x"}
    with pytest.raises(InputError, match="key=value"):
        parse_overrides(["a"])


# ------------------------------------------------------------------------------- filters

NUMBERS = {"a": 3, "b": -2, "c": 0.5, "word": "full", "nothing": None, "x.y": 7}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a * b == -6", True),
        ("1 < a < 3", False),
        ("a % 2 == 1 and not b > 0", True),
        ("word == 'full' or 1 / 0 > 1", True),
        ("word in ['none', 'full']", True),
        ("word not in ('none', 'full')", False),
        ("nothing is None", True),
        ("x.y // 2 == 3", True),
        ("max(a, x.y) == 7 and log2(8) == a", True),
        ("(a if b > 0 else b) == -2", True),
        ("2 ** a == 8", True),
    ],
)
def test_filters_compute(text: str, holds: bool) -> None:
    assert Filter.parse(text)(NUMBERS) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "a.__class__.__mro__(1)",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "open('/etc/passwd')",
        "max(*[1, 2])",
        "max(a, key=b)",
        "a[0]",
        "{1: 2}",
        "f'{a}'",
        "(y := 3)",
        "b'x' == a",
        "1j == a",
        "a; b",
        "import os",
        "",
        "(" * 5000,
        "-" * 1999 + "1",
        "a < " + "1" * 3000,
    ],
)
def test_filters_execute_nothing_else(text: str) -> None:
    with pytest.raises(InputError):
        Filter.parse(text)(NUMBERS)


@pytest.mark.parametrize(
    "text",
    ["9 ** 9 ** 9 > 1", "(10 ** 70) ** 3 > 1", "'x' * 10 ** 9 == 'y'", "1 / (a - 3) > 0",
     "nothing > 1", "word + 1 > 2", "log2(-1) > 0", "(-8) ** c > 0", "a in word"],
)  # fmt: skip
def test_filters_refuse_what_is_undefined_or_huge(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError):
        Filter.parse(text)(NUMBERS)
    assert time.monotonic() - began < 1.0


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text(max_size=80) | st.from_regex(r"[ab.()<>=+*/%\d ,\[\]'-]{0,40}", fullmatch=True))
def test_any_text_is_a_condition_or_an_input_error(text: str) -> None:
    try:
        result = Filter.parse(text)(NUMBERS)
    except InputError:
        return
    assert isinstance(result, bool)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 50), st.integers(0, 500), st.integers(1, 60))
def test_a_step_range_is_what_python_ranges_are(start: int, extra: int, step: int) -> None:
    stop = start + extra
    found = values({"parallel.tensor": {"from": start, "to": stop, "step": step}})
    assert [point["parallel.tensor"] for point in found] == list(range(start, stop + 1, step))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 12))
def test_a_factor_range_ends_at_its_end(start: int, factor: int, count: int) -> None:
    stop = start * factor**count
    found = values({"parallel.tensor": {"from": start, "to": stop, "factor": factor}})
    assert [point["parallel.tensor"] for point in found] == [
        start * factor**index for index in range(count + 1)
    ]
    assert math.isclose(found[-1]["parallel.tensor"], stop)
