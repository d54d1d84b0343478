"""Max-min fair sharing: closed forms, its definition, and a linear-programming reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from simulator.engine import max_min_shares
from simulator.engine.sharing import _vectorised


def rates(flows, capacity):
    """Byte rates of flows (tuples of links), each alone as fast as its narrowest link."""
    alone = [min(capacity[link] for link in flow) for flow in flows]
    demands = [
        [(link, a / capacity[link]) for link in flow] for flow, a in zip(flows, alone, strict=True)
    ]
    phi = max_min_shares(demands, [1.0 / a for a in alone])
    return [p * a for p, a in zip(phi, alone, strict=True)]


def test_dumbbell():
    """n flows over one bottleneck get an n-th each, whatever their access links."""
    capacity = {"mid": 9.0, **{f"in{i}": 4.0 + i for i in range(3)}}
    assert rates([(f"in{i}", "mid") for i in range(3)], capacity) == pytest.approx([3, 3, 3])
    # a slow access link leaves its share to the others
    capacity["in0"] = 1.0
    assert rates([(f"in{i}", "mid") for i in range(3)], capacity) == pytest.approx([1, 4, 4])


@pytest.mark.parametrize("hops", [2, 3, 7])
def test_parking_lot(hops):
    """One long flow over all hops and a short one on each: half each (Bertsekas & Gallager)."""
    capacity = dict.fromkeys(range(hops), 10.0)
    flows = [tuple(range(hops)), *[(h,) for h in range(hops)]]
    assert rates(flows, capacity) == pytest.approx([5.0] * (hops + 1))
    capacity[0] = 4.0  # the long flow is held by the narrow hop; the others take what is left
    assert rates(flows, capacity) == pytest.approx([2.0, 2.0] + [8.0] * (hops - 1))


@pytest.mark.parametrize("senders", [2, 5, 60])
def test_incast(senders):
    """n senders into one port, and one of them also busy elsewhere."""
    capacity = {"port": 12.0, **dict.fromkeys(range(senders), 12.0)}
    flows = [(i, "port") for i in range(senders)]
    assert rates(flows, capacity) == pytest.approx([12.0 / senders] * senders)
    flows.append((0,))
    assert rates(flows, capacity)[-1] == pytest.approx(12.0 - 12.0 / senders)


def test_communication_keeps_its_share_and_compute_yields():
    """A send at 50 GB/s takes its tenth of the SMs; the kernel it overlaps runs at nine tenths."""
    send, kernel = [("sm", 0.1), ("nic", 1.0)], [("sm", 1.0), ("hbm", 0.5)]
    assert max_min_shares([send, kernel], [1 / 50e9, 1 / 3e12]) == pytest.approx([1.0, 0.9])


def random_system(rng):
    n, m = int(rng.integers(1, 7)), int(rng.integers(1, 6))
    demand = rng.choice([0.0, 0.3, 0.5, 1.0], size=(n, m)) * rng.uniform(0.5, 1.0, size=(n, m))
    if rng.random() < 0.3:  # ties
        demand = np.round(demand, 1)
    weight = rng.choice([1.0, 2.0, 5.0, 60.0], size=n) * rng.choice([1.0, 1.1], size=n)
    return demand, weight


def as_lists(demand):
    return [[(r, float(d)) for r, d in enumerate(row) if d > 0.0] for row in demand]


def solve_blocks(blocks):
    """Maximise c x for many small independent systems (c, A, b, bounds) at once."""
    result = linprog(
        np.concatenate([-b[0] for b in blocks]),
        A_ub=sparse.block_diag([b[1] for b in blocks], format="csr"),
        b_ub=np.concatenate([b[2] for b in blocks]),
        bounds=np.concatenate([b[3] for b in blocks]),
        method="highs",
    )
    assert result.status == 0
    return np.split(result.x, np.cumsum([len(b[0]) for b in blocks])[:-1])


def lexicographic(systems):
    """The definition as linear programs: raise the lowest level as far as it goes; whoever cannot
    go beyond it is fixed; repeat."""
    phi = [np.zeros(len(w)) for _, w in systems]
    free = [np.ones(len(w), dtype=bool) for _, w in systems]
    while any(f.any() for f in free):
        live = [i for i, f in enumerate(free) if f.any()]
        levels = []
        for i in live:  # variables: phi, level
            demand, weight = systems[i]
            n, m = demand.shape
            above = np.hstack([-np.eye(n), weight[:, None]])[free[i]]
            levels.append(
                (
                    np.r_[np.zeros(n), 1.0],
                    np.vstack([np.hstack([demand.T, np.zeros((m, 1))]), above]),
                    np.r_[np.ones(m), np.zeros(len(above))],
                    [(0, 1) if free[i][j] else (phi[i][j],) * 2 for j in range(n)] + [(0, None)],
                )
            )
        solved = dict(zip(live, (x[-1] for x in solve_blocks(levels)), strict=True))
        trials, of = [], []
        for i in live:
            demand, weight = systems[i]
            n, m = demand.shape
            for j in np.flatnonzero(free[i]):
                low = np.minimum(1.0, weight * solved[i] * (1 - 1e-9))
                bounds = [(low[k], 1) if free[i][k] else (phi[i][k],) * 2 for k in range(n)]
                trials.append((np.eye(n)[j], demand.T, np.ones(m) + 1e-9, bounds))
                of.append((i, j))
        for (i, j), x in zip(of, solve_blocks(trials), strict=True):
            level = systems[i][1][j] * solved[i]
            if x[j] <= level * (1 + 1e-6):
                phi[i][j] = min(1.0, level)
                free[i][j] = False
    return phi


@pytest.mark.parametrize("solver", [max_min_shares, _vectorised])
def test_equals_linear_programming(solver):
    rng = np.random.default_rng(5)
    for _ in range(5):
        systems = [random_system(rng) for _ in range(200)]
        for (demand, weight), expected in zip(systems, lexicographic(systems), strict=True):
            actual = solver(as_lists(demand), list(weight))
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


def test_solvers_agree_on_thousands():
    rng = np.random.default_rng(6)
    for _ in range(3000):
        demand, weight = random_system(rng)
        lists, weights = as_lists(demand), list(weight)
        np.testing.assert_allclose(
            max_min_shares(lists, weights), _vectorised(lists, weights), rtol=1e-10
        )


@given(st.integers(0, 2**32))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_definition(seed):
    """Feasible; and everyone below full speed has a full resource on which nobody is above it."""
    demand, weight = random_system(np.random.default_rng(seed))
    phi = np.array(max_min_shares(as_lists(demand), list(weight)))
    load = demand.T @ phi
    assert np.all(load <= 1 + 1e-9)
    assert np.all((phi > 0) & (phi <= 1))
    for i in np.flatnonzero(phi < 1 - 1e-9):
        assert any(
            load[r] >= 1 - 1e-9
            and (phi / weight)[demand[:, r] > 0].max() <= phi[i] / weight[i] * (1 + 1e-9)
            for r in np.flatnonzero(demand[i] > 0)
        )
