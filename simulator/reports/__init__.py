"""What a run is written as and looked at: files, HTML report, figures, traces, terminal tables."""

from simulator.reports.writing import write_run

__all__ = ["write_run"]
