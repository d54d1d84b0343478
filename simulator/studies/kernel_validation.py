"""Compare the cost model with measured kernels and collectives, file by file.

A file is a CSV with `#` comment lines. What it measures is told by its columns (`KINDS`), the
accelerator by a `gpu` column or the file's name, the precision by a `dtype` column or the name.
Files of micro-benchmarks (`gemm_*`, `attention_*`) are predicted at micro-benchmark level, those
of training frameworks (with a `pass` column) at the sustained level (`gemm_derate`), but passes of
attention that name their kernel are micro-benchmarks.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simulator.catalog.accelerators import Accelerator, accelerator
from simulator.costs.attention import attention_body_seconds, attention_rates, attention_seconds
from simulator.costs.attention_kernels import attention_slowdown
from simulator.costs.collectives import bus_factor
from simulator.costs.collectives_predict import measured_operation
from simulator.costs.gemm import element_bytes, gemm_body_seconds, gemm_rates
from simulator.costs.grouped_gemm import moe_layer_seconds
from simulator.costs.kernels import kernel_cost
from simulator.costs.memory_bound import memory_cost
from simulator.errors import InputError, unknown_name
from simulator.model.operations import BYTES_PER_ELEMENT, Attention, GroupedGemm, Phase

_PASSES = {
    "fwd": Phase.FORWARD,
    "dgrad": Phase.INPUT_GRADIENT,
    "bwd": Phase.INPUT_GRADIENT,
    "wgrad": Phase.WEIGHT_GRADIENT,
}

_MASKS = ("causal", "full")

#: Constants of the attention kernels that serving stacks run, where they differ from training's:
#: their measurements include what the stack adds; `kv_cache_traffic` is how often its copy of the
#: keys and values crosses HBM. "" stands for any other kernel. Fitted on
#: attention_fwd_a100_sxm.csv and attention_fwd_h100_sxm.csv (docs/kernels.md).
SERVING_ATTENTION: dict[str, dict[str, float]] = {
    "": {
        "attention_latency_s": 11.7e-6,
        "attention_bandwidth_fraction": 0.80,
        "attention_exposed": 1.0,
        "kv_cache_traffic": 2.0,
    },
    "flash_attention": {
        "attention_latency_s": 15.4e-6,
        "attention_bandwidth_fraction": 0.85,
        "attention_exposed": 0.71,
        "kv_cache_traffic": 2.43,
    },
    "vllm_flash_attn": {
        "attention_efficiency": 0.812,
        "attention_softmax": 1.173,
        "attention_tail": 0.621,
        "attention_throttle": 0.103,
        "attention_latency_s": 9.7e-6,
        "attention_bandwidth_fraction": 0.678,
        "attention_exposed": 1.0,
        "kv_cache_traffic": 2.19,
    },
    "fa3": {
        "attention_efficiency": 0.98,
        "attention_softmax": 0.921,
        "attention_tail": 0.183,
        "attention_item_s": 0.0,
        "attention_latency_s": 11.7e-6,
        "attention_bandwidth_fraction": 0.797,
        "attention_exposed": 1.0,
        "kv_cache_traffic": 1.31,
    },
    "vllm_flash_attn_fa3": {
        "attention_efficiency": 0.98,
        "attention_item_s": 0.0,
        "attention_softmax": 0.868,
        "attention_tail": 0.235,
        "attention_throttle": 0.011,
        "attention_latency_s": 14.1e-6,
        "attention_bandwidth_fraction": 0.589,
        "attention_exposed": 1.0,
        "kv_cache_traffic": 2.85,
    },
}

#: Kernel class of an `op` of elementwise_*.csv (the kernels of early vLLM) and vector_*.csv.
ELEMENTWISE_CLASS = {
    "add": "elementwise",
    "mlp_act": "activation_narrow",
    "input_layernorm": "norm_narrow",
    "post_attention_layernorm": "norm_narrow",
    "norm": "norm",
    "copy": "copy",
    "cast": "cast",
}
VECTOR_CLASS = {"ln": "layer_norm_fp32", "layernorm": "layer_norm_fp32", "pow": "pow",
                "softmax": "softmax"}  # fmt: skip
#: Files of GEMMs in 8 bits and below include quantising the activations in most stacks: bytes
#: moved per element of A (two passes over 16-bit input, one 8-bit output, partial sectors) and
#: seconds of its launches, fitted on gemm_fp8_h100_sxm.csv.
QUANTISED = frozenset({"fp8", "mxfp8", "nvfp4", "int8"})
_QUANTISATION_BYTES, _QUANTISATION_LATENCY = 7.0, 7.3e-6
#: Eager PyTorch, as vector_*.csv was timed, adds about this much per kernel (that file's note).
_EAGER_LATENCY = 15e-6


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of the rows of one file; NaN where there is none, with the reason."""

    seconds: np.ndarray
    reasons: np.ndarray
    groups: list[np.ndarray]
    """Columns of group names, one per way of grouping; empty text: in no group."""


@dataclass(frozen=True)
class Kind:
    """One form of measured file."""

    name: str
    columns: frozenset[str]
    numeric: tuple[str, ...]
    """Columns that must be positive numbers."""
    predict: Callable[[pd.DataFrame, _Context], Prediction]


@dataclass(frozen=True)
class _Context:
    path: str
    override: Accelerator | None

    def accelerator_of(self, name: object) -> Accelerator:
        if self.override is not None:
            return self.override
        return accelerator(str(name))

    @functools.cached_property
    def from_name(self) -> Accelerator:
        """The accelerator that the file's name mentions; raises `InputError` where none."""
        if self.override is not None:
            return self.override
        words = re.split(r"[_\s.]+", Path(self.path).stem)
        for length in range(len(words), 0, -1):
            for start in range(len(words) - length, -1, -1):
                candidate = "_".join(words[start : start + length])
                try:
                    return accelerator(candidate)
                except InputError:
                    continue
        raise InputError(
            "cannot tell the accelerator: no gpu column, and none in the file's name; "
            "give --accelerator",
            place=self.path,
        )

    def dtype(self, frame: pd.DataFrame) -> np.ndarray:
        """Precision by row: the `dtype` column, or a precision in the file's name, or bf16.

        Words that are no precision are left for `_known`.
        """
        aliases = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "half": "fp16",
                   "fp8_e4m3": "fp8", "e4m3": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4",
                   "fp4": "nvfp4"}  # fmt: skip
        words = re.split(r"[_\s.-]+", Path(self.path).stem.casefold())
        named = (aliases.get(word, word) for word in words)
        default = next((word for word in named if word in BYTES_PER_ELEMENT), "bf16")
        given = [str(word).strip().casefold() for word in _text(frame, "dtype", default)]
        return np.array([aliases.get(word, word) for word in given], dtype=object)


def _by_accelerator(
    frame: pd.DataFrame, context: _Context
) -> list[tuple[Accelerator | None, np.ndarray, str]]:
    """(accelerator, row positions, reason if there is none) of the file's accelerators."""
    if "gpu" not in frame.columns or context.override is not None:
        return [(context.from_name, np.arange(len(frame)), "")]
    result: list[tuple[Accelerator | None, np.ndarray, str]] = []
    names = _text(frame, "gpu")
    for name in sorted(set(names)):
        rows = np.flatnonzero(names == name)
        try:
            result.append((accelerator(name), rows, ""))
        except InputError as error:
            result.append((None, rows, error.problem))
    return result


def _band(latency: np.ndarray, edge: float) -> np.ndarray:
    label = f"{edge:g}"
    return np.where(latency >= edge, f">={label}us", f"<{label}us").astype(object)


def _empty(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n = len(frame)
    blank = np.full(n, "", dtype=object)
    return np.full(n, np.nan), blank.copy(), blank.copy(), blank.copy()


def _text(frame: pd.DataFrame, name: str, default: str = "") -> np.ndarray:
    """A column of words; `default` in its blank cells, and in every row of a file without it."""
    if name not in frame.columns:
        return np.full(len(frame), default, dtype=object)
    words = frame[name].astype(object)
    return words.where(words.notna(), default).map(str).to_numpy(dtype=object)


def _known(reasons: np.ndarray, what: str, words: np.ndarray, choices: Iterable[str]) -> np.ndarray:
    """Whether each row's word is one of `choices`; where not, its reason says so."""
    for word in set(words) - set(choices):
        reasons[words == word] = unknown_name(what, word, choices).problem
    return np.isin(words.astype(str), list(choices))


def _floats(frame: pd.DataFrame, rows: np.ndarray, *names: str) -> list[np.ndarray]:
    return [frame[name].to_numpy(dtype=float)[rows] for name in names]


def _gemm_seconds(
    item: Accelerator, precision: str, m: np.ndarray, n: np.ndarray, k: np.ndarray,
    e_out: np.ndarray, accumulate: np.ndarray, training: bool,
) -> np.ndarray:  # fmt: skip
    pace = 1.0 / item.constants["gemm_derate"] if training else 1.0
    rates = gemm_rates(item, precision, sustained=training, pace=pace)
    chunks = []
    for i in range(0, len(m), 4096):  # bounds the memory of the candidates' axis
        j = slice(i, i + 4096)
        chunks.append(gemm_body_seconds(m[j], n[j], k[j], rates, e_out[j], 1.0, accumulate[j]))
    body = np.concatenate(chunks) if chunks else np.zeros(0)
    return rates.latency + body


def memory_seconds(
    op_class: str, moved: np.ndarray, item: Accelerator, width: float = 2.0
) -> np.ndarray:
    """Seconds of memory-bound kernels that move `moved` bytes each, without launches."""
    costs = [memory_cost(op_class, float(size), item, width=width) for size in moved]
    return np.array([hbm_bytes / rate for hbm_bytes, rate in costs])


def quantisation_seconds(m: np.ndarray, k: np.ndarray, item: Accelerator) -> np.ndarray:
    """Seconds to quantise activations [m, k] to 8 bits, as the stacks of measured files do."""
    return memory_seconds("cast", _QUANTISATION_BYTES * m * k, item) + _QUANTISATION_LATENCY


def _predict_gemm(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, fine = _empty(frame)
    dtypes = context.dtype(frame)
    known = _known(reasons, "precision", dtypes, BYTES_PER_ELEMENT)
    training = "pass" in frame.columns
    latency = frame["latency_us"].to_numpy(dtype=float)
    for item, rows, reason in _by_accelerator(frame, context):
        if item is None:
            reasons[rows] = reason
            continue
        rows = rows[known[rows]]
        for precision in sorted(set(dtypes[rows])):
            own = rows[dtypes[rows] == precision]
            m, n, k = _floats(frame, own, "m", "n", "k")
            e_out = np.full(len(own), 4.0 if precision in ("fp32", "tf32") else 2.0)
            accumulate = np.zeros(len(own))
            if "out_dtype" in frame.columns:
                names = _text(frame, "out_dtype")[own]
                e_out = np.array([BYTES_PER_ELEMENT.get(name, 2.0) for name in names])
            if "accumulate" in frame.columns:
                accumulate = _floats(frame, own, "accumulate")[0]
            seconds[own] = _gemm_seconds(item, precision, m, n, k, e_out, accumulate, training)
            if precision in QUANTISED and not training:
                seconds[own] += quantisation_seconds(m, k, item)
            label = "train_gemm" if training else "gemm"
            group[own] = f"{label} {precision} {item.name}"
            if training:
                fine[own] = group[own] + " " + _text(frame, "pass")[own]
            else:
                fine[own] = group[own] + " " + _band(latency[own], 50.0)
    return Prediction(seconds, reasons, [group, fine])


def _predict_attention(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, fine = _empty(frame)
    training = "pass" in frame.columns
    kernels = _text(frame, "kernel")
    passes = _text(frame, "pass", "fwd")
    masks, windows = _text(frame, "mask", "causal"), _windows(frame)
    dtypes = context.dtype(frame)
    reasons[windows < 0.0] = "a window is negative"
    usable = (windows >= 0.0) & _known(reasons, "mask", masks, _MASKS)
    usable &= _known(reasons, "pass", passes, _PASSES)
    usable &= _known(reasons, "precision", dtypes, BYTES_PER_ELEMENT)
    for item, rows, reason in _by_accelerator(frame, context):
        if item is None:
            reasons[rows] = reason
            continue
        rows = rows[usable[rows]]
        for step, kernel, precision in sorted({(passes[i], kernels[i], dtypes[i]) for i in rows}):
            own = rows[
                (passes[rows] == step) & (kernels[rows] == kernel) & (dtypes[rows] == precision)
            ]
            size = np.where(_floats(frame, own, "seq_len")[0] >= 2048, "S>=2048", "S<2048")
            if training and kernel:
                try:
                    slowdown = attention_slowdown(kernel, item.family)
                except InputError as error:
                    slowdown = 1.0
                    reasons[own] = f"{error.problem}; taken as the accelerator's best"
                seconds[own] = _benchmarked_attention(
                    frame.iloc[own], masks[own], windows[own], item, step, precision, slowdown
                )
                group[own] = f"attention {step} {precision} {item.name} {kernel}"
                windowed = np.where(windows[own] > 0.0, "windowed ", "")
                fine[own] = group[own] + " " + windowed + size.astype(object)
                continue
            seconds[own] = _causal_attention(frame, own, item, step, kernel, precision, training)
            label = "train_attention" if training else "attention"
            group[own] = f"{label} {step} {item.name}"
            fine[own] = group[own] + " " + (kernel + " " if kernel else "") + size.astype(object)
    return Prediction(seconds, reasons, [group, fine])


def _causal_attention(
    frame: pd.DataFrame, own: np.ndarray, item: Accelerator, step: str, kernel: str,
    precision: str, training: bool,
) -> np.ndarray:  # fmt: skip
    """Attention within a training framework, or the prefill of a serving stack."""
    names = ("qk_dim", "v_dim") if "qk_dim" in frame.columns else ("head_dim", "head_dim")
    b, h, kv, s, qk, v = _floats(frame, own, "batch", "heads", "kv_heads", "seq_len", *names)
    overrides: dict[str, float] = {}
    if not training:
        stack = kernel.strip().casefold().replace("-", "_").replace(" ", "_")
        overrides = dict(SERVING_ATTENTION.get(stack, SERVING_ATTENTION[""]))
    cached = overrides.pop("kv_cache_traffic", 0.0)
    rates = attention_rates(item, precision, overrides, sustained=training)
    backward = _PASSES[step] is not Phase.FORWARD
    traffic = element_bytes(precision) * b * s * (h + kv) * (qk + v)
    if backward:
        traffic = 2.0 * traffic
    body = attention_seconds(
        b, h, s, s, qk, v, s * s / 2.0, traffic, rates, causal=True, backward=backward
    )
    derate = item.constants["gemm_derate"] if training else 1.0
    written = cached * element_bytes(precision) * b * s * kv * (qk + v)
    return np.asarray(rates.latency + body / derate + written / item.memory_bandwidth)


def _benchmarked_attention(
    frame: pd.DataFrame, masks: np.ndarray, windows: np.ndarray, item: Accelerator, step: str,
    precision: str, slowdown: float,
) -> np.ndarray:  # fmt: skip
    """A training kernel `slowdown` times as slow as the best, by mask (of `_MASKS`) and window (0:
    none)."""
    latency = attention_rates(item, precision).latency
    sizes = frame[["batch", "heads", "kv_heads", "seq_len", "qk_dim", "v_dim"]].to_numpy(dtype=int)
    times = []
    for row, mask, window in zip(sizes.tolist(), masks, windows, strict=True):
        b, h, kv, s, qk, v = row
        operation = Attention(
            "attention", b, h, kv, s, s, qk, v, causal=mask == "causal",
            window=int(window) or None, precision=precision, phase=_PASSES[step],
        )  # fmt: skip
        times.append(latency + slowdown * attention_body_seconds(operation, item))
    return np.array(times)


def _windows(frame: pd.DataFrame) -> np.ndarray:
    """Width of every row's sliding window, 0 without."""
    if "window" not in frame.columns:
        return np.zeros(len(frame))
    return np.nan_to_num(frame["window"].to_numpy(dtype=float))


def _predict_grouped(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, _ = _empty(frame)
    passes = _text(frame, "pass")
    known = _known(reasons, "pass", passes, _PASSES)
    for item, rows, reason in _by_accelerator(frame, context):
        if item is None:
            reasons[rows] = reason
            continue
        for i in rows[known[rows]]:
            row, step = frame.iloc[i], passes[i]
            phase = _PASSES[step]
            wgrad = phase is Phase.WEIGHT_GRADIENT
            n, k = int(row["n"]), int(row["k"])
            if phase is Phase.INPUT_GRADIENT:
                n, k = k, n  # the file repeats the forward's sizes
            op = GroupedGemm(
                step, int(row["n_groups"]), float(row["m_per_group"]), n, k,
                phase=phase, output_bytes=4.0 if wgrad else 2.0, accumulate=wgrad,
            )  # fmt: skip
            seconds[i] = kernel_cost(op, item).duration
            group[i] = f"train_grouped_gemm bf16 {item.name}"
    return Prediction(seconds, reasons, [group])


#: (expert width, top-k, experts) of models whose experts are a squared relu without gate:
#: NVIDIA Nemotron 3 (model cards: `mlp_hidden_act: relu2`).
UNGATED_EXPERTS = frozenset({(1856, 6, 128), (2688, 22, 512), (5120, 22, 512)})


def _moe_stack(kernel_source: str) -> str:
    """The stack that a file's `kernel_source` names (`moe_layer_seconds`)."""
    if "tritonexperts" in kernel_source:
        return "modular"
    if "fused_moe" in kernel_source or not kernel_source:
        return "functional"
    return "tuned"


def _predict_moe(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, fine = _empty(frame)
    for item, rows, reason in _by_accelerator(frame, context):
        if item is None:
            reasons[rows] = reason
            continue
        t, h, i, k, e, tp, ep = _floats(
            frame, rows, "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
            "moe_tp_size", "moe_ep_size",
        )  # fmt: skip
        names = _text(frame, "distribution")[rows]
        kernels = _text(frame, "kernel_source")[rows]
        for name, kernel in sorted(set(zip(names, kernels, strict=True))):
            own = (names == name) & (kernels == kernel)
            stack = _moe_stack(kernel)
            # the modular collector runs a model's own activation, the earlier one a gate always
            ungated = np.zeros(int(own.sum()), dtype=bool)
            if stack != "functional":
                shapes = zip(i[own], k[own], e[own], strict=True)
                ungated = np.array([shape in UNGATED_EXPERTS for shape in shapes])
            seconds[rows[own]] = moe_layer_seconds(
                t[own], h[own], i[own], k[own], e[own], tp[own], ep[own], item,
                skewed=name.startswith("power_law"), gated=~ungated, stack=stack,
            )  # fmt: skip
        group[rows] = f"moe_layer bf16 {item.name}"
        fine[rows] = np.where(
            ep > 1, f"moe_layer bf16 {item.name} EP", f"moe_layer bf16 {item.name} no EP"
        )
    return Prediction(seconds, reasons, [group, fine])


def _predict_elementwise(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, fine = _empty(frame)
    vector = "rows" in frame.columns
    if vector:
        moved = frame["bytes"].to_numpy(dtype=float)
    else:
        moved = (frame["bytes_read"] + frame["bytes_written"]).to_numpy(dtype=float)
    ops = _text(frame, "op")
    latency = frame["latency_us"].to_numpy(dtype=float)
    for item, rows, reason in _by_accelerator(frame, context):
        if item is None:
            reasons[rows] = reason
            continue
        launch = item.constants["launch_latency_s"]
        for op in sorted(set(ops[rows])):
            own = rows[ops[rows] == op]
            if vector:
                kind = VECTOR_CLASS.get(op, "elementwise")
            elif op in ELEMENTWISE_CLASS:
                kind = ELEMENTWISE_CLASS[op]
            else:
                kind = "elementwise"
            latency_s = _EAGER_LATENCY if vector else launch
            width = 4.0 if vector else 2.0
            seconds[own] = latency_s + memory_seconds(kind, moved[own], item, width)
            label = "vector" if vector else "elementwise"
            group[own] = f"{label} {item.name}"
            fine[own] = f"{label} {op} {item.name} " + _band(
                latency[own], 100.0 if vector else 10.0
            )
    return Prediction(seconds, reasons, [group, fine])


def _collective_predictor() -> Callable[..., float]:
    for module in ("simulator.costs.collectives", "simulator.costs.collectives_predict"):
        try:
            found = getattr(importlib.import_module(module), "predict_collective", None)
        except ImportError:
            continue
        if found is not None:
            predictor: Callable[..., float] = found
            return predictor
    raise InputError("no model of collectives is installed")


def _truth(value: object) -> bool:
    return str(value).strip().casefold() in ("1", "1.0", "true", "yes", "in_place", "in-place")


def with_latency(frame: pd.DataFrame) -> pd.DataFrame:
    """Measured collectives with a column `latency_us`, from `time_us` or a bandwidth (1e9 byte/s by
    the convention of nccl-tests) where the file gives those instead."""
    if "latency_us" in frame.columns:
        return frame
    if "time_us" in frame.columns:
        return frame.assign(latency_us=frame["time_us"])
    for column in ("busbw_gbps", "algbw_gbps"):
        if column not in frame.columns:
            continue
        size, rate, n = (
            pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float)
            for name in ("bytes", column, "n_gpus")
        )
        factor = np.ones(len(frame))
        if column == "busbw_gbps":
            for i, name in enumerate(frame["collective"].astype(str)):
                try:
                    factor[i] = bus_factor(measured_operation(name), max(2, int(n[i])))
                except (InputError, ValueError):
                    factor[i] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return frame.assign(latency_us=size * factor / (rate * 1e3))
    return frame


def _predict_collectives(frame: pd.DataFrame, context: _Context) -> Prediction:
    seconds, reasons, group, fine = _empty(frame)
    try:
        predict = _collective_predictor()
    except InputError as error:
        reasons[:] = error.problem
        return Prediction(seconds, reasons, [group])

    def text(row: pd.Series, name: str) -> str | None:
        value = row.get(name)
        return None if value is None or value != value else str(value)

    for i in range(len(frame)):
        row = frame.iloc[i]
        name = context.override.name if context.override else text(row, "gpu")
        if name is None:
            name = context.from_name.name
        try:
            seconds[i] = predict(
                str(row["collective"]), name, int(row["n_gpus"]), int(row["n_nodes"]),
                int(row["gpus_per_node"]), float(row["bytes"]),
                network=text(row, "network"), algorithm=text(row, "algo"),
                source=text(row, "source"), in_place=_truth(row.get("in_place")),
            )  # fmt: skip
        except InputError as error:
            reasons[i] = error.problem
            continue
        where = "one node" if int(row["n_nodes"]) == 1 else "multi-node"
        size = float(row["bytes"])
        band = ">=16MB" if size >= 16e6 else "1-16MB" if size >= 1e6 else "<1MB"
        if where == "multi-node" and size >= 2**30:
            band = ">=1GiB"
        group[i] = f"collectives {where} {band}"
        fine[i] = f"collectives {row['collective']} {name} {where} {band}"
    return Prediction(seconds, reasons, [group, fine])


KINDS: tuple[Kind, ...] = (
    Kind(
        "train_grouped_gemm", frozenset({"n_groups", "m_per_group", "n", "k", "pass"}),
        ("n_groups", "m_per_group", "n", "k"), _predict_grouped,
    ),
    Kind(
        "train_attention",
        frozenset({"pass", "batch", "seq_len", "heads", "kv_heads", "qk_dim", "v_dim"}),
        ("batch", "seq_len", "heads", "kv_heads", "qk_dim", "v_dim"), _predict_attention,
    ),
    Kind("train_gemm", frozenset({"m", "n", "k", "pass"}), ("m", "n", "k"), _predict_gemm),
    Kind("gemm", frozenset({"m", "n", "k"}), ("m", "n", "k"), _predict_gemm),
    Kind(
        "attention", frozenset({"batch", "seq_len", "heads", "kv_heads", "head_dim"}),
        ("batch", "seq_len", "heads", "kv_heads", "head_dim"), _predict_attention,
    ),
    Kind(
        "moe_layer",
        frozenset({"num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
                   "moe_tp_size", "moe_ep_size"}),
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
         "moe_tp_size", "moe_ep_size"), _predict_moe,
    ),
    Kind(
        "collectives",
        frozenset({"collective", "n_gpus", "n_nodes", "gpus_per_node", "bytes"}),
        ("n_gpus", "n_nodes", "gpus_per_node", "bytes"), _predict_collectives,
    ),
    Kind(
        "elementwise", frozenset({"op", "bytes_read", "bytes_written"}),
        ("bytes_read", "bytes_written"), _predict_elementwise,
    ),
    Kind("vector", frozenset({"op", "rows", "cols", "bytes"}), ("bytes",), _predict_elementwise),
)  # fmt: skip

#: Forms that are recognised but that no single-kernel model predicts, with the reason.
_UNPREDICTED = (
    (
        frozenset({"dispatch_transmit_us", "combine_transmit_us"}),
        "DeepEP dispatch and combine are transfers of a whole step, not kernels of this model",
    ),
)


def read_measurements(path: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """A measured file's rows and its comment lines.

    Raises
    ------
    InputError
        If the file cannot be read, is not UTF-8 text, or is no CSV.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", place=str(path)) from None
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise InputError(f"cannot read the file: {reason}", place=str(path)) from None
    comments = [line for line in text.splitlines() if line.startswith("#")]
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    try:
        frame = pd.read_csv(io.StringIO(body))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"not a CSV table: {reason}", place=str(path)) from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError("not a CSV table: rows have more fields than the header", place=str(path))
    frame.columns = [str(column).strip() for column in frame.columns]
    return frame, comments


def kind_or_reason(frame: pd.DataFrame, place: str) -> Kind | str:
    """The form of a measured table, or why no model predicts it; `InputError` if unknown."""
    columns = set(frame.columns)
    for kind in KINDS:
        if kind.columns <= columns:
            return kind
    for needed, reason in _UNPREDICTED:
        if needed <= columns:
            return reason
    best = max(KINDS, key=lambda kind: len(kind.columns & columns) / len(kind.columns))
    missing = ", ".join(sorted(best.columns - columns))
    raise InputError(
        f"no known form of measurements; nearest is {best.name}, which lacks: {missing}",
        place=place,
    )


def kind_of(frame: pd.DataFrame, place: str) -> Kind:
    """The form of a measured table; `InputError` if unknown or not predicted."""
    kind = kind_or_reason(frame, place)
    if isinstance(kind, str):
        raise InputError(kind, place=place)
    return kind


#: Number of the first measured row: the header is row 1, comment lines do not count.
_FIRST_ROW = 2


@dataclass(frozen=True)
class FileResult:
    """One measured file, predicted."""

    path: str
    kind: str
    frame: pd.DataFrame
    """The file's own columns."""
    comments: list[str]
    predicted_us: np.ndarray
    error: np.ndarray
    """Predicted / measured - 1, NaN where either is missing."""
    reasons: np.ndarray
    """Why a row was not predicted, or, of one that was, what had to be assumed."""
    groups: list[np.ndarray]

    def unpredicted(self) -> dict[str, list[int]]:
        """By reason, the rows that were not predicted, counted from the header, which is row 1."""
        return self._rows(~np.isfinite(self.predicted_us))

    def assumed(self) -> dict[str, list[int]]:
        """By assumption, the rows that were predicted on it."""
        return self._rows(np.isfinite(self.predicted_us))

    def _rows(self, which: np.ndarray) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for index in np.flatnonzero(which & (self.reasons != "")):
            rows.setdefault(str(self.reasons[index]), []).append(int(index) + _FIRST_ROW)
        return rows


def validate_file(
    path: str | Path, *, accelerator_name: str | None = None, label: str | None = None
) -> FileResult:
    """Predict every row of one measured file; `InputError` if it is malformed."""
    place = label or str(path)
    override = accelerator(accelerator_name) if accelerator_name else None
    frame, comments = read_measurements(path)
    kind = kind_or_reason(frame, place)
    n = len(frame)
    if isinstance(kind, str):
        nothing = np.full(n, np.nan)
        blank = np.full(n, "", dtype=object)
        reasons = np.full(n, kind, dtype=object)
        return FileResult(
            place, "unpredicted", frame, comments, nothing, nothing.copy(), reasons, [blank]
        )
    clean = with_latency(frame) if kind.name == "collectives" else frame
    if "latency_us" not in clean.columns:
        raise InputError("lacks the column latency_us", place=place)
    clean = clean.copy()
    optional = ("window",) if "window" in clean.columns else ()
    for column in ("latency_us", *kind.numeric, *optional):
        numbers = pd.to_numeric(clean[column], errors="coerce")
        wrong = numbers.isna() & clean[column].notna()
        if wrong.any():
            row = int(np.flatnonzero(wrong.to_numpy())[0])
            value = clean[column].iloc[row]
            raise InputError(
                f"expected a number in row {row + _FIRST_ROW}, got {value!r}",
                place=f"{place}.{column}",
            )
        clean[column] = numbers.astype(float)
    sizes = clean[list(kind.numeric)].to_numpy(dtype=float)
    minimum = 0.0 if kind.name == "elementwise" else np.finfo(float).tiny
    good = np.isfinite(sizes).all(axis=1) & (sizes >= minimum).all(axis=1)
    good &= (sizes < 1e15).all(axis=1)
    if "pass" in kind.columns:
        good &= clean["pass"].notna().to_numpy()
    part = clean[good].reset_index(drop=True)
    found = kind.predict(part, _Context(place, override))
    predicted = np.full(n, np.nan)
    predicted[good] = found.seconds * 1e6
    reasons = np.full(n, "a size is missing, not positive or not finite", dtype=object)
    reasons[good] = found.reasons
    groups = []
    for labels in found.groups:
        names = np.full(n, "", dtype=object)
        names[good] = labels
        groups.append(names)
    measured = clean["latency_us"].to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = predicted / measured - 1.0
    usable = np.isfinite(predicted) & np.isfinite(measured) & (measured > 0)
    error[~usable] = np.nan
    return FileResult(place, kind.name, frame, comments, predicted, error, reasons, groups)


def statistics(errors: np.ndarray, rows: int) -> dict[str, Any]:
    """The figures that `--json` prints of a set of signed errors; None where there are none."""
    known = errors[np.isfinite(errors)]
    if not len(known):
        return {"rows": rows, "predicted": 0, "median_abs_error": None, "p90_abs_error": None,
                "signed_median_error": None}  # fmt: skip
    size = np.abs(known)
    return {
        "rows": rows,
        "predicted": len(known),
        "median_abs_error": float(np.median(size)),
        "p90_abs_error": float(np.quantile(size, 0.9)),
        "signed_median_error": float(np.median(known)),
    }


def summarise(results: Sequence[FileResult]) -> dict[str, Any]:
    """Over all rows, and by group: `rows`, `predicted`, median and 90th percentile of the absolute
    error, median of the signed one; `not_predicted` counts the reasons."""
    errors = [result.error for result in results]
    summary = statistics(np.concatenate(errors) if errors else np.zeros(0), sum(map(len, errors)))
    members: dict[str, list[float]] = {}
    for result in results:
        for column in result.groups:
            for label, error in zip(column, result.error, strict=True):
                if label:
                    members.setdefault(str(label), []).append(float(error))
    summary["groups"] = {
        name: statistics(np.array(members[name]), len(members[name])) for name in sorted(members)
    }
    counts: Counter[str] = Counter()
    for result in results:
        counts.update({reason: len(rows) for reason, rows in result.unpredicted().items()})
    summary["not_predicted"] = dict(sorted(counts.items()))
    return summary


def shipped_files() -> list[Path]:
    """The samples of measured facts that the package carries, in the order of their names."""
    folder = Path(str(files("simulator.catalog") / "measurements"))
    return sorted(folder.glob("*.csv"))


def write_predictions(result: FileResult, path: str | Path) -> None:
    """The input table with a `predicted_us` column; comment lines kept. Raises `InputError`."""
    table = result.frame.copy()
    table["predicted_us"] = [
        "" if not np.isfinite(value) else f"{value:.6g}" for value in result.predicted_us
    ]
    text = "".join(f"{line}\n" for line in result.comments) + table.to_csv(index=False)
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or "not writable"
        raise InputError(f"cannot write the file: {reason}", place=str(path)) from None
