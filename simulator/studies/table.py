"""One Parquet table that survives being killed while it grows.

Parquet files cannot be appended to: their index is at the end. So rows are first appended, one
line of JSON each, to a journal beside the table, and now and then the journal is folded into the
table: the new table is written aside and put in place by one atomic rename, then the journal is
emptied. Killed at any moment, a row is in the table, in the journal, or (between rename and
emptying) in both; a row's key tells that it is the same one. A line cut off in the middle is
dropped, so that its point is run again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simulator.errors import InputError

TABLE, JOURNAL, LOCK = "results.parquet", "results.journal", ".lock"
#: The journal is folded in when it has this many rows and as many as a quarter of the table's:
#: folding costs as much as the table is long, so all foldings together stay linear.
FOLD_ROWS = 128

Row = Mapping[str, Any]


class RowTable:
    """Rows by key in `folder/results.parquet`; one writer at a time.

    Parameters
    ----------
    folder:
        Made if it does not exist.
    key:
        Name of the column that identifies a row.

    Raises
    ------
    InputError
        If the folder cannot be written, another process is writing there, or the table is not
        one of this kind.
    """

    def __init__(self, folder: str | Path, key: str = "key") -> None:
        self.folder = Path(folder)
        self.key = key
        self.path = self.folder / TABLE
        self._journal_path = self.folder / JOURNAL
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / LOCK)
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror}", place=str(self.folder)
            ) from None
        try:
            self._rows: dict[str, Row] = {}
            for row in _read_table(self.path, key):
                self._rows[str(row[key])] = row
            journalled = self._read_journal()
            self._journal = os.open(
                self._journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
            )
        except BaseException:
            os.close(self._lock)
            raise
        self._in_journal = journalled
        self._columns: tuple[str, ...] = ()

    def _read_journal(self) -> int:
        """Rows of the journal; a line that was cut off is removed from the file."""
        try:
            content = self._journal_path.read_bytes()
        except FileNotFoundError:
            return 0
        good = 0
        count = 0
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or self.key not in row:
                break
            self._rows[str(row[self.key])] = row
            good += len(line)
            count += 1
        if good < len(content):
            os.truncate(self._journal_path, good)
        return count

    def __enter__(self) -> RowTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, key: str) -> Row:
        """The row of `key`."""
        return self._rows[key]

    def append(self, row: Row) -> bool:
        """Add a row unless its key is there already; whether it was added.

        The row outlives the process once this returns (it is with the operating system).
        """
        key = str(row[self.key])
        if key in self._rows:
            return False
        line = json.dumps(row, separators=(",", ":"), allow_nan=True, default=str) + "\n"
        _write_all(self._journal, line.encode())
        self._rows[key] = json.loads(line)
        self._in_journal += 1
        if self._in_journal >= max(FOLD_ROWS, len(self._rows) // 4):
            self.fold()
        return True

    def forget(self, keys: Iterable[str]) -> None:
        """Remove rows, so that their points are run again."""
        gone = [key for key in keys if self._rows.pop(key, None) is not None]
        if gone:
            self.fold(force=True)

    def fold(
        self, order: Sequence[str] = (), *, columns: Sequence[str] = (), force: bool = False
    ) -> None:
        """Fold the journal into the table.

        Rows of `order` and columns of `columns` come first and in that order.
        """
        if columns:
            self._columns = tuple(columns)
        wanted = [key for key in order if key in self._rows]
        if wanted:
            chosen = set(wanted)
            ordered = [*wanted, *(key for key in self._rows if key not in chosen)]
            changed = ordered != list(self._rows)
            self._rows = {key: self._rows[key] for key in ordered}
        else:
            changed = False
        if not (self._in_journal or changed or force) and self.path.exists():
            return
        aside = self.path.with_suffix(".parquet.new")
        with open(aside, "wb") as file:
            pq.write_table(table_of(self._rows.values(), self._columns), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)
        os.ftruncate(self._journal, 0)
        self._in_journal = 0

    def close(self) -> None:
        """Give the folder free; what is in the journal stays there for the next time."""
        os.close(self._journal)
        os.close(self._lock)
        if self._in_journal == 0:
            with contextlib.suppress(OSError):
                self._journal_path.unlink()


def _locked(path: Path) -> int:
    """Descriptor of a lock file that the operating system unlocks when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        # a record lock: unlike flock's, it is not inherited by forked workers, which may outlive us
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not POSIX: no guard against a second writer
        pass
    except OSError:
        os.close(descriptor)
        raise InputError(
            "another sweep is writing here; wait for it or choose another --out",
            place=str(path.parent),
        ) from None
    return descriptor


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_table(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a Parquet table: {error}", place=str(path)) from None
    if key not in table.column_names:
        raise InputError(f"not a table of a sweep: no column {key!r}", place=str(path))
    # columns that a row never had come back as null: leave them out again
    return [
        {name: value for name, value in row.items() if value is not None}
        for row in table.to_pylist()
    ]


def table_of(rows: Iterable[Row], columns: Sequence[str] = ()) -> pa.Table:
    """Rows as a table: a column for every name, null where a row has none.

    `columns` come first, the other columns in the order of their first appearance.

    A column's type is the narrowest that holds all its values (bool, int64, float64, else text);
    lists and mappings become JSON text.
    """
    rows = list(rows)
    present = dict.fromkeys(name for row in rows for name in row)
    names = dict.fromkeys([*(name for name in columns if name in present), *present])
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    present = [value for value in values if value is not None]
    kinds = set(map(type, present))
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int} and all(-(2**63) <= value < 2**63 for value in present):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array([None if v is None else _text(v) for v in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, sort_keys=True, default=str)


def iterate_flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with dotted names; sequences of mappings are left out."""
    for name, value in values.items():
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()  # a numpy scalar
        if isinstance(value, Mapping):
            yield from iterate_flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float | bool) or value is None:
            yield f"{prefix}{name}", value
