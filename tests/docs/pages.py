"""Reads the Markdown of the documentation and runs what it shows.

A page's fenced blocks run in order, in one folder and one Python namespace:

* `sh`, `bash`, `console`: every command (in `console` after `$ `, the other lines are its output).
  `simulator …` runs in this process, `python …` and `pytest FILE` in
  a new one (not `benchmarks/`, which take minutes); `… > FILE` is understood, pipes are not.
* `python`: executed.
* a block whose first line is a comment with a file name (`# mine.yaml`), or that follows
  `<!-- file: NAME -->`: becomes that file; if the repository has a file of that name, the two must
  say the same.
* `text` right after a block that ran: its output. `...` stands for any lines, `…` at the end of a
  line for its rest, and numbers may differ by 30 %: what the simulator predicts changes with its
  constants.
* any other `yaml`: must parse, and be a valid experiment if it has a model and a cluster.

`<!-- no-test: reason -->` before a block says why it is not run, `<!-- fails: reason -->` that its
command ends with an error for the user, which is its output.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("torch", "jax", "keras", "distributed", "google", "hta", "perfetto")
#: Commands that set up or run everything, or need what a test machine has not.
NOT_RUN = {
    "python3 -m venv": "sets up an environment",
    ".venv/bin/pip install": "sets up an environment",
    "pip install": "sets up an environment",
    ".venv/bin/pytest": "runs all tests, this one among them",
    "mkdocs": "serves or builds the site",
}

_FENCE = re.compile(r"^(`{3,})(\w*)[^`]*$")
_FILE_COMMENT = re.compile(r"^# ([\w./-]+\.(?:yaml|yml|json|csv|py|graphml|txt))$")
_DIRECTIVE = re.compile(r"^<!-- (no-test|file|fails): *(.+?) *-->$")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_TOLERANCE = 0.3


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    no_test: str | None = None
    file: str | None = None
    fails: bool = False

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, first to last."""
    found: list[Block] = []
    directives: dict[str, str] = {}
    fence: str | None = None
    language, start = "", 0
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if fence is not None:
            if line.strip() == fence:
                text = "\n".join(body) + "\n"
                first = _FILE_COMMENT.match(body[0]) if body else None
                name = directives.get("file") or (first.group(1) if first else None)
                found.append(
                    Block(
                        page,
                        start,
                        language,
                        text,
                        no_test=directives.get("no-test"),
                        file=name,
                        fails="fails" in directives,
                    )
                )
                fence, directives = None, {}
            else:
                body.append(line)
            continue
        opening = _FENCE.match(line.strip())
        directive = _DIRECTIVE.match(line.strip())
        if opening:
            fence, language, start, body = opening.group(1), opening.group(2), number + 1, []
        elif directive:
            directives[directive.group(1)] = directive.group(2)
        elif line.strip():
            directives = {}
    assert fence is None, f"{page}: a block is not closed"
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments dropped, `&&` parted."""
    joined = text.replace("\\\n", " ")
    parted: list[str] = []
    for line in joined.splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True, posix=False):
            if word == "&&":
                parted.append(" ".join(words))
                words = []
            else:
                words.append(word)
        if words:
            parted.append(" ".join(words))
    return parted


class Page:
    """Runs a page's blocks; the current folder is that of the page."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.output: str | None = None

    def run(self, block: Block) -> None:
        """Run one block, or check it."""
        previous, self.output = self.output, None
        if block.no_test:
            return
        if block.file is not None:
            self._write(block)
        elif block.language == "console":
            self._session(block)
        elif block.language in ("sh", "bash"):
            self.output = "".join(run_command(command, block) for command in commands(block.text))
        elif block.language == "python":
            self.output = self._execute(block)
        elif block.language == "text" and previous is not None:
            check_output(block, previous)
        elif block.language == "yaml":
            _check_yaml(block)

    def run_all(self, page: list[Block]) -> None:
        """Run a page, with all files that it shows there from the start."""
        for block in page:
            if block.file is not None and not block.no_test:
                self._write(block)
        for block in page:
            self.run(block)

    @staticmethod
    def _session(block: Block) -> None:
        parts = re.split(r"^\$ ", block.text, flags=re.M)
        assert not parts[0].strip(), f"{block}: output before the first command"
        for part in parts[1:]:
            command, _, shown = re.sub(r"\\\n", " ", part).partition("\n")
            output = "".join(run_command(each, block) for each in commands(command))
            if shown.strip():
                check_output(replace(block, text=shown), output)

    def _execute(self, block: Block) -> str | None:
        # the block's own line numbers, so that a traceback points into the page
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, self.namespace)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] in OPTIONAL:
                return None  # an optional extra that is not installed
            raise
        return printed.getvalue()

    def _write(self, block: Block) -> None:
        assert block.file is not None
        path = Path(block.file)
        assert not path.is_absolute()
        assert ".." not in path.parts
        original = ROOT / path
        if original.exists() and path.parts[0] in ("experiments", "topologies"):
            same = yaml.safe_load(original.read_text(encoding="utf-8"))
            shown = yaml.safe_load(block.text)
            same.pop("name", None)
            shown.pop("name", None)
            assert shown == same, f"{block}: differs from {block.file}"
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if block.language == "yaml":
            _check_yaml(block)


def _check_yaml(block: Block) -> None:
    from simulator.experiment import parse_experiment

    for value in yaml.safe_load_all(block.text):
        if isinstance(value, dict) and {"model", "cluster"} <= set(value):
            value = {key: inner for key, inner in value.items() if key not in _SWEEP_KEYS}
            parse_experiment(value, place=str(block))


#: Keys that only a sweep file has.
_SWEEP_KEYS = ("sweep", "filter", "filters")


def run_command(command: str, block: Block) -> str:
    """Run one command; its standard output. Fails the test if it fails."""
    for start in NOT_RUN:
        if command == start or command.startswith(f"{start} "):
            return ""
    words = shlex.split(command)
    target: str | None = None
    if ">" in words:
        position = words.index(">")
        words, target = words[:position], words[position + 1]
    program = words[0].removeprefix(".venv/bin/")
    if program == "simulator":
        output = _simulator(words[1:], command, block)
    elif program == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).exists(), f"{block}: {command}"
        return ""  # takes minutes; says how long
    elif program in ("python", "pytest"):
        module = ["-m", "pytest", "-p", "no:cacheprovider"] if program == "pytest" else []
        done = subprocess.run(
            [sys.executable, *module, *words[1:]],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{block}: {command}\n{done.stdout}{done.stderr}"
        output = done.stdout
    else:
        pytest.fail(
            f"{block}: don't know how to run {command!r}; mark the block with "
            "<!-- no-test: reason -->"
        )
    if target is not None:
        Path(target).write_text(output, encoding="utf-8")
        return ""
    return output


def _simulator(arguments: list[str], command: str, block: Block) -> str:
    from click.testing import CliRunner

    from simulator.cli import group
    from simulator.errors import InputError

    result = CliRunner().invoke(group, arguments, standalone_mode=False)
    if block.fails:
        assert isinstance(result.exception, InputError), f"{block}: {command} is no error"
        return "".join(f"error: {line}\n" for line in str(result.exception).splitlines())
    if result.exception is not None:
        raise AssertionError(f"{block}: {command}\n{result.output}") from result.exception
    assert result.exit_code == 0, f"{block}: {command}\n{result.output}"
    return result.stdout


def check_output(block: Block, output: str) -> None:
    """Hold the lines of a `text` block against what was printed."""
    printed = [line for line in map(_words, output.splitlines()) if line[0] or line[1]]
    position, anywhere = 0, False
    for line in block.text.splitlines():
        if line.strip() == "...":
            anywhere = True
            continue
        wanted = _words(line)
        if not (wanted[0] or wanted[1]):
            continue
        rest = printed[position:] if anywhere else printed[position : position + 1]
        match = next((i for i, got in enumerate(rest) if _alike(wanted, got)), None)
        assert match is not None, f"{block}: no line like\n{line}\nin\n{output}"
        position, anywhere = position + match + 1, False
    assert anywhere or position == len(printed), f"{block}: more lines were printed\n{output}"


def _words(line: str) -> tuple[str, list[float]]:
    """What a line says without spaces, rules and bars, and its numbers."""
    plain = re.sub(r"[^\x21-\x7e–µ…]", " ", line)
    numbers = [float(text.replace(",", "")) for text in _NUMBER.findall(plain)]
    return " ".join(_NUMBER.sub("#", plain).split()), numbers


def _alike(wanted: tuple[str, list[float]], got: tuple[str, list[float]]) -> bool:
    words, numbers = wanted
    if words.endswith("…"):
        words = words.removesuffix("…").rstrip()
        got = (got[0][: len(words)], got[1][: len(numbers)])
        wanted = (words, numbers)
    return wanted[0] == got[0] and all(
        abs(a - b) <= _TOLERANCE * max(abs(a), abs(b))
        for a, b in zip(wanted[1], got[1], strict=True)
    )
