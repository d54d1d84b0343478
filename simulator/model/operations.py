"""Operations: what one rank executes, as shapes, before any accelerator gives them a duration.

An operation is a small frozen (hashable) value, so that its cost can be cached. Sizes are those of
one rank after sharding. `phase` says which part of the schedule it belongs to: the forward (F),
the input-gradient half of the backward (I) or its weight-gradient half (W).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Part of a micro-batch's work: F, I (input gradient), W (weight gradient) or the optimizer."""

    FORWARD = "F"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    OPTIMIZER = "O"


#: Bytes per element of the storage of each precision; the block scales of mxfp8 (one byte per 32
#: elements) and nvfp4 (one byte per 16) are included, OCP Microscaling Formats v1.0.
BYTES_PER_ELEMENT: dict[str, float] = {
    "fp32": 4.0,
    "tf32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp8": 1.0 + 1.0 / 32.0,
    "nvfp4": 0.5 + 1.0 / 16.0,
}

PRECISIONS = tuple(BYTES_PER_ELEMENT)


@dataclass(frozen=True, slots=True)
class Gemm:
    """`batch` independent products D[m, n] (+)= A[m, k] B[k, n].

    `precision` is that of the inputs; `output_bytes` the bytes per output element;
    `accumulate` adds into an existing D (read and written), as weight gradients into an fp32
    main gradient do.
    """

    name: str
    m: int
    n: int
    k: int
    batch: int = 1
    precision: str = "bf16"
    phase: Phase = Phase.FORWARD
    output_bytes: float = 2.0
    accumulate: bool = False

    @property
    def kind(self) -> str:
        return "gemm"

    @property
    def flops(self) -> float:
        """Floating-point operations, a multiply-add counted as two."""
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class GroupedGemm:
    """One kernel that multiplies `groups` problems [m, k] x [k, n]: the local experts of an MoE.

    `m` is the mean number of rows per group; `imbalance` = largest / mean rows over ranks
    (1 = balanced).
    """

    name: str
    groups: int
    m: float
    n: int
    k: int
    precision: str = "bf16"
    phase: Phase = Phase.FORWARD
    output_bytes: float = 2.0
    accumulate: bool = False
    imbalance: float = 1.0

    @property
    def kind(self) -> str:
        return "grouped_gemm"

    @property
    def kernels(self) -> int:
        """Launches: one GEMM per group on several streams (Transformer Engine's
        `general_grouped_gemm` over cuBLAS)."""
        return self.groups

    @property
    def flops(self) -> float:
        return 2.0 * self.groups * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused (flash) attention core of one rank: `heads` query heads, `kv_heads` key/value heads.

    `q_len` x `kv_len` scores per head; `causal` halves them when the lengths are equal (a context
    -parallel rank with load balancing sees half as well); `window` limits a query to the last
    `window` keys (None: all). `phase` FORWARD is the forward kernel; INPUT_GRADIENT the backward.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    qk_dim: int
    v_dim: int
    causal: bool = True
    window: int | None = None
    precision: str = "bf16"
    phase: Phase = Phase.FORWARD

    @property
    def kind(self) -> str:
        return "attention"

    @property
    def score_pairs(self) -> float:
        """Query-key pairs per batch element and head that the mask keeps."""
        pairs = float(self.q_len) * self.kv_len
        if self.window is not None and self.window < self.kv_len:
            w = float(self.window)
            # the first w queries of a causal window see a triangle, the others w keys each
            return self.q_len * w - (w * w / 2.0 if self.causal else 0.0)
        return pairs / 2.0 if self.causal else pairs

    @property
    def flops(self) -> float:
        """2 * pairs * (qk_dim + v_dim) forward; the backward recomputes the scores and makes four
        products: 2.5 times the forward (Dao, FlashAttention-2, arXiv 2307.08691, section 4.1)."""
        forward = 2.0 * self.batch * self.heads * self.score_pairs * (self.qk_dim + self.v_dim)
        return forward if self.phase is Phase.FORWARD else 2.5 * forward


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """Kernels whose time is the traffic to HBM (norm, activation, softmax, optimizer, ...).

    `op_class` selects the achieved fraction of HBM bandwidth: `norm`, `elementwise` (residual,
    dropout, bias, rotary embedding), `activation` (GeLU, SwiGLU), `softmax`, `embedding`,
    `cross_entropy`, `permute` (MoE dispatch and combine), `router`, `cast` (quantisation),
    `optimizer`, `copy`. `kernels` is how many launches the entry stands for.
    """

    name: str
    op_class: str
    bytes_read: float
    bytes_written: float
    flops: float = 0.0
    kernels: int = 1
    phase: Phase = Phase.FORWARD

    @property
    def kind(self) -> str:
        return self.op_class

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class Collective:
    """Communication over one group of the rank mesh.

    `op`: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast` or `send_recv`.
    `group`: the mesh dimension whose group takes part: `tensor`, `context`, `data`, `expert`,
    `expert_tensor`, `expert_data`, `shard` / `replicate` (hybrid sharding), `embedding`,
    `pipeline`, `model` (tensor x pipeline), `world`; `host`: a rank alone, with its host's memory
    (`op` then is `device_to_host` or `host_to_device`, see `simulator.costs.host_copies`).
    `bytes` follows nccl-tests: all_reduce = buffer of one rank, all_gather = total output,
    reduce_scatter = total input, all_to_all = total per rank, send_recv = per rank.
    `overlap`: may run beside compute that does not depend on it (the framework pipelines it with
    the neighbouring GEMM, e.g. TP overlap with userbuffers); the name of the GEMM it hides behind
    or None.
    """

    name: str
    op: str
    group: str
    bytes: float
    phase: Phase = Phase.FORWARD
    overlap: str | None = None

    @property
    def kind(self) -> str:
        return self.op

    @property
    def flops(self) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy between host memory and the accelerator over PCIe (`to_device` or back)."""

    name: str
    bytes: float
    to_device: bool = True
    phase: Phase = Phase.FORWARD

    @property
    def kind(self) -> str:
        return "host_copy"

    @property
    def flops(self) -> float:
        return 0.0


Operation = Gemm | GroupedGemm | Attention | MemoryBound | Collective | HostCopy
