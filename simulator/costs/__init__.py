"""Costs: what an operation demands of the accelerator and of the links, and its fixed latency."""
