"""Weighted max-min fairness: how concurrent activities share resources.

Activity i progresses at speed phi_i, relative to the speed that it has alone, and at that speed
takes the share phi_i * d[i, r] of resource r. The allocation is the max-min fair one of the byte
rates phi_i / w_i': all activities' rates rise together, in proportion to their weights, until a
resource is full; those that use it stop, the others go on ("progressive filling"; Bertsekas and
Gallager, Data Networks, 2nd ed., section 6.5.2; for activities on several resources at once it is
the parallel-task model of SimGrid: Casanova et al., JPDC 74(10), 2014).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

Demand = Sequence[tuple[Hashable, float]]

#: From this many activities on, the vectorised solver is faster.
LARGE = 48


def max_min_shares(demands: Sequence[Demand], weights: Sequence[float]) -> list[float]:
    """Speeds (0, 1] of concurrent activities.

    Parameters
    ----------
    demands:
        Per activity, (resource, utilisation when it runs alone) pairs; every resource has
        capacity 1. An activity may list a resource once.
    weights:
        Positive; speeds rise as `weight * level`.

    Returns
    -------
    phi with `sum_i phi_i d[i, r] <= 1` for every r and `phi_i <= 1`, where no phi_i / w_i can be
    raised without lowering one that is not larger.
    """
    if len(demands) >= LARGE:
        return _vectorised(demands, weights)
    n = len(demands)
    phi = [0.0] * n
    left: dict[Hashable, float] = {}  # capacity that frozen activities leave
    slope: dict[Hashable, float] = {}  # what the others take per unit of level
    users: dict[Hashable, list[tuple[int, float]]] = {}
    for i in range(n):
        w = weights[i]
        for r, d in demands[i]:
            if r in left:
                slope[r] += w * d
                users[r].append((i, d))
            else:
                left[r] = 1.0
                slope[r] = w * d
                users[r] = [(i, d)]
    open_ = list(range(n))
    while open_:
        level = min(1.0 / weights[i] for i in open_)
        for r, s in slope.items():
            if s > 0.0 and left[r] < level * s:
                level = max(0.0, left[r]) / s
        limit = level * (1.0 + 1e-12)
        frozen: dict[int, None] = {}
        for i in open_:
            if weights[i] * limit >= 1.0:
                frozen[i] = None
        for r, s in slope.items():
            if s > 0.0 and left[r] <= limit * s:
                for i, d in users[r]:
                    if d > 0.0 and phi[i] == 0.0:
                        frozen[i] = None
        for i in frozen:
            phi[i] = min(1.0, weights[i] * level)
            for r, d in demands[i]:
                left[r] -= phi[i] * d
                slope[r] -= weights[i] * d
        open_ = [i for i in open_ if i not in frozen]
        if open_:
            # differences leave dust: add up afresh what is still open
            for r in slope:
                slope[r] = 0.0
            for i in open_:
                for r, d in demands[i]:
                    slope[r] += weights[i] * d
    return phi


def _vectorised(demands: Sequence[Demand], weights: Sequence[float]) -> list[float]:
    """The same with numpy, for large components."""
    numbers: dict[Hashable, int] = {}
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for i, demand in enumerate(demands):
        for r, d in demand:
            rows.append(i)
            columns.append(numbers.setdefault(r, len(numbers)))
            values.append(d)
    row = np.array(rows, dtype=np.int64)
    column = np.array(columns, dtype=np.int64)
    value = np.array(values)
    w = np.array(weights, dtype=float)
    n, m = len(demands), len(numbers)
    phi = np.zeros(n)
    is_open = np.ones(n, dtype=bool)
    left = np.ones(m)
    while is_open.any():
        of_open = is_open[row]
        slope = np.bincount(column[of_open], (w[row] * value)[of_open], minlength=m)
        busy = slope > 0.0
        levels = np.full(m, np.inf)
        levels[busy] = np.maximum(left[busy], 0.0) / slope[busy]
        level = min(levels.min(initial=np.inf), (1.0 / w[is_open]).min())
        limit = level * (1.0 + 1e-12)
        full = levels <= limit
        stop = np.zeros(n, dtype=bool)
        stop[row[full[column] & (value > 0.0) & of_open]] = True
        stop |= w * limit >= 1.0
        stop &= is_open
        phi[stop] = np.minimum(1.0, w[stop] * level)
        gone = stop[row]
        left -= np.bincount(column[gone], (phi[row] * value)[gone], minlength=m)
        is_open &= ~stop
    return [float(x) for x in phi]
