"""Every command and snippet of docs/importers.md runs."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from .test_cli import cli
from .test_kineto import RANKS, document

TEXT = (Path(__file__).parents[2] / "docs" / "importers.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if line.startswith("simulator ")
]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def folder(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files lie that the text takes for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(data / "dgx_h100_topo.txt", "topo.txt")
    shutil.copy(data / "hgx_a100_nccl.xml", "topo.xml")
    Path("trace.json.gz").write_bytes(gzip.compress(json.dumps(document()).encode()))
    Path("traces").mkdir()
    for rank in range(RANKS):
        Path(f"traces/{rank}.json").write_text(json.dumps(document(rank=rank)))
    Path("mymodel.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)), "
        "torch.zeros(4, 8)\n"
    )
    return tmp_path


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 5
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    words = shlex.split(command)
    if words[2] == "torch":
        pytest.importorskip("torch")
    if words[2] == "chakra":
        pytest.importorskip("google.protobuf")
        assert cli(monkeypatch, "kineto", "traces", "--out", "et") == 0
    assert words[:2] == ["simulator", "import"]
    assert cli(monkeypatch, *words[2:]) == 0
    assert (folder / words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(folder: Path, snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "import torch" in snippet:
        pytest.importorskip("torch")
    if "chakra" in snippet:
        pytest.importorskip("google.protobuf")
    exec(compile(snippet, "docs/importers.md", "exec"), {})
    assert capsys.readouterr().out.strip()
