"""The optimizer step of one rank as operations, and the bytes its state takes."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.catalog.frameworks import FrameworkProfile
from simulator.errors import unknown_name
from simulator.model.operations import (
    BYTES_PER_ELEMENT,
    Collective,
    MemoryBound,
    Operation,
    Phase,
)

OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "adafactor", "muon")

#: State besides the fp32 master weight, in bytes per parameter. Adam: two fp32 moments; momentum
#: and Muon: one; Adafactor: row and column statistics, which are negligible.
_MOMENT_BYTES = {
    "adam": 8.0, "adamw": 8.0, "sgd": 0.0, "momentum": 4.0, "adafactor": 0.0, "muon": 4.0,
}  # fmt: skip

#: Arithmetic per parameter; far below what its memory traffic costs.
_FLOPS = {
    "adam": 14.0, "adamw": 16.0, "sgd": 2.0, "momentum": 4.0, "adafactor": 20.0, "muon": 6.0,
}  # fmt: skip

#: Elementwise kernels of the unfused (for-loop or foreach) implementation and the fp32 elements
#: they read and write per parameter (torch.optim, `foreach=True`).
_EAGER = {
    "adam": (8, 13.0, 8.0), "adamw": (9, 14.0, 9.0), "sgd": (1, 2.0, 1.0),
    "momentum": (3, 5.0, 3.0), "adafactor": (8, 10.0, 6.0), "muon": (4, 6.0, 4.0),
}  # fmt: skip

#: Newton-Schulz iterations of Muon (Jordan et al. 2024): five, each three GEMMs.
MUON_ITERATIONS = 5


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter that training keeps, before any sharding."""

    parameters: float
    gradients: float
    optimizer: float
    """Master weights and moments."""

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def _known(optimizer: str) -> str:
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS, place="training.optimizer")
    return optimizer


def has_master_weights(precision: str) -> bool:
    """True where the optimizer keeps its own fp32 copy of narrower weights."""
    return precision not in ("fp32", "tf32")


def optimizer_bytes_per_parameter(
    optimizer: str, precision: str, profile: FrameworkProfile
) -> StateBytes:
    """Bytes per parameter: weights, gradients, optimizer state.

    Mixed-precision Adam with 2-byte gradients is 2 + 2 + 12 = 16 (Rajbhandari et al., ZeRO, arXiv
    1910.02054, section 3.1), with fp32 main gradients 2 + 4 + 12 = 18 (Megatron-LM's distributed
    optimizer table); fp32 Adam is 4 + 4 + 8 = 16. fp8 weights, where the framework keeps them in
    fp8, take 1 byte and their transpose another.
    """
    moments = _MOMENT_BYTES[_known(optimizer)]
    if not has_master_weights(precision):
        return StateBytes(4.0, 4.0, moments)
    weight = 2.0
    if precision in ("fp8", "mxfp8", "nvfp4") and profile.fp8_param_gather:
        weight = 2.0 * BYTES_PER_ELEMENT[precision]
    return StateBytes(weight, profile.main_grad_bytes, 4.0 + moments)


def optimizer_operations(
    parameters_on_rank: float,
    optimizer: str,
    precision: str,
    profile: FrameworkProfile,
    shard: int = 1,
    *,
    clip: bool = True,
    norm_group: str = "world",
) -> tuple[Operation, ...]:
    """Operations of one optimizer step on one rank.

    Parameters
    ----------
    parameters_on_rank:
        Parameters that the rank holds after model parallelism, before sharding.
    shard:
        Ranks that divide the optimizer's state (1: none; ZeRO: the sharding group).
    clip:
        Global gradient norm (a scalar all-reduce over `norm_group`) and scaling.

    Raises
    ------
    InputError
        For an unknown optimizer.
    """
    _known(optimizer)
    n = parameters_on_rank / max(1, shard)
    phase = Phase.OPTIMIZER
    mixed = has_master_weights(precision)
    grad = profile.main_grad_bytes if mixed else 4.0
    operations: list[Operation] = []

    def stream(name: str, read: float, written: float, flops: float, kernels: int = 1) -> None:
        operations.append(
            MemoryBound(
                f"optimizer.{name}", "optimizer", read * n, written * n, flops * n, kernels, phase
            )
        )

    if precision == "fp16":
        # dynamic loss scale: unscale the gradients and look for overflow
        stream("unscale", grad, grad, 1.0)
        operations.append(Collective("optimizer.found_inf", "all_reduce", norm_group, 4.0, phase))
    if clip:
        stream("grad_norm", grad, 0.0, 2.0)
        operations.append(
            Collective("optimizer.grad_norm.all_reduce", "all_reduce", norm_group, 4.0, phase)
        )
        stream("clip", grad, grad, 1.0)
    moments = _MOMENT_BYTES[optimizer]
    if profile.fused_optimizer or profile.compiled:
        # weight and moments are read and written once, the gradient is read once
        stream(optimizer, 4.0 + moments + grad, 4.0 + moments, _FLOPS[optimizer])
    else:
        kernels, read, written = _EAGER[optimizer]
        stream(optimizer, 4.0 * read, 4.0 * written, _FLOPS[optimizer], kernels)
    if optimizer == "muon":
        # orthogonalisation reads and writes each matrix per product; the GEMMs' FLOPs depend on
        # the matrices' aspect and are bounded by 2 n per row of the smaller side
        passes = 3.0 * MUON_ITERATIONS
        stream("newton_schulz", 2.0 * passes, 2.0 * passes, 0.0, kernels=int(passes))
    if mixed:
        stream("copy_parameters", 4.0, 2.0, 0.0)
    if not profile.compiled and not profile.fsdp:
        # gradient buffers of the whole rank are cleared for the next step (FSDP frees its shards)
        operations.append(
            MemoryBound(
                "optimizer.zero_grad", "optimizer", 0.0, grad * parameters_on_rank, 0.0, 1, phase
            )
        )
    return tuple(operations)
