"""How a layer is executed: sizes, sharding, precision, recomputation, framework behaviour."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from simulator.catalog.frameworks import FrameworkProfile
from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.operations import BYTES_PER_ELEMENT, PRECISIONS
from simulator.model.spec import ModelSpec

CONTEXT_KINDS = ("ring", "allgather", "ulysses")
RECOMPUTE = ("none", "selective", "full")

#: Names of parts that selective recomputation may list (Megatron-LM's --recompute-modules, and
#: `elementwise`: everything but matrix products and communication, "save matmul outputs";
#: `alternate_gemm`: every second matrix product, as torchtitan's selective "op" policy).
RECOMPUTE_MODULES = (
    "core_attn",
    "layernorm",
    "activation",
    "moe_act",
    "mla_up_proj",
    "attention",
    "mlp",
    "moe",
    "shared_experts",
    "elementwise",
    "alternate_gemm",
)

LOW_PRECISIONS = ("fp8", "mxfp8", "nvfp4", "int8")


@dataclass(frozen=True)
class LayerContext:
    """Everything besides the model that decides which operations a rank runs for a layer."""

    micro_batch: int
    """Sequences per micro-batch on this rank."""
    seq: int
    """Tokens per sequence before context parallelism."""
    tensor: int = 1
    context: int = 1
    context_kind: str = "ring"
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    precision: str = "bf16"
    """Of the GEMMs; activations and attention stay bf16 (fp16, fp32) below eight bits, unless
    `profile.fp8_attention`."""
    profile: FrameworkProfile = field(default_factory=lambda: FrameworkProfile(name="default"))
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    """Parts that `selective` recomputes; empty: what the profile says, and the attention core
    where it is not fused."""
    micro_batches: int = 1
    """Per step: gradients accumulate over them, and cached weight casts are shared by them."""
    accumulate_gradients: bool | None = None
    """Weight gradients add into an existing buffer; None: when there are several micro-batches
    or the framework accumulates into main gradients (fused)."""
    moe_imbalance: float = 1.0
    """Rows of the most loaded rank over the mean."""
    capacity_factor: float | None = None
    """None: dropless."""
    shards: int = 1
    """Ranks over which parameters are sharded (ZeRO-3, FSDP); 1: whole."""
    vocab_padding: int = 128
    """The vocabulary is padded to a multiple of this times `tensor` (Megatron-LM)."""
    vocabulary_ranks: int = 1
    """Pipeline ranks over which the rows of the vocabulary are spread; with more than one the
    embedding and the head are what does not grow with it (`simulator.model.vocabulary`)."""
    scaled_copies: float = 2.0
    """Copies written of a value that is quantised with one scale per tensor: with its transpose,
    unless the accelerator multiplies operands of any layout."""
    mtp_head_with_loss: bool = False
    """Multi-token prediction is on a stage of its own: its logits and loss are with the head's
    (Megatron-Core, `process_mtp_loss`)."""
    decoder_seq: int | None = None
    """Tokens per sequence of an encoder-decoder's decoder; None: `seq`."""

    # -- derived -------------------------------------------------------------------------------

    @property
    def low_precision(self) -> bool:
        return self.precision in LOW_PRECISIONS

    @property
    def wide(self) -> str:
        """Precision of activations, attention and the output projection."""
        return "bf16" if self.low_precision else self.precision

    @property
    def element(self) -> float:
        """Bytes per activation element."""
        return BYTES_PER_ELEMENT[self.wide]

    @property
    def cast_element(self) -> float:
        """Bytes per element of a GEMM's inputs."""
        return BYTES_PER_ELEMENT[self.precision]

    @property
    def tokens(self) -> int:
        """Tokens per rank and micro-batch, after context parallelism."""
        return self.micro_batch * math.ceil(self.seq / self.context)

    @property
    def sharded_tokens(self) -> int:
        """Tokens per rank where sequence parallelism splits them."""
        return math.ceil(self.tokens / self.tensor) if self.sharded else self.tokens

    @property
    def sharded(self) -> bool:
        """True if sequence parallelism is in effect."""
        return self.sequence_parallel and self.tensor > 1

    @property
    def selected_modules(self) -> tuple[str, ...]:
        """Parts that are recomputed selectively; none unless `recompute` is `selective`."""
        if self.recompute != "selective":
            return ()
        if self.recompute_modules:
            return self.recompute_modules
        if self.profile.selective_recompute:
            return tuple(self.profile.selective_recompute.split())
        return () if self.profile.fused_attention else ("core_attn",)

    def padded_vocab(self, vocab: int) -> int:
        unit = self.vocab_padding * self.tensor if self.vocab_padding > 1 else self.tensor
        return math.ceil(vocab / unit) * unit

    def check(self, model: ModelSpec, place: str | None = None) -> LayerContext:
        """Return self, or raise every contradiction with `model` as one `InputError`."""
        raise_all(list(_contradictions(self, model, place)))
        return self


def _contradictions(ctx: LayerContext, model: ModelSpec, place: str | None) -> Iterator[InputError]:
    def error(problem: str) -> InputError:
        return InputError(problem, place=place)

    for kind, value, choices in (
        ("precision", ctx.precision, PRECISIONS),
        ("context kind", ctx.context_kind, CONTEXT_KINDS),
        ("recompute", ctx.recompute, RECOMPUTE),
        *(
            ("recompute module", name, RECOMPUTE_MODULES)
            for name in ctx.selected_modules or ctx.recompute_modules
        ),
    ):
        if value not in choices:
            yield unknown_name(kind, value, choices, place=place)
    for name in ("micro_batch", "seq", "tensor", "context", "expert", "expert_tensor"):
        if getattr(ctx, name) < 1:
            yield error(f"{name} must be a positive integer, got {getattr(ctx, name)!r}")
            return
    if model.traced is not None:
        for problem in model.traced.check_context(ctx):
            yield error(problem)
        return
    if model.family == "mlp":
        return
    if model.heads % ctx.tensor:
        yield error(f"tensor {ctx.tensor} does not divide the {model.heads} attention heads")
    if model.ffn and model.ffn % ctx.tensor:
        yield error(f"tensor {ctx.tensor} does not divide ffn {model.ffn}")
    if model.kv_heads % ctx.tensor and ctx.tensor % model.kv_heads:
        yield error(f"tensor {ctx.tensor} and kv_heads {model.kv_heads} do not divide each other")
    if ctx.seq % ctx.context:
        yield error(f"context {ctx.context} does not divide the sequence length {ctx.seq}")
    elif ctx.sharded and (ctx.seq // ctx.context) % ctx.tensor:
        yield error(
            f"sequence parallelism: tensor {ctx.tensor} does not divide the "
            f"{ctx.seq // ctx.context} tokens of a rank's sequence"
        )
    if ctx.context > 1 and ctx.context_kind == "ulysses":
        local = max(1, model.heads // ctx.tensor)
        if local % ctx.context:
            yield error(f"ulysses: context {ctx.context} does not divide {local} heads per rank")
    if ctx.expert > 1 and not model.moe:
        yield error(f"expert {ctx.expert}: model {model.name!r} has no experts")
    if model.moe:
        if model.n_experts % ctx.expert:
            yield error(f"expert {ctx.expert} does not divide the {model.n_experts} experts")
        if model.expert_ffn % ctx.expert_tensor:
            yield error(
                f"expert_tensor {ctx.expert_tensor} does not divide expert_ffn {model.expert_ffn}"
            )
