"""Framework profiles: what a framework does, never how fast a result was.

A profile is a data file entry (`frameworks.yaml`): which kernels are fused, what overlaps, which
types gradients are reduced in. Every figure there has a source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from simulator.errors import InputError, raise_all, unknown_name


@dataclass(frozen=True)
class FrameworkProfile:
    """Behaviours of a training framework, as the kernels and programs need them."""

    name: str
    description: str = ""

    # kernels
    fused_attention: bool = True
    """FlashAttention / cuDNN fused attention; False: batched GEMMs, scale-mask-softmax, dropout."""
    attention_kernel: str = "best"
    """Fused kernel: `best` of the accelerator, or an older one: `flash2`, `triton`, `flash1`."""
    fused_norm: bool = True
    """One kernel per norm (Apex/TE/compiled); False: the eager decomposition, several passes."""
    native_norm: bool = False
    """That one kernel is PyTorch's own `layer_norm`, with two passes in the backward."""
    fused_activation: bool = True
    """bias+GeLU or SwiGLU in one pass (jit/TE/compiled); False: one pass per elementwise op."""
    fused_residual: bool = True
    """bias + dropout + residual add in one pass; False: one pass each."""
    fused_cross_entropy: bool = True
    """Cross-entropy over (vocabulary-parallel) logits in few passes; False: eager fp32 softmax."""
    fp32_logits: bool = False
    """Logits are cast to fp32 before the loss, and their gradient back (`NaiveAMPModel` of
    ColossalAI and InternEvo with `output_to_fp32`)."""
    logit_metrics: bool = False
    """Accuracy and perplexity of every micro-batch are computed from its logits, in eager passes
    (InternEvo's `AccPerplex`)."""
    fused_softmax: bool = True
    """Without fused attention: scale, mask and softmax in one kernel (Megatron-LM, Transformer
    Engine); False: one pass each in fp32, or what a compiler makes of it (`compiled`)."""
    fused_projections: bool = True
    """Query, key and value (and gate and up) are one GEMM; False: one GEMM per matrix."""
    split_gradient_copy: bool = False
    """The gradients of query, key and value, which a fused projection was split into, are copied
    into one tensor (autograd's backward of `chunk` and `split`)."""
    fused_cast: bool = False
    """Quantisation casts are written by the producing norm or activation kernel."""
    fused_rope: bool = True
    """Rotary embedding as one kernel; False: the eager rotate-half sequence."""
    complex_rope: bool = False
    """Rotary embedding as a product of complex fp32 numbers, which inductor leaves eager."""
    eager_ring: bool = False
    """Ring attention merges its steps in eager fp32 operations (torch.distributed.tensor's
    experimental `_templated_ring_attention`); False: one fused correction per step."""
    repeated_kv: bool = False
    """Keys and values of grouped-query attention are copied to every query head beforehand."""
    fused_optimizer: bool = True
    """Multi-tensor (Apex/foreach fused) optimizer; False: one pass per elementwise operation."""
    wgrad_accumulation_fusion: bool = True
    """Weight-gradient GEMM adds straight into the fp32 main gradient."""
    dropout: bool = False
    """Dropout is active in hidden and attention (the GPT-3-era recipes)."""

    # precision
    main_grad_bytes: float = 4.0
    """Bytes per element of the accumulated gradient."""
    grad_reduce_bytes: float = 4.0
    """Bytes per element on the wire in gradient reduction."""
    param_gather_bytes: float = 2.0
    """Bytes per element on the wire in parameter gathers."""
    fp8_recipe: str = "delayed"
    """Scale of a per-tensor fp8 cast: `delayed` (from earlier steps' maxima) or `current` (the
    tensor's own maximum, found in a pass before the cast, so that no producer can cast)."""
    fp8_param_gather: bool = False
    fp8_attention: bool = False

    # communication
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_p2p: bool = True
    tensor_backward_overlap: bool = True
    """In the backward of a column-parallel linear the input gather hides behind the input-gradient
    GEMM and the gradient's reduction behind the weight-gradient GEMM (Megatron-LM)."""
    tensor_overlap: bool = False
    """TP collectives pipelined with their GEMMs (userbuffers, async-TP, collective matmul)."""
    moe_overlap: bool = False
    """Expert all-to-all of one micro-batch hidden behind the compute of another."""
    moe_dispatcher: str = "alltoall"
    """`alltoall`, `allgather` or `deepep` (node-limited, deduplicated)."""
    moe_dispatch_fp8: bool = False
    """Tokens are quantised before they are dispatched (DeepSeek-V3's own framework)."""
    moe_host_sync: bool = True
    """Dropless dispatch: the host reads the tokens per expert before it launches the experts, so
    that nothing is queued behind it; the rest of the layer is launched while the device runs."""
    grouped_cast: str = "per_expert"
    """Quantising the experts' inputs: kernels `per_expert`, or `fused` over all of them."""
    fused_grouped_mlp: bool = False
    """Grouped GEMMs whose epilogues apply the activation and quantise (one pass less each)."""
    param_sync: str = "all_gather"
    """How updated parameters reach the replicas under a sharded optimizer: one `all_gather` per
    bucket, or a `broadcast` from every rank of the tensors that it updated."""
    fsdp_prefetch: int = 1
    """How many layers ahead parameters are gathered."""
    fsdp_regather_backward: bool = True
    """ZeRO-3: parameters freed after the forward and gathered again for the backward."""
    fsdp_limit_all_gathers: bool = True
    """A gather waits until the unit `fsdp_prefetch` + 1 before it has been computed and freed
    (PyTorch FSDP `limit_all_gathers`); False: the host issues a pass's gathers without waiting, so
    that all of its parameters may be there at once."""
    fsdp_copies: str = "none"
    """Copies around sharded parameters: `fsdp2` copies every gathered unit out of the communication
    buffer (`foreach_all_gather_copy_out`) and gradients into it, in the type of the reduction
    (`foreach_reduce_scatter_copy_in`); `fsdp1` concatenates the gradients of a flat parameter's
    views (the backward of `torch.split`), casts them to the type of the reduction and divides
    them before it (`_post_backward_hook`, `_reduce_grad`). `lists`: collectives
    take a list with one tensor per rank, which PyTorch copies from or to a flat buffer with one
    kernel per rank (`ProcessGroupNCCL::allgather`), launched while nothing else is queued."""
    fsdp_keep_elements: float = math.inf
    """Parameters gathered for a layer's recomputation stay for its backward where the layer has no
    more elements than this (DeepSpeed `stage3_max_reuse_distance`)."""
    fsdp_unit: str = "layer"
    """What is gathered and reduced at a time: a whole `layer` (PyTorch FSDP), or each `weight` just
    before its use (XLA, DeepSpeed ZeRO-3)."""

    selective_recompute: str = ""
    """What `recompute: selective` means where no modules are listed: names of
    `simulator.model.context.RECOMPUTE_MODULES`, separated by spaces; empty: an unfused attention
    core."""
    default_recompute: str = ""
    """What the framework recomputes where a published configuration does not say."""
    fsdp_offload: bool = False
    """Where a configuration does not say: fully sharded steps offload activations to a host that
    NVLink-C2C joins before they recompute."""
    default_pipeline_microbatches: str = ""
    """Micro-batches of a pipeline where a configuration does not say: `ranks`, as many as pipeline
    ranks; empty: not known."""
    default_virtual_stages: float = 1.0
    """Stages per pipeline rank of an interleaved schedule where a configuration does not say."""
    recompute_early_stop: bool = False
    """Recomputation ends with the last tensor that the backward needs (PyTorch's non-reentrant
    checkpoint; XLA's dead-code elimination); False: the whole layer runs again."""

    fsdp: bool = False
    """Parameters are sharded around each pass (PyTorch FSDP): zero2 then means SHARD_GRAD_OP."""
    scatter_gather_p2p: bool = False
    """Tensor-parallel ranks each send a slice of the stage boundary (SC21, section 4.1)."""
    bucket_elements: float = 40e6
    """Gradient bucket: at least this many elements ..."""
    bucket_elements_per_rank: float = 1e6
    """... and this many per data-parallel rank (Megatron-LM distributed_data_parallel_config)."""

    # host
    step_host_time: float = 0.0
    """Seconds per step in which the device waits for the host (data loader, logging, optimizer
    loop, synchronisation of the loss)."""
    cuda_graphs: bool = False
    """Kernels replayed from a graph: no host launch gap."""
    graphed_modules: str = ""
    """Parts of a layer that alone are replayed from graphs: names of `GRAPH_MODULES` (Megatron-LM's
    --cuda-graph-modules), separated by spaces."""
    compiled: bool = False
    """torch.compile / XLA: elementwise chains fused, fewer launches."""
    host_time_per_kernel: float = 8e-6
    """CPU seconds to launch one kernel through an eager framework (4-10 us beyond the kernel were
    measured for eager PyTorch); the GPU starves when kernels are shorter."""
    host_time_per_grouped_kernel: float = 4e-6
    """The same of one of many that a single call launches: the products of the local experts and
    their casts (Transformer Engine issue 2897, GB200: 3.3 ms for the six products of each of 64
    experts are 8.6 us each; issue 2053: that host takes 2.5 times as long as the x86 one of a
    DGX)."""
    host_time_per_operation: float = 0.0
    """CPU seconds that an operation takes before its first launch, whatever it launches: Python
    module and autograd function, checks, allocations (Transformer Engine issue 445, H100: a small
    te.Linear takes 0.40 ms longer than torch's, forward and backward: 80 us for each of about five
    operations)."""
    host_time_per_expert_operation: float = 0.0
    """The same of the operations from a mixture-of-experts layer's router to its combine: routing,
    dispatcher and permutation (autograd functions around several launches and Triton kernels),
    lists of weights, gradients and main gradients of all local experts, and their parameters'
    hooks. No measurement of them is public; fitted on whole steps, see docs/fidelity.md."""
    host_time_low_precision: float = 2.0
    """The same of a quantised product with its casts, over that of others: quantisers, scales and
    tensors of several buffers are made per call (Transformer Engine issue 761: scheduling te.Linear
    takes more than twice as long in fp8 as in bf16)."""

    source: str = ""


_PATH = Path(__file__).with_name("frameworks.yaml")
DEFAULT = "megatron-core"


@lru_cache(maxsize=1)
def frameworks() -> dict[str, FrameworkProfile]:
    """All profiles of the catalogue by name."""
    raw = yaml.safe_load(_PATH.read_text(encoding="utf-8"))
    profiles: dict[str, FrameworkProfile] = {}
    for name, entry in raw.items():
        profiles[name] = framework_from_mapping({"name": name, **entry}, known=profiles)
    return profiles


def framework(name: str | None) -> FrameworkProfile:
    """The profile called `name` (None: the default); raises `InputError` naming the nearest."""
    profiles = frameworks()
    wanted = name or DEFAULT
    if wanted not in profiles:
        raise unknown_name("framework", wanted, profiles)
    return profiles[wanted]


#: Parts of a layer that can be replayed from graphs alone, see
#: `simulator.model.layers.graph_module`.
GRAPH_MODULES = ("attn", "mlp", "moe_router", "moe_preprocess", "moe")
#: Behaviours that have names.
_CHOICES = {
    "moe_dispatcher": ("alltoall", "allgather", "deepep"),
    "fp8_recipe": ("delayed", "current"),
    "grouped_cast": ("per_expert", "fused"),
    "param_sync": ("all_gather", "broadcast"),
    "fsdp_copies": ("none", "fsdp1", "fsdp2", "lists"),
    "fsdp_unit": ("layer", "weight"),
    "default_pipeline_microbatches": ("", "ranks"),
}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", str: "text"}


def _number(key: str, value: Any) -> float:
    """A finite number; positive where it is a size, else not negative. YAML takes `1e-6` (without
    a point) for text, so that text that reads as a number is one."""
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if math.isnan(number):
        raise InputError(f"{key}: expected a number, got {value!r}")
    if key.endswith("_bytes") or key == "bucket_elements":
        if not 0 < number <= _MOST:
            raise InputError(f"{key}: expected a finite number above 0, got {value!r}")
    elif not 0 <= number <= _MOST:
        raise InputError(f"{key}: expected a finite number of at least 0, got {value!r}")
    return number


#: Beyond any size or time of a profile, below what overflows.
_MOST = 1e15


def framework_from_mapping(
    mapping: Mapping[str, Any],
    *,
    known: Mapping[str, FrameworkProfile] | None = None,
    place: str | None = None,
) -> FrameworkProfile:
    """A profile from a mapping; `base` names the profile that it changes.

    Raises
    ------
    InputError
        For every unknown key and wrong type at once.
    """
    values = dict(mapping)
    profiles = frameworks() if known is None else known
    base_name = values.pop("base", None)
    base = FrameworkProfile(name="")
    if base_name is not None:
        if not isinstance(base_name, str) or base_name not in profiles:
            raise unknown_name("framework", str(base_name), profiles, place=place)
        base = profiles[base_name]
    fields = {item.name: item for item in dataclasses.fields(FrameworkProfile)}
    errors = []
    for key, value in values.items():
        if key not in fields:
            errors.append(unknown_name("framework key", key, fields, place=place))
            continue
        expected = type(getattr(base, key))
        if expected is float:
            try:
                values[key] = _number(key, value)
            except InputError as error:
                errors.append(error.at(place) if place else error)
        elif type(value) is not expected:
            name = _TYPE_NAMES[expected]
            errors.append(InputError(f"{key}: expected {name}, got {value!r}", place=place))
        elif expected is int and value < 0:
            errors.append(InputError(f"{key}: must not be negative, got {value}", place=place))
        elif key in _CHOICES and value not in _CHOICES[key]:
            errors.append(unknown_name(key.replace("_", " "), value, _CHOICES[key], place=place))
    for module in values.get("graphed_modules", "").split() if not errors else ():
        if module not in GRAPH_MODULES:
            errors.append(unknown_name("graph module", module, GRAPH_MODULES, place=place))
    raise_all(errors)
    values.setdefault("name", f"{base_name} (changed)" if base_name else "custom")
    return dataclasses.replace(base, **values)
