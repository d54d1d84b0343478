"""Terminal tables."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from simulator.reports.terminal import (
    memory_table,
    print_memory,
    print_result,
    print_summary,
    summary_rows,
)

GIB = 2.0**30
STAGE = {"parameters": 40 * GIB, "gradients": 20 * GIB, "optimizer": 10 * GIB,
         "activations": 20 * GIB, "buffers": 5 * GIB, "total": 95 * GIB}  # fmt: skip
SMALL = {**STAGE, "parameters": 1 * GIB, "total": 56 * GIB}
TIGHT = {
    "step_time_s": 2.0, "breakdown_s": {"gemm": 1.5, "bubble": 0.5},
    "exposed_communication_s": {}, "peak_memory_bytes": 95 * GIB,
    "memory_capacity_bytes": 80 * GIB, "fits": False, "memory": [STAGE, STAGE, SMALL],
}  # fmt: skip


def printed(call: Any, *args: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    call(*args, console)
    return console.export_text()


def test_a_result_shows_what_people_ask_for(result: Any) -> None:
    text = printed(print_result, result)
    for word in ("step time", "tokens/s", "MFU / HFU", "pipeline bubble", "peak memory", "energy",
                 "gemm", "Memory per pipeline rank", "tiny GPT"):  # fmt: skip
        assert word in text
    assert "too much" not in text


def test_what_does_not_fit_is_marked_and_says_by_how_much() -> None:
    text = printed(print_summary, TIGHT)
    assert "does not fit" in text
    assert "15.0 too much" in text
    assert "0-1" in text  # equal ranks are one row
    assert "70%" in text


def test_memory_alone(result: Any) -> None:
    text = printed(print_memory, result.memory)
    for stage in result.memory.stages:
        assert f"{stage.total / GIB:.2f}" in text


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_the_terminal(result: Any, width: int) -> None:
    lines = printed(print_result, result, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("factor", [1.0, 9.0, 20.0, 90.0])
def test_memory_far_beyond_capacity_can_be_read_in_80_columns(factor: float) -> None:
    stages = [{name: size * factor for name, size in stage.items()} for stage in (STAGE, SMALL)]
    table = memory_table([STAGE] * 10 + stages + [STAGE] * 2, 80 * GIB)
    text = printed(lambda console: console.print(table), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    total = 95 * factor
    assert any(f"{total:.{decimals}f} " in text for decimals in (0, 1, 2))
    assert "12-13" in text
    over = total - 80
    assert f"{over:.1f} too much" in text or f"{over:.0f} too much" in text


def test_names_are_no_markup(result: Any) -> None:
    text = printed(
        lambda console: print_summary({"step_time_s": 1.0}, console, title="[bold]x[/nope] 模型")
    )
    assert "[bold]x[/nope] 模型" in text


def test_figures_that_are_missing_are_left_out() -> None:
    assert summary_rows({}) == []
    assert summary_rows({"step_time_s": 0.25}) == [("step time", "250 ms")]
