"""The report and the trace of timelines with up to a million operations and more.

    python benchmarks/report.py [OPERATIONS ...]

Prints per size: megabytes of the page, seconds to write the page and the trace, and, where a
Chromium is installed, seconds until the page is painted and milliseconds per frame while zooming.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator.reports.html import write_report
from simulator.reports.trace import write_trace
from tests.reports.browser import Page, find_chromium
from tests.reports.conftest import synthetic, view_of_frame

STREAMS = ("compute", "data", "pipeline", "copy")
RANKS = 8
#: Draws 20 frames, each at another zoom.
FRAMES = (
    "(() => { const t = report.timeline, n = 20, begin = performance.now();"
    " for (let i = 0; i < n; i++) { t.view = {from: 0, to: t.length * 0.7 ** i}; t.draw(); }"
    " return (performance.now() - begin) / n; })()"
)


def main(sizes: list[int]) -> None:
    chromium = find_chromium()
    table = Table(title=f"{RANKS} ranks, {len(STREAMS)} streams each", title_justify="left")
    for name in ("operations", "page MB", "page s", "trace MB", "trace s", "paint s", "frame ms"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        page, trace = Path(folder) / "report.html", Path(folder) / "trace.json.gz"
        for size in sizes:
            frame = synthetic(RANKS, size // (RANKS * len(STREAMS)), streams=STREAMS)
            view = view_of_frame(frame)
            begin = time.perf_counter()
            write_report(view, page)
            written = time.perf_counter()
            write_trace(view.frame, trace, view.trace)
            traced = time.perf_counter()
            paint = frames = "-"
            if chromium is not None:
                with Page(chromium) as browser:
                    paint = f"{browser.open(page):.2f}"
                    frames = f"{browser.run(FRAMES):.1f}"
            table.add_row(
                f"{len(frame):,}",
                f"{page.stat().st_size / 1e6:.1f}",
                f"{written - begin:.1f}",
                f"{trace.stat().st_size / 1e6:.1f}",
                f"{traced - written:.1f}",
                paint,
                frames,
            )
    Console().print(table)


if __name__ == "__main__":
    main([int(text.replace("_", "")) for text in sys.argv[1:]] or [10_000, 100_000, 1_000_000])
