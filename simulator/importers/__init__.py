"""In and out: other tools' models, traces and cluster descriptions.

Names are imported when first used, so that an absent optional package (torch, jax, keras,
protobuf) matters only to those who use it.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Trace": "trace",
    "TraceOperation": "trace",
    "as_trace": "export",
    "read_kineto": "kineto",
    "read_chakra": "chakra",
    "write_chakra": "chakra",
    "replay": "replaying",
    "read_topo_matrix": "topo_matrix",
    "read_nccl_xml": "nccl_xml",
    "read_graphml": "graphml",
    "write_graphml": "graphml",
    "replicate": "hosts",
    "TracedModel": "traced",
    "traced_layers": "traced",
    "model_from_torch": "torch_module",
    "model_from_jax": "jax_function",
    "model_from_keras": "keras_model",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"simulator.importers.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
