"""The fast engine, folded and unfolded, against the slow one: every row of every rank."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.engine import Jitter, simulate
from simulator.engine.jitter import Factors
from simulator.folding import fold as fold_system
from simulator.folding import resolve

from .reference import Reference
from .synthetic import random_case


def rows_of(timeline):
    """{(rank, stream, entry, task): (start, end)} of all ranks."""
    rows = {}
    for c in range(timeline.classes):
        table = timeline.program_table(c)
        start, end = timeline.start(c), timeline.end(c)
        first = {}
        for s, _name in enumerate(table.streams):
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
    for seed in range(10 * block, 10 * block + 10):
        workload, cluster, traffic = random_case(seed)
        expected = Reference(workload, cluster, traffic).run()
        for fold in (True, False):
            timeline = simulate(workload, cluster, traffic=traffic, fold=fold)
            try:
                assert_same(rows_of(timeline), expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, fold={fold}: {error}") from error


@pytest.mark.parametrize("per", ["rank", "class"])
def test_jitter_equals_reference(per):
    for seed in range(1000, 1010):
        workload, cluster, traffic = random_case(seed)
        jitter = Jitter("gamma", 0.2, seed, per)
        system = resolve(workload, cluster, traffic)
        keys = np.arange(workload.ranks) if per == "rank" else fold_system(system).class_of
        reference = Reference(workload, cluster, traffic, jitter=Factors(jitter), keys=keys)
        expected = reference.run()
        for fold in (True, False):
            timeline = simulate(workload, cluster, traffic=traffic, fold=fold, jitter=jitter)
            assert_same(rows_of(timeline), expected)
            assert per == "class" or timeline.classes == workload.ranks


def test_without_overlap_sharing_equals_reference():
    for seed in range(2000, 2010):
        workload, cluster, traffic = random_case(seed)
        expected = Reference(workload, cluster, traffic, overlap=False).run()
        timeline = simulate(workload, cluster, traffic=traffic, overlap_sharing=False)
        assert_same(rows_of(timeline), expected)
