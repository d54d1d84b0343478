"""Guarding simulated results against regressions: a pytest plugin, and what it compares."""
