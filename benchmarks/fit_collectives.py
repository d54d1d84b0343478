"""Fit the constants of one-node collectives of `simulator/catalog/collectives.yaml`.

    python benchmarks/fit_collectives.py FILE.csv [--leave-out SOURCE ...]

Prints, per accelerator, the entries `ring`, `nvls` and `all_to_all`, and the errors by source;
those of sources left out of the fit are marked. The formula is that of
`simulator.costs.collectives` inside one NVSwitch domain (a test holds both equal):

    min over protocols of  start + steps * hop + ramp * sqrt(wire) + wire / (share R) + copy
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from simulator.catalog.accelerators import accelerator

Array = np.ndarray
MB = 1e6

#: name -> (start value, lower, upper bound). hop_simple stays below NCCL's own constant for an
#: NVLink hop (3.4 us): with 2 and 8 GPUs it trades against the ramp, and it must extrapolate to 72.
RING = {
    "base": (6.0, 1.0, 20.0), "start_simple": (6.0, 0.2, 20.0), "hop_ll": (0.8, 0.1, 3.0),
    "hop_ll128": (1.2, 0.1, 4.0), "hop_simple": (0.3, 0.05, 3.4), "share_ll": (0.036, 0.005, 0.2),
    "share_ll128": (0.25, 0.08, 0.6), "share_simple": (0.8, 0.5, 0.95), "ramp": (4.0, 0.01, 12.0),
    "copy": (2.0, 0.5, 8.0),
}  # fmt: skip
NVLS = {
    "base": (18.0, 8.0, 30.0), "share_simple": (0.73, 0.4, 0.98), "ramp": (9.0, 0.2, 25.0),
    "start_ll": (1.8, 0.1, 20.0), "share_ll": (0.25, 0.05, 0.9),
}  # fmt: skip
ALL_TO_ALL = {
    "base": (8.0, 2.0, 20.0), "hop": (0.3, 0.02, 2.0), "share_ll": (0.03, 0.005, 0.6),
    "start_simple": (4.0, 0.1, 20.0), "share_simple": (0.72, 0.4, 0.95), "copy": (3.0, 0.5, 9.0),
    "ramp": (3.0, 0.01, 12.0), "hop_simple": (0.2, 0.02, 2.0),
}  # fmt: skip


def ring_us(p: dict[str, float], op: Array, n: Array, b: Array, rate: float) -> Array:
    """Microseconds of an out-of-place ring; `rate` in byte/us."""
    rounds = np.where(op == "all_reduce", 2.0, 1.0)
    wire, steps = rounds * (n - 1) / n * b, rounds * (n - 1)
    copy = b / n / p["copy"] / rate
    return np.minimum.reduce(
        [
            p["base"] + steps * p["hop_ll"] + wire / (p["share_ll"] * rate),
            p["base"] + steps * p["hop_ll128"] + wire / (p["share_ll128"] * rate),
            p["base"] + p["start_simple"] + steps * p["hop_simple"]
            + wire / (p["share_simple"] * rate) + p["ramp"] * np.sqrt(wire / MB),
        ]
    ) + copy  # fmt: skip


def nvls_us(p: dict[str, float], n: Array, b: Array, rate: float) -> Array:
    """Microseconds of an all-reduce in the switch."""
    wire = b * (1 + 1 / n)
    return np.minimum(
        p["base"] + wire / (p["share_simple"] * rate) + p["ramp"] * np.sqrt(b / MB),
        p["base"] + p["start_ll"] + wire / (p["share_ll"] * rate),
    )


def all_to_all_us(p: dict[str, float], n: Array, b: Array, rate: float) -> Array:
    """Microseconds of an out-of-place all-to-all."""
    wire, own = (n - 1) / n * b, b / n
    return np.minimum(
        p["base"] + (n - 1) * p["hop"] + (wire + own) / (p["share_ll"] * rate),
        p["base"] + p["start_simple"] + (n - 1) * p["hop_simple"]
        + wire / (p["share_simple"] * rate) + own / p["copy"] / rate + p["ramp"] * np.sqrt(b / MB),
    )  # fmt: skip


def fit(
    bounds: dict[str, tuple[float, float, float]], model: Callable[[dict[str, float]], Array],
    measured: Array, b: Array,
) -> dict[str, float]:  # fmt: skip
    """Constants with the least robust squared log error; sizes from 1 MB count more."""
    weight = np.where(b >= MB, 1.5, 0.6)
    low, high = (np.log([v[i] for v in bounds.values()]) for i in (1, 2))
    start = np.log([v[0] for v in bounds.values()])
    rng = np.random.default_rng(0)
    best = None
    for attempt in range(24):
        jitter = rng.normal(0, (0.3, 1.0)[attempt % 2], len(start)) if attempt else 0.0
        result = least_squares(
            lambda q: weight * np.log(model(dict(zip(bounds, np.exp(q), strict=True))) / measured),
            np.clip(start + jitter, low + 1e-6, high - 1e-6), bounds=(low, high),
            loss="soft_l1", f_scale=0.08,
        )  # fmt: skip
        if best is None or result.cost < best.cost:
            best = result
    assert best is not None
    return dict(zip(bounds, np.exp(best.x).tolist(), strict=True))


def report(title: str, data: pd.DataFrame, error: Array, left_out: set[str]) -> None:
    for source in sorted(data.source.unique()):
        for low, high in ((MB, 16e6), (16e6, np.inf)):
            where = ((data.source == source) & (data.bytes >= low) & (data.bytes < high)).to_numpy()
            if where.any():
                e = np.abs(error[where])
                mark = " (left out)" if source in left_out else ""
                print(
                    f"#   {title} {source}{mark} {'>= 16 MB' if low > MB else '1-16 MB'}: "
                    f"n {where.sum()}, median {100 * np.median(e):.1f} %, "
                    f"90th {100 * np.quantile(e, 0.9):.1f} %"
                )


def show(name: str, constants: dict[str, float]) -> None:
    print(f"    {name}: {{{', '.join(f'{k}: {v:.4g}' for k, v in constants.items())}}}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--leave-out", nargs="*", default=[])
    arguments = parser.parse_args()
    left_out = set(arguments.leave_out)
    table = pd.read_csv(arguments.data, comment="#")
    table = table[table.n_nodes == 1]
    for gpu, rows in table.groupby("gpu"):
        device = accelerator(gpu)
        rate = device.scale_up_bandwidth * 1e-6
        print(f"  # {device.name}")
        reduces = rows[rows.collective.isin(["all_reduce", "all_gather", "reduce_scatter"])]
        nvls = device.family in ("hopper", "blackwell")
        bounds = {f"ring.{k}": v for k, v in RING.items()}
        if nvls:
            bounds |= {f"nvls.{k}": v for k, v in NVLS.items()}

        def columns(data: pd.DataFrame) -> tuple[Array, Array, Array]:
            return (
                data.collective.to_numpy(), data.n_gpus.to_numpy(float), data.bytes.to_numpy(float)
            )  # fmt: skip

        def model(
            p: dict[str, float], data: pd.DataFrame, rate: float = rate, nvls: bool = nvls
        ) -> Array:
            op, n, b = columns(data)
            time = ring_us({k[5:]: v for k, v in p.items() if k[:4] == "ring"}, op, n, b, rate)
            if nvls:
                other = nvls_us({k[5:]: v for k, v in p.items() if k[:4] == "nvls"}, n, b, rate)
                time = np.where((op == "all_reduce") & (n >= 3), np.minimum(time, other), time)
            return time

        train = reduces[~reduces.source.isin(left_out)]
        found = fit(
            bounds, lambda p, t=train: model(p, t), train.latency_us.to_numpy(),
            train.bytes.to_numpy(float),
        )  # fmt: skip
        show("ring", {k[5:]: v for k, v in found.items() if k[:4] == "ring"})
        if nvls:
            show("nvls", {k[5:]: v for k, v in found.items() if k[:4] == "nvls"})
        report(
            "ring/nvls",
            reduces,
            model(found, reduces) / reduces.latency_us.to_numpy() - 1,
            left_out,
        )
        swaps = rows[rows.collective == "alltoall"]
        train = swaps[~swaps.source.isin(left_out)]
        _, n, b = columns(train)
        constants = fit(
            ALL_TO_ALL, lambda p, n=n, b=b, rate=rate: all_to_all_us(p, n, b, rate),
            train.latency_us.to_numpy(), b,
        )  # fmt: skip
        show("all_to_all", constants)
        _, n, b = columns(swaps)
        report(
            "all_to_all", swaps,
            all_to_all_us(constants, n, b, rate) / swaps.latency_us.to_numpy() - 1, left_out,
        )  # fmt: skip


if __name__ == "__main__":
    main()
