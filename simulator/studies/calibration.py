"""Measure this machine, or take measured files, and fit the constants of the cost model.

`measure_machine` times matrix products, attention, memory streams and (several GPUs) all-reduces
with PyTorch, or products and streams with NumPy where PyTorch is missing. `fit_accelerator` fits
the model's constants to such rows, or to measured files, and reports residuals on rows that the
fit did not see. `write_accelerator` writes a file that the catalogue's loader reads. Fits are on
kernels only, never on training steps.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import platform
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.optimize import least_squares

from simulator.catalog.accelerators import (
    Accelerator,
    accelerator,
    accelerator_from_mapping,
    families,
)
from simulator.costs.attention import attention_rates, attention_seconds
from simulator.costs.gemm import gemm_body_seconds, gemm_rates
from simulator.costs.memory_bound import CLASSES, hbm_share
from simulator.errors import InputError
from simulator.studies.kernel_validation import (
    ELEMENTWISE_CLASS,
    QUANTISED,
    VECTOR_CLASS,
    kind_of,
    memory_seconds,
    quantisation_seconds,
    read_measurements,
)

#: (lower, upper) bounds of the constants that a fit may move.
BOUNDS: dict[str, tuple[float, float]] = {
    "gemm_efficiency": (0.30, 0.99),
    "gemm_bandwidth_fraction": (0.05, 0.98),
    "gemm_latency_s": (0.2e-6, 20e-6),
    "gemm_epilogue_bytes_per_flop": (0.001, 1.0),
    "gemm_throttle": (0.001, 0.6),
    "gemm_energy_j_per_flop": (1.0e-13, 4.0e-12),
    "gemm_throttle_s": (1.0e-4, 2.0e-2),
    "gemm_tile_128_efficiency": (0.7, 1.0),
    "gemm_tile_small_efficiency": (0.5, 1.0),
    "gemm_l2_bytes_per_flop": (0.010, 0.06),
    "gemm_k_step_s": (0.01e-6, 1.0e-6),
    "gemm_split_s": (0.01e-6, 6.0e-6),
    "gemm_wave_share": (0.001, 1.0),
    "gemm_memory_latency_s": (0.01e-6, 5.0e-6),
    "gemm_p": (1.0, 8.0),
    "attention_efficiency": (0.02, 0.98),
    "attention_backward_efficiency": (0.02, 0.98),
    "attention_softmax": (0.1, 2.0),
    "attention_tail": (0.01, 1.5),
    "attention_throttle": (0.001, 0.4),
    "attention_latency_s": (1.0e-6, 40e-6),
    "attention_bandwidth_fraction": (0.2, 1.2),
    "attention_idle_boost": (0.0, 0.6),
    "kv_cache_traffic": (0.0, 12.0),
}

#: From so many rows on, all constants of a kernel are fitted; with fewer, the main ones.
_MANY = 200
_FEW_GEMM = ("gemm_efficiency", "gemm_bandwidth_fraction", "gemm_latency_s")
_MORE_GEMM = (
    "gemm_epilogue_bytes_per_flop", "gemm_tile_128_efficiency", "gemm_tile_small_efficiency",
    "gemm_l2_bytes_per_flop", "gemm_k_step_s", "gemm_split_s", "gemm_wave_share",
    "gemm_memory_latency_s", "gemm_p", "gemm_throttle_s",
)  # fmt: skip
#: Most rows of one kind that a fit uses; chosen by a seeded generator.
_MOST_ROWS = 2500


@dataclass(frozen=True)
class Fit:
    """Constants fitted to one kind of rows, and how well they predict."""

    kind: str
    constants: dict[str, float]
    residuals: dict[str, Any]
    """`fitted` and `held_out`: rows, median and 90th percentile of the absolute error."""


@dataclass
class Measurements:
    """What was timed on one machine. Frames have the columns of measured files."""

    device: str
    software: str
    method: str
    gemm: pd.DataFrame = field(default_factory=pd.DataFrame)
    """m, n, k, dtype, latency_us."""
    attention: pd.DataFrame = field(default_factory=pd.DataFrame)
    """pass, batch, seq_len, heads, kv_heads, qk_dim, v_dim, latency_us."""
    stream: pd.DataFrame = field(default_factory=pd.DataFrame)
    """op, bytes, latency_us."""
    collectives: pd.DataFrame = field(default_factory=pd.DataFrame)
    sustained: pd.DataFrame = field(default_factory=pd.DataFrame)
    """As gemm, timed in a loop of seconds: clocks as in training."""
    properties: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """That this is no GPU, and why."""


# fitting


def _residuals(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    error = np.abs(predicted / measured - 1.0)
    if not len(error):
        return {"rows": 0}
    return {
        "rows": len(error),
        "median_abs_error": round(float(np.median(error)), 5),
        "p90_abs_error": round(float(np.quantile(error, 0.9)), 5),
    }


def _held_out(*columns: Any) -> np.ndarray:
    """True for 40 % of the shape families: whole combinations of `columns`, by their checksum."""
    keys = zip(*columns, strict=True)
    return np.array(
        [zlib.crc32(",".join(f"{x:g}" for x in key).encode()) % 100 >= 60 for key in keys]
    )


def _weights(latency: np.ndarray, many: bool) -> np.ndarray:
    if not many:
        return np.ones(len(latency))
    # short kernels are scattered by their launch: they count less
    return np.where(latency >= 50.0, 1.0, np.where(latency >= 10.0, 0.5, 0.2))


def _solve(
    names: Sequence[str],
    start: Mapping[str, float],
    predict: Callable[[dict[str, float]], np.ndarray],
    measured: np.ndarray,
    weights: np.ndarray,
    scale: float,
) -> dict[str, float]:
    low = np.array([BOUNDS[name][0] for name in names])
    high = np.array([BOUNDS[name][1] for name in names])
    low = np.maximum(low, high * 1e-6)  # fitted as logarithms
    first = np.clip([start[name] for name in names], low * 1.001, high * 0.999)

    def residual(logs: np.ndarray) -> np.ndarray:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        found: np.ndarray = np.log(predict(values) / measured) * weights
        return found

    solution = least_squares(
        residual, np.log(first), bounds=(np.log(low), np.log(high)),
        loss="soft_l1", f_scale=scale, diff_step=1e-3, max_nfev=60,
    )  # fmt: skip
    return dict(zip(names, np.exp(solution.x).tolist(), strict=True))


def _with(item: Accelerator, constants: Mapping[str, float]) -> Accelerator:
    return dataclasses.replace(item, constants={**item.constants, **constants})


def _split(frame: pd.DataFrame, columns: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows to fit, rows held out); a few rows are all fitted, and residuals are of the fit."""
    if len(frame) < _MANY:
        return frame, frame.iloc[:0]
    out = _held_out(*(frame[column] for column in columns))
    fitted = frame[~out]
    if len(fitted) > _MOST_ROWS:
        chosen = np.random.default_rng(0).choice(len(fitted), _MOST_ROWS, replace=False)
        fitted = fitted.iloc[np.sort(chosen)]
    return fitted, frame[out]


def fit_gemm(frame: pd.DataFrame, item: Accelerator, precision: str) -> Fit:
    """Fit the GEMM constants of one precision on rows m, n, k, latency_us."""
    frame = frame[frame["latency_us"] >= 2.0] if len(frame) >= _MANY else frame
    fitted, held = _split(frame, ("n", "k"))
    many = len(frame) >= _MANY
    efficiency = {
        "fp32": "gemm_fp32_efficiency", "fp8": "gemm_fp8_efficiency",
    }.get(item.compute_precision(precision), "gemm_efficiency")  # fmt: skip
    names = [*_FEW_GEMM, *(_MORE_GEMM if many and item.family != "cpu" else ())]
    if many and item.family != "cpu":
        powered = item.constants["gemm_energy_j_per_flop"] > 0 and item.clock_hz
        law = item.constants["gemm_throttle"] == 0 and powered
        names.append("gemm_energy_j_per_flop" if law else "gemm_throttle")
    if item.constants["mxu_edge"]:
        names = list(_FEW_GEMM)
    quantised = precision in QUANTISED and many
    if quantised:
        names = ["gemm_efficiency"]  # the rest is the device's, fitted in 16 bits

    def renamed(values: Mapping[str, float]) -> dict[str, float]:
        return {efficiency if k == "gemm_efficiency" else k: v for k, v in values.items()}

    def predict(values: Mapping[str, float], rows: pd.DataFrame) -> np.ndarray:
        rates = gemm_rates(_with(item, renamed(values)), precision)
        m, n, k = (rows[name].to_numpy(dtype=float) for name in ("m", "n", "k"))
        body = gemm_body_seconds(m, n, k, rates, 4.0 if rates.e_in == 4.0 else 2.0)
        if quantised:
            body = body + quantisation_seconds(m, k, item)
        seconds: np.ndarray = (rates.latency + body) * 1e6
        return seconds

    measured = fitted["latency_us"].to_numpy(dtype=float)
    start = {**item.constants, "gemm_efficiency": item.constants[efficiency]}
    values = _solve(
        names, start, lambda v: predict(v, fitted), measured, _weights(measured, many), 0.05
    )
    report: dict[str, Any] = {"fitted": _residuals(predict(values, fitted), measured)}
    if len(held):
        long = held[held["latency_us"] >= 50.0]
        report["held_out"] = _residuals(predict(values, held), held["latency_us"].to_numpy())
        report["held_out_50us"] = _residuals(predict(values, long), long["latency_us"].to_numpy())
    return Fit(f"gemm_{precision}", renamed(values), report)


def fit_attention(frame: pd.DataFrame, item: Accelerator, *, serving: bool = False) -> Fit:
    """Fit the attention constants on rows batch, seq_len, heads, kv_heads, qk_dim, v_dim, pass.

    With `serving`, the fixed latency and the traffic of the stack's key-value cache are fitted too.
    """
    frame = frame.copy()
    if "qk_dim" not in frame.columns:
        frame["qk_dim"] = frame["v_dim"] = frame["head_dim"]
    if "pass" not in frame.columns:
        frame["pass"] = "fwd"
    fitted, held = _split(frame, ("heads", "kv_heads"))
    many = len(frame) >= _MANY
    backward = bool((frame["pass"] == "bwd").any())
    names = ["attention_efficiency"]
    if backward:
        names.append("attention_backward_efficiency")
    if many:
        names += ["attention_softmax", "attention_tail", "attention_throttle",
                  "attention_idle_boost"]  # fmt: skip
    if serving:
        names += ["attention_latency_s", "attention_bandwidth_fraction", "kv_cache_traffic"]

    def predict(values: Mapping[str, float], rows: pd.DataFrame) -> np.ndarray:
        overrides = {**values, **({"attention_exposed": 1.0} if serving else {})}
        cache = overrides.pop("kv_cache_traffic", 0.0)
        rates = attention_rates(item, "bf16", overrides)
        columns = ("batch", "heads", "kv_heads", "seq_len", "qk_dim", "v_dim")
        b, h, kv, s, qk, v = (rows[name].to_numpy(dtype=float) for name in columns)
        traffic = 2.0 * b * s * (h + kv) * (qk + v)
        back = (rows["pass"] == "bwd").to_numpy()
        args = (b, h, s, s, qk, v, s * s / 2.0)
        forward = attention_seconds(*args, traffic, rates)
        body = np.where(
            back, attention_seconds(*args, 2.0 * traffic, rates, backward=True), forward
        )
        body = body + cache * 2.0 * b * s * kv * (qk + v) / item.memory_bandwidth
        seconds: np.ndarray = (rates.latency + body) * 1e6
        return seconds

    measured = fitted["latency_us"].to_numpy(dtype=float)
    weights = np.where(fitted["seq_len"].to_numpy() >= 2048, 1.0, 0.35)
    start = {**item.constants, "kv_cache_traffic": 1.0}
    values = _solve(names, start, lambda v: predict(v, fitted), measured, weights, 0.1)
    report: dict[str, Any] = {"fitted": _residuals(predict(values, fitted), measured)}
    if len(held):
        long = held[held["seq_len"] >= 2048]
        report["held_out"] = _residuals(predict(values, held), held["latency_us"].to_numpy())
        report["held_out_S>=2048"] = _residuals(
            predict(values, long), long["latency_us"].to_numpy()
        )
    return Fit("attention", values, report)


def fit_stream(frame: pd.DataFrame, item: Accelerator) -> Fit:
    """Fit the stream rate and the launch latency on rows op, bytes, latency_us.

    Rows are those of kernels that stream (copy, add, mul, relu); others are ignored.
    """
    classes = [ELEMENTWISE_CLASS.get(op, VECTOR_CLASS.get(op, "elementwise")) for op in frame["op"]]
    streams = np.array([name in ("copy", "elementwise") for name in classes])
    rows = frame[streams]
    beyond = rows[rows["bytes"] > 2.0 * item.l2_bytes]
    rows = beyond if len(beyond) >= 3 else rows
    if not len(rows):
        raise InputError("no rows of streaming kernels (copy, add, mul, relu) to fit")
    moved = rows["bytes"].to_numpy(dtype=float)
    measured = rows["latency_us"].to_numpy(dtype=float) * 1e-6
    traffic = moved * np.array([hbm_share(x, item) for x in moved])
    # t = launch + traffic / rate, by least squares of the relative error
    design = np.stack([np.ones(len(rows)), traffic], axis=1) / measured[:, None]
    launch, inverse = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)[0]
    launch = float(np.clip(launch, 0.0, min(20e-6, measured.min())))
    if inverse <= 0:
        inverse = float(np.median(measured / traffic))
    # memory_rate joins the stream with what SMs issue: solve for the stream's own share
    issued = CLASSES["elementwise"].per_clock * item.core_count * (item.clock_hz or np.inf)
    rate = min(1.0 / float(inverse), 0.97 * issued)
    stream = (rate**-4.0 - issued**-4.0) ** -0.25
    fraction = float(min(stream / item.memory_bandwidth, 0.999))
    constants = {"stream_fraction": fraction, "launch_latency_s": launch}
    tuned = _with(item, constants)
    predicted = launch + memory_seconds("elementwise", moved, tuned)
    return Fit("stream", constants, {"fitted": _residuals(predicted, measured)})


def fit_files(paths: Sequence[str | Path], item: Accelerator) -> list[Fit]:
    """Fit `item`'s constants to measured files in the form of `kernel_validation`.

    Raises
    ------
    InputError
        For files that are malformed, of a form that no fit is known for, or without rows.
    """
    fits: list[Fit] = []
    for path in paths:
        frame, _ = read_measurements(path)
        kind = kind_of(frame, str(path))
        if "latency_us" not in frame.columns:
            raise InputError("lacks the column latency_us", place=str(path))
        for column in (*kind.numeric, "latency_us"):
            frame[column] = pd.to_numeric(frame[column], errors="coerce")
        frame = frame.dropna(subset=[*kind.numeric, "latency_us"])
        sizes = frame[[*kind.numeric, "latency_us"]].to_numpy(dtype=float)
        frame = frame[(sizes > 0).all(axis=1) & np.isfinite(sizes).all(axis=1)]
        if "gpu" in frame.columns:
            frame = frame[[_same(name, item) for name in frame["gpu"]]]
        if len(frame) < 4:
            raise InputError(f"only {len(frame)} usable rows of {item.name}", place=str(path))
        if kind.name == "gemm":
            precision = "fp8" if "fp8" in Path(path).stem else "bf16"
            if "dtype" in frame.columns:
                precision = str(frame["dtype"].iloc[0])
            fits.append(fit_gemm(frame, item, precision))
        elif kind.name == "attention":
            kernels = frame["kernel"] if "kernel" in frame.columns else pd.Series("", frame.index)
            for name in sorted(kernels.astype(str).unique()):
                part = frame[kernels.astype(str) == name]
                found = fit_attention(part, item, serving=True)
                fits.append(dataclasses.replace(found, kind=f"serving_attention {name}".strip()))
        elif kind.name in ("elementwise", "vector"):
            if kind.name == "elementwise":
                frame = frame.assign(bytes=frame["bytes_read"] + frame["bytes_written"])
            fits.append(fit_stream(frame[frame["latency_us"] >= 20.0], item))
        else:
            raise InputError(f"no fit for files of {kind.name}", place=str(path))
    return fits


def _same(name: object, item: Accelerator) -> bool:
    try:
        return accelerator(str(name)).name == item.name
    except InputError:
        return False


# measuring


def _median_seconds(call: Callable[[], Any], wait: Callable[[], Any], budget: float) -> float:
    """Seconds of one call: the lower quartile of repeats within `budget` seconds, at least three;
    other processes only ever make a call slower."""
    call()
    wait()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.quantile(times, 0.25))


_QUICK_GEMM = ((64, 64, 64), (128, 128, 128), (256, 256, 256), (384, 384, 384), (512, 512, 512),
               (64, 512, 512), (512, 64, 1024), (768, 768, 768))  # fmt: skip
_FULL_GEMM_CPU = (*_QUICK_GEMM, (1024, 1024, 1024), (2048, 1024, 1024), (1536, 1536, 1536),
                  (32, 2048, 2048), (1, 2048, 2048))  # fmt: skip


def _copied_on_cpu(quick: bool) -> tuple[int, ...]:
    """MiB to copy: more than the last-level cache of a host processor holds for us."""
    return (32, 64, 96) if quick else (64, 128, 256)


def _numpy_machine(quick: bool) -> Measurements:
    rng = np.random.default_rng(0)
    budget = 0.05 if quick else 0.5
    result = Measurements(
        device=_cpu_name(), software=f"NumPy {np.__version__}", method="numpy, CPU, wall clock"
    )
    rows = []
    for m, n, k in _QUICK_GEMM if quick else _FULL_GEMM_CPU:
        a = rng.standard_normal((m, k), dtype=np.float32)
        b = rng.standard_normal((k, n), dtype=np.float32)
        out = np.empty((m, n), dtype=np.float32)
        seconds = _median_seconds(functools.partial(np.matmul, a, b, out=out), int, budget)
        rows.append((m, n, k, "fp32", seconds * 1e6))
    result.gemm = pd.DataFrame(rows, columns=["m", "n", "k", "dtype", "latency_us"])
    streams = []
    for mib in _copied_on_cpu(quick):
        source = np.ones(mib * 2**18, dtype=np.float32)
        target = np.empty_like(source)
        seconds = _median_seconds(functools.partial(np.copyto, target, source), int, budget)
        streams.append(("copy", 2.0 * source.nbytes, seconds * 1e6))
    result.stream = pd.DataFrame(streams, columns=["op", "bytes", "latency_us"])
    return result


def _torch_machine(torch: Any, quick: bool) -> Measurements:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    wait = torch.cuda.synchronize if cuda else int
    budget = 0.05 if quick else 0.3
    name = torch.cuda.get_device_name() if cuda else _cpu_name()
    result = Measurements(
        device=name, software=f"PyTorch {torch.__version__}",
        method=f"torch, {'CUDA events' if cuda else 'CPU, wall clock'}",
    )  # fmt: skip
    if cuda:
        result.software += f", CUDA {torch.version.cuda}"
        found = torch.cuda.get_device_properties(0)
        result.properties = {
            "core_count": int(found.multi_processor_count),
            "memory": float(found.total_memory),
            "l2": float(getattr(found, "L2_cache_size", 0) or 0),
        }
    dtype, label = (torch.bfloat16, "bf16") if cuda else (torch.float32, "fp32")
    torch.manual_seed(0)

    def timed(call: Callable[[], Any]) -> float:
        if not cuda:
            return _median_seconds(call, wait, budget)
        for _ in range(3):
            call()
        wait()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        wait()
        once = max(start.elapsed_time(stop) * 1e-3, 1e-6)
        # enough repeats that the queue never runs dry: no host launch time in the figure
        repeats = int(np.clip(budget / once, 5, 2000))
        times = []
        for _ in range(3):
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            wait()
            times.append(start.elapsed_time(stop) * 1e-3 / repeats)
        return float(np.median(times))

    if cuda:
        sizes = [128, 512, 1024, 2048, 4096, 8192]
        widths = (1024, 4096, 8192) if quick else (512, 1024, 2048, 4096, 5120, 8192, 14336)
        depths = (1024, 8192) if quick else (512, 1024, 4096, 8192)
        shapes = [(m, n, k) for m in sizes for n in widths for k in depths]
    else:
        shapes = list(_QUICK_GEMM if quick else _FULL_GEMM_CPU)
    rows = []
    for m, n, k in shapes:
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        rows.append((m, n, k, label, timed(functools.partial(torch.matmul, a, b.t())) * 1e6))
    result.gemm = pd.DataFrame(rows, columns=["m", "n", "k", "dtype", "latency_us"])

    streams = []
    copied = (16, 64, 256) if quick else (16, 64, 256, 1024)
    for mib in copied if cuda else _copied_on_cpu(quick):
        x = torch.ones(mib * 2**18, device=device, dtype=torch.float32)
        y = torch.empty_like(x)
        seconds = timed(functools.partial(y.copy_, x))
        streams.append(("copy", 8.0 * x.numel(), seconds * 1e6))
    result.stream = pd.DataFrame(streams, columns=["op", "bytes", "latency_us"])

    attend = torch.nn.functional.scaled_dot_product_attention
    cases = [(1, 16, 2048), (1, 16, 4096), (2, 32, 4096), (1, 32, 8192)] if cuda else [(1, 4, 256)]
    dims = 128 if cuda else 64
    attention = []
    for batch, heads, length in cases[: 2 if quick else None]:
        shape = (batch, heads, length, dims)
        q, k, v = (
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        with torch.no_grad():
            forward = timed(functools.partial(attend, q, k, v, is_causal=True))

        def both(q: Any = q, k: Any = k, v: Any = v) -> None:
            out = attend(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        total = timed(both)
        for step, seconds in (("fwd", forward), ("bwd", max(total - forward, forward))):
            attention.append((step, batch, length, heads, heads, dims, dims, seconds * 1e6))
    columns = ["pass", "batch", "seq_len", "heads", "kv_heads", "qk_dim", "v_dim", "latency_us"]
    result.attention = pd.DataFrame(attention, columns=columns)

    if cuda:
        size = 8192
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        end = time.perf_counter() + (2.0 if quick else 10.0)
        while time.perf_counter() < end:  # reach the temperature and clocks of training
            for _ in range(20):
                a @ b
            wait()
        result.sustained = pd.DataFrame(
            [(size, size, size, label, timed(functools.partial(torch.matmul, a, b)) * 1e6)],
            columns=["m", "n", "k", "dtype", "latency_us"],
        )
        if torch.cuda.device_count() > 1:
            result.collectives = _measure_collectives(torch, quick)
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _all_reduce_worker(
    rank: int, world: int, port: int, backend: str, sizes: Sequence[int], queue: Any
) -> None:  # pragma: no cover - runs in child processes of a machine with several GPUs
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = backend == "nccl"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world)
    for size in sizes:
        data = torch.ones(size // 4, device=f"cuda:{rank}" if cuda else "cpu")
        for _ in range(3):
            dist.all_reduce(data)
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(10):
            dist.all_reduce(data)
        if cuda:
            torch.cuda.synchronize()
        if rank == 0:
            queue.put((size, (time.perf_counter() - start) / 10))
    dist.destroy_process_group()


def _measure_collectives(torch: Any, quick: bool, backend: str = "nccl") -> pd.DataFrame:
    """All-reduce of every GPU of the machine: columns as measured files of collectives have."""
    world = torch.cuda.device_count() if backend == "nccl" else 2
    sizes = [2**20, 2**24] if quick else [2**p for p in range(12, 31, 2)]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(
        _all_reduce_worker, args=(world, _free_port(), backend, sizes, queue), nprocs=world
    )
    rows = []
    while not queue.empty():
        size, seconds = queue.get()
        rows.append(("all_reduce", world, 1, world, size, seconds * 1e6))
    columns = ["collective", "n_gpus", "n_nodes", "gpus_per_node", "bytes", "latency_us"]
    return pd.DataFrame(rows, columns=columns)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def measure_machine(*, quick: bool = False, backend: str = "auto") -> Measurements:
    """Time kernels on this machine.

    Parameters
    ----------
    quick:
        Few small shapes, seconds; otherwise minutes.
    backend:
        `torch`, `numpy`, or `auto`: PyTorch where it is installed.

    Raises
    ------
    InputError
        If `torch` is asked for and not installed.
    """
    torch = _torch(backend)
    measured = _numpy_machine(quick) if torch is None else _torch_machine(torch, quick)
    measured.note = cpu_note(backend)
    return measured


def cpu_note(backend: str = "auto") -> str:
    """That `measure_machine` measures the CPU, and why; nothing where it measures a GPU."""
    torch = _torch(backend)
    if torch is not None and torch.cuda.is_available():
        return ""
    missing = "NumPy was asked for" if backend == "numpy" else "PyTorch is not installed"
    why = missing if torch is None else "PyTorch finds no GPU"
    return f"measured on the CPU ({_cpu_name()}), not on a GPU: {why}"


def _torch(backend: str) -> Any:
    """PyTorch, None where NumPy is to measure."""
    if backend not in ("auto", "torch", "numpy"):
        raise InputError(f"expected auto, torch or numpy, got {backend!r}", place="backend")
    if backend == "numpy":
        return None
    try:
        import torch
    except ImportError:
        if backend == "torch":
            raise InputError("PyTorch is not installed", place="backend") from None
        return None
    return torch


def _described(measured: Measurements, base: str | None) -> tuple[dict[str, Any], Accelerator]:
    """The part of the accelerator file that is not fitted, and the accelerator to start from."""
    if base is not None:
        return {"base": base}, accelerator(base)
    try:
        found = accelerator(measured.device)
    except InputError:
        pass
    else:
        return {"base": found.name}, found
    # unknown device: peaks are what was seen, a little more, so that nothing beats them
    gemm = measured.gemm
    rate = float((2e6 * gemm["m"] * gemm["n"] * gemm["k"] / gemm["latency_us"]).max())
    stream = float((measured.stream["bytes"] / measured.stream["latency_us"]).max()) * 1e6
    cuda = bool(measured.properties)
    memory = measured.properties.get("memory") or _host_memory()
    precision = str(gemm["dtype"].iloc[0])
    entry: dict[str, Any] = {
        "vendor": "unknown",
        "family": "ampere" if cuda else "cpu",
        "kind": "gpu",
        "peak_flops": {precision: float(f"{1.05 * rate:.6g}")},
        "core_count": int(measured.properties.get("core_count") or os.cpu_count() or 1),
        "memory": memory,
        "memory_bandwidth": float(f"{1.10 * stream:.6g}"),
        "l2": measured.properties.get("l2", 0.0),
        "sources": {
            "peak_flops": "1.05 times the best product measured",
            "memory_bandwidth": "1.1 times the best copy measured",
        },
    }
    return entry, accelerator_from_mapping({**entry, "name": "machine"}, "this machine")


def _host_memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 8.0 * 2**30


def calibrate(
    measured: Measurements, *, base: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """Fit the constants to what was measured: the mapping of an accelerator file.

    Raises
    ------
    InputError
        If `base` is no accelerator.
    """
    entry, item = _described(measured, base)
    fits: list[Fit] = []
    if len(measured.stream):
        fits.append(fit_stream(measured.stream, item))
        item = _with(item, fits[-1].constants)
    for precision in sorted(measured.gemm["dtype"].unique()) if len(measured.gemm) else []:
        fits.append(fit_gemm(measured.gemm[measured.gemm["dtype"] == precision], item, precision))
        item = _with(item, fits[-1].constants)
    if len(measured.attention):
        fits.append(fit_attention(measured.attention, item))
        item = _with(item, fits[-1].constants)
    extra: dict[str, Any] = {"note": measured.note} if measured.note else {}
    if len(measured.sustained):
        row = measured.sustained.iloc[0]
        rates = gemm_rates(item, str(row["dtype"]), sustained=True)
        micro = rates.latency + gemm_body_seconds(row["m"], row["n"], row["k"], rates)
        derate = float(np.clip(float(micro) * 1e6 / float(row["latency_us"]), 0.3, 1.2))
        fits.append(Fit("sustained", {"gemm_derate": derate}, {"rows": 1}))
    if len(measured.collectives):
        c = measured.collectives
        n = c["n_gpus"].astype(float)
        bus = c["bytes"] / c["latency_us"] * 1e6 * 2 * (n - 1) / n
        extra["all_reduce_bus_bandwidth"] = {
            str(int(size)): float(f"{rate:.5g}") for size, rate in zip(c["bytes"], bus, strict=True)
        }
    return accelerator_file(
        entry, fits, name or _file_name(measured.device), extra={
            "device": measured.device, "software": measured.software, "method": measured.method,
            **extra,
        },
    )  # fmt: skip


def _file_name(device: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in device).strip("-")
    return "-".join(word for word in words.split("-") if word) + "-calibrated"


def accelerator_file(
    entry: Mapping[str, Any], fits: Sequence[Fit], name: str, *, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The mapping that `accelerator_from_mapping` reads: figures, constants, their residuals."""
    known = families()["ampere"]
    constants: dict[str, float] = {}
    kernels: dict[str, dict[str, float]] = {}
    for fit in fits:
        rounded = {key: float(f"{value:.6g}") for key, value in fit.constants.items()}
        if fit.kind.startswith("serving_attention"):
            # a serving stack's kernel, not this accelerator's own in training
            kernels[fit.kind] = rounded
        else:
            constants.update({key: value for key, value in rounded.items() if key in known})
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    calibration: dict[str, Any] = {
        "date": today,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **extra,
        "residuals": {fit.kind: fit.residuals for fit in fits},
    }
    if kernels:
        calibration["kernels"] = kernels
    sources = {
        **entry.get("sources", {}),
        **dict.fromkeys(constants, f"simulator calibrate, {today}"),
    }
    return {"name": name, **{k: v for k, v in entry.items() if k != "sources"},
            "constants": constants, "sources": sources, "calibration": calibration}  # fmt: skip


def write_accelerator(mapping: Mapping[str, Any], path: str | Path) -> Accelerator:
    """Write an accelerator file, whole or not at all, and return what the catalogue reads from it.

    Raises
    ------
    InputError
        If the mapping is no valid accelerator or the file cannot be written.
    """
    item = accelerator_from_mapping(mapping, str(path))
    text = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or "not writable"
        raise InputError(f"cannot write the file: {reason}", place=str(path)) from None
    return item
