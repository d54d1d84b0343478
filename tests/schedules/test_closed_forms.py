"""Makespan and bubbles equal the published closed forms, in exact arithmetic."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from simulator.schedules import Durations, build, closed_forms, simulate, steady_bubble_fraction
from simulator.schedules.timing import Timing

P = (2, 3, 4, 5, 8)


def timed(name: str, p: int, m: int, v: int | None = None, **durations) -> Timing:
    return simulate(build(name, p, m, v), Durations(**durations))


def excess(timing: Timing):
    return timing.makespan - timing.ideal


def window(timing: Timing):
    return max(timing.windows) - timing.ideal


def drawn(seed: int, count: int = 3):
    """Random exact durations (F, B, I, W, c); I + W = B."""
    rng = random.Random(seed)
    for _ in range(count):
        f, i, w = (Fraction(rng.randint(4, 40), 4) for _ in range(3))
        yield f, i + w, i, w, Fraction(rng.randint(0, 12), 4)


@pytest.mark.parametrize("p", P)
def test_gpipe(p: int) -> None:
    for f, b, _, _, c in drawn(p):
        for m in (1, p - 1, p, 2 * p + 1, 12):
            t = timed("gpipe", p, m, F=f, B=b, comm=c)
            assert excess(t) == closed_forms.gpipe(p, f, b, c)


@pytest.mark.parametrize("p", P)
def test_one_f_one_b(p: int) -> None:
    for f, b, _, _, c in drawn(p + 10):
        for m in range(p, 4 * p + 2):
            t = timed("1f1b", p, m, F=f, B=b, comm=c)
            assert excess(t) == closed_forms.one_f_one_b(p, m, f, b, c)


@pytest.mark.parametrize("p", (1, *P))
def test_forwards_ahead_leave_the_bubble_of_one_f_one_b(p: int) -> None:
    for f, b, *_ in drawn(p + 15):
        for ahead in (0, 1, 2):
            schedule = build("1f1b", p, 3 * p + 2, forwards_ahead=ahead)
            assert excess(simulate(schedule, Durations(F=f, B=b))) == (p - 1) * (f + b)
            last = [action.kind for action in schedule.actions[-1]]
            assert last[: ahead + 2] == ["F"] * (ahead + 1) + ["B"]


def test_bubble_fraction_of_one_f_one_b_is_the_textbook_one() -> None:
    t = timed("1f1b", 8, 24, F=1, B=2)
    assert t.bubble_fraction == pytest.approx(7 / (24 + 7))
    assert t.window_bubble_fraction == pytest.approx(7 / (24 + 7))


@pytest.mark.parametrize("p", P)
def test_eager_one_f_one_b(p: int) -> None:
    for f, b, _, _, c in drawn(p + 20):
        c = min(c, f / 2, b / 2)
        for m in (2 * p, 2 * p + 1, 4 * p):
            t = timed("eager-1f1b", p, m, F=f, B=b, comm=c)
            assert excess(t) == closed_forms.eager_one_f_one_b(p, f, b, c)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("v", [2, 3, 4])
def test_interleaved_one_f_one_b(p: int, v: int) -> None:
    for f, b, i, _, c in drawn(p + v):
        c = min(c, f, b / 2, i)
        for m in (p, 2 * p, 4 * p):
            t = timed("interleaved-1f1b", p, m, v, F=f, B=b, comm=c)
            assert excess(t) == closed_forms.interleaved_one_f_one_b(p, v, f, b, c)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("v", [1, 2, 3])
def test_looped_bfs(p: int, v: int) -> None:
    for f, b, _, _, c in drawn(p + v + 30):
        for m in (1, p - 1, p, 2 * p + 1):
            t = timed("looped-bfs", p, m, v, F=f, B=b, comm=c)
            assert excess(t) == closed_forms.looped_bfs(p, m, v, f, b, c)


@pytest.mark.parametrize("p", P)
def test_zb_h1(p: int) -> None:
    for f, _, i, w, c in drawn(p + 40):
        w = min(f, i, w)
        c = min(c, w / 4)
        for m in (2 * p, 3 * p, 4 * p):
            t = timed("zb-h1", p, m, F=f, I=i, W=w, comm=c)
            assert excess(t) == closed_forms.zb_h1(p, f, i, w, c)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_zb(p: int, v: int) -> None:
    for f, _, i, w, _ in drawn(p + 50):
        w = min(f, i, w)
        for m in (p, 2 * p, 4 * p):
            t = timed("interleaved-zb", p, m, v, F=f, I=i, W=w)
            assert excess(t) == closed_forms.interleaved_zb(p, v, f, i, w)
    c = Fraction(1, 100)
    t = timed("interleaved-zb", p, 2 * p, v, F=1, I=1, W=1, comm=c)
    assert excess(t) == closed_forms.interleaved_zb(p, v, 1, 1, 1, c)


@pytest.mark.parametrize("p", P)
def test_zb_h2(p: int) -> None:
    for f, _, i, w, _ in drawn(p + 60):
        w = min(f, i, w)
        for m in (2 * p, 2 * p + 1, 4 * p):
            t = timed("zb-h2", p, m, F=f, I=i, W=w)
            assert window(t) == closed_forms.zb_h2_window(p, f, i, w)
    t = timed("zb-h2", p, 2 * p, F=1, I=1, W=1)
    assert (window(t), excess(t)) == (0, p - 1)


@pytest.mark.parametrize("p", P)
def test_zb_v(p: int) -> None:
    for m in (2 * p - 1, 2 * p, 4 * p):
        t = timed("zb-v", p, m, F=3, I=3, W=3)
        assert (window(t), excess(t)) == (0, closed_forms.zb_v(p, 3))
        c = Fraction(1, 10)
        t = timed("zb-v", p, m, F=1, I=1, W=1, comm=c)
        assert excess(t) == closed_forms.zb_v(p, 1, c)


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_dualpipe(p: int) -> None:
    for m in (2 * p, 2 * p + 2, 5 * p):
        t = timed("dualpipe", p, m, F=1, B=2, I=1, W=1)
        assert excess(t) == closed_forms.dualpipe(p, 1, 2, 1)


@pytest.mark.parametrize("p", P)
def test_dualpipe_v(p: int) -> None:
    for m in (2 * p, 2 * p + 1, 5 * p):
        t = timed("dualpipe-v", p, m, F=1, B=2, I=1, W=1)
        assert excess(t) == closed_forms.dualpipe_v(p, 1, 2, 1)


def test_dualpipe_figure_is_66_cells_wide() -> None:
    """The figure in DeepSeek's README: 8 ranks, 20 micro-batches, F = I = W = 1."""
    assert timed("dualpipe", 8, 20, F=1, B=2, I=1, W=1).makespan == 66


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_chimera(p: int) -> None:
    for m in (p, 2 * p, 4 * p):
        equal = timed("chimera", p, m, F=2, B=2)
        twice = timed("chimera", p, m, F=2, B=4)
        assert excess(equal) == closed_forms.chimera(p, m, 2, backward_twice=False)
        assert excess(twice) == closed_forms.chimera(p, m, 2, backward_twice=True)
        assert equal.bubble_fraction == pytest.approx((p - 2) / (2 * m + p - 2))


def test_full_recomputation_leaves_the_fraction() -> None:
    """1F1B with B replaced by B + F has the bubble fraction (p - 1) / (m + p - 1)."""
    schedule = build("1f1b", 4, 12)
    t = simulate(schedule, Durations(F=1, B=2).with_recomputation())
    assert t.makespan == simulate(schedule, Durations(F=1, B=3)).makespan
    assert t.bubble_fraction == pytest.approx(3 / 15)


def test_forward_only() -> None:
    t = timed("forward-only", 4, 8, F=2, comm=1)
    assert t.makespan == 8 * 2 + 3 * (2 + 1)


def test_2bw_has_no_bubble_once_it_runs() -> None:
    """Two steps without a flush take one more ideal step: the steady bubble is zero."""
    one, two = (timed("pipedream-2bw", 4, m, F=1, B=2) for m in (8, 16))
    assert two.makespan - one.makespan == 8 * 3
    assert steady_bubble_fraction(one, two) == 0
    assert one.bubble_fraction > 0


# Zero Bubble paper, arXiv:2401.10241, tables 5 and 6: profiled milliseconds per stage (F, I, W,
# communication), then the bubble rates of 1F1B, ZB-H1, ZB-H2, ZB-1p and ZB-2p.
PAPER = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083, 0.1585, 0.0433)),
    (8, 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837, 0.1242, 0.0039)),
    (8, 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674, 0.0444, 0.0674, 0.0026)),
    (8, 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698, 0.1323, 0.0029)),
    (8, 32, (29.802, 29.428, 19.530, 0.577), (0.1898, 0.1045, 0.0559, 0.1045, 0.0022)),
    (8, 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294, 0.0554, 0.0010)),
    (16, 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672, 0.1397, 0.0066)),
    (16, 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.1088, 0.0516, 0.1088, 0.0054)),
    (16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266, 0.0576, 0.0028)),
    (32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641, 0.1421, 0.0038)),
    (32, 128, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1106, 0.0490, 0.1106, 0.0029)),
    (32, 256, (10.402, 10.248, 7.698, 0.460), (0.1352, 0.0594, 0.0257, 0.0594, 0.0018)),
]


@pytest.mark.parametrize("p, m, profile, published", PAPER)
def test_zero_bubble_papers_rates(p, m, profile, published) -> None:
    f, i, w, c = profile
    durations = Durations(F=f, I=i, W=w, comm=c)
    for name, rate in zip(("1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p"), published, strict=True):
        options = {"durations": durations} if name in ("zb-1p", "zb-2p") else {}
        found = simulate(build(name, p, m, **options), durations).window_bubble_fraction
        assert f"{found:.4f}" == f"{rate:.4f}", name
