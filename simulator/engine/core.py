"""The discrete-event engine: streams of rank classes as callbacks of SimPy events.

The engine runs the quotient that `simulator.folding` makes: one set of streams per rank class. Two
ways of executing the tasks of an entry live side by side, and give the same times:

* a **step** is one task as one activity. It registers what it loads (links, and its ranks' SMs and
  HBM), and `max_min_shares` says how fast it goes whenever something in its connected component
  of overloaded resources changes;
* a **run** is a stretch of tasks as one event. Its tasks' start and end times come from a table of
  cumulated durations. A run is allowed only where its tasks provably go at full speed, or where
  they are the only ones that yield: if the other activities of the rank (a send, a gradient
  reduction) leave a constant part of SMs and HBM, and would not get more even if the run stopped,
  task k lasts `max(T_k, sm_k / (1 - B_sm), hbm_k / (1 - B_hbm))`, again a table. When the others
  come or go, the run moves from one table to another at the same position: O(log n), not O(tasks).
  Where neither holds the run is dissolved into steps.

A run may span several classes that meet in collectives inside an entry (a tensor-parallel group
whose ranks are not interchangeable): a *team*. Its members' times are joined at the collectives.

Changes within one instant are collected and settled together, by an event of lower priority.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappush

import numpy as np
import simpy
from simpy.events import NORMAL, Event, EventPriority

from simulator.collector import paused_collector
from simulator.engine.jitter import Factors
from simulator.engine.sharing import max_min_shares
from simulator.errors import InputError, SimulatorError
from simulator.folding import Quotient
from simulator.workload import Entry, RankProgram, Segment, Task

#: Relative excess over capacity that counts as none: rounding of sums of utilisations.
TOLERANCE = 1e-10
_FULL = 1.0 + TOLERANCE
_LAST = EventPriority(2)


class Timer(Event):
    """An event at a set time, of a step or a run."""

    def __init__(
        self, clock: Clock, callback: Callable[[Timer], None], subject: Step | Run | None
    ) -> None:
        # as `Event` does, and triggered at once
        self.env = clock
        self.callbacks = [callback]
        self._value = None
        self._ok = True
        self.subject = subject


class Clock(simpy.Environment):
    """A SimPy environment that can schedule at an absolute time.

    `Environment.schedule` adds a delay to the current time, which rounds: activities that end at
    the same time on different streams would end one unit in the last place apart. All events of
    the engine are scheduled here; `scheduled` counts them.
    """

    scheduled = 0

    def call_at(
        self,
        time: float,
        callback: Callable[[Timer], None],
        subject: Step | Run | None = None,
        priority: EventPriority = NORMAL,
    ) -> Timer:
        """Call `callback(timer)` at `time` (not before now); returns the timer."""
        timer = Timer(self, callback, subject)
        self.scheduled += 1
        heappush(self._queue, (time, priority, self.scheduled, timer))
        return timer


# ------------------------------------------------------------------------------ static parts


class Program:
    """A `RankProgram` with its waits turned round: which entries wait for an event."""

    __slots__ = (
        "entries", "entry_count", "entry_first", "entry_row", "events", "names", "pending",
        "program", "rows", "waiters",
    )  # fmt: skip

    def __init__(self, program: RankProgram) -> None:
        self.program = program
        self.names = tuple(program.streams)
        self.entries: list[tuple[Entry, ...]] = [program.streams[name] for name in self.names]
        self.events = program.events
        self.waiters: list[list[tuple[int, int]]] = [[] for _ in range(program.events)]
        self.pending: list[list[int]] = []
        self.entry_row: list[list[int]] = []
        self.entry_first: list[int] = []
        self.entry_count = 0
        row = 0
        for s, entries in enumerate(self.entries):
            rows: list[int] = []
            counts: list[int] = []
            for e, entry in enumerate(entries):
                rows.append(row)
                row += len(entry.segment.tasks)
                counts.append(len(entry.waits))
                for event in (*entry.waits, *entry.signals):
                    if not 0 <= event < program.events:
                        raise InputError(
                            f"entry {e} of stream {self.names[s]!r} of program {program.name!r} "
                            f"uses event {event}; there are events 0..{program.events - 1}"
                        )
                for event in entry.waits:
                    self.waiters[event].append((s, e))
            self.entry_row.append(rows)
            self.pending.append(counts)
            self.entry_first.append(self.entry_count)
            self.entry_count += len(entries)
        self.rows = row


class Table:
    """Start offsets of a plan's tasks under a constant background; `cum[k]` is that of task k."""

    __slots__ = ("body", "cum", "lat", "number")

    def __init__(self, number: int, lat: list[float], body: list[float], cum: list[float]) -> None:
        self.number = number
        self.lat = lat
        self.body = body
        self.cum = cum


class Cost:
    """Latency, duration alone, SM seconds and HBM seconds of the tasks of a segment."""

    __slots__ = ("body", "hbm", "lat", "lat_list", "sm", "tables")

    def __init__(self, lat: np.ndarray, body: np.ndarray, sm: np.ndarray, hbm: np.ndarray) -> None:
        self.lat, self.body, self.sm, self.hbm = lat, body, sm, hbm
        self.lat_list: list[float] = lat.tolist()
        self.tables: dict[tuple[float, float], Table] = {}


class Plan:
    """What a segment is for the ranks of one class."""

    __slots__ = (
        "activity", "body", "compute_from", "cost", "hbm", "joint", "joint_peaks", "lat", "links",
        "local_peaks", "n", "names", "next_joint", "peak_hbm", "peak_sm", "received", "sm",
        "team_end", "weight", "weighted_hbm", "weighted_sm",
    )  # fmt: skip

    n: int
    cost: Cost
    lat: list[float]
    body: list[float]
    sm: list[float]
    hbm: list[float]
    weight: list[float]
    activity: list[int]
    joint: list[bool]
    names: list[str]
    links: list[tuple[tuple[int, float], ...]]
    received: list[tuple[RankClass, float, float] | None]
    """What a transfer takes of its receiver: class, SM seconds, HBM seconds."""
    next_joint: list[int]
    compute_from: list[int]
    peak_sm: float
    peak_hbm: float
    weighted_sm: float
    weighted_hbm: float
    local_peaks: dict[int, float]
    joint_peaks: dict[int, float]
    team_end: list[int]
    """Up to where a team that meets in task k can go on: the next collective with other members."""


# ----------------------------------------------------------------------------- dynamic parts


class Stream:
    """A stream of a rank class: where it is."""

    __slots__ = (
        "active",
        "cls",
        "entries",
        "entry",
        "index",
        "k",
        "plan",
        "row0",
        "rows",
    )  # fmt: skip

    def __init__(self, cls: RankClass, index: int) -> None:
        self.cls = cls
        self.index = index
        self.entries = cls.program.entries[index]
        self.rows = cls.program.entry_row[index]
        self.entry = 0
        self.k = 0
        self.row0 = 0
        self.active = False
        self.plan: Plan | None = None


class RankClass:
    """Ranks that behave alike."""

    __slots__ = (
        "event_entry",
        "event_time",
        "first_entry",
        "first_row",
        "hbm_bandwidth",
        "index",
        "key",
        "occurrences",
        "pending",
        "program",
        "runs",
        "slowdown",
        "steps",
        "streams",
    )  # fmt: skip

    def __init__(
        self, index: int, program: Program, slowdown: float, hbm_bandwidth: float,
        first_row: int, first_entry: int,
    ) -> None:  # fmt: skip
        self.index = index
        self.program = program
        self.slowdown = slowdown
        self.hbm_bandwidth = hbm_bandwidth
        self.first_row = first_row
        self.first_entry = first_entry
        self.key = 0
        self.pending = [list(counts) for counts in program.pending]
        self.event_time: list[float | None] = [None] * program.events
        self.event_entry: list[int] = [-1] * program.events
        self.steps: dict[Step, tuple[float, float]] = {}
        self.runs: dict[Run, int] = {}
        self.occurrences: dict[tuple[int, str], int] = {}
        self.streams = [Stream(self, s) for s in range(len(program.entries))]


class Step:
    """One task in execution as an activity of its own."""

    __slots__ = (
        "body", "due", "end", "in_latency", "links", "local", "number", "phi", "rem", "streams",
        "t", "timer", "weight",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        streams: list[Stream],
        body: float,
        weight: float,
        links: Sequence[tuple[int, float]],
        local: list[tuple[RankClass, float, float]],
    ) -> None:
        self.number = number
        self.streams = streams
        self.body = body
        self.weight = weight
        self.links = links
        self.local = local
        self.rem = 1.0
        self.phi = 1.0
        self.t = 0.0
        self.due = 0.0
        self.end = 0.0
        self.in_latency = True
        self.timer: Timer | None = None


#: A stretch of a run at one table: tasks [first, last), task k starting at base + cum[k]; whether
#: it is a collective that the members of a team met in.
Interval = tuple[int, int, Table, float, bool]


def _merged(
    local: list[tuple[RankClass, float, float]],
) -> list[tuple[RankClass, float, float]]:
    """One demand per class: a class may be both sender and receiver."""
    merged: dict[RankClass, tuple[float, float]] = {}
    for cls, sm, hbm in local:
        old = merged.get(cls, (0.0, 0.0))
        merged[cls] = (old[0] + sm, old[1] + hbm)
    return [(cls, sm, hbm) for cls, (sm, hbm) in merged.items()]


class Run:
    """A stretch of tasks [k, end) of one stream, or of the streams of a team, as one event."""

    __slots__ = (
        "alike", "done", "due", "end", "ends", "intervals", "keys", "links", "next_keys",
        "number", "streams", "timer", "timer_at",
    )  # fmt: skip

    def __init__(self, number: int, streams: list[Stream], end: int) -> None:
        self.number = number
        self.streams = streams
        self.end = end
        self.keys: list[tuple[float, float]] = []
        self.next_keys: list[tuple[float, float]] = []
        self.links: tuple[tuple[int, float], ...] = ()
        self.alike = True
        self.intervals: list[list[Interval]] = []
        self.ends: list[float] = []
        self.done = [False] * len(streams)
        self.due = 0.0
        self.timer_at = 0.0
        self.timer: Timer | None = None


#: Where a run's member is: (task, seconds of latency left, fraction of the body left, waiting for
#: the others).
Position = tuple[int, float, float, bool]


@dataclass(frozen=True, eq=False)
class Record:
    """What happened, before it is expanded into rows (`simulator.timeline`).

    Rows are numbered class by class, stream by stream, in program order.
    """

    start: np.ndarray
    end: np.ndarray
    joint_first: np.ndarray
    """Offsets into `joint_rows`: rows of one collective of several classes."""
    joint_rows: np.ndarray
    event_time: tuple[np.ndarray, ...]
    event_entry: tuple[np.ndarray, ...]
    """Per class: the entry that fired each event; entries are numbered like rows."""
    first_row: np.ndarray
    first_entry: np.ndarray
    entry_start: np.ndarray
    events: int
    step_time: float


class Engine:
    """Executes the quotient of a workload."""

    def __init__(
        self,
        quotient: Quotient,
        *,
        jitter: Factors | None = None,
        jitter_keys: np.ndarray | None = None,
        overlap_sharing: bool = True,
        runs: bool = True,
    ) -> None:
        self.quotient = quotient
        self.jitter = jitter
        self.overlap_sharing = overlap_sharing
        self.use_runs = runs
        system = quotient.system
        workload = system.workload
        self.clock = Clock()
        self.programs = [Program(program) for program in workload.programs]
        self.classes: list[RankClass] = []
        row = entry = 0
        for index, rank in enumerate(quotient.representatives.tolist()):
            program = self.programs[int(workload.program_of[rank])]
            cls = RankClass(
                index,
                program,
                float(workload.slowdown[rank]),
                float(system.hbm_bandwidth[rank]),
                row,
                entry,
            )
            if jitter_keys is not None:
                cls.key = int(jitter_keys[rank])
            self.classes.append(cls)
            row += program.rows
            entry += program.entry_count
        self.rows = row
        links = len(quotient.link_representatives)
        self.load = [0.0] * links
        self.users: list[dict[Step | Run, float]] = [{} for _ in range(links)]
        self.meetings: dict[tuple[int, str, int], list[Stream]] = {}
        self.work: list[Stream] = []  # to go on with their entry
        self.ready: list[Stream] = []  # that may begin their next entry
        self.dirty_links: dict[int, None] = {}
        self.dirty_classes: dict[RankClass, None] = {}
        self.changed: dict[Step, None] = {}
        self.replan: dict[Run, None] = {}
        self.flush_pending = False
        self.plans: dict[tuple[int, int, int], Plan] = {}
        self.costs: dict[tuple[bytes, bytes, bytes, bytes], Cost] = {}
        self.tables: list[np.ndarray] = []
        self.bases: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]] = {}
        self.numbers = 0
        # what the timeline is expanded from
        self.start_rows: list[int] = []
        self.start_times: list[float] = []
        self.end_rows: list[int] = []
        self.end_times: list[float] = []
        self.pieces: list[tuple[int, int, int, int]] = []
        self.piece_bases: list[float] = []
        self.joint_first: list[int] = []
        self.joint_rows: list[int] = []
        self.teams: list[tuple[tuple[int, ...], int, int, Plan]] = []
        self.entry_start: list[list[list[float]]] = [
            [[] for _ in cls.streams] for cls in self.classes
        ]
        self.peer_class = self._peer_classes()

    # ------------------------------------------------------------------------ preparation

    def _peer_classes(self) -> dict[tuple[int, int], RankClass]:
        """(class, pipeline coordinate) -> class of the receivers."""
        peers: dict[tuple[int, int], RankClass] = {}
        q = self.quotient
        pipeline_peer = np.asarray(q.system.workload.pipeline_peer)
        for index, rank in enumerate(q.representatives.tolist()):
            for peer in range(len(pipeline_peer)):
                receiver = int(pipeline_peer[peer][rank])
                if receiver >= 0:
                    peers[index, peer] = self.classes[int(q.class_of[receiver])]
        return peers

    def _plan(self, stream: Stream, entry: Entry) -> Plan:
        """The plan of an entry; one per class and segment, or per entry where there is jitter."""
        key = (stream.cls.index, id(entry.segment), entry.peer)
        if self.jitter is None:
            plan = self.plans.get(key)
            if plan is None:
                plan = self.plans[key] = self._make_plan(stream, entry, None)
            return plan
        factors = self.jitter.factors(
            stream.cls.key, stream.index, stream.entry, len(entry.segment.tasks)
        )
        return self._make_plan(stream, entry, factors)

    def _activity(self, cls: RankClass, task: Task, entry: Entry) -> tuple[int, int]:
        """(activity class, variant) of a communicating task; (-1, -1) if nobody takes part."""
        collective = task.collective
        assert collective is not None
        q = self.quotient
        name = "" if entry.peer >= 0 else collective.group
        variant = q.system.variant_index[name, entry.peer, collective.op, float(collective.bytes)]
        family = q.system.variants[variant].family
        activity = int(q.class_activity[family, cls.index])
        return (activity, variant) if activity >= 0 else (-1, -1)

    def _base(self, segment: Segment) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Latency, SM seconds and HBM bytes of the tasks, and which of them communicate."""
        base = self.bases.get(id(segment))
        if base is None:
            tasks = segment.tasks
            base = (
                np.array([t.latency for t in tasks], dtype=float),
                np.array([t.compute for t in tasks], dtype=float),
                np.array([t.hbm_bytes for t in tasks], dtype=float),
                [k for k, t in enumerate(tasks) if t.collective is not None],
            )
            self.bases[id(segment)] = base
        return base

    def _make_plan(self, stream: Stream, entry: Entry, factors: np.ndarray | None) -> Plan:
        cls = stream.cls
        tasks = entry.segment.tasks
        n = len(tasks)
        latency, compute, hbm_bytes, communicating = self._base(entry.segment)
        lat = latency.copy()
        sm = compute * cls.slowdown
        hbm = hbm_bytes * (cls.slowdown / cls.hbm_bandwidth)
        if factors is not None:
            lat, sm, hbm = lat * factors, sm * factors, hbm * factors
        body = np.maximum(sm, hbm)
        plan = Plan()
        plan.n = n
        plan.weight = [1.0 / cls.hbm_bandwidth] * n
        plan.activity = [-1] * n
        plan.joint = [False] * n
        plan.names = [""] * n
        plan.links = [()] * n
        plan.received = [None] * n
        plan.local_peaks, plan.joint_peaks = {}, {}
        meets: list[tuple[int, ...]] = [()] * n
        computes = np.ones(n + 1, dtype=np.int64)
        computes[n] = 0
        for k in communicating:
            collective = tasks[k].collective
            assert collective is not None
            activity, variant = self._activity(cls, tasks[k], entry)
            if activity < 0:
                continue
            computes[k] = 0
            share = self.quotient.shares[activity, variant]
            members = self.quotient.activity_members[activity]
            seconds = share.seconds
            lat[k] += share.latency
            duration = max(float(body[k]), seconds)
            own = 0.0
            for m in members:
                other = self.classes[m]
                t = share.hbm_bytes * other.slowdown / other.hbm_bandwidth
                duration = max(duration, t)
                if m == cls.index:
                    own = t
            if self.overlap_sharing:
                hbm[k] = max(float(hbm[k]), own)
                sm[k] = max(float(sm[k]), share.sm_fraction * max(share.alone, own))
            body[k] = duration
            # a kernel that hides its own collective yields to others as kernels do
            if share.bottleneck_bytes > 0.0 and duration > 0.0 and tasks[k].compute == 0.0:
                plan.weight[k] = duration / share.bottleneck_bytes
            if duration > 0.0:
                plan.links[k] = tuple((link, t / duration) for link, t in share.links)
            plan.activity[k] = activity
            plan.names[k] = collective.name
            peaks = plan.local_peaks
            if entry.peer >= 0:
                plan.joint[k] = True
                other = self.peer_class[cls.index, entry.peer]
                t = share.hbm_bytes * other.slowdown / other.hbm_bandwidth
                busy = share.sm_fraction * max(share.alone, t)
                if self.overlap_sharing and (busy > 0.0 or t > 0.0):
                    plan.received[k] = (other, busy, t)
            elif members != (cls.index,):
                plan.joint[k] = True
                meets[k] = members
                peaks = plan.joint_peaks
            for link, d in plan.links[k]:
                peaks[link] = max(peaks.get(link, 0.0), d)
        plan.lat, plan.body = lat.tolist(), body.tolist()
        plan.sm, plan.hbm = sm.tolist(), hbm.tolist()
        plan.cost = self._cost(lat, body, sm, hbm)
        with np.errstate(divide="ignore", invalid="ignore"):
            share_sm = np.where(body > 0.0, sm / body, 0.0)
            share_hbm = np.where(body > 0.0, hbm / body, 0.0)
        weight = np.array(plan.weight)
        plan.peak_sm = float(share_sm.max(initial=0.0))
        plan.peak_hbm = float(share_hbm.max(initial=0.0))
        plan.weighted_sm = float((share_sm * weight).max(initial=0.0))
        plan.weighted_hbm = float((share_hbm * weight).max(initial=0.0))
        plan.compute_from = np.cumsum(computes[::-1])[::-1].tolist()
        plan.next_joint = [n] * (n + 1)
        joint = [k for k in communicating if plan.joint[k]]
        first = 0
        for k in joint:
            plan.next_joint[first : k + 1] = [k] * (k + 1 - first)
            first = k + 1
        # where jitter stretches a collective's own computation, members' latencies differ
        fused = factors is not None and any(
            tasks[k].latency or tasks[k].compute or tasks[k].hbm_bytes for k in joint
        )
        plan.team_end = list(range(n))
        for k in reversed(joint):
            if entry.peer < 0 and not fused:
                if any(self.classes[m].program is not cls.program for m in meets[k]):
                    continue
                following = plan.next_joint[k + 1]
                same = following < n and meets[following] == meets[k]
                plan.team_end[k] = plan.team_end[following] if same else following
        return plan

    def _cost(self, lat: np.ndarray, body: np.ndarray, sm: np.ndarray, hbm: np.ndarray) -> Cost:
        if self.jitter is not None:
            return Cost(lat, body, sm, hbm)
        key = (lat.tobytes(), body.tobytes(), sm.tobytes(), hbm.tobytes())
        cost = self.costs.get(key)
        if cost is None:
            cost = self.costs[key] = Cost(lat, body, sm, hbm)
        return cost

    def _table(self, cost: Cost, key: tuple[float, float]) -> Table:
        table = cost.tables.get(key)
        if table is None:
            body = cost.body
            if key[0] > 0.0:
                body = np.maximum(body, cost.sm / (1.0 - key[0]))
            if key[1] > 0.0:
                body = np.maximum(body, cost.hbm / (1.0 - key[1]))
            cum = np.empty(len(body) + 1)
            cum[0] = 0.0
            np.cumsum(cost.lat + body, out=cum[1:])
            table = Table(len(self.tables), cost.lat_list, body.tolist(), cum.tolist())
            self.tables.append(cum)
            cost.tables[key] = table
        return table

    # ------------------------------------------------------------------------- the clock

    def execute(self) -> Record:
        """Run to the end.

        Raises
        ------
        SimulatorError
            If streams wait for each other, or an event is fired twice.
        """
        for cls in self.classes:
            self.ready.extend(cls.streams)
        self.clock.call_at(0.0, self._begin)
        with paused_collector():
            self.clock.run()
        waiting = [
            self._waiting(stream)
            for cls in self.classes
            for stream in cls.streams
            if stream.entry < len(stream.entries)
        ]
        if waiting:
            shown = "; ".join(waiting[:8])
            more = f"; and {len(waiting) - 8} more" if len(waiting) > 8 else ""
            raise SimulatorError(f"deadlock at {self.clock.now:.6g} s: {shown}{more}")
        return self._record()

    def _waiting(self, stream: Stream) -> str:
        cls = stream.cls
        rank = int(self.quotient.representatives[cls.index])
        entry = stream.entries[stream.entry]
        where = f"rank {rank}, stream {cls.program.names[stream.index]!r}: "
        where += f"entry {stream.entry} ({entry.segment.name!r}"
        where += f", micro-batch {entry.microbatch})" if entry.microbatch >= 0 else ")"
        if stream.active and stream.plan is not None and stream.k < stream.plan.n:
            task = entry.segment.tasks[stream.k]
            group = task.collective.group if task.collective else ""
            return f"{where} waits in {task.name!r} for the other members of its {group!r} group"
        missing = [e for e in entry.waits if cls.event_time[e] is None]
        return f"{where} waits for event(s) {', '.join(map(str, missing[:4]))}"

    def _begin(self, _timer: Timer) -> None:
        self._drain()

    def _mark(self) -> None:
        if not self.flush_pending:
            self.flush_pending = True
            self.clock.call_at(self.clock._now, self._flush, None, _LAST)

    def _drain(self) -> None:
        work, ready = self.work, self.ready
        while work or ready:
            if work:
                self._go(work.pop())
                continue
            stream = ready.pop()
            if (
                not stream.active
                and stream.entry < len(stream.entries)
                and stream.cls.pending[stream.index][stream.entry] == 0
            ):
                entry = stream.entries[stream.entry]
                stream.active = True
                stream.k = 0
                stream.row0 = stream.cls.first_row + stream.rows[stream.entry]
                stream.plan = self._plan(stream, entry)
                self.entry_start[stream.cls.index][stream.index].append(self.clock._now)
                self._go(stream)

    # --------------------------------------------------------------------------- streams

    def _go(self, stream: Stream) -> None:
        """Execute the stream's entry from its task `k` on."""
        plan = stream.plan
        assert plan is not None
        k = stream.k
        if k >= plan.n:
            self._finish(stream)
        elif plan.joint[k]:
            if stream.entries[stream.entry].peer >= 0:
                self._step([stream])
            else:
                self._arrive(stream)
        else:
            end = plan.next_joint[k]
            if (
                self.use_runs
                and plan.compute_from[k] > plan.compute_from[end]
                and self._try_run([stream], end)
            ):
                return
            self._step([stream])

    def _finish(self, stream: Stream) -> None:
        cls = stream.cls
        entry = stream.entries[stream.entry]
        source = cls.first_entry + cls.program.entry_first[stream.index] + stream.entry
        stream.active = False
        stream.entry += 1
        for event in entry.signals:
            self._fire(cls, event, source)
        if entry.peer >= 0 and entry.signals_peer:
            receiver = self.peer_class[cls.index, entry.peer]
            for event in entry.signals_peer:
                self._fire(receiver, event, source)
        self.ready.append(stream)

    def _fire(self, cls: RankClass, event: int, source: int) -> None:
        if cls.event_time[event] is not None:
            rank = int(self.quotient.representatives[cls.index])
            raise SimulatorError(f"event {event} of rank {rank} is fired twice")
        cls.event_time[event] = self.clock._now
        cls.event_entry[event] = source
        for s, e in cls.program.waiters[event]:
            counts = cls.pending[s]
            counts[e] -= 1
            if counts[e] == 0:
                stream = cls.streams[s]
                if stream.entry == e and not stream.active:
                    self.ready.append(stream)

    def _arrive(self, stream: Stream) -> None:
        """The stream has reached a collective with members of other classes."""
        plan = stream.plan
        assert plan is not None
        k = stream.k
        activity, name = plan.activity[k], plan.names[k]
        occurrences = stream.cls.occurrences
        count = occurrences.get((activity, name), 0)
        occurrences[activity, name] = count + 1
        key = (activity, name, count)
        members = self.quotient.activity_members[activity]
        present = self.meetings.setdefault(key, [])
        present.append(stream)
        if len(present) < len(members):
            return
        del self.meetings[key]
        present.sort(key=lambda s: s.cls.index)
        if (
            self.use_runs
            and plan.compute_from[k] > plan.compute_from[plan.team_end[k]]
            and all(
                s.k == k and s.entry == stream.entry and s.index == stream.index for s in present
            )
            and self._try_run(present, plan.team_end[k])
        ):
            self.teams.append((tuple(s.row0 for s in present), k, plan.team_end[k], plan))
            return
        self.joint_first.append(len(self.joint_rows))
        self.joint_rows.extend(s.row0 + s.k for s in present)
        self._step(present)

    # ----------------------------------------------------------------------------- steps

    def _make_step(self, streams: list[Stream]) -> tuple[Step, float]:
        first = streams[0]
        plan = first.plan
        assert plan is not None
        k = first.k
        latency, body, weight, links = plan.lat[k], plan.body[k], plan.weight[k], plan.links[k]
        if len(streams) > 1:
            for s in streams:
                assert s.plan is not None
                latency = max(latency, s.plan.lat[s.k])
                weight = min(weight, s.plan.weight[s.k])
                if s.plan.body[s.k] > body:
                    body, links = s.plan.body[s.k], s.plan.links[s.k]
        local: list[tuple[RankClass, float, float]] = []
        if body > 0.0:
            for s in streams:
                assert s.plan is not None
                sm, hbm = s.plan.sm[s.k], s.plan.hbm[s.k]
                if sm > 0.0 or hbm > 0.0:
                    local.append((s.cls, sm / body, hbm / body))
            received = plan.received[k]
            if received is not None:
                other, sm, hbm = received
                local = _merged([*local, (other, sm / body, hbm / body)])
        self.numbers += 1
        return Step(self.numbers, streams, body, weight, links, local), latency

    def _step(self, streams: list[Stream]) -> None:
        step, latency = self._make_step(streams)
        now = self.clock._now
        for s in streams:
            self.start_rows.append(s.row0 + s.k)
            self.start_times.append(now)
        self._launch(step, latency, 1.0)

    def _launch(self, step: Step, latency: float, rem: float) -> None:
        now = self.clock._now
        step.rem = rem
        if latency > 0.0:
            step.due = now + latency
            step.timer = self.clock.call_at(step.due, self._latency_over, step)
        else:
            self._activate(step)

    def _latency_over(self, timer: Timer) -> None:
        step = timer.subject
        assert isinstance(step, Step)
        self._activate(step)
        self._drain()

    def _activate(self, step: Step) -> None:
        """The step begins to load its resources."""
        step.in_latency = False
        now = self.clock._now
        if step.body <= 0.0 or step.rem <= 0.0:
            self._complete(step)
            return
        step.t = now
        load, users = self.load, self.users
        for link, d in step.links:
            load[link] += d
            users[link][step] = d
            if load[link] > _FULL:
                self.dirty_links[link] = None
        for cls, sm, hbm in step.local:
            cls.steps[step] = (sm, hbm)
            self.dirty_classes[cls] = None
        self.changed[step] = None
        self._mark()

    def _complete(self, step: Step) -> None:
        now = self.clock._now
        for s in step.streams:
            self.end_rows.append(s.row0 + s.k)
            self.end_times.append(now)
            s.k += 1
            self.work.append(s)

    def _on_step(self, timer: Timer) -> None:
        step = timer.subject
        assert isinstance(step, Step)
        if step.timer is not timer:
            return
        if step.end > self.clock._now:  # it was slowed after the timer was set
            step.due = step.end
            step.timer = self.clock.call_at(step.due, self._on_step, step)
            return
        step.timer = None
        load, users = self.load, self.users
        for link, _ in step.links:
            if load[link] > _FULL:
                self.dirty_links[link] = None
            own = users[link]
            d = own.pop(step)
            load[link] = load[link] - d if own else 0.0
        for cls, _, _ in step.local:
            del cls.steps[step]
            self.dirty_classes[cls] = None
        if step.local or step.phi < 1.0 or self.dirty_links:
            self._mark()
        self._complete(step)
        self._drain()

    # ------------------------------------------------------------------------------ runs

    def _background(
        self, cls: RankClass, plan: Plan, others: Sequence[Plan] = ()
    ) -> tuple[float, float] | None:
        """The background that a run of `plan` would see, or None if it cannot be a run.

        (0, 0) where nothing is short. A run that yields alone is exact if the others keep their
        speeds whatever it does: filling up all byte rates together, the run's resource must not
        be full before the fastest of the others has stopped rising.
        """
        sm = hbm = full_sm = full_hbm = fastest_sm = fastest_hbm = 0.0
        for step, (d_sm, d_hbm) in cls.steps.items():
            phi = step.phi
            if d_sm > 0.0:
                full_sm += d_sm
                sm += phi * d_sm
                fastest_sm = max(fastest_sm, phi / step.weight)
            if d_hbm > 0.0:
                full_hbm += d_hbm
                hbm += phi * d_hbm
                fastest_hbm = max(fastest_hbm, phi / step.weight)
        peak_sm, peak_hbm = plan.peak_sm, plan.peak_hbm
        for other in others:
            peak_sm += other.peak_sm
            peak_hbm += other.peak_hbm
        short_sm = full_sm + peak_sm > _FULL and peak_sm > 0.0
        short_hbm = full_hbm + peak_hbm > _FULL and peak_hbm > 0.0
        if not (short_sm or short_hbm):
            return (0.0, 0.0)
        if others:
            return None
        if short_sm and sm + plan.weighted_sm * fastest_sm > 1.0:
            return None
        if short_hbm and hbm + plan.weighted_hbm * fastest_hbm > 1.0:
            return None
        return (sm if short_sm else 0.0, hbm if short_hbm else 0.0)

    def _try_run(self, streams: list[Stream], end: int) -> bool:
        """Start a run of the streams from their current task to `end`, if that is exact."""
        plans: list[Plan] = []
        keys: list[tuple[float, float]] = []
        for s in streams:
            assert s.plan is not None
            plans.append(s.plan)
            others = [run.streams[i].plan for run, i in s.cls.runs.items()]
            key = self._background(s.cls, s.plan, others)  # type: ignore[arg-type]
            if key is None:
                return False
            keys.append(key)
        if len(plans) == 1:
            peaks = plans[0].local_peaks
        else:
            peaks = dict(plans[0].joint_peaks)
            for plan in plans:
                for link, d in plan.local_peaks.items():
                    peaks[link] = peaks.get(link, 0.0) + d
        load = self.load
        for link, d in peaks.items():
            if load[link] + d > _FULL:
                return False
        self.numbers += 1
        run = Run(self.numbers, streams, end)
        run.links = tuple(peaks.items())
        for link, d in run.links:
            load[link] += d
            self.users[link][run] = d
        now = self.clock._now
        k = streams[0].k
        for i, s in enumerate(streams):
            s.cls.runs[run] = i
            self.start_rows.append(s.row0 + k)
            self.start_times.append(now)
        run.keys = keys
        run.next_keys = list(keys)
        start = (k, plans[0].lat[k], 1.0, False)
        self._lay_out(run, [start] * len(streams))
        return True

    def _lay_out(self, run: Run, positions: list[Position]) -> None:
        """Times of all tasks to come, from the members' positions now."""
        now = self.clock._now
        tables = [
            self._table(s.plan.cost, key)  # type: ignore[union-attr]
            for s, key in zip(run.streams, run.keys, strict=True)
        ]
        table, position = tables[0], positions[0]
        run.alike = True
        for i in range(1, len(tables)):
            if tables[i] is not table or positions[i] != position:
                run.alike = False
                break
        if run.alike and not position[3]:
            k, latency, rem, _ = position
            base = now - self._offset(table, k, latency, rem)
            run.intervals = [[(k, run.end, table, base, False)]]
            run.ends = [base + table.cum[run.end]]
        else:
            run.alike = False
            self._lay_out_team(run, positions, tables)
        run.due = min(e for e, done in zip(run.ends, run.done, strict=False) if not done)
        if run.timer is None or run.due < run.timer_at:  # else the timer set will look again
            run.timer_at = run.due
            run.timer = self.clock.call_at(run.due, self._on_run, run)

    @staticmethod
    def _offset(table: Table, k: int, latency: float, rem: float) -> float:
        if latency > 0.0:
            return table.cum[k] + (table.lat[k] - latency)
        return table.cum[k] + table.lat[k] + (1.0 - rem) * table.body[k]

    def _lay_out_team(self, run: Run, positions: list[Position], tables: list[Table]) -> None:
        now = self.clock._now
        members = [i for i in range(len(tables)) if not run.done[i]]
        plan = run.streams[members[0]].plan
        assert plan is not None
        end = run.end
        at = [position[0] for position in positions]
        time = [now] * len(tables)
        intervals: list[list[Interval]] = [[] for _ in tables]
        k = at[members[0]]
        together = all(
            at[i] == k and not positions[i][3] for i in members
        ) and k < end and plan.joint[k]  # fmt: skip
        fresh = [False] * len(tables)
        if together:
            # a collective is under way
            _, latency, rem, _ = positions[members[0]]
            table = max((tables[i] for i in members), key=lambda t: t.lat[k] + t.body[k])
            base = now - self._offset(table, k, latency, rem)
            for i in members:
                intervals[i].append((k, k + 1, table, base, False))
                time[i] = base + table.cum[k + 1]
                at[i] = k + 1
                fresh[i] = True
        j = min(min(plan.next_joint[at[i]], end) if at[i] < end else end for i in members)
        while True:
            start, longest, slowest = -1.0, -1.0, tables[members[0]]
            for i in members:
                table, k = tables[i], at[i]
                if k < j:
                    if fresh[i]:
                        base = time[i] - table.cum[k]
                    else:
                        _, latency, rem, _ = positions[i]
                        base = now - self._offset(table, k, latency, rem)
                        fresh[i] = True
                    intervals[i].append((k, j, table, base, False))
                    time[i] = base + table.cum[j]
                if time[i] > start:
                    start = time[i]
                if j < end:
                    duration = table.lat[j] + table.body[j]
                    if duration > longest:
                        longest, slowest = duration, table
            if j == end:
                break
            base = start - slowest.cum[j]
            met = (j, j + 1, slowest, base, True)
            after = base + slowest.cum[j + 1]
            j += 1
            for i in members:
                intervals[i].append(met)
                time[i], at[i], fresh[i] = after, j, True
            j = min(plan.next_joint[j], end) if j < end else end
        old = run.ends if len(run.ends) == len(tables) else [now] * len(tables)
        run.ends = [old[i] if run.done[i] else time[i] for i in range(len(tables))]
        run.intervals = intervals

    def _on_run(self, timer: Timer) -> None:
        run = timer.subject
        assert isinstance(run, Run)
        if run.timer is not timer:
            return
        now = self.clock._now
        if run.due > now:  # it was slowed after the timer was set
            run.timer_at = run.due
            run.timer = self.clock.call_at(run.due, self._on_run, run)
            return
        if run.alike:
            first, last, table, base, _ = run.intervals[0][0]
            for s in run.streams:
                self.pieces.append((s.row0, first, last, table.number))
                self.piece_bases.append(base)
                s.k = last
                del s.cls.runs[run]
                self.work.append(s)
            run.done = [True] * len(run.streams)
        else:
            for i, s in enumerate(run.streams):
                if not run.done[i] and run.ends[i] <= now:
                    self._commit(s, run.intervals[i], None)
                    run.done[i] = True
                    s.k = run.end
                    del s.cls.runs[run]
                    self.work.append(s)
            left = [run.ends[i] for i, done in enumerate(run.done) if not done]
            if left:
                run.due = run.timer_at = min(left)
                run.timer = self.clock.call_at(run.due, self._on_run, run)
                self._drain()
                return
        self._release(run)
        self._drain()

    def _release(self, run: Run) -> None:
        load, users = self.load, self.users
        for link, d in run.links:
            own = users[link]
            del own[run]
            load[link] = load[link] - d if own else 0.0
        run.timer = None

    def _commit(self, stream: Stream, intervals: list[Interval], now: float | None) -> Position:
        """Record what was executed until `now` (all, if None); returns the position."""
        for n, (first, last, table, base, met) in enumerate(intervals):
            cum = table.cum
            if now is not None:
                x = now - base
                if x < cum[last] or n == len(intervals) - 1:
                    if met and x <= cum[first]:
                        return (first, table.lat[first], 1.0, True)
                    k = min(max(bisect_right(cum, x, first, last) - 1, first), last - 1)
                    if met:
                        self.start_rows.append(stream.row0 + first)
                        self.start_times.append(base + cum[first])
                    if k > first:
                        self.pieces.append((stream.row0, first, k, table.number))
                        self.piece_bases.append(base)
                    y = x - cum[k]
                    if y < table.lat[k]:
                        return (k, table.lat[k] - max(y, 0.0), 1.0, False)
                    body = table.body[k]
                    done = (y - table.lat[k]) / body if body > 0.0 else 1.0
                    return (k, 0.0, max(0.0, 1.0 - done), False)
            if met:
                self.start_rows.append(stream.row0 + first)
                self.start_times.append(base + cum[first])
            self.pieces.append((stream.row0, first, last, table.number))
            self.piece_bases.append(base)
        return (intervals[-1][1], 0.0, 0.0, False)

    def _positions(self, run: Run) -> list[Position]:
        now = self.clock._now
        if run.alike:
            return [self._commit(s, run.intervals[0], now) for s in run.streams]
        return [
            (run.end, 0.0, 0.0, False) if run.done[i] else self._commit(s, run.intervals[i], now)
            for i, s in enumerate(run.streams)
        ]

    def _dissolve(self, run: Run) -> None:
        """Go on in steps."""
        positions = self._positions(run)
        self._release(run)
        together: dict[int, list[Stream]] = {}
        waiting: list[Stream] = []
        for i, s in enumerate(run.streams):
            if run.done[i]:
                continue
            del s.cls.runs[run]
            k, latency, rem, waits = positions[i]
            s.k = k
            assert s.plan is not None
            if waits:
                waiting.append(s)
            elif s.plan.joint[k]:
                together.setdefault(k, []).append(s)
            else:
                step, _ = self._make_step([s])
                self._launch(step, latency, rem)
        for k, streams in together.items():
            _, latency, rem, _ = positions[run.streams.index(streams[0])]
            self.joint_first.append(len(self.joint_rows))
            self.joint_rows.extend(s.row0 + k for s in streams)
            step, _ = self._make_step(streams)
            self._launch(step, latency, rem)
        for s in waiting:
            self._arrive(s)

    # -------------------------------------------------------------------------- settling

    def _flush(self, _timer: Timer) -> None:
        """Settle what changed in this instant: speeds of steps, tables of runs, timers."""
        while self.dirty_links or self.dirty_classes:
            links, self.dirty_links = self.dirty_links, {}
            classes, self.dirty_classes = self.dirty_classes, {}
            for link in links:
                if self.load[link] > _FULL:
                    for user in [u for u in self.users[link] if isinstance(u, Run)]:
                        self._dissolve(user)
            classes.update(self._share(links, classes))
            for cls in classes:
                self._settle(cls)
        for run in self.replan:
            if run.timer is not None and run.next_keys != run.keys and run.due > self.clock._now:
                positions = self._positions(run)
                run.keys = list(run.next_keys)
                self._lay_out(run, positions)
        self.replan.clear()
        now = self.clock._now
        for step in self.changed:
            if step.rem <= 0.0:
                continue
            step.end = now + step.rem * step.body / step.phi
            if step.timer is None or step.in_latency or step.due > step.end or step.due <= now:
                step.due = step.end
                step.timer = self.clock.call_at(step.due, self._on_step, step)
        self.changed.clear()
        self.flush_pending = False
        if self.work or self.ready:
            self._drain()

    def _settle(self, cls: RankClass) -> None:
        """Give the run of a class the table of its background, or dissolve it."""
        if not cls.runs:
            return
        if len(cls.runs) > 1:
            plans = [run.streams[i].plan for run, i in cls.runs.items()]
            if self._background(cls, plans[0], plans[1:]) is None:  # type: ignore[arg-type]
                longest = max(cls.runs, key=lambda run: (run.end, -run.number))
                for run in [r for r in cls.runs if r is not longest]:
                    self._dissolve(run)
            else:
                for run, i in cls.runs.items():
                    if run.next_keys[i] != (0.0, 0.0):
                        run.next_keys[i] = (0.0, 0.0)
                        self.replan[run] = None
                return
        ((run, i),) = cls.runs.items()
        plan = run.streams[i].plan
        assert plan is not None
        key = self._background(cls, plan)
        if key is None:
            self._dissolve(run)
        elif key != run.next_keys[i]:
            run.next_keys[i] = key
            self.replan[run] = None

    def _share(
        self, links: dict[int, None], classes: dict[RankClass, None]
    ) -> dict[RankClass, None]:
        """Speeds of the steps that the changed resources can affect.

        Returns the classes whose ranks take part in a step that changed its speed.
        """
        affected: dict[RankClass, None] = {}
        users, load = self.users, self.load
        component: dict[Step, None] = {}
        stack: list[Step] = []

        def add(step: Step) -> None:
            if step not in component:
                component[step] = None
                stack.append(step)

        short: dict[RankClass, tuple[bool, bool]] = {}

        def shortage(cls: RankClass) -> tuple[bool, bool]:
            known = short.get(cls)
            if known is None:
                sm = hbm = 0.0
                for d_sm, d_hbm in cls.steps.values():
                    sm += d_sm
                    hbm += d_hbm
                known = short[cls] = (sm > _FULL, hbm > _FULL)
            return known

        for link in links:
            full = load[link] > _FULL
            for user in users[link]:
                if isinstance(user, Step) and (full or user.phi < 1.0):
                    add(user)
        for cls in classes:
            if cls.steps:
                sm, hbm = shortage(cls)
                for step in cls.steps:
                    if sm or hbm or step.phi < 1.0:
                        add(step)
        if not component:
            return affected
        while stack:
            step = stack.pop()
            for link, _ in step.links:
                if load[link] > _FULL:
                    for user in users[link]:
                        if isinstance(user, Step):
                            add(user)
            for cls, d_sm, d_hbm in step.local:
                sm, hbm = shortage(cls)
                if (sm and d_sm > 0.0) or (hbm and d_hbm > 0.0):
                    for other, (o_sm, o_hbm) in cls.steps.items():
                        if (sm and o_sm > 0.0) or (hbm and o_hbm > 0.0):
                            add(other)
        steps = sorted(component, key=lambda step: step.number)
        demands: list[list[tuple[int, float]]] = []
        first_local = len(load)
        for step in steps:
            demand = [(link, d) for link, d in step.links if load[link] > _FULL]
            for cls, d_sm, d_hbm in step.local:
                sm, hbm = shortage(cls)
                if sm and d_sm > 0.0:
                    demand.append((first_local + 2 * cls.index, d_sm))
                if hbm and d_hbm > 0.0:
                    demand.append((first_local + 2 * cls.index + 1, d_hbm))
            demands.append(demand)
        now = self.clock._now
        for step, phi in zip(
            steps, max_min_shares(demands, [step.weight for step in steps]), strict=True
        ):
            if phi == step.phi:
                continue
            step.rem = max(0.0, step.rem - step.phi * (now - step.t) / step.body)
            step.t = now
            step.phi = phi
            self.changed[step] = None
            for cls, _, _ in step.local:
                affected[cls] = None
        return affected

    # ------------------------------------------------------------------------- recording

    def _record(self) -> Record:
        end = np.full(self.rows, np.nan)
        end[np.array(self.end_rows, dtype=np.int64)] = self.end_times
        if self.pieces:
            piece = np.array(self.pieces, dtype=np.int64)
            base = np.array(self.piece_bases)
            lengths = np.array([len(t) for t in self.tables])
            offsets = np.r_[0, np.cumsum(lengths)[:-1]]
            flat = np.concatenate(self.tables)
            count = piece[:, 2] - piece[:, 1]
            total = int(count.sum())
            ramp = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
            k = np.repeat(piece[:, 1], count) + ramp
            end[np.repeat(piece[:, 0], count) + k] = (
                np.repeat(base, count) + flat[np.repeat(offsets[piece[:, 3]], count) + k + 1]
            )
        start = np.empty(self.rows)
        if self.rows:
            start[0] = 0.0
            start[1:] = end[:-1]
        start[np.array(self.start_rows, dtype=np.int64)] = self.start_times
        joint_rows, joint_first = list(self.joint_rows), list(self.joint_first)
        for rows, k, last, plan in self.teams:
            for j in range(k, last):
                if plan.joint[j]:
                    joint_first.append(len(joint_rows))
                    joint_rows.extend(row + j for row in rows)
        return Record(
            start=start,
            end=end,
            joint_first=np.array([*joint_first, len(joint_rows)], dtype=np.int64),
            joint_rows=np.array(joint_rows, dtype=np.int64),
            event_time=tuple(
                np.array([np.nan if t is None else t for t in cls.event_time], dtype=float)
                for cls in self.classes
            ),
            event_entry=tuple(np.array(c.event_entry, dtype=np.int64) for c in self.classes),
            first_row=np.array([cls.first_row for cls in self.classes] + [self.rows]),
            first_entry=np.cumsum([0] + [cls.program.entry_count for cls in self.classes]),
            entry_start=np.array(
                [t for streams in self.entry_start for times in streams for t in times], dtype=float
            ),
            events=self.clock.scheduled,
            # not the clock's last time: timers that were overtaken may lie later
            step_time=float(end.max(initial=0.0)),
        )
