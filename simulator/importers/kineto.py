"""PyTorch profiler (Kineto) traces: GPU kernels by stream, collectives with group and size.

Reads the JSON that `torch.profiler` exports (`export_chrome_trace`, `tensorboard_trace_handler`),
plain or gzipped. Used: `traceEvents` of kind `X` with category `kernel`, `gpu_memcpy`,
`gpu_memset` (work), `cuda_runtime` / `cuda_driver` (launch times, by correlation), `cuda_sync`
(stream waits, with `enable_cuda_sync_events`), `cpu_op` (shapes of matrix products, parameters of
collectives) and `user_annotation` (`ProfilerStep#n`); `distributedInfo` (rank, world size, process
groups). Field names: pytorch/kineto libkineto/src/output_json.cpp and CuptiActivity.cpp, and
torch/csrc/profiler/util.cpp for the parameters of collectives.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.importers.files import listed, parse_json, read_bytes
from simulator.importers.trace import MAX_RANKS, Trace, TraceOperation

_WORK = {"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"}
_LAUNCH = {"cuda_runtime", "cuda_driver", "runtime"}

#: c10d collective (with `_`, `-` dropped) -> operation; the cost of a reduction to, or a
#: distribution from, one rank is that of the broadcast of the same buffer.
_COLLECTIVES = {
    "allreduce": "all_reduce", "allreducecoalesced": "all_reduce", "barrier": "all_reduce",
    "allgather": "all_gather", "allgatherbase": "all_gather", "allgatherintotensor": "all_gather",
    "allgatherintotensorcoalesced": "all_gather", "allgathercoalesced": "all_gather",
    "allgathersingle": "all_gather", "allgatherv": "all_gather",
    "reducescatter": "reduce_scatter", "reducescatterbase": "reduce_scatter",
    "reducescattertensor": "reduce_scatter", "reducescattertensorcoalesced": "reduce_scatter",
    "reducescatterv": "reduce_scatter", "reducescattersingle": "reduce_scatter",
    "alltoall": "all_to_all", "alltoallv": "all_to_all", "alltoallbase": "all_to_all",
    "alltoallsingle": "all_to_all",
    "broadcast": "broadcast", "reduce": "broadcast", "gather": "broadcast",
    "scatter": "broadcast", "send": "send", "recv": "recv",
}  # fmt: skip

#: NCCL kernel names without parameters, e.g. ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL.
_NCCL_KERNEL = re.compile(
    r"nccl\w*?Kernel_(SendRecv|AllReduce|AllGather|ReduceScatter|Broadcast|Reduce)"
)
_NCCL_OPS = {
    "SendRecv": "all_to_all", "AllReduce": "all_reduce", "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter", "Broadcast": "broadcast", "Reduce": "broadcast",
}  # fmt: skip

#: Bytes per element by torch scalar type (c10/core/ScalarType.h), as `dtype` names it.
_ELEMENT = {
    "float": 4, "double": 8, "half": 2, "bfloat16": 2, "byte": 1, "char": 1, "short": 2, "int": 4,
    "long": 8, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "complexfloat": 8, "complexdouble": 16, "uint8": 1, "int8": 1,
    "int32": 4, "int64": 8, "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip

#: Kind of a kernel by its name, first match wins; the kinds of the simulator's own operations.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("attention", r"flash|fmha|attention|softmax_.*dropout.*bmm|cudnn.*sdpa"),
        ("grouped_gemm", r"grouped.?gemm|group_gemm"),
        ("gemm", r"gemm|xmma|cutlass.*(tensorop|mma)|nvjet|cublas|matmul|splitkreduce|hgmma|wgrad"),
        ("optimizer", r"adam|multi_tensor_apply|sgd|lamb|l2norm"),
        ("norm", r"layer_?norm|rms_?norm|ln_(fwd|bwd)|batch_?norm|gammabeta"),
        ("cross_entropy", r"nll_loss|cross_?entropy|log_softmax"),
        ("softmax", r"softmax"),
        ("embedding", r"embedding|index_?select|gather|scatter"),
        ("permute", r"permute|sort|topk"),
        ("activation", r"gelu|silu|swiglu|relu|sigmoid|tanh"),
        ("cast", r"cast|quant|convert"),
        ("elementwise", r"elementwise|vectorized|fill|triton|copy|cat|add|mul|dropout|rope|rotary"),
    )
)


def kernel_kind(name: str) -> str:
    """Kind of operation (`gemm`, `attention`, `norm`, ...) that a kernel's name suggests."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def read_kineto(paths: str | Path | Sequence[str | Path], *, step: int | None = None) -> Trace:
    """A trace from the profiler files of one or more ranks.

    Parameters
    ----------
    paths:
        A file, a folder of files (`*.json`, `*.json.gz`) or several files, one per rank.
    step:
        Keep only the work that was launched in `ProfilerStep#step`; all of it when left out.

    Raises
    ------
    InputError
        If a file is broken or has no GPU work, or two files are of the same rank.
    """
    files = _files(paths)
    operations: dict[int, tuple[TraceOperation, ...]] = {}
    groups: dict[str, tuple[int, ...]] = {}
    world = len(files)
    for index, path in enumerate(files):
        document = parse_json(read_bytes(path), place=str(path))
        single = kineto_trace(document, step=step, rank=index if len(files) > 1 else 0,
                              place=str(path))  # fmt: skip
        world = max(world, single.world_size)
        for rank, mine in single.operations.items():
            if rank in operations:
                raise InputError(f"rank {rank} is in two files", place=str(path))
            operations[rank] = mine
        groups.update(single.groups)
    name = str(files[0]) if len(files) == 1 else str(files[0].parent)
    return Trace(operations, groups, world, name)


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    files = listed(paths)
    if isinstance(paths, str | Path) and files != [Path(paths)]:
        files = [path for path in files if path.name.endswith((".json", ".json.gz"))]
        if not files:
            raise InputError("has no *.json or *.json.gz file", place=str(paths))
    if not files:
        raise InputError("no trace file given")
    return files


def _real(value: Any) -> float | None:
    """A finite number, also written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e18 else None


def _whole(value: Any) -> int | None:
    number = _real(value)
    return int(number) if number is not None else None


@dataclass(slots=True)
class _Kernel:
    """One piece of GPU work; times in microseconds."""

    event: Mapping[str, Any]
    args: Mapping[str, Any]
    stream: str
    start: float
    end: float
    launch: float
    """Time of the launching call, which orders work across streams; its start where unknown."""
    order: int
    nccl: bool
    waits: set[int] = field(default_factory=set)


def kineto_trace(
    document: Any, *, step: int | None = None, rank: int = 0, place: str = "trace"
) -> Trace:
    """The trace of one rank from a parsed file; see `read_kineto`.

    Dependencies between streams are those of `cuda_sync` events where the file has them.
    Otherwise they are inferred: a collective waits for the kernel launched last before it on
    another stream (ProcessGroupNCCL makes its stream wait for the current one), and a kernel that
    starts after a pause, less than 50 us after a collective launched before it has ended, waits
    for that.
    """
    events, info = _events(document, place)
    launches, cpu_ops, window = _host_events(events, step, place)
    kernels = _kernels(events, launches, window)
    if not kernels:
        what = f" launched in ProfilerStep#{step}" if step is not None else ""
        raise InputError(f"has no GPU work{what} (expected events of category kernel)", place=place)
    if not _explicit_waits(events, kernels, launches):
        _inferred_waits(kernels)
    number = _whole(info.get("rank"))
    number = rank if number is None or not 0 <= number < MAX_RANKS else number
    world = _whole(info.get("world_size")) or 1
    groups = _groups(info)
    operations: list[TraceOperation] = []
    for kernel in kernels:
        operations.append(_operation(kernel, cpu_ops, groups, number, world))
    largest = max((max(members) for members in groups.values()), default=0)
    world = min(max(world, largest + 1, number + 1), MAX_RANKS)
    if largest >= MAX_RANKS:
        raise InputError(f"a process group has rank {largest}", place=place)
    if any(op.group == _WORLD for op in operations):
        groups.setdefault(_WORLD, tuple(range(world)))
    return Trace({number: tuple(operations)}, groups, world, place)


_WORLD = "default"


def _events(document: Any, place: str) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    info: Any = {}
    if isinstance(document, Mapping):
        info = document.get("distributedInfo")
        document = document.get("traceEvents")
    if not isinstance(document, list):
        raise InputError("expected a JSON object with a list `traceEvents`", place=place)
    events = [event for event in document if isinstance(event, Mapping) and event.get("ph") == "X"]
    return events, info if isinstance(info, Mapping) else {}


def _args(event: Mapping[str, Any]) -> Mapping[str, Any]:
    args = event.get("args")
    return args if isinstance(args, Mapping) else {}


def _category(event: Mapping[str, Any]) -> str:
    return str(event.get("cat", "")).lower()


def _host_events(
    events: Sequence[Mapping[str, Any]], step: int | None, place: str
) -> tuple[dict[int, float], dict[int, list[Mapping[str, Any]]], tuple[float, float] | None]:
    """Launch times by correlation, CPU operators by external id, and the window of the step."""
    launches: dict[int, float] = {}
    cpu_ops: dict[int, list[Mapping[str, Any]]] = {}
    steps: dict[int, tuple[float, float]] = {}
    for event in events:
        category = _category(event)
        if category in _LAUNCH:
            correlation, ts = _whole(_args(event).get("correlation")), _real(event.get("ts"))
            if correlation is not None and ts is not None:
                launches[correlation] = ts
        elif category in ("cpu_op", "operator"):
            identity = _whole(_args(event).get("External id"))
            if identity is not None:
                cpu_ops.setdefault(identity, []).append(event)
        elif category == "user_annotation":
            match = re.match(r"^ProfilerStep#(\d{1,9})$", str(event.get("name")))
            start, length = _real(event.get("ts")), _real(event.get("dur"))
            if match and start is not None and length is not None:
                steps[int(match.group(1))] = (start, start + length)
    if step is None:
        return launches, cpu_ops, None
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)[:20])) or "none"
        raise InputError(f"has no ProfilerStep#{step} (it has: {known})", place=place)
    return launches, cpu_ops, steps[step]


def _kernels(
    events: Sequence[Mapping[str, Any]],
    launches: Mapping[int, float],
    window: tuple[float, float] | None,
) -> list[_Kernel]:
    kernels: list[_Kernel] = []
    for event in events:
        if _category(event) not in _WORK:
            continue
        args = _args(event)
        start, length = _real(event.get("ts")), _real(event.get("dur"))
        if start is None or length is None or length < 0:
            continue
        correlation = _whole(args.get("correlation"))
        launch = launches.get(correlation) if correlation is not None else None
        launch = start if launch is None else launch
        if window is not None and not window[0] <= launch <= window[1]:
            continue
        stream = _whole(args.get("stream"))
        stream = _whole(event.get("tid")) if stream is None else stream
        nccl = "nccl" in str(event.get("name", "")).lower() or "Collective name" in args
        label = f"stream {stream if stream is not None else '?'}"
        kernels.append(_Kernel(event, args, label, start, start + length, launch, 0, nccl))
    kernels.sort(key=lambda k: (k.start, k.end))
    last: dict[str, float] = {}
    for index, kernel in enumerate(kernels):
        kernel.order = index
        # Clock rounding lets kernels of a stream overlap by a nanosecond: a stream has none.
        kernel.start = max(kernel.start, last.get(kernel.stream, kernel.start))
        kernel.end = max(kernel.end, kernel.start)
        last[kernel.stream] = kernel.end
    return kernels


class _ByLaunch:
    """The kernels of one stream in launch order, to look up the last one launched before a time."""

    def __init__(self, kernels: Sequence[_Kernel]) -> None:
        self.kernels = sorted(kernels, key=lambda k: (k.launch, k.order))
        self.times = [k.launch for k in self.kernels]

    def before(self, time: float) -> _Kernel | None:
        position = bisect.bisect_left(self.times, time)
        return self.kernels[position - 1] if position else None

    def after(self, time: float) -> _Kernel | None:
        position = bisect.bisect_left(self.times, time)
        return self.kernels[position] if position < len(self.kernels) else None


def _streams(kernels: Sequence[_Kernel]) -> dict[str, _ByLaunch]:
    by_stream: dict[str, list[_Kernel]] = {}
    for kernel in kernels:
        by_stream.setdefault(kernel.stream, []).append(kernel)
    return {name: _ByLaunch(mine) for name, mine in by_stream.items()}


def _add_wait(kernel: _Kernel, producer: _Kernel) -> None:
    """A wait that the times contradict was not one (an inferred pair, or a reused event)."""
    if producer.order < kernel.order and producer.end <= kernel.start + 1.0:
        kernel.waits.add(producer.order)


def _explicit_waits(
    events: Sequence[Mapping[str, Any]], kernels: Sequence[_Kernel], launches: Mapping[int, float]
) -> bool:
    syncs = [
        event for event in events
        if _category(event) == "cuda_sync" and "Stream Wait" in str(event.get("name", ""))
    ]  # fmt: skip
    if not syncs:
        return False
    streams = _streams(kernels)
    for event in syncs:
        args = _args(event)
        waiting = streams.get(f"stream {_whole(args.get('stream'))}")
        producing = streams.get(f"stream {_whole(args.get('wait_on_stream'))}")
        own = launches.get(_whole(args.get("correlation")) or -1, _real(event.get("ts")))
        record = launches.get(_whole(args.get("wait_on_cuda_event_record_corr_id")) or -1, own)
        if waiting is None or producing is None or own is None or record is None:
            continue
        consumer, producer = waiting.after(own), producing.before(record)
        if consumer is not None and producer is not None:
            _add_wait(consumer, producer)
    return True


#: A kernel that starts this long after a collective's end can still have waited for it, us.
_WAKE_UP = 50.0


def _inferred_waits(kernels: Sequence[_Kernel]) -> None:
    compute = _ByLaunch([k for k in kernels if not k.nccl])
    ends = sorted((k for k in kernels if k.nccl), key=lambda k: (k.end, k.order))
    end_times = [k.end for k in ends]
    previous: dict[str, float] = {}
    for kernel in kernels:
        if kernel.nccl:
            producer = compute.before(kernel.launch)
            if producer is not None and producer.stream != kernel.stream:
                _add_wait(kernel, producer)
        elif kernel.start > previous.get(kernel.stream, kernel.start):
            position = bisect.bisect_right(end_times, kernel.start) - 1
            if position >= 0:
                found = ends[position]
                paused = found.end > previous.get(kernel.stream, 0.0)
                near = kernel.start - found.end < _WAKE_UP
                if paused and near and found.launch < kernel.launch:
                    _add_wait(kernel, found)
        previous[kernel.stream] = kernel.end


def _ranks(value: Any, size: int | None) -> tuple[int, ...]:
    """Ranks of "[0, 8, 16]" or a list; "[0, 8, ..., 56]" goes on as it begins."""
    if isinstance(value, list):
        whole = [_whole(item) for item in value[:MAX_RANKS]]
        numbers = [-1 if number is None else number for number in whole]
    elif isinstance(value, str):
        numbers = [int(text) for text in re.findall(r"\d{1,9}", value)]
        if "..." in value and size and len(numbers) > 1 and 1 < size <= MAX_RANKS:
            stride = numbers[1] - numbers[0]
            numbers = [numbers[0] + i * stride for i in range(size)]
    else:
        return ()
    fine = all(0 <= number < MAX_RANKS for number in numbers)
    return tuple(numbers) if fine and len(set(numbers)) == len(numbers) else ()


def _groups(info: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    groups: dict[str, tuple[int, ...]] = {}
    config = info.get("pg_config")
    for item in config if isinstance(config, list) else []:
        if isinstance(item, Mapping):
            members = _ranks(item.get("ranks"), _whole(item.get("pg_size")))
            if members:
                label = _label(item.get("pg_desc"), item.get("pg_name"))
                groups[_group_name(label, members)] = members
    return groups


def _label(description: Any, name: Any) -> str:
    """Description of a process group where it has one: alike for the groups of all ranks."""
    text = str(description or "").strip()
    return (text if text and text != "undefined" else str(name or ""))[:200].replace("/", "_")


def _group_name(name: str, members: Sequence[int]) -> str:
    """Names are counted per rank: the same name on other ranks may be another group."""
    return f"pg {name}/{members[0]}x{len(members)}-{members[-1]}"


def _operation(
    kernel: _Kernel,
    cpu_ops: Mapping[int, list[Mapping[str, Any]]],
    groups: dict[str, tuple[int, ...]],
    rank: int,
    world: int,
) -> TraceOperation:
    name = str(kernel.event.get("name", ""))[:500]
    start, end = kernel.start * 1e-6, kernel.end * 1e-6
    waits = tuple(sorted(kernel.waits))
    parents = cpu_ops.get(_whole(kernel.args.get("External id")) or -1, [])
    category = _category(kernel.event)
    own = _own(kernel.args)
    if not kernel.nccl:
        size = max(0.0, _real(kernel.args.get("bytes")) or 0.0)
        flops = max(0.0, _real(kernel.args.get("flops")) or 0.0)
        if own is not None:
            kind = own["kind"]
        elif category.endswith("memcpy"):
            kind = "host_copy" if re.search(r"HtoD|DtoH|Pageable|Pinned", name) else "copy"
        else:
            kind = "copy" if category.endswith("memset") else kernel_kind(name)
        if kind == "gemm" and not flops:
            flops = _gemm_flops(parents)
        op = TraceOperation(
            name, kernel.stream, kind, start, end, flops=flops, bytes=size, waits=waits
        )
        return op if own is None else dataclasses.replace(op, **own)
    args = kernel.args
    if "Collective name" not in args:
        args = next((_args(op) for op in parents if "Collective name" in _args(op)), args)
    plain = re.sub(r"[^a-z]", "", str(args.get("Collective name", "")).lower())
    operation = _COLLECTIVES.get(plain, "")
    if not operation:
        match = _NCCL_KERNEL.search(name)
        operation = _NCCL_OPS[match.group(1)] if match else "all_reduce"
    element = _ELEMENT.get(str(args.get("dtype", "")).lower(), 0)
    received = max(0.0, _real(args.get("In msg nelems")) or 0.0)
    sent = max(0.0, _real(args.get("Out msg nelems")) or 0.0)
    elements = sent if operation == "all_gather" else received or sent
    if plain == "barrier":
        elements, element = max(elements, 1.0), element or 1
    members = _ranks(args.get("Process Group Ranks"), _whole(args.get("Group size")))
    label = _label(args.get("Process Group Description"), args.get("Process Group Name"))
    group = _WORLD
    if members:
        group = _group_name(label, members)
        groups.setdefault(group, members)
    else:
        group = next((known for known in groups if known.startswith(f"pg {label}/")), "")
        if not group and (_whole(args.get("Group size")) or world) == world:
            group = _WORLD
        members = groups.get(group, ())
    peer = -1
    if operation in ("send", "recv"):
        peer = _peer(args, operation, members, rank)
    op = TraceOperation(
        name,
        kernel.stream,
        "send_recv" if operation in ("send", "recv") else operation,
        start,
        end,
        bytes=elements * element,
        waits=waits,
        collective=operation,
        group=group,
        peer=peer,
    )
    return op if own is None else dataclasses.replace(op, **own)


def _own(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a trace that the simulator wrote says beside Kineto's fields."""
    if not isinstance(args.get("Operation"), str) or not isinstance(args.get("Kind"), str):
        return None
    found: dict[str, Any] = {"name": args["Operation"][:500], "kind": args["Kind"][:100]}
    if isinstance(args.get("Phase"), str):
        found["phase"] = args["Phase"][:10]
    for key in ("stage", "layer", "microbatch"):
        number = _whole(args.get(key.capitalize()))
        if number is not None and -1 <= number < MAX_RANKS:
            found[key] = number
    return found


def _peer(args: Mapping[str, Any], operation: str, members: Sequence[int], rank: int) -> int:
    named = _whole(args.get("Dst Rank" if operation == "send" else "Src Rank"))
    if named is not None and 0 <= named < MAX_RANKS and named != rank:
        return named
    if len(members) == 2 and rank in members:
        return members[0] if members[1] == rank else members[1]
    return -1


def _gemm_flops(parents: Sequence[Mapping[str, Any]]) -> float:
    """2 m n k of the matrix product that launched a kernel, from its recorded input shapes."""
    for op in parents:
        name = str(op.get("name", ""))
        dims = _args(op).get("Input Dims")
        if not isinstance(dims, list):
            continue
        matrices = [
            [_whole(d) or 0 for d in dim]
            for dim in dims
            if isinstance(dim, list) and len(dim) in (2, 3)
        ]
        if name == "aten::addmm" and len(matrices) > 2:
            matrices = matrices[1:]
        if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::baddbmm"):
            if name == "aten::baddbmm":
                matrices = matrices[1:]
            if len(matrices) >= 2 and matrices[0][-1] == matrices[1][-2]:
                product = 2.0 * matrices[1][-1]
                for dim in matrices[0]:
                    product *= dim
                return product if 0 <= product < 1e24 else 0.0
    return 0.0
