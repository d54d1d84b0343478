"""Framework profiles: what a framework does, never how fast a result was.

A profile is a data file entry (`frameworks.yaml`): which kernels are fused, what overlaps, which
types gradients are reduced in. Every figure there has a source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrameworkProfile:
    """Behaviours of a training framework, as the kernels and programs need them."""

    name: str
    description: str = ""

    # kernels
    fused_attention: bool = True
    """FlashAttention / cuDNN fused attention; False: batched GEMMs, scale-mask-softmax, dropout."""
    fused_norm: bool = True
    """One kernel per norm (Apex/TE/compiled); False: the eager decomposition, several passes."""
    fused_activation: bool = True
    """bias+GeLU or SwiGLU in one pass (jit/TE/compiled); False: one pass per elementwise op."""
    fused_residual: bool = True
    """bias + dropout + residual add in one pass; False: one pass each."""
    fused_cross_entropy: bool = True
    """Cross-entropy over (vocabulary-parallel) logits in few passes; False: eager fp32 softmax."""
    fused_rope: bool = True
    """Rotary embedding as one kernel; False: the eager rotate-half sequence."""
    fused_optimizer: bool = True
    """Multi-tensor (Apex/foreach fused) optimizer; False: one pass per elementwise operation."""
    wgrad_accumulation_fusion: bool = True
    """Weight-gradient GEMM adds straight into the fp32 main gradient."""
    dropout: bool = False
    """Dropout is active in hidden and attention (the GPT-3-era recipes)."""
    norm_dtype_bytes: float = 2.0

    # precision
    main_grad_bytes: float = 4.0
    """Bytes per element of the accumulated gradient."""
    grad_reduce_bytes: float = 4.0
    """Bytes per element on the wire in gradient reduction."""
    param_gather_bytes: float = 2.0
    """Bytes per element on the wire in parameter gathers."""
    fp8_param_gather: bool = False
    fp8_attention: bool = False

    # communication
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_p2p: bool = True
    tensor_overlap: bool = False
    """TP collectives pipelined with their GEMMs (userbuffers, async-TP, collective matmul)."""
    moe_overlap: bool = False
    """Expert all-to-all of one micro-batch hidden behind the compute of another."""
    moe_dispatcher: str = "alltoall"
    """`alltoall`, `allgather` or `deepep` (node-limited, deduplicated)."""
    fsdp_prefetch: int = 1
    """How many layers ahead parameters are gathered."""
    fsdp_regather_backward: bool = True
    """ZeRO-3: parameters freed after the forward and gathered again for the backward."""
    fsdp_limit_all_gathers: bool = True

    # host
    cuda_graphs: bool = False
    """Kernels replayed from a graph: no host launch gap."""
    compiled: bool = False
    """torch.compile / XLA: elementwise chains fused, fewer launches."""
    host_time_per_kernel: float = 5e-6
    """CPU seconds to launch one kernel; the GPU starves when kernels are shorter."""

    source: str = ""
