"""The fast engine, folded and unfolded, against the slow one: every row of every rank."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.engine import simulate

from .reference import Reference
from .synthetic import random_case


def rows_of(timeline):
    """{(rank, stream, entry, task): (start, end)} of all ranks."""
    rows = {}
    for c in range(timeline.classes):
        table = timeline.program_table(c)
        start, end = timeline.start(c), timeline.end(c)
        first = {}
        for s, name in enumerate(table.streams):
            first[s] = int(np.flatnonzero(table.entry_stream == s)[0]) if (
                table.entry_stream == s).any() else 0  # fmt: skip
        for rank in timeline.members(c).tolist():
            for row in range(table.rows):
                s = int(table.stream[row])
                entry = int(table.entry[row])
                k = row - int(table.entry_first[entry])
                rows[rank, table.streams[s], entry - first[s], k] = (start[row], end[row])
    return rows


def assert_same(actual, expected, rel=1e-9):
    assert actual.keys() == expected.keys()
    keys = list(expected)
    if not keys:
        return
    a = np.array([actual[k] for k in keys])
    b = np.array([expected[k] for k in keys])
    scale = max(1e-12, np.abs(b).max())
    worst = np.abs(a - b).max(axis=1)
    i = int(np.argmax(worst))
    assert worst[i] <= rel * scale, (keys[i], a[i], b[i], worst[i] / scale)


@pytest.mark.parametrize("block", range(20))
def test_equals_reference(block):
    for seed in range(12 * block, 12 * block + 12):
        workload, cluster, traffic = random_case(seed)
        expected = Reference(workload, cluster, traffic).run()
        folded = simulate(workload, cluster, traffic=traffic)
        try:
            assert_same(rows_of(folded), expected)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
