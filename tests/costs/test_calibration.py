"""calibrate: fits recover known constants, measurements run, files load again."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from simulator.catalog.accelerators import accelerator, accelerator_from_file
from simulator.cli.calibrate import command
from simulator.costs.gemm import gemm_body_seconds, gemm_rates
from simulator.costs.kernels import kernel_cost
from simulator.errors import InputError
from simulator.model.operations import Gemm, MemoryBound
from simulator.studies.calibration import (
    Measurements,
    _with,
    accelerator_file,
    calibrate,
    cpu_note,
    fit_gemm,
    fit_stream,
    measure_machine,
    write_accelerator,
)


def synthetic(constants, rows=300, base="H100", noise=0.03):
    """GEMM rows that an H100 with other constants would give, with measurement noise."""
    rng = np.random.default_rng(3)
    m, n, k = (2.0 ** rng.uniform(low, 14, rows) // 1 for low in (5, 7, 7))
    rates = gemm_rates(_with(accelerator(base), constants), "bf16")
    seconds = rates.latency + gemm_body_seconds(m, n, k, rates)
    return pd.DataFrame(
        {
            "m": m,
            "n": n,
            "k": k,
            "latency_us": seconds * 1e6 * np.exp(noise * rng.normal(size=rows)),
        }
    )


def test_fit_recovers_the_constants_of_synthetic_measurements():
    truth = {"gemm_efficiency": 0.70, "gemm_bandwidth_fraction": 0.70, "gemm_latency_s": 3.5e-6}
    fit = fit_gemm(synthetic(truth), accelerator("H100"), "bf16")
    for name, value in truth.items():
        assert fit.constants[name] == pytest.approx(value, rel=0.06), name
    assert fit.residuals["held_out"]["median_abs_error"] < 0.04
    assert fit.residuals["held_out"]["rows"] > 50


def test_few_rows_move_few_constants():
    fit = fit_gemm(synthetic({"gemm_efficiency": 0.6}, rows=30), accelerator("H100"), "bf16")
    assert set(fit.constants) == {
        "gemm_efficiency", "gemm_bandwidth_fraction", "gemm_latency_s"
    }  # fmt: skip
    assert fit.constants["gemm_efficiency"] == pytest.approx(0.6, rel=0.1)


def test_stream_fit_is_exact_on_exact_data():
    item = accelerator("A100")
    truth = _with(item, {"stream_fraction": 0.8, "launch_latency_s": 3e-6})
    sizes = [2e8, 4e8, 1e9, 4e9]
    rows = pd.DataFrame(
        [("add", s, kernel_cost(MemoryBound("c", "elementwise", s, 0), truth).duration * 1e6)
         for s in sizes], columns=["op", "bytes", "latency_us"],
    )  # fmt: skip
    fit = fit_stream(rows, item)
    assert fit.constants["stream_fraction"] == pytest.approx(0.8, rel=1e-3)
    assert fit.constants["launch_latency_s"] == pytest.approx(3e-6, rel=1e-2)
    with pytest.raises(InputError, match="streaming"):
        fit_stream(rows.assign(op="softmax"), item)


def test_calibrating_a_known_device_keeps_its_datasheet(tmp_path):
    frame = synthetic({"gemm_efficiency": 0.7}, rows=24).assign(dtype="bf16")
    stream = pd.DataFrame({"op": ["copy"], "bytes": [8e9], "latency_us": [8e9 / 2.9e12 * 1e6]})
    sustained = pd.DataFrame({"m": [8192], "n": [8192], "k": [8192], "dtype": ["bf16"],
                              "latency_us": [2500.0]})  # fmt: skip
    measured = Measurements("NVIDIA H100 80GB HBM3", "test", "test", gemm=frame, stream=stream,
                            sustained=sustained)  # fmt: skip
    mapping = calibrate(measured)
    item = write_accelerator(mapping, tmp_path / "h100.yaml")
    assert item.peak_flops == accelerator("H100").peak_flops
    assert item.constants["gemm_efficiency"] == pytest.approx(0.7, rel=0.1)
    assert 0.3 <= item.constants["gemm_derate"] < 1.2
    # the sustained rate is what the file now predicts for training
    cost = kernel_cost(Gemm("g", 8192, 8192, 8192), item)
    assert cost.duration == pytest.approx(2500e-6, rel=0.02)
    assert accelerator_from_file(tmp_path / "h100.yaml") == item


def test_numpy_fallback_measures_fits_and_writes_a_usable_file(tmp_path):
    path = tmp_path / "cpu.yaml"
    result = CliRunner().invoke(
        command, ["--quick", "--backend", "numpy", "--out", str(path), "--json"]
    )
    assert result.exit_code == 0, result.output
    mapping = json.loads(result.stdout)
    [line] = result.stderr.splitlines()
    assert line.startswith("measured on the CPU (")
    assert line.endswith("), not on a GPU: NumPy was asked for")
    assert yaml.safe_load(path.read_text())["calibration"]["note"] == line
    for key in ("date", "software", "residuals", "device"):
        assert mapping["calibration"][key]
    item = accelerator(str(path))
    op = Gemm("g", 1024, 1024, 1024, precision="fp32")
    cost = kernel_cost(op, item)
    assert op.flops / item.peak("fp32") <= cost.duration < 100 * op.flops / item.peak("fp32")
    assert "NumPy" in mapping["calibration"]["software"]


@pytest.mark.parametrize(
    "gpu, why", [(None, "PyTorch is not installed"), (False, "PyTorch finds no GPU"), (True, None)]
)
def test_a_measured_cpu_is_said_to_be_none_of_the_gpus(monkeypatch, gpu, why):
    cuda = SimpleNamespace(is_available=lambda: gpu)
    torch = None if gpu is None else SimpleNamespace(cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)  # None: as if not installed
    note = cpu_note()
    assert note.endswith(f"not on a GPU: {why}") if why else note == ""


def test_missing_torch_is_an_input_error():
    try:
        import torch  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="PyTorch"):
            measure_machine(quick=True, backend="torch")
    with pytest.raises(InputError, match="auto, torch or numpy"):
        measure_machine(quick=True, backend="abacus")


def test_fitting_files(tmp_path):
    path = tmp_path / "gemm_bf16_h100_sxm.csv"
    synthetic({"gemm_efficiency": 0.7}).to_csv(path, index=False)
    out = tmp_path / "fitted.yaml"
    runner = CliRunner()
    result = runner.invoke(
        command, ["--fit", str(path), "--accelerator", "h100", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert accelerator(str(out)).constants["gemm_efficiency"] == pytest.approx(0.7, rel=0.06)
    result = runner.invoke(command, ["--fit", str(path)])
    assert isinstance(result.exception, InputError)
    (tmp_path / "train.csv").write_text("m,n,k,pass,latency_us\n" + "1,2,3,fwd,4\n" * 9)
    result = runner.invoke(command, ["--fit", str(tmp_path / "train.csv"), "--accelerator", "h100"])
    assert isinstance(result.exception, InputError)


def test_nothing_half_written(tmp_path):
    mapping = accelerator_file({"base": "H100"}, [], "x", extra={})
    with pytest.raises(InputError, match="cannot write"):
        write_accelerator(mapping, tmp_path / "no" / "such" / "folder.yaml")
    with pytest.raises(InputError):
        write_accelerator({**mapping, "base": "nothing"}, tmp_path / "x.yaml")
    assert list(tmp_path.iterdir()) == []
