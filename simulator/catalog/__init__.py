"""Data: accelerators and frameworks, every figure with its source."""
