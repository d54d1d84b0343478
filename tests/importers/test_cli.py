"""`simulator import`: what it writes, the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from simulator.cli import main
from simulator.experiment import load_experiment
from simulator.importers.trace import COLUMNS
from simulator.simulation import run
from simulator.topology import load_cluster

from .test_kineto import RANKS, document


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["simulator", "import", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("topo", "dgx1_v100_topo.txt", ["--accelerator", "V100", "--network", "100 Gb/s"]),
        ("nccl-xml", "hgx_a100_nccl.xml", []),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".graphml"])
def test_clusters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, kind: str, name: str,
    options: list[str], suffix: str,
) -> None:  # fmt: skip
    out = tmp_path / f"cluster{suffix}"
    assert cli(monkeypatch, kind, data / name, *options, "--nodes", 2, "--out", out) == 0
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        yaml.safe_dump(
            {
                "model": {"family": "mlp", "dense_sizes": [64, 64, 64]},
                "cluster": {"topology": out.name},
                "training": {"precision": "fp16"},
            }
        )
    )
    result = run(load_experiment(experiment))
    assert result.summary.accelerators == 16
    if suffix == ".graphml":
        again = tmp_path / "again.graphml"
        assert cli(monkeypatch, "graphml", out, "--out", again) == 0
        assert again.read_bytes() == out.read_bytes()


def test_kineto(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(document()))
    out = tmp_path / "timeline.parquet"
    assert cli(monkeypatch, "kineto", trace, "--out", out) == 0
    assert tuple(pd.read_parquet(out).columns) == COLUMNS
    arguments = ["--replay", "dgx-h100", "--nodes", "2", "--ranks", "16"]
    assert cli(monkeypatch, "kineto", trace, *arguments, "--out", tmp_path / "replayed.csv") == 0
    assert "replayed" in capsys.readouterr().out
    replayed = pd.read_csv(tmp_path / "replayed.csv")
    assert set(COLUMNS) <= set(replayed.columns)


def test_kineto_becomes_chakra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(document()))
    folder = tmp_path / "chakra"
    assert cli(monkeypatch, "kineto", trace, "--ranks", RANKS, "--out", folder) == 0
    assert len(list(folder.glob("*.et"))) == RANKS
    assert cli(monkeypatch, "chakra", folder, "--out", tmp_path / "t.csv") == 0
    assert len(pd.read_csv(tmp_path / "t.csv")) == 5 * RANKS


def test_hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
                "vocab_size": 1000, "max_position_embeddings": 512,
            }
        )
    )  # fmt: skip
    out = tmp_path / "model.yaml"
    assert cli(monkeypatch, "hf", config, "--out", out) == 0
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("model: model.yaml\ncluster: {topology: dgx-h100, nodes: 1}\n")
    assert run(load_experiment(experiment)).plan.model.kv_heads == 2


def test_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\n"
        "def regression():\n"
        "    return torch.nn.Linear(8, 1), torch.zeros(32, 8)\n"
        "def wrong():\n"
        "    return 3\n"
        "def broken():\n"
        "    raise RuntimeError('no weights here')\n"
    )
    out = tmp_path / "model.yaml"
    assert cli(monkeypatch, "torch", f"{source}:regression", "--out", out) == 0
    assert yaml.safe_load(out.read_text())["layers"][0]["parameters"] == 9
    for name in ("wrong", "broken", "absent"):
        assert cli(monkeypatch, "torch", f"{source}:{name}", "--out", tmp_path / "x.yaml") == 2
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["topo", "absent.txt", "--out", "x.yaml"],
        ["nccl-xml", "absent.xml", "--out", "x.yaml"],
        ["kineto", "absent.json", "--out", "x.parquet"],
        ["hf", "absent.json", "--out", "x.yaml"],
        ["torch", "no_such_module:function", "--out", "x.yaml"],
        ["torch", "nonsense", "--out", "x.yaml"],
    ],
)
def test_errors_are_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_on_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "cluster.txt"
    arguments = ["topo", data / "dgx_h100_topo.txt", "--accelerator", "H100"]
    assert cli(monkeypatch, *arguments, "--out", out) == 2
    assert cli(monkeypatch, *arguments, "--nodes", 2, "--out", tmp_path / "c.graphml") == 2
    assert list(tmp_path.iterdir()) == []
    assert load_cluster("dgx-h100", nodes=1) is not None
