"""Files of measured collectives: times or bandwidths, in place or not, foreign accelerators."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.costs.collectives import bus_factor
from simulator.costs.collectives_predict import predict_collective
from simulator.studies.kernel_validation import validate_file

OPS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "sendrecv", "broadcast", "gather")


def table(gpu: str = "H100-SXM5") -> pd.DataFrame:
    rows = [
        {
            "collective": op, "n_gpus": n, "n_nodes": 1, "gpus_per_node": n, "bytes": size,
            "latency_us": 1e6 * predict_collective(op, gpu, n, 1, n, size), "gpu": gpu,
            "network": "NVSwitch", "algo": "nccl-default",
        }
        for op in OPS for n in (2, 3, 5, 8) for size in (1e4, 1e7, 1e9)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def errors(frame: pd.DataFrame, tmp_path, **options) -> np.ndarray:
    path = tmp_path / "collectives.csv"
    frame.to_csv(path, index=False)
    result = validate_file(path, **options)
    assert result.kind == "collectives"
    assert not any(result.reasons)
    return result.error


def test_times_and_bandwidths_say_the_same(tmp_path):
    frame = table()
    factor = [
        bus_factor({"alltoall": "all_to_all", "gather": "all_to_all"}.get(op, op), n)
        for op, n in zip(frame.collective, frame.n_gpus, strict=True)
    ]
    algbw = frame.bytes / frame.latency_us / 1e3
    bare = frame.drop(columns="latency_us")
    for other in (
        frame,
        bare.assign(time_us=frame.latency_us),
        bare.assign(algbw_gbps=algbw),
        bare.assign(busbw_gbps=algbw * factor),
    ):
        np.testing.assert_allclose(errors(other, tmp_path), 0.0, atol=1e-9)


def test_in_place_rows_lack_the_copy_of_an_all_gather(tmp_path):
    frame = table().query("collective in ('all_gather', 'reduce_scatter') and bytes > 1e8")
    error = errors(frame.assign(in_place="yes"), tmp_path)
    gathers = (frame.collective == "all_gather").to_numpy()
    assert (error[gathers & (frame.n_gpus == 2).to_numpy()] < -0.05).all()
    np.testing.assert_allclose(error[~gathers], 0.0, atol=1e-9)


@pytest.mark.parametrize(
    "gpu", ["H200", "H800", "A800", "GB200", "B300", "V100", "L40S", "A40", "MI300X", "TPU-v5p"]
)
def test_every_accelerator_of_the_catalogue_is_predicted(gpu, tmp_path):
    """Groups of any size, any operation: a finite positive time, longer for more bytes."""
    frame = table()
    frame = frame[frame.n_gpus.isin([2, 8])] if gpu.startswith("TPU") else frame
    error = errors(frame, tmp_path, accelerator_name=gpu)
    seconds = ((1 + error) * frame.latency_us.to_numpy()).reshape(-1, 3)
    assert (seconds > 0).all()
    assert (np.diff(seconds, axis=1) > 0).all()
