"""The timeline: when every operation ran, columnar, per class of ranks.

A class's rows are kept once; the timeline of any of its ranks is the same rows with the rank's own
coordinates. Rows are ordered stream by stream, each in program order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from simulator.errors import InputError
from simulator.folding import Quotient
from simulator.workload import RankProgram, Task

Ranks = Literal["representatives", "all"] | Sequence[int]

#: Times closer than this (relative) are the same moment: what of two such was last is decided by
#: order in the program instead of by rounding.
_SAME = 1e-12


#: Streams on which frameworks issue the collectives that computation waits for.
_STREAM_OF_GROUP = {
    "tensor": "tensor",
    "context": "context",
    "expert": "expert",
    "expert_tensor": "expert",
}


class ProgramTable:
    """The columns of a program's rows that do not depend on when or where they ran."""

    def __init__(self, program: RankProgram) -> None:
        self.program = program
        self.streams = tuple(program.streams)
        tasks: list[Task] = []
        first_of: dict[int, int] = {}
        entry_task: list[int] = []
        length: list[int] = []
        stage: list[int] = []
        microbatch: list[int] = []
        stream: list[int] = []
        waits: list[int] = []
        wait_count: list[int] = []
        peer: list[int] = []
        for index, entries in enumerate(program.streams.values()):
            for entry in entries:
                segment = entry.segment
                if id(segment) not in first_of:
                    first_of[id(segment)] = len(tasks)
                    tasks.extend(segment.tasks)
                entry_task.append(first_of[id(segment)])
                length.append(len(segment.tasks))
                stage.append(entry.stage)
                microbatch.append(entry.microbatch)
                stream.append(index)
                waits.extend(entry.waits)
                wait_count.append(len(entry.waits))
                peer.append(entry.peer)
        self.tasks = tuple(tasks)
        self.entry_length = np.array(length, dtype=np.int64)
        self.entry_first = np.cumsum(self.entry_length) - self.entry_length
        self.entry_stream = np.array(stream, dtype=np.int64)
        self.entry_peer = np.array(peer, dtype=np.int64)
        self.waits = np.array(waits, dtype=np.int64)
        self.wait_count = np.array(wait_count, dtype=np.int64)
        rows = int(self.entry_length.sum())
        self.rows = rows
        self.entry = np.repeat(np.arange(len(length)), self.entry_length)
        k = np.arange(rows) - self.entry_first[self.entry]
        self.task = np.array(entry_task, dtype=np.int64)[self.entry] + k
        self.stream = self.entry_stream[self.entry]
        self.stage = np.array(stage, dtype=np.int64)[self.entry]
        self.microbatch = np.array(microbatch, dtype=np.int64)[self.entry]
        self.kinds = tuple(dict.fromkeys(t.kind for t in tasks))
        kind_of = {kind: i for i, kind in enumerate(self.kinds)}
        self.task_kind = np.array([kind_of[t.kind] for t in tasks], dtype=np.int64)
        self.task_communicates = np.array(
            [t.collective is not None and t.compute == 0.0 for t in tasks], dtype=bool
        )

    @cached_property
    def shown_streams(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Stream of every row as people know it, and the streams' names.

        A collective that computation waits for is an entry of the compute stream here; frameworks
        issue it on the communication stream of its group (`tensor`, `context`, `expert`), and so
        it is shown.
        """
        names = list(self.streams)
        if "compute" not in names:
            return self.stream, self.streams
        compute = names.index("compute")
        code = np.full(len(self.tasks), compute, dtype=np.int64)
        for index, task in enumerate(self.tasks):
            if self.task_communicates[index] and task.collective is not None:
                name = _STREAM_OF_GROUP.get(task.collective.group, "compute")
                if name in self.streams:
                    continue  # a stream of its own keeps to itself: one operation at a time
                if name not in names:
                    names.append(name)
                code[index] = names.index(name)
        return np.where(self.stream == compute, code[self.task], self.stream), tuple(names)

    def texts(self, attribute: str) -> pd.Categorical:
        """Column of a text attribute of the tasks."""
        values = [str(getattr(task, attribute)) for task in self.tasks]
        categories = list(dict.fromkeys(values))
        number = {value: i for i, value in enumerate(categories)}
        codes = np.array([number[value] for value in values], dtype=np.int64)
        return _categorical(codes[self.task], categories)

    def numbers(self, attribute: str, dtype: type) -> np.ndarray:
        """Column of a numeric attribute of the tasks."""
        return np.array([getattr(task, attribute) for task in self.tasks], dtype=dtype)[self.task]


def _categorical(codes: np.ndarray, categories: Sequence[str]) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=pd.Index(list(categories), dtype=object))


def union_length(start: np.ndarray, end: np.ndarray) -> float:
    """Length of the union of intervals [s]."""
    merged = merged_intervals(start, end)
    return float((merged[1] - merged[0]).sum())


def merged_intervals(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint, ascending intervals with the same union; empty ones are left out."""
    keep = end > start
    start, end = start[keep], end[keep]
    if not start.size:
        return start, end
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    first = np.r_[True, start[1:] > end[:-1]]
    return start[first], end[np.r_[first[1:], True]]


def covered_length(
    start: np.ndarray, end: np.ndarray, cover: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Length of each interval that lies in the disjoint, ascending intervals `cover`."""
    a, b = cover
    if not a.size:
        return np.zeros(len(start))
    knots = np.stack([a, b], axis=1).reshape(-1)
    lengths = np.stack([np.zeros(a.size), b - a], axis=1).reshape(-1).cumsum()
    return np.interp(end, knots, lengths) - np.interp(start, knots, lengths)


class Timeline:
    """Result of `simulator.engine.simulate`.

    Attributes
    ----------
    step_time:
        Seconds until the last operation ends.
    events:
        Events that the engine processed.
    """

    def __init__(self, quotient: Quotient, record: Any, *, jitter: Any = None) -> None:
        self.quotient = quotient
        self.workload = quotient.system.workload
        self.record = record
        self.jitter = jitter
        self.events = int(record.events)
        self.step_time = float(record.step_time)

    # ----------------------------------------------------------------------------- classes

    @property
    def classes(self) -> int:
        """Number of classes of ranks."""
        return self.quotient.classes

    def members(self, rank_class: int) -> np.ndarray:
        """Ranks of a class, ascending."""
        return self.quotient.members(rank_class)

    @property
    def representatives(self) -> np.ndarray:
        """First rank of every class."""
        return self.quotient.representatives

    @cached_property
    def _tables(self) -> tuple[ProgramTable, ...]:
        return tuple(ProgramTable(program) for program in self.workload.programs)

    def program_table(self, rank_class: int) -> ProgramTable:
        """Columns of the class's rows that are fixed by its program."""
        rank = self.representatives[rank_class]
        return self._tables[int(self.workload.program_of[rank])]

    def _rows(self, rank_class: int) -> slice:
        first = self.record.first_row
        return slice(int(first[rank_class]), int(first[rank_class + 1]))

    def start(self, rank_class: int) -> np.ndarray:
        """Start of every operation of the class [s], in row order."""
        return self.record.start[self._rows(rank_class)]

    def end(self, rank_class: int) -> np.ndarray:
        """End of every operation of the class [s], in row order."""
        return self.record.end[self._rows(rank_class)]

    # ------------------------------------------------------------------------------ causes

    @cached_property
    def causes(self) -> np.ndarray:
        """For every row (classes one after the other) the row whose end it started at; -1: none.

        Of several things that a row waited for, the last to happen.
        """
        record = self.record
        start, end = record.start, record.end
        first_entry = record.first_entry
        entries = int(first_entry[-1])
        source = np.full(entries, -1, dtype=np.int64)  # entry -> entry that it waited for last
        last_row = np.full(entries, -1, dtype=np.int64)
        cause = np.arange(len(start), dtype=np.int64) - 1
        first_rows = []
        first_row_entries = []
        row_entry = np.empty(len(start), dtype=np.int64)
        for c in range(self.classes):
            table = self.program_table(c)
            row0, entry0 = int(record.first_row[c]), int(first_entry[c])
            own = slice(entry0, int(first_entry[c + 1]))
            began = record.entry_start[own]
            nonempty = table.entry_length > 0
            last = row0 + table.entry_first + table.entry_length - 1
            ended = began.copy()
            ended[nonempty] = end[last[nonempty]]
            last_row[own] = np.where(nonempty, last, -1)
            numbers = np.arange(own.start, own.stop)
            previous_end = np.full(len(began), -np.inf)
            same = np.zeros(len(began), dtype=bool)
            same[1:] = table.entry_stream[1:] == table.entry_stream[:-1]
            previous_end[same] = ended[np.flatnonzero(same) - 1]
            best = np.where(same, numbers - 1, -1)
            if table.waits.size:
                # waits in order, the stream's own predecessor first: the earliest of those
                # that happened last wins
                owner = np.repeat(np.arange(len(began)), table.wait_count)
                when = record.event_time[c][table.waits]
                who = record.event_entry[c][table.waits]
                starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
                latest = np.maximum.reduceat(when, starts)
                owners = owner[starts]
                later = latest > previous_end[owners] + _SAME * np.abs(latest)
                near = when >= np.repeat(
                    latest - _SAME * np.abs(latest), np.diff(np.r_[starts, owner.size])
                )
                order = np.where(near, np.arange(owner.size), owner.size)
                chosen = np.minimum.reduceat(order, starts)
                best[owners[later]] = who[chosen[later]]
            source[own] = best
            first_rows.append((row0 + table.entry_first)[nonempty])
            first_row_entries.append(numbers[nonempty])
            row_entry[row0 : row0 + table.rows] = entry0 + table.entry
        # an empty entry passes on what it waited for
        pointer = np.where(last_row >= 0, np.arange(entries), source)
        while True:
            following = np.where(pointer >= 0, pointer[pointer], -1)
            if np.array_equal(following, pointer):
                break
            pointer = following
        entry_cause = np.where(
            source >= 0, np.where(pointer[source] >= 0, last_row[pointer[source]], -1), -1
        )
        rows = np.concatenate(first_rows) if first_rows else np.zeros(0, dtype=np.int64)
        row_entries = np.concatenate(first_row_entries) if first_rows else rows
        is_first = np.zeros(len(start), dtype=bool)
        is_first[rows] = True
        cause[rows] = entry_cause[row_entries]
        joint, offsets = record.joint_rows, record.joint_first[:-1]
        if joint.size:
            arrival = np.where(
                is_first[joint], record.entry_start[row_entry[joint]], end[joint - 1]
            )
            sizes = np.diff(record.joint_first)
            latest = np.repeat(np.maximum.reduceat(arrival, offsets), sizes)
            near = arrival >= latest - _SAME * np.abs(latest)
            order = np.where(near, np.arange(joint.size), joint.size)
            chosen = np.minimum.reduceat(order, offsets)
            # whoever came last needs no other's excuse
            cause[joint] = np.where(near, cause[joint], cause[joint[np.repeat(chosen, sizes)]])
        return cause

    def critical_path(self) -> pd.DataFrame:
        """The chain of operations that determines the step time, first to last.

        Columns as `frame`, of the representative rank that each operation ran on.
        """
        if not len(self.record.end):
            return self.frame([])
        row = int(np.argmax(self.record.end))
        chain: list[int] = []
        while row >= 0:
            chain.append(row)
            row = int(self.causes[row])
        rows = np.array(chain[::-1])
        owner = np.searchsorted(self.record.first_row, rows, side="right") - 1
        parts = []
        for c in dict.fromkeys(owner.tolist()):
            mine = np.flatnonzero(owner == c)
            part = self._class_frame(int(c), int(self.representatives[c]))
            part = part.iloc[rows[mine] - self.record.first_row[c]].set_axis(mine)
            parts.append(part)
        return _concat(parts).sort_index()

    # ------------------------------------------------------------------------------ frames

    def _waited_for(self, rank_class: int) -> pd.Categorical:
        rows = self._rows(rank_class)
        cause = self.causes[rows]
        table = self.program_table(rank_class)
        numbers = np.arange(rows.start, rows.stop)
        own = (cause == numbers - 1) & (cause >= rows.start)
        stream_of, _ = table.shown_streams
        own[own] = stream_of[cause[own] - rows.start] == stream_of[own]
        shown = np.flatnonzero((cause >= 0) & ~own)
        codes = np.full(len(cause), 0, dtype=np.int64)
        categories: dict[str, int] = {"": 0}
        owner = np.searchsorted(self.record.first_row, cause[shown], side="right") - 1
        for c in np.unique(owner):
            other = self.program_table(int(c))
            mine = shown[owner == c]
            local = cause[mine] - int(self.record.first_row[c])
            streams_of, names = other.shown_streams
            key = streams_of[local] * len(other.tasks) + other.task[local]
            unique, inverse = np.unique(key, return_inverse=True)
            new = []
            for value in unique.tolist():
                stream, task = divmod(value, len(other.tasks))
                text = f"{names[stream]}: {other.tasks[task].name}"
                new.append(categories.setdefault(text, len(categories)))
            codes[mine] = np.array(new)[inverse.reshape(-1)]
        return _categorical(codes, list(categories))

    def _class_frame(self, rank_class: int, rank: int) -> pd.DataFrame:
        table = self.program_table(rank_class)
        cache = self.__dict__.setdefault("_frame_cache", {})
        static = cache.get(rank_class)
        if static is None:
            static = {
                "stage": table.stage,
                "stream": _categorical(*table.shown_streams),
                "operation": table.texts("name"),
                "kind": table.texts("kind"),
                "phase": table.texts("phase"),
                "layer": table.numbers("layer", np.int64),
                "microbatch": table.microbatch,
                "start": self.start(rank_class),
                "end": self.end(rank_class),
                "flops": table.numbers("flops", np.float64),
                "bytes": table.numbers("bytes", np.float64),
                "waited_for": self._waited_for(rank_class),
                "host_wait": self.host_wait(rank_class),
            }
            cache.clear()  # only the latest class: the frames of its ranks follow each other
            cache[rank_class] = static
        columns: dict[str, Any] = {"rank": np.full(table.rows, rank), **static}
        for name, values in self.workload.labels.items():
            value = np.asarray(values)[rank]
            columns[name] = np.full(table.rows, value)
        return pd.DataFrame(columns)

    def _selected(self, ranks: Ranks) -> np.ndarray:
        if isinstance(ranks, str):
            if ranks == "representatives":
                return self.representatives
            if ranks == "all":
                return np.arange(self.workload.ranks)
            raise InputError(f"ranks are 'representatives', 'all' or a list, got {ranks!r}")
        selected = np.asarray(list(ranks), dtype=np.int64)
        bad = selected[(selected < 0) | (selected >= self.workload.ranks)]
        if bad.size:
            raise InputError(f"there is no rank {bad[0]}; ranks are 0..{self.workload.ranks - 1}")
        return selected

    def iter_frames(self, ranks: Ranks = "representatives") -> Iterator[pd.DataFrame]:
        """`frame` of one rank after the other, class by class; only one is held at a time."""
        selected = self._selected(ranks)
        order = np.argsort(self.quotient.class_of[selected], kind="stable")
        for rank in selected[order].tolist():
            yield self._class_frame(int(self.quotient.class_of[rank]), rank)

    def frame(self, ranks: Ranks = "representatives") -> pd.DataFrame:
        """One row per operation.

        Columns: `rank`, `stage` (global pipeline stage), `stream`, `operation`, `kind`, `phase`,
        `layer`, `microbatch`, `start` and `end` [s], `flops`, `bytes`, `waited_for` (stream and
        name of the operation of another stream or rank whose end it waited for last; empty where
        it just followed its predecessor), `host_wait` [s] (of its time, what the device waits for
        the host's launch), and the workload's labels (mesh coordinates).

        Raises
        ------
        InputError
            For a rank that does not exist.
        """
        frames = {int(f["rank"].iloc[0]): f for f in self.iter_frames(ranks) if len(f)}
        parts = [frames[r] for r in self._selected(ranks).tolist() if r in frames]
        if not parts:
            return self._empty_frame()
        return _concat(parts)

    def _empty_frame(self) -> pd.DataFrame:
        names = ["rank", "stage", "stream", "operation", "kind", "phase", "layer", "microbatch",
                 "start", "end", "flops", "bytes", "waited_for", "host_wait",
                 *self.workload.labels]  # fmt: skip
        return pd.DataFrame({name: [] for name in names})

    def write_parquet(self, path: str | Path, ranks: Ranks = "representatives") -> None:
        """Write `frame(ranks)` as Parquet, one row group per rank, one rank in memory at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer = None
        try:
            for frame in self.iter_frames(ranks):
                table = pa.Table.from_pandas(frame, preserve_index=False)
                if writer is None:
                    schema = pa.schema(
                        [
                            (f.name, pa.dictionary(pa.int32(), pa.string()))
                            if pa.types.is_dictionary(f.type)
                            else (f.name, f.type)
                            for f in table.schema
                        ]
                    )
                    writer = pq.ParquetWriter(path, schema, compression="zstd")
                writer.write_table(table.cast(schema))
            if writer is None:
                pq.write_table(
                    pa.Table.from_pandas(self._empty_frame(), preserve_index=False), path
                )
        finally:
            if writer is not None:
                writer.close()

    def write_csv(self, path: str | Path, ranks: Ranks = "representatives") -> None:
        """Write `frame(ranks)` as CSV, one rank in memory at a time."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            header = True
            for frame in self.iter_frames(ranks):
                frame.to_csv(file, index=False, header=header)
                header = False
            if header:
                self._empty_frame().to_csv(file, index=False)

    # -------------------------------------------------------------------------- aggregates

    def busy(self, rank_class: int) -> dict[str, dict[str, float]]:
        """Seconds per stream and kind of operation of a rank of the class."""
        table = self.program_table(rank_class)
        duration = self.end(rank_class) - self.start(rank_class)
        kinds = len(table.kinds)
        key = table.stream * kinds + table.task_kind[table.task]
        sums = np.bincount(key, weights=duration, minlength=len(table.streams) * kinds)
        return {
            stream: {
                kind: float(sums[s * kinds + k])
                for k, kind in enumerate(table.kinds)
                if sums[s * kinds + k] > 0.0
            }
            for s, stream in enumerate(table.streams)
        }

    def host_wait(self, rank_class: int) -> np.ndarray:
        """Of every operation's time, the seconds in which the device waits for the host."""
        waits = self.program_table(rank_class).numbers("host_wait", float)
        return np.minimum(waits, self.end(rank_class) - self.start(rank_class))

    def working_time(self, rank_class: int) -> float:
        """Seconds that the kernels of a rank of the class would take if nothing slowed them: no
        host that launches too late, and nothing that takes SMs or HBM bandwidth from them. Copies
        to and from the host use no SMs and do not count."""
        table, rank = self.program_table(rank_class), int(self.representatives[rank_class])
        bandwidth = float(self.quotient.system.hbm_bandwidth[rank])
        memory = table.numbers("hbm_bytes", float) / bandwidth
        body = np.maximum(table.numbers("compute", float), memory)
        latency = table.numbers("latency", float) - table.numbers("host_wait", float)
        alone = latency + float(self.workload.slowdown[rank]) * body
        wait = self.host_wait(rank_class)
        duration = self.end(rank_class) - self.start(rank_class) - wait
        copies = np.array([kind == "host_copy" for kind in table.kinds], dtype=bool)
        computes = ~(table.task_communicates | copies[table.task_kind])[table.task]
        working = float(np.minimum(alone, duration)[computes].sum())
        # streams may compute at the same time
        return min(working, self.compute_time(rank_class) - float(wait[computes].sum()))

    def compute_intervals(self, rank_class: int) -> tuple[np.ndarray, np.ndarray]:
        """Disjoint, ascending intervals (start, end) in which the class computes [s]."""
        table = self.program_table(rank_class)
        compute = ~table.task_communicates[table.task]
        return merged_intervals(self.start(rank_class)[compute], self.end(rank_class)[compute])

    def compute_time(self, rank_class: int) -> float:
        """Seconds in which a rank of the class computes (anything but pure communication)."""
        start, end = self.compute_intervals(rank_class)
        return float((end - start).sum())

    def idle_time(self, rank_class: int) -> float:
        """Seconds of the step in which a rank of the class neither computes nor communicates."""
        return self.step_time - union_length(self.start(rank_class), self.end(rank_class))

    def exposed_communication(self, rank_class: int, by: str = "kind") -> dict[str, float]:
        """Seconds of communication that no computation of the rank covers, per kind.

        `by`: `kind` of operation (`all_reduce`, ...), `group` of the mesh (`tensor`, ...),
        or `stream`. Two that overlap each other count in both; what a collective waits for its
        launch is no communication.
        """
        table = self.program_table(rank_class)
        start = self.start(rank_class) + self.host_wait(rank_class)
        end, cover = self.end(rank_class), self.compute_intervals(rank_class)
        rows = np.flatnonzero(table.task_communicates[table.task])
        if by == "stream":
            names: list[str] = list(table.streams)
            code = table.stream[rows]
        elif by in ("kind", "group"):
            texts = [
                t.kind if by == "kind" else (t.collective.group if t.collective else "")
                for t in table.tasks
            ]
            names = list(dict.fromkeys(texts))
            number = {text: i for i, text in enumerate(names)}
            code = np.array([number[text] for text in texts], dtype=np.int64)[table.task[rows]]
        else:
            raise InputError(f"exposed communication is by 'kind', 'group' or 'stream', got {by!r}")
        result: dict[str, float] = {}
        for i, name in enumerate(names):
            mine = rows[code == i]
            if mine.size:
                a, b = merged_intervals(start[mine], end[mine])
                result[name] = float((b - a - covered_length(a, b, cover)).sum())
        return result

    def exposed_communication_total(self, rank_class: int, *, besides: str | None = None) -> float:
        """Seconds in which a rank of the class communicates and does not compute; communication
        of group `besides` does not count."""
        table = self.program_table(rank_class)
        counted = table.task_communicates
        if besides is not None:
            counted = counted & ~self._of_group(table, besides)
        rows = counted[table.task]
        start = self.start(rank_class) + self.host_wait(rank_class)
        a, b = merged_intervals(start[rows], self.end(rank_class)[rows])
        return float((b - a - covered_length(a, b, self.compute_intervals(rank_class))).sum())

    @staticmethod
    def _of_group(table: ProgramTable, group: str) -> np.ndarray:
        """Tasks of the table that communicate over a group: bool [tasks]."""
        return np.array(
            [t.collective is not None and t.collective.group == group for t in table.tasks],
            dtype=bool,
        )

    def stalled(self, rank_class: int, group: str) -> float:
        """Seconds in which the compute stream of a rank waits for communication of `group` on
        another stream, everything else that it waits for being there, and nothing else goes on.

        Other than exposed communication, it leaves out what runs while computation waits for
        something else (another pipeline stage).
        """
        table, record = self.program_table(rank_class), self.record
        mine = self._of_group(table, group)[table.task]
        if not mine.any() or "compute" not in table.streams:
            return 0.0
        first = int(record.first_entry[rank_class])
        begun = record.entry_start[first : first + len(table.entry_length)]
        start, end = self.start(rank_class), self.end(rank_class)
        ended = begun.copy()
        nonempty = np.flatnonzero(table.entry_length)
        ended[nonempty] = end[(table.entry_first + table.entry_length - 1)[nonempty]]
        sends = np.zeros(len(begun), dtype=bool)
        sends[table.entry[mine]] = True
        # when the last of either kind was there
        owner = np.repeat(np.arange(len(begun)), table.wait_count)
        when = record.event_time[rank_class][table.waits]
        who = record.event_entry[rank_class][table.waits] - first
        own = (who >= 0) & (who < len(begun))
        own[own] = sends[who[own]]
        awaited, others = np.zeros(len(begun)), np.zeros(len(begun))
        np.maximum.at(awaited, owner[own], when[own])
        np.maximum.at(others, owner[~own], when[~own])
        computes = table.entry_stream == table.streams.index("compute")
        same = np.flatnonzero(computes[1:] & computes[:-1]) + 1
        others[same] = np.maximum(others[same], ended[same - 1])
        late = np.flatnonzero(computes & (awaited > others))
        rest = merged_intervals(start[~mine], end[~mine])
        a, b = others[late], awaited[late]
        return float((b - a - covered_length(a, b, rest)).sum())

    def flops(self, rank_class: int) -> float:
        """FLOPs of a rank of the class."""
        return float(self.program_table(rank_class).numbers("flops", float).sum())

    # ------------------------------------------------------------------------------- links

    def _communication(self) -> Iterable[tuple[int, int, int, np.ndarray]]:
        """(activity class, variant, class, rows) of all communication, each activity once."""
        q = self.quotient
        for c in range(self.classes):
            table = self.program_table(c)
            # a task's group, or, in a transfer, its receiver
            wanted = np.array([t.collective is not None for t in table.tasks], dtype=bool)
            rows = np.flatnonzero(wanted[table.task]) if wanted.size else np.zeros(0, dtype=int)
            if not rows.size:
                continue
            peer = table.entry_peer[table.entry[rows]]
            key = (peer + 1) * len(table.tasks) + table.task[rows]
            unique, inverse = np.unique(key, return_inverse=True)
            for i, value in enumerate(unique.tolist()):
                p, t = divmod(value, len(table.tasks))
                collective = table.tasks[t].collective
                assert collective is not None
                name = collective.group if p == 0 else ""
                variant = q.system.variant_index[
                    name, p - 1, collective.op, float(collective.bytes)
                ]
                activity = int(q.class_activity[q.system.variants[variant].family, c])
                # of a collective's classes only the first counts it
                if activity >= 0 and q.activity_members[activity][0] == c:
                    yield activity, variant, c, rows[inverse.reshape(-1) == i]

    def link_bytes(self) -> np.ndarray:
        """Bytes that every directed link of the cluster carries in the step, [links]."""
        q = self.quotient
        system = q.system
        activities = len(q.activity_members)
        total = np.zeros(len(system.link_capacity))
        counts: dict[int, np.ndarray] = {}
        for activity, variant, _, rows in self._communication():
            counts.setdefault(variant, np.zeros(activities))[activity] += rows.size
        for variant, count in counts.items():
            loads = system.variants[variant].loads
            loads.add_to(total, count[q.activity_class[loads.group]])
        return total

    def link_utilisation(self) -> pd.DataFrame:
        """One row per class of links that can run short.

        Columns: `link` (index of a representative), `links` (how many), `capacity` [byte/s],
        `bytes` per link, `busy` [s] in which anything uses it, `utilisation` = bytes /
        (capacity * step time).
        """
        q = self.quotient
        classes = len(q.link_representatives)
        starts: list[list[np.ndarray]] = [[] for _ in range(classes)]
        ends: list[list[np.ndarray]] = [[] for _ in range(classes)]
        for activity, variant, c, rows in self._communication():
            for link, _ in q.shares[activity, variant].links:
                starts[link].append(self.start(c)[rows])
                ends[link].append(self.end(c)[rows])
        capacity = q.system.link_capacity[q.link_representatives]
        carried = self.link_bytes()[q.link_representatives]
        busy = [
            union_length(np.concatenate(a), np.concatenate(b)) if a else 0.0
            for a, b in zip(starts, ends, strict=True)
        ]
        scale = self.step_time if self.step_time > 0.0 else 1.0
        return pd.DataFrame(
            {
                "link": q.link_representatives,
                "links": np.bincount(q.link_class[q.link_class >= 0], minlength=classes),
                "capacity": capacity,
                "bytes": carried,
                "busy": busy,
                "utilisation": carried / (capacity * scale),
            }
        )


def _concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all parts; categories are united rather than turned into strings."""
    columns: dict[str, Any] = {}
    for name in parts[0].columns:
        series = [part[name] for part in parts]
        if isinstance(series[0].dtype, pd.CategoricalDtype):
            columns[name] = pd.api.types.union_categoricals(
                [s.array for s in series], ignore_order=True
            )
        else:
            columns[name] = np.concatenate([s.to_numpy() for s in series])
    index = np.concatenate([part.index.to_numpy() for part in parts])
    fresh = len(parts) == 1 or np.unique(index).size < index.size
    return pd.DataFrame(columns, index=None if fresh and len(parts) > 1 else index)
