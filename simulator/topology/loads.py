"""Which groups load which links: one pattern of links for all groups that are alike.

On a regular cluster most groups of a parallel plan are alike but for their place: what one loads,
another loads a fixed number of links further on. `LinkLoads` writes such a pattern once, with a
shift per group, so that 131,072 accelerators need neither routes nor arrays of their own; what
needs all links goes through them in pieces that fit into a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

Rows = IntArray | slice
Entries = IntArray | tuple[slice, None]

#: Entries of a piece: arrays of that many numbers stay in the cache.
_PIECE = 1 << 15
#: From this many rows on, those of one pattern are a piece of their own.
_ALIKE = 8


@dataclass(frozen=True, eq=False)
class Congruence:
    """Groups of accelerators whose routes are the same but for the numbers of the links.

    Link l on the routes of group `first[class_of[g]]` is link `l + shift[block_of(l), g]` on those
    of group g. Of two links of different blocks the one with the smaller number keeps it.
    """

    class_of: IntArray
    """[G]."""
    first: IntArray
    """First group of each class."""
    shift: NDArray[np.int32]
    """[blocks, G]; 0 for the first group of a class."""
    block_of: Callable[[IntArray], NDArray[np.int8]]


@dataclass(frozen=True, eq=False)
class LinkLoads:
    """Work of R groups on directed links.

    Row r, which is group `group[r]`, loads the links `link[e] + shift[block[e], r]` with `work[e]`
    bytes (byte-equivalents) each, for the entries e = start[p] ... start[p + 1] - 1 of its pattern
    p = `pattern[r]`. Within a pattern, links ascend, and still do when shifted.
    """

    group: IntArray
    """[R], each group at most once."""
    pattern: IntArray
    start: IntArray
    """[patterns + 1]."""
    link: IntArray
    work: FloatArray
    block: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    """[entries]; empty where nothing is shifted."""
    shift: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int32))
    """[blocks, R]; empty where nothing is shifted."""

    @classmethod
    def of(cls, groups: int, group: IntArray, link: IntArray, work: FloatArray) -> LinkLoads:
        """From entries in any order; those of one group and link are added up, empty ones go."""
        if not np.all(work > 0.0):
            kept = work > 0.0
            group, link, work = group[kept], link[kept], work[kept]
        ahead, same = group[1:] > group[:-1], group[1:] == group[:-1]
        if not np.all(ahead | (same & (link[1:] > link[:-1]))):
            order = np.lexsort((link, group))
            group, link, work = group[order], link[order], work[order]
            begins = np.flatnonzero((np.diff(group, prepend=-1) != 0) | np.diff(link, prepend=-1))
            work = np.add.reduceat(work, begins)
            group, link = group[begins], link[begins]
        number = np.arange(groups)
        start = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))])
        return cls(number, number, start, link, work)

    @classmethod
    def joined(cls, parts: Sequence[LinkLoads]) -> LinkLoads:
        """The rows of several, of different groups."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            empty = np.zeros(0, dtype=np.int64)
            return cls(empty, empty, np.zeros(1, dtype=np.int64), empty, np.zeros(0))
        patterns = np.cumsum([0] + [len(part.start) - 1 for part in parts])
        entries = np.cumsum([0] + [len(part.link) for part in parts])
        start = [part.start[:-1] + at for part, at in zip(parts, entries, strict=False)]
        blocks = max(len(part.shift) for part in parts)
        block = [part.block if part.block.size else np.zeros(len(part.link)) for part in parts]
        shift = np.zeros((blocks, sum(len(part.group) for part in parts)), dtype=np.int32)
        row = 0
        for part in parts:
            if part.shift.size:
                shift[:, row : row + len(part.group)] = part.shift
            row += len(part.group)
        return cls(
            np.concatenate([part.group for part in parts]),
            np.concatenate([p.pattern + at for p, at in zip(parts, patterns, strict=False)]),
            np.concatenate([*start, entries[-1:]]),
            np.concatenate([part.link for part in parts]),
            np.concatenate([part.work for part in parts]),
            np.concatenate(block).astype(np.int8) if blocks else np.zeros(0, dtype=np.int8),
            shift,
        )

    def moved(self, like: Congruence) -> LinkLoads:
        """The loads of all groups, where the rows are the first group of each class."""
        number, block = np.arange(len(like.class_of)), like.block_of(self.link)
        return replace(self, group=number, pattern=like.class_of, block=block, shift=like.shift)

    def numbered(self, group: IntArray) -> LinkLoads:
        """The same rows with other numbers for their groups: number g becomes `group[g]`."""
        return replace(self, group=group[self.group])

    def alike(self, other: LinkLoads) -> bool:
        """Whether the same groups load the same links, with whatever work."""
        return all(
            mine is its or np.array_equal(mine, its)
            for mine, its in (
                (self.link, other.link), (self.group, other.group), (self.start, other.start),
                (self.pattern, other.pattern), (self.block, other.block),
                (self.shift, other.shift),
            )
        )  # fmt: skip

    def pieces(self) -> Iterator[tuple[Rows, Entries, IntArray]]:
        """All links of all rows, some rows at a time.

        Yields
        ------
        rows (n of them), entries and links [k, n], where the j-th row loads `links[i, j]` with
        `work[entries][i, j]`. Of rows of one pattern, `work[entries]` is [k, 1].
        """
        size = np.diff(self.start)
        if len(size) == 1:
            yield from self._pattern(0, None)
            return
        many = np.bincount(self.pattern, minlength=len(size)) >= _ALIKE
        common = many[self.pattern]
        for rows in _equal(np.flatnonzero(common), self.pattern[common]):
            yield from self._pattern(int(self.pattern[rows[0]]), rows)
        # of the others, those with as many entries
        rest = np.flatnonzero(~common)
        for rows in _equal(rest, size[self.pattern[rest]]):
            k = int(size[self.pattern[rows[0]]])
            step = max(1, _PIECE // max(1, k))
            for begin in range(0, len(rows) if k else 0, step):
                some = rows[begin : begin + step]
                entries = self.start[self.pattern[some]] + np.arange(k)[:, None]
                links = self.link[entries]
                if self.shift.size:
                    links += self.shift[self.block[entries], some]
                yield some, entries, links

    def _pattern(
        self, pattern: int, rows: IntArray | None
    ) -> Iterator[tuple[Rows, Entries, IntArray]]:
        """Pieces of the rows of one pattern; None: of all."""
        entries = slice(int(self.start[pattern]), int(self.start[pattern + 1])), None
        links = self.link[entries]
        count = len(self.group) if rows is None else len(rows)
        step = max(1, _PIECE // max(1, len(links)))
        for begin in range(0, count if len(links) else 0, step):
            some: Rows = slice(begin, min(count, begin + step))
            if rows is not None:
                some = rows[some]
            if self.shift.size:
                yield some, entries, links + self.shift[:, some][self.block[entries[0]]]
            else:
                yield some, entries, np.broadcast_to(links, (len(links), len(self.group[some])))

    def entries(self) -> tuple[IntArray, IntArray, FloatArray]:
        """(group, link, work) of everything, by row."""
        count = np.diff(self.start)[self.pattern]
        begin = np.cumsum(count) - count
        row = np.repeat(np.arange(len(count)), count)
        entry = np.arange(len(row)) + (self.start[self.pattern] - begin)[row]
        link = self.link[entry]
        if self.shift.size:
            link = link + self.shift[self.block[entry], row]
        return self.group[row], link, self.work[entry]

    def alone(self, capacity: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Per row: seconds on its slowest link when nothing else runs, and the work there."""
        seconds, bottleneck = np.zeros(len(self.group)), np.zeros(len(self.group))
        for rows, entries, links in self.pieces():
            work = self.work[entries]
            rate = capacity[links]
            if work.shape[1] < rate.shape[1] and np.all(rate == rate[:, :1]):
                rate = rate[:, :1]
            needed = work / rate
            slowest = needed.max(axis=0)
            seconds[rows] = slowest
            bottleneck[rows] = np.where(needed >= slowest * (1.0 - 1e-9), work, 0.0).max(axis=0)
        return seconds, bottleneck

    def add_to(self, total: FloatArray, times: FloatArray) -> None:
        """Add the work of row r, `times[r]` times, to the `total` of every link."""
        for rows, entries, links in self.pieces():
            np.add.at(total, links.ravel(), (self.work[entries] * times[rows]).ravel())


def _equal(values: IntArray, key: IntArray) -> Iterator[IntArray]:
    """`values` in lots of equal `key`."""
    if not len(values):
        return
    if (key == key[0]).all():
        yield values
        return
    order = np.argsort(key, kind="stable")
    yield from np.split(values[order], np.flatnonzero(np.diff(key[order])) + 1)


def equal_rows(columns: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """(class of every row, first row of each class) of rows that are equal in all `columns` [G, n].

    Classes are numbered in the order of their first rows.
    """
    rows = len(columns[0])
    if all((column == column[:1]).all() for column in columns):
        return np.zeros(rows, dtype=np.int64), np.zeros(min(1, rows), dtype=np.int64)
    table = np.ascontiguousarray(np.concatenate(columns, axis=1))
    # by a random sum of each row, then by the numbers themselves
    weights = np.random.default_rng(0).integers(1, 2**62, size=table.shape[1])
    with np.errstate(over="ignore"):
        _, first, inverse = np.unique(table @ weights, return_index=True, return_inverse=True)
    if not (table == table[first[inverse]]).all():
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[inverse.reshape(-1)], first[order]
