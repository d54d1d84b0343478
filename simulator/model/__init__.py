"""Models: layers of operations with their FLOPs, bytes and parameters."""
