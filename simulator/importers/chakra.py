"""MLCommons Chakra execution traces, in and out.

A trace is one file per rank, `NAME.RANK.et`: a `GlobalMetadata` message and then `Node` messages,
each preceded by its length as a varint. `NAME.json` beside them lists the ranks of every process
group by name, the form that ASTRA-sim takes as its communicator-group configuration.

A node's standard attributes are those that ASTRA-sim's feeder reads: `comm_type`, `comm_size`,
`pg_name`, `comm_src`, `comm_dst`, `comm_tag`, `num_ops`, `tensor_size`, `is_cpu_op`. The fields
`start_time_micros` and `duration_micros` are whole microseconds, so that exact seconds and what
Chakra has no field for are attributes named `simulator.*`: a trace that was written here is read
back unchanged.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.importers.chakra_schema import COLLECTIVE_TYPES, NODE_TYPES, messages
from simulator.importers.export import as_trace
from simulator.importers.files import gunzip, listed, parse_json, read_bytes, replacing_folder
from simulator.importers.trace import COLLECTIVES, MAX_RANKS, Trace, TraceOperation

#: Version of the schema that is written; ASTRA-sim's traces carry the same.
SCHEMA_VERSION = "0.0.4"

_COMM_TYPE = {name.lower(): number for name, number in COLLECTIVE_TYPES.items()}
#: comm_type -> operation. The cost of a reduction to, or a distribution from, one rank is that of
#: the broadcast of the same buffer; a barrier is an all-reduce of nothing.
_OPERATION = {
    0: "all_reduce", 1: "broadcast", 2: "all_gather", 3: "broadcast", 4: "broadcast",
    5: "broadcast", 6: "all_to_all", 7: "reduce_scatter", 8: "reduce_scatter", 9: "all_reduce",
}  # fmt: skip
_MAX_NODES = 50_000_000
_MAX_MESSAGE = 64 * 2**20

# ------------------------------------------------------------------------------------ writing


def write_chakra(
    source: Trace | Any, directory: str | Path, *, name: str = "trace", ranks: Any = None
) -> list[Path]:
    """Write a Chakra trace: `directory/name.RANK.et` per rank and `directory/name.json`.

    Parameters
    ----------
    source:
        A `Trace`; a simulated `Timeline` or `Result` (its `frame()` is used, with groups and peers
        from its workload); or a DataFrame with a timeline's columns.
    ranks:
        Passed to the timeline's `frame`: which ranks to write; its default when None.

    Returns
    -------
    The files written, the group file last.

    Raises
    ------
    InputError
        If the folder cannot be written or protobuf is not installed.
    """
    trace = source if isinstance(source, Trace) else as_trace(source, ranks=ranks)
    groups = {group: list(members) for group, members in trace.groups.items()}
    with replacing_folder(directory) as folder:
        for rank in sorted(trace.operations):
            (folder / f"{name}.{rank}.et").write_bytes(encode_rank(trace, rank))
        (folder / f"{name}.json").write_bytes(json.dumps(groups, indent=1).encode())
    names = [f"{name}.{rank}.et" for rank in sorted(trace.operations)]
    return [Path(directory) / file for file in [*names, f"{name}.json"]]


def encode_rank(trace: Trace, rank: int) -> bytes:
    """The bytes of one rank's file."""
    kinds = messages()
    out = io.BytesIO()
    metadata = kinds.GlobalMetadata(version=SCHEMA_VERSION)
    _set(metadata, "schema", "string", "chakra")
    _set(metadata, "rank", "int64", rank)
    _set(metadata, "world_size", "int64", trace.world_size)
    _set(metadata, "simulator.name", "string", trace.name)
    _append(out, metadata)
    last_of_stream: dict[str, int] = {}
    tags: dict[tuple[str, int], int] = {}
    for position, op in enumerate(trace.operations[rank]):
        node = kinds.Node(id=position, name=op.name)
        node.start_time_micros = max(0, round(op.start * 1e6))
        node.duration_micros = max(0, round(op.duration * 1e6))
        before = last_of_stream.get(op.stream)
        if before is not None:
            node.ctrl_deps.append(before)
        last_of_stream[op.stream] = position
        node.data_deps.extend(op.waits)
        _set(node, "is_cpu_op", "bool", False)
        if op.collective in COLLECTIVES:
            node.type = NODE_TYPES["COMM_COLL_NODE"]
            _set(node, "comm_type", "int64", _COMM_TYPE[op.collective])
            _set(node, "comm_size", "int64", round(op.bytes))
            _set(node, "pg_name", "string", op.group)
        elif op.collective in ("send", "recv"):
            sends = op.collective == "send"
            node.type = NODE_TYPES["COMM_SEND_NODE" if sends else "COMM_RECV_NODE"]
            _set(node, "comm_size", "int64", round(op.bytes))
            _set(node, "comm_src", "int32", rank if sends else op.peer)
            _set(node, "comm_dst", "int32", op.peer if sends else rank)
            tag = tags.get((op.collective, op.peer), 0)
            tags[op.collective, op.peer] = tag + 1
            _set(node, "comm_tag", "int32", tag)
            if op.group:
                _set(node, "pg_name", "string", op.group)
        else:
            node.type = NODE_TYPES["COMP_NODE"]
            _set(node, "num_ops", "int64", min(round(op.flops), 2**63 - 1))
            _set(node, "tensor_size", "uint64", round(op.bytes))
        _set(node, "simulator.stream", "string", op.stream)
        _set(node, "simulator.kind", "string", op.kind)
        _set(node, "simulator.phase", "string", op.phase)
        if op.match:
            _set(node, "simulator.match", "string", op.match)
        if op.overhead:
            _set(node, "simulator.overhead", "double", op.overhead)
        for key in ("start", "end", "flops", "bytes"):
            _set(node, f"simulator.{key}", "double", float(getattr(op, key)))
        for key in ("stage", "layer", "microbatch"):
            _set(node, f"simulator.{key}", "int64", int(getattr(op, key)))
        _append(out, node)
    return out.getvalue()


def _set(message: Any, name: str, kind: str, value: Any) -> None:
    attribute = message.attr.add()
    attribute.name = name
    setattr(attribute, f"{kind}_val", value)


def _append(out: io.BytesIO, message: Any) -> None:
    # Deterministic serialisation: the same trace is the same bytes on every run.
    data = message.SerializeToString(deterministic=True)
    out.write(_varint(len(data)))
    out.write(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# ------------------------------------------------------------------------------------ reading


def read_chakra(path: str | Path | Sequence[str | Path]) -> Trace:
    """A trace from Chakra files.

    Parameters
    ----------
    path:
        A folder with `NAME.RANK.et` files (and group lists in `*.json`), or the files.

    Raises
    ------
    InputError
        If a file is missing or broken, ranks repeat, dependencies form a cycle, or protobuf is not
        installed.
    """
    files, groups = _files(path)
    operations: dict[int, tuple[TraceOperation, ...]] = {}
    world = 0
    title = ""
    claimed: set[str] = set()
    for index, file in enumerate(files):
        match = re.search(r"\.(\d{1,7})\.et(\.gz)?$", file.name)
        number = int(match.group(1)) if match else index
        rank, size, name, mine = decode_rank(read_bytes(file), rank=number, place=str(file))
        if rank in operations:
            raise InputError(f"rank {rank} is in two files", place=str(file))
        operations[rank] = mine
        world, title = max(world, size, rank + 1), title or name
        claimed.update(op.group for op in mine if op.collective in COLLECTIVES)
    for members in groups.values():
        world = max(world, max(members, default=0) + 1)
    for group in sorted(claimed - set(groups)):
        # ASTRA-sim: a collective without a known group runs over all ranks
        groups[group] = tuple(range(world))
    used = {group: members for group, members in groups.items() if members}
    return Trace(operations, used, world, title)


def _files(
    path: str | Path | Sequence[str | Path],
) -> tuple[list[Path], dict[str, tuple[int, ...]]]:
    names = listed(path)
    files = [p for p in names if p.name.endswith((".et", ".et.gz"))] or [
        p for p in names if not p.name.endswith(".json")
    ]
    if not files or (
        len(names) != 1 and not any(p.name.endswith((".et", ".et.gz")) for p in files)
    ):
        raise InputError("has no *.et file", place=str(path))
    groups: dict[str, tuple[int, ...]] = {}
    for p in names:
        if p.name.endswith(".json"):
            groups.update(_read_groups(p))
    return files, groups


def _read_groups(path: Path) -> dict[str, tuple[int, ...]]:
    value = parse_json(read_bytes(path, limit=2**28), place=str(path))
    if not isinstance(value, dict):
        raise InputError("expected a mapping of group names to lists of ranks", place=str(path))
    groups: dict[str, tuple[int, ...]] = {}
    for name, members in value.items():
        fine = isinstance(members, list) and all(
            isinstance(m, int) and not isinstance(m, bool) and 0 <= m < MAX_RANKS for m in members
        )
        if not fine or len(set(members)) != len(members):
            raise InputError(f"group {name!r}: expected a list of distinct ranks", place=str(path))
        groups[name] = tuple(members)
    return groups


def decode_rank(
    data: bytes,
    *,
    rank: int = 0,
    place: str = "Chakra trace",
) -> tuple[int, int, str, tuple[TraceOperation, ...]]:
    """Rank, world size (0: not stated), name and operations of one rank's file.

    Nodes are laid out in an order that respects their dependencies; computation without a stream
    of its own runs on `compute`, communication on one stream per process group.
    """
    kinds = messages()
    data = gunzip(data, place=place)
    chunks = _messages(data, place)
    metadata = kinds.GlobalMetadata()
    try:
        first = next(chunks)
    except StopIteration:
        raise InputError("is empty", place=place) from None
    nodes: list[Any] = []
    _parse(metadata, first, place)
    for chunk in chunks:
        node = kinds.Node()
        _parse(node, chunk, place)
        nodes.append(node)
        if len(nodes) > _MAX_NODES:
            raise InputError(f"more than {_MAX_NODES} nodes", place=place)
    about = _attributes(metadata)
    rank = _integer(about.get("rank"), rank, MAX_RANKS)
    world = _integer(about.get("world_size"), 0, MAX_RANKS + 1)
    nodes = [node for node in nodes if node.type not in (0, 1)]
    order = _order(nodes, place)
    position = {node.id: index for index, node in enumerate(order)}
    operations: list[TraceOperation] = []
    clock: dict[str, float] = {}
    for node in order:
        attributes = _attributes(node)
        op = _node_operation(node, attributes, place)
        own = "simulator.stream" in attributes
        # What was written here lists exactly what an operation waited for. Elsewhere every
        # dependency counts; those on the same stream are implied by its order.
        dependencies = node.data_deps if own else (*node.data_deps, *node.ctrl_deps)
        kept = sorted({position[d] for d in dependencies if d in position})
        if not own:
            kept = [w for w in kept if operations[w].stream != op.stream]
        start, end = op.start, op.end
        if "simulator.start" not in attributes:
            ready = max([clock.get(op.stream, 0.0)] + [operations[w].end for w in kept])
            start = max(op.start, ready)
            end = start + op.duration
        clock[op.stream] = max(end, clock.get(op.stream, 0.0))
        operations.append(replace(op, start=start, end=end, waits=tuple(kept)))
    return rank, world, str(about.get("simulator.name", "")), tuple(operations)


def _messages(data: bytes, place: str) -> Iterator[bytes]:
    """The length-delimited messages of a file."""
    offset, end = 0, len(data)
    while offset < end:
        length = shift = 0
        while True:
            if offset >= end or shift > 28:
                raise InputError(f"broken message length at byte {offset}", place=place)
            byte = data[offset]
            offset += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if length > min(end - offset, _MAX_MESSAGE):
            raise InputError(
                f"a message of {length} bytes at byte {offset}, but {end - offset} are left; "
                "the file is cut off or no Chakra trace",
                place=place,
            )
        yield data[offset : offset + length]
        offset += length


def _parse(message: Any, data: bytes, place: str) -> None:
    try:
        message.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError and what its backends raise besides
        raise InputError(f"not a Chakra message: {error}", place=place) from None


def _attributes(message: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for attribute in message.attr:
        kind = attribute.WhichOneof("value")
        if kind is not None:
            value = getattr(attribute, kind)
            values[attribute.name] = list(value.values) if kind.endswith("_list") else value
    return values


def _integer(value: Any, default: int, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return int(value) if -1 <= value < limit else default


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if math.isfinite(value) and 0 <= value < 1e30 else 0.0


def _order(nodes: Sequence[Any], place: str) -> list[Any]:
    """Nodes after everything they depend on; by position in the file where that leaves a choice."""
    import heapq

    index = {node.id: i for i, node in enumerate(nodes)}
    if len(index) != len(nodes):
        raise InputError("two nodes have the same id", place=place)
    after: dict[int, list[int]] = {}
    open_ = [0] * len(nodes)
    for i, node in enumerate(nodes):
        for dependency in {*node.data_deps, *node.ctrl_deps}:
            if dependency in index:
                after.setdefault(index[dependency], []).append(i)
                open_[i] += 1
    ready = [i for i, count in enumerate(open_) if count == 0]
    heapq.heapify(ready)
    order: list[Any] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(nodes[i])
        for j in after.get(i, ()):
            open_[j] -= 1
            if open_[j] == 0:
                heapq.heappush(ready, j)
    if len(order) != len(nodes):
        raise InputError("dependencies form a cycle", place=place)
    return order


def _node_operation(node: Any, attributes: Mapping[str, Any], place: str) -> TraceOperation:
    start = _exact(attributes, "simulator.start", node.start_time_micros * 1e-6)
    end = _exact(attributes, "simulator.end", start + node.duration_micros * 1e-6)
    collective, group, peer = "", "", -1
    if node.type == NODE_TYPES["COMM_COLL_NODE"]:
        number = _integer(attributes.get("comm_type"), -1, 10)
        if number not in _OPERATION:
            raise InputError(
                f"node {node.id} ({node.name[:60]!r}): unknown comm_type "
                f"{attributes.get('comm_type')!r}",
                place=place,
            )
        collective = _OPERATION[number]
        group = str(attributes.get("pg_name", ""))
        default_kind, size = collective, _real(attributes.get("comm_size"))
        if number == COLLECTIVE_TYPES["BARRIER"]:
            size = max(size, 4.0)  # an all-reduce of one element
    elif node.type in (NODE_TYPES["COMM_SEND_NODE"], NODE_TYPES["COMM_RECV_NODE"]):
        sends = node.type == NODE_TYPES["COMM_SEND_NODE"]
        collective = "send" if sends else "recv"
        peer = _integer(attributes.get("comm_dst" if sends else "comm_src"), -1, MAX_RANKS)
        group = str(attributes.get("pg_name", ""))
        default_kind, size = "send_recv", _real(attributes.get("comm_size"))
    elif node.type in (NODE_TYPES["MEM_LOAD_NODE"], NODE_TYPES["MEM_STORE_NODE"]):
        default_kind, size = "host_copy", _real(attributes.get("tensor_size"))
    else:
        default_kind, size = "compute", _real(attributes.get("tensor_size"))
    flops = 0.0 if collective else _real(attributes.get("num_ops"))
    stream = attributes.get("simulator.stream")
    if not isinstance(stream, str):
        stream = f"{collective} {group}".strip() if collective else "compute"
        if default_kind == "host_copy":
            stream = "copy"
    return TraceOperation(
        name=node.name,
        stream=stream,
        kind=str(attributes.get("simulator.kind", default_kind)),
        start=start,
        end=max(start, end),
        phase=str(attributes.get("simulator.phase", "")),
        stage=_integer(attributes.get("simulator.stage"), -1, 2**31),
        layer=_integer(attributes.get("simulator.layer"), -1, 2**31),
        microbatch=_integer(attributes.get("simulator.microbatch"), -1, 2**31),
        flops=_exact(attributes, "simulator.flops", flops),
        bytes=_exact(attributes, "simulator.bytes", size),
        collective=collective,
        group=group,
        peer=peer,
        match=str(attributes.get("simulator.match", "")),
        overhead=_exact(attributes, "simulator.overhead", 0.0),
    )


def _exact(attributes: Mapping[str, Any], key: str, default: float) -> float:
    value = attributes.get(key)
    if isinstance(value, float) and math.isfinite(value) and value >= 0.0:
        return value
    return default
