"""To be documented by its owner."""
