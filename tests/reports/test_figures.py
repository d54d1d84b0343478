"""Static figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.reports import figures
from simulator.reports.figures import FIGURES, save_figures
from simulator.reports.view import view_of

from .conftest import synthetic, view_of_frame


def test_every_figure_and_every_format(tmp_path: Path, result: Any) -> None:
    view = view_of(result)
    paths = save_figures(view, tmp_path, formats=("svg",))
    assert [p.name for p in paths] == [f"{name}.svg" for name in FIGURES]
    for path in paths:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for path in save_figures(view, tmp_path, names=["memory"], formats=("png", "pdf"), dpi=60):
        head = {".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]
        assert path.read_bytes().startswith(head)


def test_the_same_run_gives_the_same_picture(tmp_path: Path, result: Any) -> None:
    for name in ("a", "b"):
        save_figures(view_of(result), tmp_path / name, names=["breakdown"], dpi=50)
    first, second = ((tmp_path / n / "breakdown.png").read_bytes() for n in ("a", "b"))
    assert first == second


def test_the_breakdown_is_as_long_as_the_step(result: Any) -> None:
    view = view_of(result)
    (axes,) = figures.breakdown(view).axes
    for patch_row in range(len(view.rank_labels)):
        ends = [
            p.get_x() + p.get_width()
            for p in axes.patches
            if abs(p.get_y() + p.get_height() / 2 - patch_row) < 0.4
        ]
        assert max(ends) == pytest.approx(view.step_time)


def test_memory_bars_are_the_report(result: Any) -> None:
    bars = figures.memory(view_of(result)).axes[0]
    tops = sorted({round(p.get_x(), 3): 0.0 for p in bars.patches})
    for left, stage in zip(tops, result.memory.stages, strict=True):
        height = sum(p.get_height() for p in bars.patches if round(p.get_x(), 3) == left)
        assert height == pytest.approx(stage.total / 2**30)


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 50))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_columns_hold_all_the_busy_time(seed: int, operations: int, columns: int) -> None:
    frame = synthetic(1, operations, streams=("compute",), seed=seed)
    start, end = frame["start"].to_numpy(), frame["end"].to_numpy()
    busy = figures._busy(start, end, np.linspace(0.0, end[-1], columns + 1))
    assert busy.sum() == pytest.approx((end - start).sum())
    assert (busy >= -1e-12).all()
    assert (busy <= end[-1] / columns + 1e-12).all()


def test_a_part_of_the_timeline_and_of_its_streams(result: Any) -> None:
    view = view_of(result)
    (axes,) = figures.timeline(
        view, start=0.2 * view.step_time, end=0.4 * view.step_time, streams=["compute"]
    ).axes
    assert len(axes.get_yticklabels()) == len(view.rank_labels)
    assert axes.get_xlim() == pytest.approx((0.2 * view.step_time, 0.4 * view.step_time))


def test_names_with_mathematics_are_text(tmp_path: Path) -> None:
    frame = synthetic(1, 40).assign(kind="$\\frac{$<kind>&")
    view = view_of_frame(frame)
    paths = save_figures(view, tmp_path, names=["timeline", "breakdown"], formats=("svg",))
    assert len(paths) == 2
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert "<kind>" not in text


def test_what_cannot_be_drawn_is_one_clear_error(tmp_path: Path) -> None:
    view = view_of_frame(synthetic(1, 10))
    assert {p.stem for p in save_figures(view, tmp_path, dpi=40)} == {"timeline", "breakdown"}
    for arguments in (
        {"names": ["memory"]}, {"names": ["network"]}, {"names": ["critical_path"]},
        {"names": ["timelin"]}, {"formats": ["jpg"]},
    ):  # fmt: skip
        with pytest.raises(InputError):
            save_figures(view, tmp_path, **arguments)
    with pytest.raises(InputError, match="empty"):
        figures.timeline(view, start=2.0, end=1.0)
