"""A simulated step, and a synthetic one whose every figure is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.experiment import parse_experiment
from simulator.reports.columns import complete
from simulator.reports.trace import TraceContext
from simulator.reports.view import RunView
from simulator.simulation import Result, run

EXPERIMENT = {
    "name": "tiny GPT",
    "model": {"family": "gpt", "layers": 4, "hidden": 256, "heads": 4, "vocab": 1024,
              "max_seq": 128},
    "cluster": {"topology": "dgx-h100", "nodes": 1},
    "parallel": {"tensor": 2, "pipeline": 2, "sharding": "zero1"},
    "training": {"micro_batch_size": 1, "global_batch_size": 16},
}  # fmt: skip


@pytest.fixture(scope="session")
def result() -> Result:
    """One step of a tiny model on 8 H100."""
    return run(parse_experiment(EXPERIMENT))


def synthetic(
    ranks: int, per_stream: int, *, streams: tuple[str, ...] = ("compute", "data"), seed: int = 0
) -> pd.DataFrame:
    """A timeline with `per_stream` operations on every stream: back to back or with gaps."""
    random = np.random.default_rng(seed)
    names = np.array([f"op{i}" for i in range(37)], dtype=object)
    kinds = np.array(["gemm", "attention", "norm", "all_reduce", "all_gather"])
    parts = []
    for rank in range(ranks):
        for stream in streams:
            length = random.gamma(2.0, 1e-4, per_stream)
            gap = np.where(random.random(per_stream) < 0.2, random.gamma(1.0, 1e-4, per_stream), 0)
            end = np.cumsum(length + gap)
            number = np.arange(per_stream)
            kind = number % 3 if stream == "compute" else 3 + number % 2
            parts.append(
                pd.DataFrame(
                    {
                        "rank": rank,
                        "stage": number % 4,
                        "stream": stream,
                        "operation": names[number % len(names)],
                        "kind": kinds[kind],
                        "phase": np.array(["F", "I", "W"])[number % 3],
                        "layer": number % 12,
                        "microbatch": number // 12,
                        "start": end - length,
                        "end": end,
                        "flops": 1e9 * (number % 5),
                        "bytes": 1e6 * (number % 7),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def view_of_frame(frame: pd.DataFrame, title: str = "synthetic", **more: object) -> RunView:
    """A view with nothing but a timeline."""
    frame = complete(frame)
    ranks = np.unique(frame["rank"]).tolist()
    step = float(frame["end"].max())
    fields: dict[str, object] = {
        "title": title,
        "summary": {"step_time_s": step},
        "frame": frame,
        "step_time": step,
        "rank_labels": {int(r): f"rank {r}" for r in ranks},
        "trace": TraceContext(world_size=len(ranks), accelerator="H100-80GB-SXM", title=title),
    }
    return RunView(**{**fields, **more})  # type: ignore[arg-type]
