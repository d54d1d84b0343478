"""The picture of fidelity: simulated against measured step times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from simulator.errors import InputError
from simulator.studies.validation import RowResult

MARKERS = "osD^v<>Ph*Xd8p"


def draw(results: Sequence[RowResult], path: Path) -> None:
    """Log-log scatter of simulated against measured seconds per step, one marker per family.

    The shaded band is +-10 %.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    families: dict[str, list[RowResult]] = {}
    for result in results:
        if result.simulated_step_time_s is not None:
            families.setdefault(result.family, []).append(result)
    figure, axes = plt.subplots(figsize=(7.5, 7.0))
    colours = plt.get_cmap("tab20")
    for index, (family, rows) in enumerate(families.items()):
        axes.plot(
            [row.measured_step_time_s for row in rows],
            [row.simulated_step_time_s or math.nan for row in rows],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            alpha=0.75,
            color=colours(index % 20),
            label=f"{family} ({len(rows)})",
        )
    times = [row.measured_step_time_s for rows in families.values() for row in rows] or [0.1, 10.0]
    low, high = min(times) * 0.7, max(times) * 1.4
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], alpha=0.15)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, high),
        xlabel="measured step time [s]",
        ylabel="simulated step time [s]",
        title="published training steps; the band is ±10 %",
    )
    axes.set_aspect("equal")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be written: {error}", place=str(path)) from None
    finally:
        plt.close(figure)
