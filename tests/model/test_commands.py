"""`simulator list` and `simulator show`."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner

from simulator.cli.list import command as list_command
from simulator.cli.show import command as show_command
from simulator.cli.validate import command as validate_command
from simulator.errors import InputError
from simulator.model.library import model, model_names


def output(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(
    "kind", ["models", "accelerators", "topologies", "schedules", "frameworks"]
)
def test_lists(kind: str) -> None:
    rows = json.loads(output(list_command, kind, "--json"))
    assert len({row["name"] for row in rows}) == len(rows) > 3
    text = output(list_command, kind)
    assert rows[0]["name"] in text
    assert rows[-1]["name"] in text


def test_models_are_listed_with_their_counts() -> None:
    rows = {row["name"]: row for row in json.loads(output(list_command, "models", "--json"))}
    assert tuple(rows) == model_names()
    assert rows["llama3-70b"]["parameters"] == 70_553_706_496


@pytest.mark.parametrize(
    "kind, name, key",
    [
        ("model", "DeepSeek-V3", "active_parameters"),
        ("accelerator", "H100-80GB-SXM", "peak_flops"),
        ("schedule", "zb-h1", "reference"),
        ("framework", "megatron-core", "source"),
        ("topology", "dgx-h100", "name"),
    ],
)
def test_shows(kind: str, name: str, key: str) -> None:
    assert key in json.loads(output(show_command, kind, name, "--json"))
    assert key.replace("_", " ") in output(show_command, kind, name)


def test_parts_of_a_model_add_up() -> None:
    for name in ("gpt3-175b", "deepseek-v3", "t5-11b", "vit-b-16", "mlp-small"):
        shown = json.loads(output(show_command, "model", name, "--json"))
        parts = {k: v for k, v in shown["parameters_by_part"].items() if "not counted" not in k}
        assert sum(parts.values()) == shown["parameters"] == model(name).parameters


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (list_command, ["modles"], "did you mean 'models'"),
        (show_command, ["model", "gpt-5"], "unknown model"),
        (show_command, ["modell", "gpt2"], "did you mean 'model'"),
        (show_command, ["schedule", "1f1c"], "did you mean '1f1b'"),
        (show_command, ["model", "missing.json"], "cannot be read"),
    ],
)
def test_unknown_names(command: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("H100-SXM", "accelerator"), ("llama3-8b", "model"), ("zb-h1", "schedule"),
     ("gcp-a3-mega", "topology"), ("torchtitan", "framework")],
)  # fmt: skip
def test_a_name_is_looked_for_in_all_catalogues(name: str, kind: str) -> None:
    shown = json.loads(output(show_command, name, "--json"))
    assert shown.pop("catalogue") == kind
    assert shown == json.loads(output(show_command, kind, name, "--json"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "which model.*simulator list models"),
        ("topologies", "which topology.*simulator list topologies"),
        ("nosuch", "no catalogue has 'nosuch'"),
        ("dgx-h100", "several kinds; say which: accelerator, topology"),
    ],
)
def test_a_name_alone_that_does_not_say_enough(name: str, message: str) -> None:
    result = CliRunner().invoke(show_command, [name])
    assert isinstance(result.exception, InputError)
    assert re.search(message, str(result.exception))


def test_an_unknown_family_of_rows_is_refused() -> None:
    result = CliRunner().invoke(validate_command, ["--family", "mosiac"])
    assert isinstance(result.exception, InputError)
    assert "unknown family 'mosiac'; did you mean 'mosaic'" in str(result.exception)
