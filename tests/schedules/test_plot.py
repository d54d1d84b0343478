"""Pictures: the interactive page in a real browser, and static figures without overlaps."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from simulator.errors import InputError
from simulator.reports.pipeline_plot import to_figure, to_html, write_plot
from simulator.schedules import ActivationMemory, Durations, build, simulate

from .browser import Browser, find_browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def timings():
    one = simulate(build("1f1b", 8, 32), Durations(F=1, B=2, comm=0.1))
    two = simulate(build("zb-v", 8, 32), Durations(F=0.5, I=0.5, W=0.5, comm=0.1))
    return one, two


def data_of(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match[1])


def test_page_holds_every_action_and_loads_nothing(timings) -> None:
    page = to_html(timings, titles=["1F1B", "</script><b>ZB-V"])
    data = data_of(page)
    assert "</script><b>" not in page
    assert not re.search(r"(src|href)=|url\(|https?://|@import|fetch\(", page)
    assert [p["title"] for p in data["panels"]] == ["1F1B", "</script><b>ZB-V"]
    for panel, timing in zip(data["panels"], timings, strict=True):
        for row, starts, ends in zip(panel["rows"], timing.start, timing.end, strict=True):
            assert row["s"] == pytest.approx(starts)
            assert row["e"] == pytest.approx(ends)
    assert data["span"] == timings[0].makespan
    assert data["kinds"] == ["F", "B", "I", "W"]
    # One transfer of an activation and one of a gradient per micro-batch and hop.
    assert len(data["panels"][0]["arrows"]) == 2 * 32 * 7
    assert len(data["panels"][1]["arrows"]) == 2 * 32 * 14


@needs_browser
def test_zoom_and_tooltip_in_a_browser(timings, tmp_path) -> None:
    path = tmp_path / "schedules.html"
    write_plot(timings, path, titles=["1F1B", "ZB-V"])
    with Browser() as browser:
        browser.open(path)
        assert browser.evaluate("document.querySelectorAll('canvas').length") == 2
        box = browser.evaluate(
            "(({x, y, width}) => ({x, y, width}))(document.querySelector('canvas')"
            ".getBoundingClientRect())"
        )
        left, right, top, row = box["x"] + 62, box["x"] + box["width"] - 14, box["y"] + 22, 24
        timing = timings[0]
        scale = (right - left) / timing.makespan

        def hover(time: float, rank: int, view: tuple[float, float]) -> str:
            x = left + (time - view[0]) / (view[1] - view[0]) * (right - left)
            browser.mouse("mouseMoved", x, top + (rank + 0.5) * row)
            assert browser.evaluate("document.getElementById('tooltip').style.display") == "block"
            return browser.evaluate("document.getElementById('tooltip').textContent")

        def view() -> tuple[float, float]:
            return tuple(browser.evaluate("[view.from, view.to]"))

        whole = view()
        assert whole == (0, pytest.approx(timing.makespan))
        # The third action of rank 2 is 2F2.
        middle = (timing.start[2][2] + timing.end[2][2]) / 2
        text = hover(middle, 2, whole)
        assert text.startswith("forward 2F2: micro-batch 2, stage 2\nrank 2\n")
        assert f"start {timing.start[2][2]:.4g}" in text
        assert "duration 1" in text
        assert "idle" in hover(timing.end[0][7] + 2, 0, whole)
        # Zoom in at the mouse: the time under it stays, the view shrinks.
        x = left + middle * scale
        for _ in range(8):
            browser.mouse("mouseWheel", x, top + 2.5 * row, deltaX=0, deltaY=-240)
        zoomed = view()
        assert zoomed[1] - zoomed[0] < 0.1 * (whole[1] - whole[0])
        assert zoomed[0] < middle < zoomed[1]
        assert hover(middle, 2, zoomed).startswith("forward 2F2")
        # Drag to the left: later times come into view.
        browser.mouse("mousePressed", x, top + row, button="left", clickCount=1)
        browser.mouse("mouseMoved", x - 100, top + row, button="left", buttons=1)
        browser.mouse("mouseReleased", x - 100, top + row, button="left", clickCount=1)
        panned = view()
        assert panned[0] > zoomed[0]
        assert panned[1] - panned[0] == pytest.approx(zoomed[1] - zoomed[0])
        # Both panels share the time axis; the button shows the whole step again.
        browser.evaluate("document.getElementById('reset').click()")
        browser.settle()
        assert view() == whole
        # The memory plot answers as well.
        browser.mouse("mouseMoved", left + middle * scale, top + 8 * row + 26 + 60)
        assert "rank 2: 3 micro-batches" in browser.evaluate(
            "document.getElementById('tooltip').textContent"
        )
        # Something is drawn where an action is, and nothing where the rank idles.
        browser.mouse("mouseMoved", 5, 5)

        def pixel(time: float, rank: int) -> list[int]:
            return browser.evaluate(
                f"[...panels[0].context.getImageData({62 + time * scale}, "
                f"{22 + (rank + 0.15) * row}, 1, 1).data]"
            )

        assert pixel(0.5, 0) == [0x2F, 0x6F, 0xB7, 255]
        assert pixel(timing.start[0][8] + 1, 0) == [0xD9, 0x73, 0x1A, 255]
        assert pixel(0.5, 7)[3] == 0
        browser.evaluate("document.getElementById('arrows').click()")
        browser.settle()
        assert browser.errors == []


@needs_browser
def test_large_page_stays_usable(tmp_path) -> None:
    """64 ranks x 512 micro-batches: drawn and zoomed within a second each."""
    timing = simulate(build("1f1b", 64, 512))
    path = tmp_path / "large.html"
    write_plot([timing], path)
    assert path.stat().st_size < 8e6
    with Browser() as browser:
        browser.open(path)
        duration = browser.evaluate(
            "(() => { const t = performance.now(); draw(); return performance.now() - t; })()"
        )
        assert duration < 1000
        browser.evaluate("zoom(0.01, span / 2); draw()")
        shown = browser.evaluate("view.to - view.from")
        assert shown == pytest.approx(timing.makespan / 100)
        assert browser.errors == []


SIZES = {"1f1b": (8, 32), "zb-v": (4, 12), "dualpipe": (4, 12)}


@pytest.mark.parametrize("name", list(SIZES))
def test_static_figures_have_no_overlapping_text(name: str) -> None:
    timing = simulate(build(name, *SIZES[name]), Durations(F=1, B=2))
    figure = to_figure([timing, timing], titles=["first", "second"])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        texts = [t for t in axes.texts if t.get_text()]
        rows: dict[float, list] = {}
        for text in texts:
            box = text.get_window_extent(renderer)
            rows.setdefault(round(text.get_position()[1], 3), []).append(box)
            assert figure.bbox.contains(box.x0, box.y0)
        for boxes in rows.values():
            boxes.sort(key=lambda box: box.x0)
            assert all(a.x1 <= b.x0 + 0.5 for a, b in itertools.pairwise(boxes))
        if axes.texts:
            # Every action has its number.
            entries = sum(len(o) for o in timing.schedule.without_overlap().actions)
            assert len(texts) == entries
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    titles += [axes._left_title.get_window_extent(renderer) for axes in figure.axes]
    shown = [box for box in titles if box.width > 1]
    assert len(shown) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(shown) for b in shown[i + 1 :])
    for axes in figure.axes:
        labels = [t.get_window_extent(renderer) for t in axes.get_yticklabels() if t.get_text()]
        labels.sort(key=lambda box: box.y0)
        assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(labels))


def test_files_are_deterministic(tmp_path) -> None:
    small = simulate(build("zb-h1", 3, 4), Durations(comm=0.5))
    for suffix in ("png", "svg", "html"):
        texts = []
        for index in (0, 1):
            path = tmp_path / f"{index}.{suffix}"
            write_plot([small], path, memory=ActivationMemory(activation=2.0), arrows=True)
            texts.append(path.read_bytes())
        assert texts[0] == texts[1], suffix
        assert len(texts[0]) > 1000


def test_bad_file_names(timings, tmp_path) -> None:
    with pytest.raises(InputError, match=r"ends with .html, .png"):
        write_plot(timings, tmp_path / "a.gif")
    with pytest.raises(InputError, match="cannot write the plot"):
        write_plot(timings, tmp_path / "none" / "a.html")
