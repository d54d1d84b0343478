"""A discrete-event simulator of AI-training clusters."""

__version__ = "0.1.0"
