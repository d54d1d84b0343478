"""validate-kernels: agreement with measured samples, forms of files, malformed input."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from simulator.cli.validate_kernels import command
from simulator.errors import InputError
from simulator.studies.kernel_validation import shipped_files, summarise, validate_file


@pytest.fixture(scope="module")
def groups():
    files = [path for path in shipped_files() if "collectives" not in path.name]
    return summarise([validate_file(path) for path in files])["groups"]


# The goals for data that no fit has seen: medians and 90th percentiles of the absolute error. The
# shipped samples of GEMM and forward attention are from shape families that no fit has seen.
GOALS = [
    ("gemm bf16 A100-80GB-SXM >=50us", 0.06, 0.15),
    ("gemm bf16 H100-80GB-SXM >=50us", 0.06, 0.15),
    ("gemm bf16 B200 >=50us", 0.06, 0.15),
    ("gemm fp8 H100-80GB-SXM >=50us", 0.20, None),
    ("attention fwd A100-80GB-SXM flash_attention S>=2048", 0.06, 0.15),
    ("attention fwd A100-80GB-SXM vllm_flash_attn S>=2048", 0.06, 0.15),
    ("attention fwd H100-80GB-SXM fa3 S>=2048", 0.06, 0.15),
    ("attention fwd H100-80GB-SXM vllm_flash_attn_fa3 S>=2048", 0.06, 0.15),
    # another laboratory and a training framework, on another board (A100-PCIe, 300 W)
    ("train_gemm bf16 A100-80GB-PCIe", 0.05, 0.20),
    ("train_attention fwd A100-80GB-PCIe", 0.08, 0.20),
    ("train_attention bwd A100-80GB-PCIe", 0.08, 0.20),
    ("train_grouped_gemm bf16 A100-80GB-PCIe", 0.08, 0.20),
    # kernels alone, by their vendor, forward and backward
    ("attention fwd bf16 H200 cudnn S>=2048", 0.06, 0.15),
    ("attention bwd bf16 H200 cudnn S>=2048", 0.06, 0.15),
    ("attention fwd bf16 GB200 cudnn S>=2048", 0.06, 0.15),
    ("attention bwd bf16 GB200 cudnn S>=2048", 0.06, 0.15),
    ("attention fwd bf16 GB300 cudnn S>=2048", 0.08, 0.20),
    ("attention bwd bf16 GB300 cudnn S>=2048", 0.08, 0.20),
    ("attention bwd bf16 A100-80GB-PCIe flash2", 0.06, 0.15),
    ("elementwise add A100-80GB-SXM >=10us", 0.08, 0.20),
    ("vector A100-40GB-PCIe", 0.05, 0.20),
]


@pytest.mark.parametrize("name, median, p90", GOALS)
def test_agrees_with_measured_kernels(groups, name, median, p90):
    assert groups[name]["predicted"] == groups[name]["rows"] > 0
    assert groups[name]["median_abs_error"] <= median
    if p90 is not None:
        assert groups[name]["p90_abs_error"] <= p90


def test_samples_are_small_and_say_where_they_come_from():
    files = shipped_files()
    assert len(files) >= 10
    assert sum(path.stat().st_size for path in files) < 1e6
    for path in files:
        assert "# source" in path.read_text(encoding="utf-8")[:3000], path.name


def write(path, text):
    path.write_text(text)
    return str(path)


def test_training_attention_by_kernel_mask_and_window(tmp_path):
    head = "pass,batch,seq_len,heads,kv_heads,qk_dim,v_dim,gpu,dtype,kernel,mask,window,latency_us"
    cases = ("cudnn,causal,", "cudnn,full,", "cudnn,causal,1024", "flash2,causal,")
    shape = "2,8192,64,8,128,128,H200,bf16"
    rows = [f"{step},{shape},{case},1000" for step in ("fwd", "bwd") for case in cases]
    result = validate_file(write(tmp_path / "x.csv", "\n".join([head, *rows])))
    for causal, full, windowed, flash2 in np.reshape(result.predicted_us, (2, 4)):
        assert 1.8 < full / causal < 2.0
        # 1024 of on average 4096 keys, and the blocks that the window cuts
        assert 0.23 < windowed / causal < 0.35
        assert flash2 / causal == pytest.approx(1.75, rel=0.02)
    assert {name for name, _ in zip(result.groups[1], rows, strict=True)} >= {
        "attention bwd bf16 H200 cudnn windowed S>=2048"
    }
    # within a framework: at the settled clock
    plain = "pass,batch,seq_len,heads,kv_heads,qk_dim,v_dim,gpu,dtype,latency_us"
    row = "fwd,2,8192,64,8,128,128,H200,bf16,1000"
    framework = validate_file(write(tmp_path / "y.csv", f"{plain}\n{row}\n"))
    assert framework.predicted_us[0] > result.predicted_us[0]


def test_unknown_masks_are_named(tmp_path):
    head = "pass,batch,seq_len,heads,kv_heads,qk_dim,v_dim,gpu,dtype,kernel,mask,latency_us"
    rows = [f"fwd,2,8192,64,8,128,128,H200,bf16,cudnn,{mask},1000" for mask in ("causall", "full")]
    result = validate_file(write(tmp_path / "x.csv", "\n".join([head, *rows])))
    assert np.isnan(result.predicted_us).tolist() == [True, False]
    assert result.reasons[0].startswith("unknown mask 'causall'; did you mean 'causal'?")
    windows = [
        f"{row},{window}" for row, window in zip([rows[1]] * 3, ("", "-5", "0"), strict=True)
    ]
    result = validate_file(write(tmp_path / "y.csv", "\n".join([f"{head},window", *windows])))
    assert result.reasons[1] == "a window is negative"
    assert result.predicted_us[0] == result.predicted_us[2]
    with pytest.raises(InputError, match="expected a number in row 2, got 'abc'"):
        validate_file(write(tmp_path / "z.csv", "\n".join([f"{head},window", f"{rows[1]},abc"])))


TRAINING = "pass,batch,seq_len,heads,kv_heads,qk_dim,v_dim,gpu,dtype,kernel,latency_us"


def training_rows(*cases):
    return "\n".join([TRAINING, *(f"fwd,2,8192,64,8,128,128,H200,{case},1000" for case in cases)])


@pytest.mark.parametrize(
    "kernel, spellings",
    [
        ("best", ["cudnn", "cuDNN 9.12", "cudnn_flash_te", "fa3", "FlashAttention-3", "te"]),
        ("flash2", ["Flash2", "FlashAttention-2", "flash_attn 2.7.4", "fa2", "flash_attn"]),
        ("triton", ["Triton", "flash_triton"]),
        ("flash1", ["fa1", "flash-attention v1"]),
    ],
)
def test_kernels_are_known_however_they_are_spelt(tmp_path, kernel, spellings):
    rows = training_rows(*(f"bf16,{name}" for name in (kernel, *spellings)))
    result = validate_file(write(tmp_path / "x.csv", rows))
    assert result.predicted_us.tolist() == [result.predicted_us[0]] * (len(spellings) + 1)
    assert np.isfinite(result.predicted_us[0])


def test_blank_cells_are_as_in_a_file_without_the_column(tmp_path):
    rows = training_rows("bf16,cudnn", ",cudnn", "bf16,")
    named, no_precision, no_kernel = validate_file(write(tmp_path / "x.csv", rows)).predicted_us
    assert no_precision == named
    plain = "pass,batch,seq_len,heads,kv_heads,qk_dim,v_dim,latency_us"
    row = "fwd,2,8192,64,8,128,128,1000"
    framework = validate_file(write(tmp_path / "y_h200.csv", f"{plain}\n{row}\n"))
    assert no_kernel == framework.predicted_us[0]


def test_unknown_kernels_and_precisions_leave_the_other_rows_predicted(tmp_path):
    bad = ["bf16,flahs2"] * 1000 + ["bf61,cudnn"]
    rows = training_rows("bf16,cudnn", *bad, "bf16,flash2", "bf16,flahs2", "bf16,flash5")
    source = write(tmp_path / "x.csv", f"# a comment\n{rows}")
    result = validate_file(source)
    predicted = result.predicted_us
    assert np.flatnonzero(~np.isfinite(predicted)).tolist() == [1001]
    # a kernel that nobody knows is the accelerator's best, and the output says so
    assert set(predicted[1:1001]) == {predicted[0]} == {predicted[1003]} != {predicted[1002]}
    summary = summarise([result])
    assert (summary["rows"], summary["predicted"]) == (1005, 1004)
    text = CliRunner().invoke(command, ["--data", source]).output
    lines = [line for line in text.splitlines() if source in line]
    assert len(lines) == 3
    kernel = "unknown attention kernel 'flahs2'; did you mean 'flash2'?"
    precision = "unknown precision 'bf61'; did you mean 'bf16'?"
    assert f"not predicted: {source}: row 1003: {precision}" in lines[0]
    assert f"note: {source}: rows 3-1002, 1005: {kernel}" in lines[1]
    assert lines[1].endswith("; taken as the accelerator's best")
    assert f"note: {source}: row 1006: unknown attention kernel 'flash5'" in lines[2]


def test_rows_of_gemms_of_unknown_precision_are_named(tmp_path):
    rows = "m,n,k,latency_us,dtype\n64,64,64,3,bf61\n64,64,64,3,BF16\n64,64,64,3,\n"
    result = validate_file(write(tmp_path / "gemm_bf16_h100.csv", rows))
    assert result.predicted_us[1] == result.predicted_us[2]
    [(reason, numbers)] = result.unpredicted().items()
    assert numbers == [2]
    assert reason.startswith("unknown precision 'bf61'; did you mean 'bf16'?")


def test_many_scattered_rows_are_one_short_line(tmp_path):
    rows = training_rows(*(f"bf16,{name}" for name in ("flahs2", "cudnn") * 500))
    text = CliRunner().invoke(command, ["--data", write(tmp_path / "x.csv", rows)]).output
    [line] = [line for line in text.splitlines() if line.startswith("note: ")]
    assert "rows 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24 and 488 more: unknown" in line


def test_accelerator_from_name_column_and_option(tmp_path):
    rows = "m,n,k,latency_us\n4096,4096,4096,200\n"
    by_name = validate_file(write(tmp_path / "gemm_bf16_h200_sxm.csv", rows))
    assert "gemm bf16 H200" in by_name.groups[0][0]
    by_column = validate_file(
        write(tmp_path / "x.csv", "m,n,k,latency_us,gpu\n4096,4096,4096,200,NVIDIA L40S\n")
    )
    assert "L40S" in by_column.groups[0][0]
    by_option = validate_file(write(tmp_path / "y.csv", rows), accelerator_name="mi300x")
    assert "MI300X" in by_option.groups[0][0]
    times = [r.predicted_us[0] for r in (by_name, by_column, by_option)]
    assert len(set(times)) == 3
    with pytest.raises(InputError, match="--accelerator"):
        validate_file(write(tmp_path / "z.csv", rows))


def test_precision_from_name_and_column(tmp_path):
    rows = "m,n,k,latency_us\n8192,8192,8192,2000\n"
    times = [
        validate_file(write(tmp_path / f"gemm_{p}_h100.csv", rows)).predicted_us[0]
        for p in ("tf32", "bf16", "fp8")
    ]
    assert times[0] > times[1] > times[2]
    mixed = "m,n,k,latency_us,dtype\n8192,8192,8192,2000,tf32\n8192,8192,8192,2000,bfloat16\n"
    found = validate_file(write(tmp_path / "gemm_h100.csv", mixed)).predicted_us
    assert found.tolist() == pytest.approx(times[:2])


def test_rows_that_cannot_be_predicted_say_why(tmp_path):
    text = ("m,n,k,latency_us,gpu\n512,512,512,9,H100\n512,512,512,9,Cray-1\n"
            "0,512,512,9,H100\n512,,512,9,H100\n512,512,512,,H100\n")  # fmt: skip
    found = validate_file(write(tmp_path / "g.csv", text))
    summary = summarise([found])
    assert (summary["rows"], summary["predicted"]) == (5, 1)
    assert sum(summary["not_predicted"].values()) == 3
    assert any("Cray-1" in reason for reason in summary["not_predicted"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "CSV"),
        ("a,b\n1,2\n", "no known form"),
        ("m,n,k\n1,2,3\n", "latency_us"),
        ("m,n,k,latency_us\n1,2,x,4\n", "row 2"),
        ("m,n,k,latency_us,dtype\n1,2,3,4,bf61\n", None),
        ('m,n,k,latency_us\n1,2,"3,4\n', "CSV"),
        ("m,n,k,latency_us\n", None),
        ("m,n,k,latency_us,other\n64,64,64,3,text\n", None),
        ("m,n,k,latency_us\n1,2,3,4,5,6\n1,2,3,4\n", "more fields"),
        ("\x00\x01\x02", "no known form"),
    ],
)
def test_malformed_files_are_input_errors(tmp_path, content, message):
    path = tmp_path / "gemm_bf16_h100.csv"
    path.write_text(content)
    if message is None:
        # readable after all: every row is predicted or says why not
        found = validate_file(path)
        assert len(found.error) == len(found.frame)
        assert all(np.isfinite(found.predicted_us) | (found.reasons != ""))
    else:
        with pytest.raises(InputError, match=message):
            validate_file(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        validate_file(tmp_path / "none.csv")
    path = tmp_path / "gemm_h100.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="UTF-8"):
        validate_file(path)


def test_command_prints_one_json_object_and_writes_predictions(tmp_path):
    source = write(
        tmp_path / "gemm_bf16_a100_sxm.csv",
        "# kept\nm,n,k,latency_us\n4096,4096,4096,540\n1,2,0,5\n",
    )
    out = tmp_path / "out.csv"
    result = CliRunner().invoke(command, ["--data", source, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert (summary["rows"], summary["predicted"]) == (2, 1)
    # in a pipe, long names of groups are on one line, not cut off
    text = CliRunner().invoke(command, ["--data", source], env={"COLUMNS": "80"}).output
    assert all(group in text for group in summary["groups"])
    assert set(summary) >= {"median_abs_error", "p90_abs_error", "signed_median_error", "groups"}
    assert out.read_text().startswith("# kept\n")
    table = pd.read_csv(out, comment="#")
    assert table["predicted_us"].iloc[0] == pytest.approx(540, rel=0.2)
    assert np.isnan(table["predicted_us"].iloc[1])
    expected = table["predicted_us"].iloc[0] / 540 - 1
    assert summary["signed_median_error"] == pytest.approx(expected, rel=1e-4)


def test_out_needs_one_file(tmp_path):
    result = CliRunner().invoke(command, ["--out", str(tmp_path / "o.csv")])
    assert isinstance(result.exception, InputError)


def test_exchange_kernels_are_recognised_but_not_predicted(tmp_path):
    header = ("node_num,hidden_size,num_token,num_topk,num_experts,dispatch_transmit_us,"
              "combine_transmit_us\n1,7168,1,8,256,37.3,48.4\n")  # fmt: skip
    summary = summarise([validate_file(write(tmp_path / "moe_h100.csv", header))])
    assert (summary["rows"], summary["predicted"], summary["median_abs_error"]) == (1, 0, None)


def test_collectives_are_predicted_by_their_own_model(tmp_path):
    text = ("collective,n_gpus,n_nodes,gpus_per_node,bytes,latency_us,gpu,network,algo\n"
            "all_reduce,8,1,8,1073741824,4000,H100-SXM5,NVLink4+NVSwitch,nccl-default\n"
            "all_reduce,8,1,8,1073741824,4000,Cray-1,NVLink4+NVSwitch,nccl-default\n")  # fmt: skip
    found = validate_file(write(tmp_path / "collectives.csv", text))
    assert found.kind == "collectives"
    assert found.reasons[1]
