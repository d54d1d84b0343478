"""A progress bar for commands that start worker processes."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """A bar on standard error, drawn from the first `update` on and only in a terminal."""

    def __init__(self, title: str, *, quiet: bool, remaining: bool = False) -> None:
        self._title, self._remaining = title, remaining
        self._quiet = quiet or not sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, total: int, note: str = "") -> None:
        """So much is done; `note` (rich markup) stands beside the numbers."""
        if self._quiet:
            return
        if self._bar is None:
            self._bar = self._made()
            self._task = self._bar.add_task(self._title, total=total, note="")
            self._bar.start()
        self._bar.update(self._task, completed=done, note=note)
        self._bar.refresh()

    def _made(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        left = (TextColumn("left"), TimeRemainingColumn()) if self._remaining else ()
        return Progress(
            TextColumn(self._title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            *left,
            console=Console(stderr=True),
            auto_refresh=False,  # no thread: the workers are forked from this process
            transient=True,
        )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
