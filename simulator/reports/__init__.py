"""What a run is written as and looked at: files, HTML report, figures, traces, terminal tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.reports.terminal import print_result
    from simulator.reports.view import view_of
    from simulator.reports.writing import write_run

__all__ = ["print_result", "view_of", "write_run"]

_HOMES = {"print_result": "terminal", "view_of": "view", "write_run": "writing"}


def __getattr__(name: str) -> Any:
    # imported when first used: a table in the terminal needs neither pandas nor the topology
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
