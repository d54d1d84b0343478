"""Time of one transformer layer against the published measurement, through the cost model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from simulator.catalog.accelerators import accelerator
from simulator.catalog.frameworks import framework
from simulator.costs.kernels import kernel_cost
from simulator.model.context import LayerContext
from simulator.model.layers import layer_operations
from simulator.model.library import model
from simulator.model.operations import Collective, Operation

#: NCCL ring bus bandwidth on 8 A100s for these sizes (nccl-tests, about 230 GB/s).
BUS_BANDWIDTH = 235e9


def seconds(operations: Sequence[Operation]) -> float:
    """Kernels back to back; a collective hides behind the kernel that it names."""
    names = {op.name for op in operations}

    def duration(op: Operation) -> float:
        if isinstance(op, Collective):
            steps = 2 if op.op == "all_reduce" else 1
            return 20e-6 + steps * 7 / 8 * op.bytes / BUS_BANDWIDTH
        return kernel_cost(op, accelerator("A100-80GB-SXM"), framework("megatron-lm-2021")).duration

    hidden = {
        op.overlap: duration(op)
        for op in operations
        if isinstance(op, Collective) and op.overlap in names
    }
    return sum(
        max(duration(op), hidden.get(op.name, 0.0))
        for op in operations
        if not (isinstance(op, Collective) and op.overlap in names)
    )


@pytest.mark.parametrize(
    "recompute, sequence_parallel, forward_ms, backward_ms",
    [
        ("none", False, 7.7, 11.9),
        ("none", True, 7.2, 11.8),
        ("full", False, 7.7, 19.5),
        ("selective", False, 7.7, 13.2),
        ("selective", True, 7.2, 13.1),
    ],
)
def test_table_4_of_korthikanti_et_al(
    recompute: str, sequence_parallel: bool, forward_ms: float, backward_ms: float
) -> None:
    """One layer of the 22B model, micro-batch 4, tensor 8, A100 (arXiv 2205.05198, table 4)."""
    ctx = LayerContext(
        4,
        2048,
        tensor=8,
        sequence_parallel=sequence_parallel,
        precision="fp16",
        profile=framework("megatron-lm-2021"),
        recompute=recompute,
        micro_batches=4,
    )
    operations = layer_operations(model("gpt-22b"), 0, ctx)
    assert seconds(operations.forward) * 1e3 == pytest.approx(forward_ms, rel=0.1)
    assert seconds(operations.backward) * 1e3 == pytest.approx(backward_ms, rel=0.12)
