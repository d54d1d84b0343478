"""Every number of docs/schedules.md is what its command prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulator.cli.schedule import command
from simulator.errors import InputError
from simulator.schedules import names
from simulator.schedules.files import schedule_from_texts

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]


def between(mark: str) -> str:
    match = re.search(rf"<!-- {mark} -->(.*?)<!-- end -->", TEXT, re.S)
    assert match, mark
    return match[1].strip()


def printed(line: str) -> str:
    arguments = shlex.split(line)
    assert arguments[:2] == ["simulator", "schedule"]
    answer = CliRunner().invoke(command, arguments[2:], catch_exceptions=False)
    assert answer.exit_code == 0
    return answer.output


@pytest.mark.parametrize("number", [1, 2])
def test_tables(number: int) -> None:
    lines = [line for line in COMMANDS if line.endswith("--markdown")]
    done = subprocess.run(
        [sys.executable, *shlex.split(lines[number - 1])[1:]],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == between(f"table {number}")


def test_numbers_in_the_text() -> None:
    line = next(c for c in COMMANDS if c.startswith("simulator schedule zb-2p"))
    assert between("zb-2p") in printed(line)
    line = next(c for c in COMMANDS if "--recompute" in c)
    first = next(row for row in printed(line).splitlines() if re.match(r" +0 ", row))
    assert between("recompute") in first.split()


def test_every_schedule_is_in_the_table_of_uses() -> None:
    described = re.findall(r"^\| (`[^|]+) \|", TEXT, re.M)
    mentioned = {name for row in described for name in re.findall(r"`([^`]+)`", row)}
    assert mentioned == set(names())


def test_the_commands_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        if line.startswith("simulator schedule") and "--actions" not in line:
            printed(re.sub(r"--plot \S+", "--plot small.html", line))


def test_the_deadlock_message() -> None:
    with pytest.raises(InputError) as caught:
        schedule_from_texts([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]])
    assert f"mine.csv: {caught.value}" in TEXT


def test_the_python_examples_run(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 2
    exec(compile(blocks[0], "docs/schedules.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1].startswith("[4, 4, 4, 4] 0.0 ")
