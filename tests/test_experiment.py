"""The experiment file: what it accepts, and what it says about what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.errors import InputError
from simulator.experiment import (
    Cluster,
    Experiment,
    Parallel,
    load_experiment,
    parse_experiment,
    to_mapping,
)

MINIMAL = {"model": "gpt2", "cluster": {"topology": "dgx-a100", "nodes": 1}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_dataclasses_are_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: gpt2\ncluster: {topology: dgx-a100, nodes: 1}\nparallel: {tensor: 2}\n",
    )
    assert load_experiment(path) == Experiment(
        model="gpt2",
        cluster=Cluster(topology="dgx-a100", nodes=1),
        parallel=Parallel(tensor=2),
    )


def test_all_errors_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: gpt2\n"
        "cluster:\n"
        "  topolgy: dgx-a100\n"
        "parallel:\n"
        "  sharding: zero4\n"
        "training:\n"
        "  micro_batch_size: 0\n",
    )
    with pytest.raises(InputError) as caught:
        load_experiment(path)
    lines = str(caught.value).splitlines()
    assert any(":3: cluster.topolgy" in line and "'topology'" in line for line in lines)
    assert any(":5: parallel.sharding" in line and "zero3" in line for line in lines)
    assert any(":7: training.micro_batch_size" in line for line in lines)
    assert any("cluster.topology: missing" in line for line in lines)


def test_unknown_names_are_reported_with_unknown_keys(tmp_path: Path) -> None:
    names = (
        "model: llamma3-8b\n"
        "framework: megatronn\n"
        "cluster:\n"
        "  topology: dgx-h1000\n"
        "parallel:\n"
        "  schedule: zb-h11\n"
    )
    found = [
        ":1: model: unknown model 'llamma3-8b'; did you mean",
        ":2: framework: unknown framework 'megatronn'; did you mean",
        ":4: cluster.topology: unknown topology 'dgx-h1000'; did you mean",
    ]
    path = write(tmp_path, f"{names}  tensro: 8\n")
    with pytest.raises(InputError) as caught:
        load_experiment(path, ["training.micro_batch_size=0"])
    lines = str(caught.value).splitlines()
    found.append(":6: parallel.schedule: unknown schedule 'zb-h11'; did you mean")
    assert len(lines) == 6
    assert all(any(f"{path}{text}" in line for line in lines) for text in found)
    # names alone: all that can be looked up before there are sizes
    with pytest.raises(InputError) as caught:
        simulator.run(write(tmp_path, names))
    lines = str(caught.value).splitlines()
    assert all(
        line.startswith(f"{path}{text}") for line, text in zip(lines, found[:3], strict=True)
    )


def test_files_are_no_unknown_names(tmp_path: Path) -> None:
    path = write(tmp_path, "model: own.json\ncluster: {topology: net.gml, nods: 2}\n")
    with pytest.raises(InputError) as caught:
        load_experiment(path)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["cluster.nods"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "model: [",
        "model: gpt2\nmodel: gpt2\ncluster: {topology: a}\n",
        "a: &a [*a]\n",
        "model: !!python/object/apply:os.system [true]\n",
    ],
)
def test_what_is_no_experiment_is_one_clean_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        load_experiment(write(tmp_path, text))


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_experiment(tmp_path / "nothing.yaml")


def test_overrides_are_yaml_values_at_dotted_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "model: gpt2\ncluster: {topology: dgx-a100}\n")
    experiment = load_experiment(path, ["parallel.tensor=4", "training.precision=fp16"])
    assert experiment.parallel.tensor == 4
    assert experiment.training.precision == "fp16"
    with pytest.raises(InputError, match="key=value"):
        load_experiment(path, ["parallel.tensor"])
    with pytest.raises(InputError, match="tensor"):
        load_experiment(path, ["parallel.tensr=4"])


def test_replace_validates() -> None:
    experiment = parse_experiment(MINIMAL)
    assert experiment.replace(**{"parallel.pipeline": 4}).parallel.pipeline == 4
    with pytest.raises(InputError, match=r"parallel\.pipeline"):
        experiment.replace(**{"parallel.pipeline": "four"})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    tensor=st.integers(1, 64),
    pipeline=st.integers(1, 64),
    sharding=st.sampled_from(["none", "zero1", "zero2", "zero3"]),
    precision=st.sampled_from(["fp32", "bf16", "fp8", "nvfp4"]),
    clipping=st.booleans(),
    faults=st.lists(st.fixed_dictionaries({"gpu": st.integers(0, 7)}), max_size=3),
)
def test_mappings_round_trip(
    tensor: int,
    pipeline: int,
    sharding: str,
    precision: str,
    clipping: bool,
    faults: list[dict[str, int]],
) -> None:
    experiment = parse_experiment(
        {
            "model": "gpt2",
            "cluster": {"topology": "dgx-a100", "faults": faults},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sharding": sharding},
            "training": {"precision": precision, "gradient_clipping": clipping},
        }
    )
    assert parse_experiment(to_mapping(experiment)) == experiment
