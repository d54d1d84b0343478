"""The timeline as a Chrome trace with the fields that PyTorch's profiler (Kineto) writes.

Perfetto (ui.perfetto.dev) and chrome://tracing open it; with one file per rank and the launches on
the host's side, HolisticTraceAnalysis (HTA) does as well. Fields follow Kineto's
`output_json.cpp` and the Trace Event Format (Google, "Trace Event Format", 2016): times are
microseconds, written to the nanosecond.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simulator.model.operations import BYTES_PER_ELEMENT
from simulator.reports.columns import (
    Templates,
    awaited_rows,
    complete,
    launched_at,
    stream_number,
    stream_order,
    templates,
)
from simulator.reports.files import whole_file
from simulator.reports.palette import COMMUNICATION_KINDS, COPY_KINDS

#: Version of Kineto's trace schema whose fields are written.
SCHEMA_VERSION = 1

#: Names of torch's data types (`c10::ScalarType`), as `record_param_comms` writes them.
_DTYPES: dict[str, str] = {
    "fp32": "Float", "tf32": "Float", "fp16": "Half", "bf16": "BFloat16",
    "fp8": "Float8_e4m3fn", "mxfp8": "Float8_e4m3fn", "int8": "Char", "nvfp4": "Byte",
}  # fmt: skip

#: NCCL's kernel and PyTorch's collective name (ProcessGroupNCCL.cpp) of each kind.
_COLLECTIVES: dict[str, tuple[str, str]] = {
    "all_reduce": ("AllReduce", "allreduce"),
    "all_gather": ("AllGather", "_allgather_base"),
    "reduce_scatter": ("ReduceScatter", "_reduce_scatter_base"),
    "all_to_all": ("SendRecv", "all_to_all"),
    "broadcast": ("Broadcast", "broadcast"),
    "send_recv": ("SendRecv", "send"),
}

_HOST_PROCESS_OFFSET = 1_000_000
"""Process ids of the hosts in a trace are that of the rank plus this."""


@dataclass(frozen=True, eq=False)
class TraceJob:
    """What a trace says of the collectives of one job."""

    ranks: range
    name: str = ""
    """Empty where the job is alone on the cluster."""
    precision: str = "bf16"
    group_of: Mapping[str, str] = field(default_factory=dict)
    """Group name (`tensor`, `data_context`, ...) of each collective operation's name."""
    group_size: Mapping[str, int] = field(default_factory=dict)
    """Number of ranks of a group of each name."""

    def shown_group(self, group: str) -> str:
        """A group's name, which tells the groups of several jobs apart."""
        return f"{self.name}: {group}" if self.name and group else group


@dataclass(frozen=True, eq=False)
class TraceContext:
    """What a trace says beside the timeline's rows."""

    world_size: int
    accelerator: str = ""
    memory_bytes: float = 0.0
    title: str = ""
    jobs: tuple[TraceJob, ...] = ()
    """Jobs of the timeline, whose column `job` holds indices into them where they are several."""
    stands_for: Mapping[int, int] = field(default_factory=dict)
    """Number of ranks that behave as this rank does."""

    def job(self, index: int) -> TraceJob:
        """The job of that index."""
        return self.jobs[index] if self.jobs else TraceJob(range(self.world_size))


def write_trace(
    frame: pd.DataFrame,
    path: str | Path,
    context: TraceContext,
    *,
    rank: int | None = None,
    flows: bool = False,
    launches: bool = False,
) -> None:
    """Write a timeline as a Chrome trace; the file is whole or absent.

    Parameters
    ----------
    frame:
        A timeline (`Timeline.frame`).
    path:
        Ends in `.json`, or in `.json.gz` to be compressed.
    context:
        The cluster's side of the metadata.
    rank:
        The rank that `distributedInfo` names; the first of the timeline when left out.
    flows:
        Draw an arrow from the end of what an operation waited for to its start.
    launches:
        Write the host's side as well: one `cudaLaunchKernel` per operation and the `ProfilerStep`
        around them, which HTA needs to tell iterations apart.
    """
    frame = complete(frame)
    ranks = np.unique(frame["rank"]).tolist()
    streams = stream_order(frame["stream"].unique())
    first = rank if rank is not None else (int(frame["rank"].iloc[0]) if len(frame) else 0)
    _save([frame], path, context, first, ranks, streams, flows, launches)


def write_rank_traces(
    frames: Iterable[pd.DataFrame],
    path: str | Path,
    context: TraceContext,
    *,
    ranks: Sequence[int],
    streams: Iterable[str],
    flows: bool = False,
) -> None:
    """`write_trace` of a timeline that comes one rank at a time, so that it need not fit in memory.

    Parameters
    ----------
    frames:
        One complete timeline (`columns.complete`) per rank.
    ranks:
        The ranks that come.
    streams:
        All streams that come.
    flows:
        Draw arrows, within a rank only.
    """
    first = min(ranks, default=0)
    _save(frames, path, context, first, sorted(ranks), stream_order(streams), flows, False)


def write_hta(
    frames: pd.DataFrame | Iterable[pd.DataFrame], directory: str | Path, context: TraceContext
) -> list[Path]:
    """One trace per rank, named `rank-N.json.gz`, as HTA expects them in one directory.

    `frames` is one timeline, or several of different ranks, of which one is held at a time.
    """
    written = []
    for frame in [frames] if isinstance(frames, pd.DataFrame) else frames:
        for rank in np.unique(frame["rank"]).tolist():
            path = Path(directory) / f"rank-{rank}.json.gz"
            rows = frame[frame["rank"] == rank]
            write_trace(rows, path, context, rank=int(rank), launches=True)
            written.append(path)
    return written


# ------------------------------------------------------------------------------------ writing


def _save(frames: Iterable[pd.DataFrame], path: str | Path, *arguments: Any) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        if str(path).endswith(".gz"):
            # no name and no time in the header: same timeline, same bytes
            with gzip.GzipFile("", "wb", 2, raw, mtime=0) as packed:
                _write(frames, packed, *arguments)
        else:
            _write(frames, raw, *arguments)


def _write(
    frames: Iterable[pd.DataFrame],
    out: Any,
    context: TraceContext,
    first: int,
    ranks: Sequence[int],
    streams: list[str],
    flows: bool,
    launches: bool,
) -> None:
    text = io.TextIOWrapper(out, encoding="utf-8", newline="\n", write_through=False)
    text.write(f'{{\n"schemaVersion": {SCHEMA_VERSION},\n')
    text.write(f'"deviceProperties": {json.dumps(_devices(ranks, context))},\n')
    text.write(f'"distributedInfo": {json.dumps(_distributed(first, context))},\n')
    text.write('"displayTimeUnit": "ms",\n"baseTimeNanoseconds": 0,\n')
    text.write(f'"traceName": {json.dumps(context.title)},\n"traceEvents": [\n')
    numbers = {name: stream_number(name, streams) for name in streams}
    separator, done = "", 0
    for frame in frames:
        for chunk in _events(frame, context, numbers, flows, launches, done):
            text.write(separator + ",\n".join(chunk))
            separator = ",\n"
        done += len(frame)
    text.write("\n]}\n")
    text.flush()
    text.detach()


def _devices(ranks: Sequence[int], context: TraceContext) -> list[dict[str, Any]]:
    return [
        {
            "id": int(rank),
            "name": context.accelerator,
            "totalGlobalMem": round(context.memory_bytes),
        }
        for rank in ranks
    ]


def _distributed(rank: int, context: TraceContext) -> dict[str, Any]:
    groups = [
        (job.shown_group(name), job.group_size.get(name, 0))
        for job in context.jobs
        for name in sorted(set(job.group_of.values()))
    ]
    return {
        "backend": "nccl",
        "rank": rank,
        "world_size": context.world_size,
        "pg_count": len(groups),
        "pg_config": [
            {
                "pg_name": name,
                "pg_desc": name,
                "backend_config": "cuda:nccl",
                "pg_size": size,
            }
            for name, size in groups
        ],
    }


def _events(
    frame: pd.DataFrame,
    context: TraceContext,
    numbers: Mapping[str, int],
    flows: bool,
    launches: bool,
    done: int,
) -> Iterator[list[str]]:
    """The events of a timeline that `done` operations precede in the file, in chunks."""
    yield list(_metadata(frame, context, numbers, launches))
    if not len(frame):
        return
    # as a profiler shows it: a kernel that waits for its launch is not there yet
    frame = frame.assign(start=launched_at(frame))
    several = len(context.jobs) > 1 and "job" in frame.columns
    kinds = templates(frame, apart=("job",) if several else ())
    heads, tails = _templates(kinds, context, numbers)
    # to whole nanoseconds at both ends: rows that touch still touch, rows never overlap
    start = np.rint(frame["start"].to_numpy() * 1e9).astype(np.int64)
    end = np.rint(frame["end"].to_numpy() * 1e9).astype(np.int64)
    rank = frame["rank"].to_numpy().tolist()
    microbatch = frame["microbatch"].to_numpy().tolist()
    code = kinds.code.tolist()
    number = kinds.rows["stream"].astype(object).map(numbers).to_numpy()[kinds.code].tolist()
    begin, length = start.tolist(), (end - start).tolist()
    ts, dur = _micros(start), _micros(end - start)
    if launches:
        yield list(_steps(frame, start, end))
    size = 50_000
    for low in range(0, len(frame), size):
        chunk = []
        for i in range(low, min(low + size, len(frame))):
            template = code[i]
            chunk.append(
                f'{heads[template]}"ts": {ts[i]}, "dur": {dur[i]}, '
                f'"pid": {rank[i]}, {tails[template]}"device": {rank[i]}, '
                f'"correlation": {done + i + 1}, "External id": {done + i + 1}, '
                f'"Microbatch": {microbatch[i]}}}}}'
            )
            if launches:
                chunk.append(
                    '{"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", '
                    f'"ts": {ts[i]}, "dur": 0, "pid": {_HOST_PROCESS_OFFSET + rank[i]}, '
                    f'"tid": {_HOST_PROCESS_OFFSET + rank[i]}, '
                    f'"args": {{"correlation": {done + i + 1}, "External id": {done + i + 1}}}}}'
                )
        yield chunk
    if flows:
        yield from _arrows(frame, begin, length, rank, number, done)


def _micro(nanoseconds: int) -> str:
    """Nanoseconds as microseconds with three decimals, exactly."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def _micros(nanoseconds: np.ndarray) -> list[str]:
    """`_micro` of many."""
    whole, rest = (nanoseconds // 1000).tolist(), (nanoseconds % 1000).tolist()
    return [f"{a}.{b:03d}" for a, b in zip(whole, rest, strict=True)]


def _metadata(
    frame: pd.DataFrame, context: TraceContext, numbers: Mapping[str, int], launches: bool
) -> Iterator[str]:
    def event(name: str, pid: int, tid: int, args: Mapping[str, Any]) -> str:
        fields = {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": dict(args)}
        return json.dumps(fields, ensure_ascii=False)

    pairs = frame[["rank", "stream"]].drop_duplicates()
    for pid in np.unique(pairs["rank"]).tolist():
        rows = pairs[pairs["rank"] == pid]
        count = context.stands_for.get(pid, 1)
        name = f"rank {pid}" + (f" (and {count - 1} like it)" if count > 1 else "")
        job = next((job.name for job in context.jobs if pid in job.ranks), "")
        name = f"{job}: {name}" if job else name
        yield event("process_name", pid, 0, {"name": name})
        yield event("process_labels", pid, 0, {"labels": context.accelerator})
        yield event("process_sort_index", pid, 0, {"sort_index": pid})
        for index, stream in enumerate(stream_order(rows["stream"])):
            tid = numbers[stream]
            yield event("thread_name", pid, tid, {"name": f"stream {tid} {stream}"})
            yield event("thread_sort_index", pid, tid, {"sort_index": index})
        if launches:
            host = _HOST_PROCESS_OFFSET + pid
            yield event("process_name", host, 0, {"name": f"host of rank {pid}"})
            yield event("thread_name", host, host, {"name": "launches"})


def _steps(frame: pd.DataFrame, start: np.ndarray, end: np.ndarray) -> Iterator[str]:
    ranks, inverse = np.unique(frame["rank"].to_numpy(), return_inverse=True)
    last = np.zeros(len(ranks), dtype=np.int64)
    np.maximum.at(last, inverse, end)
    for rank, stop in zip(ranks.tolist(), last.tolist(), strict=True):
        pid = _HOST_PROCESS_OFFSET + rank
        yield (
            '{"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0.000, '
            f'"dur": {_micro(stop + 1000)}, "pid": {pid}, "tid": {pid}, "args": {{}}}}'
        )


def _templates(
    kinds: Templates, context: TraceContext, numbers: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """The two constant pieces of each distinct operation's event."""
    heads, tails = [], []
    for row in kinds.rows.to_dict("records"):
        kind, operation = str(row["kind"]), str(row["operation"])
        category = "gpu_memcpy" if kind in COPY_KINDS else "kernel"
        heads.append(
            f'{{"ph": "X", "cat": "{category}", '
            f'"name": {json.dumps(_kernel_name(kind, operation), ensure_ascii=False)}, '
        )
        args: dict[str, Any] = {
            "stream": numbers[str(row["stream"])],
            "Operation": operation,
            "Kind": kind,
            "Phase": str(row["phase"]),
            "Layer": int(row["layer"]),
            "Stage": int(row["stage"]),
            "flops": float(row["flops"]),
            "bytes": float(row["bytes"]),
        }
        if kind in COMMUNICATION_KINDS:
            job = context.job(int(row.get("job", 0)))
            args |= _collective_args(kind, operation, float(row["bytes"]), job)
        body = json.dumps(args, ensure_ascii=False)[:-1]
        tails.append(f'"tid": {numbers[str(row["stream"])]}, "args": {body}, ')
    return heads, tails


def _kernel_name(kind: str, operation: str) -> str:
    """HTA tells communication by `^nccl.*Kernel` and copies by `^Memcpy`."""
    if kind in _COLLECTIVES:
        return f"ncclDevKernel_{_COLLECTIVES[kind][0]}({operation})"
    if kind in COPY_KINDS:
        return f"Memcpy ({operation})"
    return operation


def _collective_args(kind: str, operation: str, size: float, job: TraceJob) -> dict[str, Any]:
    group = job.group_of.get(operation, "")
    members = job.group_size.get(group, 0)
    elements = round(size / BYTES_PER_ELEMENT.get(job.precision, 1.0))
    shard = elements // members if members else elements
    return {
        "Collective name": _COLLECTIVES.get(kind, (kind, kind))[1],
        "In msg nelems": shard if kind == "all_gather" else elements,
        "Out msg nelems": shard if kind == "reduce_scatter" else elements,
        "dtype": _DTYPES.get(job.precision, "Byte"),
        "Group size": 2 if kind == "send_recv" else members,
        "Process Group Name": job.shown_group(group),
        "Process Group Description": job.shown_group(group),
    }


def _arrows(
    frame: pd.DataFrame,
    begin: Sequence[int],
    length: Sequence[int],
    rank: Sequence[int],
    number: Sequence[int],
    done: int,
) -> Iterator[list[str]]:
    """Flow arrows from the end of what an operation waited for to its start."""
    source = awaited_rows(frame)
    chunk = []
    for target in np.flatnonzero(source >= 0).tolist():
        origin = int(source[target])
        common = f'"cat": "wait", "name": "waits for", "id": {done + target + 1}'
        # inside the slice, at its end: Perfetto binds an arrow to the slice that encloses it
        leave = max(begin[origin], begin[origin] + length[origin] - 1)
        chunk.append(
            f'{{"ph": "s", {common}, "ts": {_micro(leave)}, "pid": {rank[origin]}, '
            f'"tid": {number[origin]}}}'
        )
        chunk.append(
            f'{{"ph": "f", "bp": "e", {common}, "ts": {_micro(begin[target])}, '
            f'"pid": {rank[target]}, "tid": {number[target]}}}'
        )
    if chunk:
        yield chunk
