"""The timeline's columns as reports read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulator.errors import InputError

#: Columns that every report needs.
REQUIRED = ("rank", "stage", "stream", "operation", "kind", "start", "end")
#: Columns that are filled in where a table (an imported trace) lacks them.
_DEFAULTS: dict[str, Any] = {
    "phase": "", "layer": -1, "microbatch": -1, "flops": 0.0, "bytes": 0.0, "host_wait": 0.0,
}  # fmt: skip
_NUMBERS = (
    "rank", "stage", "layer", "microbatch", "start", "end", "flops", "bytes", "host_wait",
)  # fmt: skip
#: What two rows have to share to be the same operation at another time.
_TEMPLATE = ("operation", "kind", "phase", "layer", "stage", "stream", "flops", "bytes")

#: Streams from the top of a rank's rows to the bottom, with the numbers that traces give them:
#: PyTorch's profiler shows the compute stream as 7.
STREAM_NUMBERS: dict[str, int] = {
    "compute": 7, "tensor": 16, "expert": 18, "data": 20, "pipeline": 24, "pipeline.backward": 28,
    "copy": 32,
}  # fmt: skip


def complete(frame: pd.DataFrame, *, place: str | None = None) -> pd.DataFrame:
    """`frame` with every column that reports use; raises `InputError` if it is no timeline.

    Rows are sorted by rank, stream and start; the index is that of the input, so that row numbers
    in other columns can still be resolved.
    """
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise InputError(f"a timeline needs the columns {', '.join(missing)}", place=place)
    fill = {name: value for name, value in _DEFAULTS.items() if name not in frame.columns}
    frame = frame.assign(**fill) if fill else frame
    _check_numbers(frame, place)
    streams = stream_order(frame["stream"].unique())
    position = {name: index for index, name in enumerate(streams)}
    keys = (
        frame["start"].to_numpy(),
        frame["stream"].map(position).to_numpy(dtype=np.int64),
        frame["rank"].to_numpy(),
    )
    return frame.iloc[np.lexsort(keys)]


def _check_numbers(frame: pd.DataFrame, place: str | None) -> None:
    for name in _NUMBERS:
        column = frame[name]
        if not pd.api.types.is_numeric_dtype(column) or not np.isfinite(column.to_numpy()).all():
            raise InputError(f"column {name!r} of a timeline holds finite numbers", place=place)
    if (frame["end"].to_numpy() < frame["start"].to_numpy()).any():
        raise InputError("an operation of the timeline ends before it starts", place=place)


def stream_order(streams: object) -> list[str]:
    """Stream names in the order in which reports draw them; unknown ones last, by name."""
    rank = {name: index for index, name in enumerate(STREAM_NUMBERS)}
    names = [str(name) for name in streams]  # type: ignore[attr-defined]
    return sorted(dict.fromkeys(names), key=lambda name: (rank.get(name, len(rank)), name))


def stream_number(stream: str, streams: list[str]) -> int:
    """The number by which a trace names a stream; `streams` are all of them, in order."""
    known = STREAM_NUMBERS.get(stream)
    unknown = [name for name in streams if name not in STREAM_NUMBERS]
    return known if known is not None else 40 + 4 * unknown.index(stream)


def host_waits_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """A complete timeline in which what operations wait for their launch is rows of its own.

    They have the kind `host`, the operation's name and its other columns, and are in front of it.
    """
    launched = launched_at(frame)
    waits = (launched > frame["start"]).to_numpy()
    if not waits.any():
        return frame
    before = frame[waits].assign(end=launched[waits], kind="host", flops=0.0, bytes=0.0)
    kind = frame["kind"].astype(str)
    return pd.concat([before, frame.assign(start=launched, kind=kind)], ignore_index=True)


def launched_at(frame: pd.DataFrame) -> pd.Series:
    """When what the rows of a complete timeline name begins, after waiting for its launch [s]."""
    # a row of kind `host` is nothing but waiting
    return frame["start"] + frame["host_wait"].where(frame["kind"] != "host", 0.0)


@dataclass(frozen=True, eq=False)
class Templates:
    """The distinct operations of a timeline: a million rows are a few thousand of them, repeated.

    `rows` has one row per distinct operation, `code[i]` is the row of `rows` that row `i` of the
    timeline is an occurrence of.
    """

    rows: pd.DataFrame
    code: NDArray[np.int64]


def templates(frame: pd.DataFrame, apart: Sequence[str] = ()) -> Templates:
    """The distinct (operation, kind, phase, layer, stage, stream, FLOPs, bytes) of a timeline.

    `apart` names further columns by which operations are told apart.
    """
    names = [*_TEMPLATE, *apart]
    code = np.zeros(len(frame), dtype=np.int64)
    for name in names:
        column, values = pd.factorize(frame[name], use_na_sentinel=False)
        if len(values) <= 1:
            continue
        # renumbered after each column, so that the product stays below len(frame) * len(values)
        code = pd.factorize(code * len(values) + column)[0]
    _, first = np.unique(code, return_index=True)
    return Templates(frame.iloc[first][names].reset_index(drop=True), code)


def awaited_rows(frame: pd.DataFrame) -> NDArray[np.int64]:
    """Position in `frame` of the row that each row waited for; -1 where it waited for none.

    Column `cause` holds index labels of the table that the rows come from; a label whose row is
    not part of `frame` (a rank that is not shown) counts as none.
    """
    if "cause" not in frame.columns:
        return np.full(len(frame), -1, dtype=np.int64)
    return frame.index.get_indexer(pd.Index(frame["cause"])).astype(np.int64)
