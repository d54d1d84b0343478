"""Simulated timelines as traces: with dependencies, groups, and receives made explicit."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from simulator.errors import InputError
from simulator.importers.trace import COLLECTIVES, COLUMNS, Trace, TraceOperation
from simulator.workload import RankProgram, Task, Workload


def as_trace(source: Any, *, ranks: Any = None, name: str = "") -> Trace:
    """A trace of a simulation's result.

    Parameters
    ----------
    source:
        A `Result`, a `Timeline`, or a DataFrame with a timeline's columns (which knows neither
        groups nor peers, so that the trace cannot be replayed).
    ranks:
        Ranks to take; all when None.

    Raises
    ------
    InputError
        If the source has not a timeline's columns, or a rank does not exist.
    """
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, ranks, name)
    timeline = getattr(source, "timeline", source)
    if not hasattr(timeline, "workload") or not hasattr(timeline, "quotient"):
        raise InputError(
            f"expected a timeline, a result or a DataFrame, got {type(source).__name__}"
        )
    return _Exporter(timeline).trace(ranks, name)


class _Exporter:
    def __init__(self, timeline: Any) -> None:
        self.timeline = timeline
        self.workload: Workload = timeline.workload
        self.class_of = np.asarray(timeline.quotient.class_of)
        self.members: dict[tuple[str, int], tuple[int, ...]] = {}
        self.sends = self._incoming()

    def trace(self, ranks: Any, name: str) -> Trace:
        world = self.workload.ranks
        wanted = range(world) if ranks is None else [int(rank) for rank in ranks]
        for rank in wanted:
            if not 0 <= rank < world:
                raise InputError(f"rank {rank} does not exist; there are {world}", place="ranks")
        operations = {rank: self._rank(rank) for rank in wanted}
        groups: dict[str, tuple[int, ...]] = {}
        for ops in operations.values():
            for op in ops:
                if op.group and op.group not in groups:
                    family, label = op.group.rsplit("/", 1)
                    groups[op.group] = self._members(family, int(label))
        return Trace(operations, dict(sorted(groups.items())), world, name)

    def _members(self, family: str, label: int) -> tuple[int, ...]:
        key = (family, label)
        if key not in self.members:
            found = np.flatnonzero(np.asarray(self.workload.groups[family]) == label)
            self.members[key] = tuple(int(rank) for rank in found)
        return self.members[key]

    def program(self, rank: int) -> RankProgram:
        return self.workload.programs[int(self.workload.program_of[rank])]

    def times(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        rank_class = int(self.class_of[rank])
        return self.timeline.start(rank_class), self.timeline.end(rank_class)

    def _incoming(self) -> dict[int, list[tuple[int, str, int, Task, tuple[int, ...]]]]:
        """Transfers by receiver: (sender, stream, row of the sender, task, events they fire)."""
        by_program: list[list[tuple[int, str, int, Task, tuple[int, ...]]]] = []
        for program in self.workload.programs:
            found, row = [], 0
            for stream, entries in program.streams.items():
                for entry in entries:
                    if entry.peer >= 0 and entry.segment.tasks:
                        task = entry.segment.tasks[-1]
                        last = row + len(entry.segment.tasks) - 1
                        found.append((entry.peer, stream, last, task, entry.signals_peer))
                    row += len(entry.segment.tasks)
            by_program.append(found)
        incoming: dict[int, list[tuple[int, str, int, Task, tuple[int, ...]]]] = {}
        for sender in range(self.workload.ranks):
            for peer, stream, row, task, events in by_program[
                int(self.workload.program_of[sender])
            ]:
                receiver = int(self.workload.pipeline_peer[peer][sender])
                incoming.setdefault(receiver, []).append((sender, stream, row, task, events))
        return incoming

    def _rank(self, rank: int) -> tuple[TraceOperation, ...]:
        start, end = self.times(rank)
        drafts: list[tuple[TraceOperation, list[int]]] = []
        """Operations in program order, with the drafts that they wait for."""
        by_event: dict[int, list[int]] = {}
        waiting: list[tuple[int, tuple[int, ...]]] = []

        def add(op: TraceOperation, waits: list[int]) -> int:
            drafts.append((op, waits))
            return len(drafts) - 1

        senders: list[int] = []
        for sender, stream, row, task, events in self.sends.get(rank, ()):
            if sender not in senders:
                senders.append(sender)
            number = senders.index(sender)  # alike on all ranks that do the same: they still fold
            sent, arrived = self.times(sender)
            op = self._operation(task, f"{stream}.receive.{number}", -1, -1,
                                 float(sent[row]), float(arrived[row]))  # fmt: skip
            received = TraceOperation(
                name=op.name.replace("send", "receive"), stream=op.stream, kind=op.kind,
                start=op.start, end=op.end, phase=op.phase, bytes=op.bytes, collective="recv",
                peer=sender,
            )  # fmt: skip
            position = add(received, [])
            for event in events:
                by_event.setdefault(event, []).append(position)
        row = 0
        for stream, entries in self.program(rank).streams.items():
            before: list[int] = []
            """The drafts that end when this stream gets free."""
            for entry in entries:
                first = True
                own: list[int] = []
                for task in entry.segment.tasks:
                    op = self._operation(
                        task,
                        stream,
                        entry.stage,
                        entry.microbatch,
                        float(start[row]),
                        float(end[row]),
                    )
                    row += 1
                    both = task.collective is not None and entry.peer < 0 and self._computes(task)
                    if entry.peer >= 0:
                        peer = int(self.workload.pipeline_peer[entry.peer][rank])
                        op = _changed(op, collective="send", peer=peer, overhead=task.latency)
                    elif task.collective is not None and not both:
                        op = _changed(self._grouped(op, task, rank), overhead=task.latency)
                    position = add(op, [d for d in before if drafts[d][0].stream != stream])
                    if first:
                        waiting.append((position, entry.waits))
                    own = [position]
                    if both:
                        assert task.collective is not None
                        hidden = _changed(
                            op,
                            stream=f"{stream}.overlapped",
                            flops=0.0,
                            kind=task.collective.kind,
                        )
                        hidden = self._grouped(hidden, task, rank)
                        beside = add(hidden, list(before))
                        if first:
                            waiting.append((beside, entry.waits))
                        own.append(beside)
                    first = False
                    before = own
                if first:  # an entry without tasks fires when its waits and predecessor are done
                    own = [*before, *(p for event in entry.waits for p in by_event.get(event, ()))]
                for event in entry.signals:
                    by_event.setdefault(event, []).extend(own)
        for position, events in waiting:
            op, waits = drafts[position]
            waits.extend(p for event in events for p in by_event.get(event, ()))
        return _in_order(drafts)

    @staticmethod
    def _computes(task: Task) -> bool:
        return task.compute > 0.0 or task.hbm_bytes > 0.0

    def _grouped(self, op: TraceOperation, task: Task, rank: int) -> TraceOperation:
        collective = task.collective
        assert collective is not None
        label = int(np.asarray(self.workload.groups[collective.group])[rank])
        return _changed(
            op,
            collective=collective.op,
            group=f"{collective.group}/{label}",
            bytes=float(collective.bytes),
            match=collective.name,
        )

    @staticmethod
    def _operation(
        task: Task, stream: str, stage: int, microbatch: int, start: float, end: float
    ) -> TraceOperation:
        return TraceOperation(
            task.name, stream, task.kind, start, end, task.phase, stage, task.layer, microbatch,
            float(task.flops), float(task.bytes),
        )  # fmt: skip


def _changed(op: TraceOperation, **changes: Any) -> TraceOperation:
    return dataclasses.replace(op, **changes)


def _in_order(drafts: Sequence[tuple[TraceOperation, list[int]]]) -> tuple[TraceOperation, ...]:
    """By start, everything after what it waits for and after its predecessor in its stream."""
    after: list[list[int]] = [[] for _ in drafts]
    missing = [0] * len(drafts)
    last: dict[str, int] = {}
    for index, (op, waits) in enumerate(drafts):
        before = set(waits)
        if op.stream in last:
            before.add(last[op.stream])
        last[op.stream] = index
        for other in before:
            after[other].append(index)
        missing[index] = len(before)
    ready = [
        (op.start, op.end, i) for i, (op, _) in enumerate(drafts) if missing[i] == 0
    ]  # fmt: skip
    heapq.heapify(ready)
    position: dict[int, int] = {}
    result: list[TraceOperation] = []
    while ready:
        _, _, index = heapq.heappop(ready)
        op, waits = drafts[index]
        position[index] = len(result)
        result.append(_changed(op, waits=tuple(sorted({position[other] for other in waits}))))
        for other in after[index]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, (drafts[other][0].start, drafts[other][0].end, other))
    if len(result) != len(drafts):
        raise InputError("the programs' events form a cycle")
    return tuple(result)


def _from_frame(frame: pd.DataFrame, ranks: Any, name: str) -> Trace:
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise InputError(f"has no column {missing[0]!r} (a timeline has: {', '.join(COLUMNS)})")
    if ranks is not None:
        frame = frame[frame["rank"].isin(list(ranks))]
    operations: dict[int, tuple[TraceOperation, ...]] = {}
    try:
        typed = frame[list(COLUMNS)].astype(
            dict.fromkeys(("rank", "stage", "layer", "microbatch"), "int64")
            | dict.fromkeys(("start", "end", "flops", "bytes"), "float64")
            | dict.fromkeys(("stream", "operation", "kind", "phase", "waited_for"), "str")
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"a timeline's column has values of the wrong type: {error}") from None
    for rank in sorted(typed["rank"].unique().tolist()):
        operations[rank] = _frame_rank(typed[typed["rank"] == rank])
    if not operations:
        raise InputError("has no rows")
    return Trace(operations, {}, max(operations) + 1, name)


def _frame_rank(part: pd.DataFrame) -> tuple[TraceOperation, ...]:
    drafts: list[tuple[TraceOperation, list[int]]] = []
    columns = {column: part[column].tolist() for column in COLUMNS}
    for i in range(len(part)):
        row: dict[str, Any] = {column: values[i] for column, values in columns.items()}
        kind = row["kind"]
        collective = kind if kind in COLLECTIVES else ("send" if kind == "send_recv" else "")
        op = TraceOperation(
            row["operation"], row["stream"], kind, row["start"], row["end"], row["phase"],
            row["stage"], row["layer"], row["microbatch"], row["flops"], row["bytes"],
            collective=collective,
        )  # fmt: skip
        drafts.append((op, []))
    # waited_for names a stream and an operation: the last of that name that had ended by then
    by_name: dict[str, list[int]] = {}
    for index, (op, _) in enumerate(drafts):
        by_name.setdefault(f"{op.stream}: {op.name}", []).append(index)
    for (op, waits), cause in zip(drafts, columns["waited_for"], strict=True):
        if not cause:
            continue
        ended = [i for i in by_name.get(cause, ()) if _before(drafts[i][0], op)]
        if ended:
            waits.append(max(ended, key=lambda i: (drafts[i][0].end, i)))
    return _in_order(drafts)


def _before(cause: TraceOperation, op: TraceOperation) -> bool:
    return (
        cause is not op
        and cause.end <= op.start * (1 + 1e-9) + 1e-12
        and (cause.start < op.start or cause.end < op.end)
        and math.isfinite(cause.end)
    )
