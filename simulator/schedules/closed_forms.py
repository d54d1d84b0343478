"""Closed forms of the time of published schedules, where they hold.

Every function gives the makespan (or the longest window, where it says so) less the ideal
m v (F + B), in the timing model of `simulator.schedules.timing`, for stages of equal cost. They are
independent of the simulation and are held equal to it in the tests. Durations may be numbers of
any kind; `b` is an unsplit backward pass, `i` and `w` its halves, `c` the one-way delay between two
ranks.
"""

from __future__ import annotations

from typing import Any


def gpipe(p: int, f: Any, b: Any, c: Any = 0) -> Any:
    """GPipe, any m: fill and drain of p - 1 stages, each with its transfers.

    Source: Huang et al., GPipe, arXiv:1811.06965, section 2.3 (bubble (p - 1) of m + p - 1 slots).
    """
    return (p - 1) * (f + b + 2 * c)


def one_f_one_b(p: int, m: int, f: Any, b: Any, c: Any = 0) -> Any:
    """1F1B, p >= 2, m >= p: GPipe's bubble; in the steady state transfers are exposed.

    A round trip between two neighbours costs 2 c and is hidden once in p micro-batches.
    Source: Narayanan et al., PipeDream-Flush, arXiv:2006.09503; DAPPLE policy A, arXiv:2007.01045,
    for c = 0; the term in c holds in exact arithmetic on every case tried.
    """
    exposed = m - m // p - (1 if m % p >= 2 else 0)
    return (p - 1) * (f + b) + 2 * c * (exposed + p - 2)


def eager_one_f_one_b(p: int, f: Any, b: Any, c: Any = 0) -> Any:
    """Eager 1F1B, m >= 2p and c <= min(F, B) / 2: the steady state hides its transfers.

    Source: Fan et al., DAPPLE (policy B), arXiv:2007.01045.
    """
    return (p - 1) * (f + b + 2 * c)


def interleaved_one_f_one_b(p: int, v: int, f: Any, b: Any, c: Any = 0) -> Any:
    """Interleaved 1F1B, m a multiple of p and c <= min(F, B / 2).

    f and b are of one chunk, 1/v of a rank's layers, so the bubble falls by v; every chunk boundary
    is a hop. Source: Narayanan et al., arXiv:2104.04473, section 2.2.2, for c = 0.
    """
    return (p - 1) * (f + b) + 2 * (v * p - 1) * c


def looped_bfs(p: int, m: int, v: int, f: Any, b: Any, c: Any = 0) -> Any:
    """Breadth-first, any m: GPipe's bubble, and a stall between chunks when m is too small.

    Source: Lamy-Poirier, arXiv:2211.05953, section 4.
    """
    stall = max(0, (p - m) * f + p * c) + max(0, (p - m) * b + p * c)
    return (p - 1) * (f + b + 2 * c) + (v - 1) * stall


def zb_h1(p: int, f: Any, i: Any, w: Any, c: Any = 0) -> Any:
    """ZB-H1, W <= min(F, I), m >= 2p and c <= W / 4.

    Source: Qi et al., arXiv:2401.10241, table 2, for c = 0.
    """
    return (p - 1) * (f + i - w) + 4 * (p - 1) * c


def interleaved_zb(p: int, v: int, f: Any, i: Any, w: Any, c: Any = 0) -> Any:
    """Interleaved ZB-1P, v >= 2, m a multiple of p, W <= min(F, I); c only for F = I = W, m >= 2p.

    f, i and w are of one chunk. Source: Qi et al., arXiv:2401.10241, table 2, for c = 0; the term
    in c from the orders, in exact arithmetic.
    """
    return (p - 1) * (f + i - w) + (p * (v + 3) - 4) * c


def zb_h2_window(p: int, f: Any, i: Any, w: Any) -> Any:
    """ZB-H2, longest window, c = 0, W <= min(F, I), m >= 2p; never below zero.

    Source: Qi et al., arXiv:2401.10241, table 2.
    """
    return max(0, (p - 1) * (f + i - 2 * w))


def zb_v(p: int, f: Any, c: Any = 0) -> Any:
    """ZB-V makespan, F = I = W = f, m >= 2p - 1, small c (the window is 0 for c = 0).

    Source: Qi et al., arXiv:2401.10241, section 6, for the window; the makespan adds the shift of
    the last rank, and the term in c is from PyTorch's order, in exact arithmetic.
    """
    return (p - 1) * f + (5 * p - 7) * c


def dualpipe(p: int, f: Any, b: Any, w: Any) -> Any:
    """DualPipe, p even, m even and >= 2p, c = 0, F = I = W, an overlapped pair takes F + B.

    Source: README of github.com/deepseek-ai/DualPipe: (PP/2 - 1)(F&B + B - 3W).
    """
    return (p // 2 - 1) * ((f + b) + b - 3 * w)


def dualpipe_v(p: int, f: Any, b: Any, w: Any) -> Any:
    """DualPipeV on p ranks (PP / 2 of the README), m >= 2p, else as `dualpipe`; f, b of one chunk.

    Source: README of github.com/deepseek-ai/DualPipe.
    """
    return (p - 1) * ((f + b) + b - 3 * w)


def chimera(p: int, m: int, f: Any, backward_twice: bool) -> Any:
    """Chimera with direct concatenation, p even, m a multiple of p, c = 0; B = F or B = 2F.

    Source: Li and Hoefler, arXiv:2107.06925, section 3 and table 2: p - 2 slots for equal passes,
    and for B = 2F the gaps of every block of p micro-batches.
    """
    blocks = 1 + m // p if backward_twice else 1
    return blocks * (p - 2) * f
