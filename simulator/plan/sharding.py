"""What of a replica is sharded while the micro-batches of a step run."""

from __future__ import annotations

from simulator.catalog.frameworks import FrameworkProfile


def step_sharding(sharding: str, profile: FrameworkProfile, pipeline: int) -> str:
    """`sharding` as it acts within a step.

    In a pipeline PyTorch's FSDP neither frees parameters after a forward nor reduces gradients
    before the last micro-batch (torch.distributed.pipelining, `backward_maybe_with_nosync`;
    torchtitan's `fsdp_reshard_after_forward = "default"`): zero2 and zero3 then cost and hold what
    zero1 does.
    """
    if profile.fsdp and pipeline > 1 and sharding in ("zero2", "zero3"):
        return "zero1"
    return sharding


def sharded_around_passes(sharding: str, profile: FrameworkProfile, pipeline: int) -> bool:
    """Are parameters gathered for each pass of a micro-batch, gradients reduced after it?"""
    acting = step_sharding(sharding, profile, pipeline)
    return acting == "zero3" or (acting == "zero2" and profile.fsdp)
