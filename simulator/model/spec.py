"""What a model is: dimensions, and the parameter tensors that follow from them.

`ModelSpec` describes GPT, Llama, BERT, T5, ViT and MoE transformers and plain dense networks by
their dimensions. `layer_tensors` lists the parameter tensors of a layer; every count of parameters
(whole model, per rank, active per token) is a sum over them, so that there is one truth.

A *layer* is named by the index of a transformer block (0..layers-1; encoder blocks come first in an
encoder-decoder), or by `"embedding"`, `"head"` (final norm, output projection, loss) or `"mtp"`
(multi-token prediction).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.routing import Routing

LayerId = int | Literal["embedding", "head", "mtp"]

FAMILIES = ("gpt", "llama", "bert", "t5", "vit", "moe", "mlp", "traced")
ACTIVATIONS = ("gelu", "silu", "relu", "squared_relu", "identity", "tanh", "sigmoid")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope", "relative", "alibi", "none")
QK_NORMS = ("none", "head", "full")

#: Upper bound of layers, so that a broken file cannot fill the memory with them.
MAX_LAYERS = 100_000

#: How a tensor is sharded: over tensor parallelism, over experts, or not at all.
Sharding = Literal["tensor", "expert", "replicated"]


@dataclass(frozen=True, slots=True)
class ParameterTensor:
    """One parameter tensor of a layer before sharding (`elements` over the whole model)."""

    name: str
    elements: int
    sharding: Sharding
    matrix: bool = True
    """True: weight of a GEMM or a table; False: a vector (norm scale, bias)."""


@dataclass(frozen=True, slots=True)
class Block:
    """What distinguishes one transformer block from another in the same model."""

    moe: bool
    window: int | None
    causal: bool
    cross_attention: bool
    index: int = 0
    """Only for dense networks and traced models, whose blocks differ; 0 otherwise."""


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions of a model; sizes in elements, `published_parameters` as its authors state it.

    Raises
    ------
    InputError
        From `check`, if sizes are not positive or contradict each other (all errors at once).
    """

    name: str
    family: str
    layers: int
    """Blocks that pipeline stages divide; encoder plus decoder blocks of an encoder-decoder."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    """Vocabulary (of a ViT or a classifier: classes)."""

    gated_mlp: bool = False
    activation: str = "gelu"
    norm: str = "layernorm"
    positions: str = "learned"
    max_seq: int = 2048
    """Learned positions: size of the table; otherwise the published context length."""
    biases: bool = True
    """Biases in all projections of attention and MLP."""
    qkv_bias: bool = False
    """Bias in the QKV projection although `biases` is False (Qwen2)."""
    norm_biases: bool | None = None
    """Biases in layer norms; None: wherever the norm is a layernorm."""
    tied_embeddings: bool = False
    qk_norm: str = "none"
    """`head`: a norm over each head's dimension (Qwen3); `full`: over all heads together."""
    parallel_blocks: bool = False
    """Attention and MLP read the same input (Falcon, PaLM)."""
    block_norms: int = 2
    """Norms per block; 4 with post-norms (Gemma 2 and 3), 1 in some parallel blocks."""
    final_norm: bool = True
    embedding_norm: bool = False
    causal: bool = True
    window: int | None = None
    """Sliding-window size in keys, of the blocks that `window_pattern` marks."""
    window_pattern: tuple[bool, ...] = (True,)
    attention_sinks: bool = False
    """One learned logit per head (gpt-oss)."""

    n_experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Total width of the shared experts."""
    shared_gate: bool = False
    first_dense_layers: int = 0
    moe_every: int = 1
    """Every `moe_every`-th block after the first dense ones is an MoE block."""
    router_bias: bool = False
    router_groups: int = 1
    """Groups of experts of which a token chooses `router_group_limit` first (DeepSeek-V2, V3)."""
    router_group_limit: int = 1

    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    """> 0: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_dim: int = 0
    mtp_layers: int = 0

    encoder_layers: int = 0
    token_types: int = 0
    """Size of the token-type (segment) table (BERT)."""
    pooler: bool = False
    lm_head_transform: bool = False
    """Dense + activation + norm before the vocabulary projection (BERT's masked-LM head)."""
    head_bias: bool = False
    embedding_dim: int = 0
    """Width of the embedding table where it is not `hidden` (projected in and out)."""
    relative_buckets: int = 0
    """T5's relative position buckets, one table for the encoder and one for the decoder."""
    patch_size: int = 0
    image_size: int = 0
    channels: int = 3
    dense_sizes: tuple[int, ...] = ()
    """Widths of a plain dense network, input first: `layers` = len - 1."""

    published_parameters: float | None = None
    source: str = ""
    traced: Any = None
    """Of family `traced`: the layers' operations (`simulator.importers.traced.TracedModel`)."""

    # -- derived -------------------------------------------------------------------------------

    @property
    def mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def routing(self) -> Routing:
        """Where tokens go; of an MoE model only."""
        return Routing(self.n_experts, self.top_k, self.router_groups, self.router_group_limit)

    @property
    def moe(self) -> bool:
        return self.n_experts > 0

    @property
    def qk_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_dim + self.qk_rope_dim if self.mla else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.v_dim if self.mla else self.head_dim

    @property
    def query_width(self) -> int:
        """Width of the attention output before its projection: heads * value head."""
        return self.heads * self.value_dim

    def norm_size(self, width: int) -> int:
        biased = self.norm == "layernorm" if self.norm_biases is None else self.norm_biases
        return width * (2 if biased else 1)

    def is_moe(self, layer: int) -> bool:
        """True if block `layer` routes its tokens to experts."""
        if not self.moe or layer < self.first_dense_layers:
            return False
        return (layer - self.first_dense_layers) % self.moe_every == self.moe_every - 1

    def block(self, layer: int) -> Block:
        """The block with this index; blocks that compare equal do the same work."""
        if not 0 <= layer < self.layers:
            raise InputError(f"model {self.name!r} has blocks 0..{self.layers - 1}, got {layer}")
        if self.family in ("mlp", "traced"):
            return Block(False, None, False, False, layer)
        windowed = self.window_pattern[layer % len(self.window_pattern)]
        decoder = layer >= self.encoder_layers
        return Block(
            moe=self.is_moe(layer),
            window=self.window if windowed else None,
            causal=self.causal and decoder,
            cross_attention=self.encoder_layers > 0 and decoder,
        )

    @property
    def layer_ids(self) -> tuple[LayerId, ...]:
        """All layers in execution order."""
        ids: list[LayerId] = ["embedding", *range(self.layers), "head"]
        if self.mtp_layers:
            ids.append("mtp")
        return tuple(ids)

    @property
    def parameters(self) -> int:
        """Parameters without multi-token prediction layers, as published counts are."""
        return sum(count_parameters(self, layer) for layer in self.layer_ids if layer != "mtp")

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: `top_k` of the experts."""
        total = 0.0
        for layer in self.layer_ids:
            if layer == "mtp":
                continue
            for tensor in layer_tensors(self, layer):
                share = self.top_k / self.n_experts if tensor.sharding == "expert" else 1.0
                total += tensor.elements * share
        return round(total)

    def check(self, place: str | None = None) -> ModelSpec:
        """Return self, or raise every contradiction as one `InputError`."""
        raise_all(list(_contradictions(self, place)))
        return self


def _contradictions(model: ModelSpec, place: str | None) -> Iterator[InputError]:
    def error(key: str, problem: str) -> InputError:
        return InputError(problem, place=f"{place}.{key}" if place else key)

    for key, choices in (
        ("family", FAMILIES),
        ("activation", ACTIVATIONS),
        ("norm", NORMS),
        ("positions", POSITIONS),
        ("qk_norm", QK_NORMS),
    ):
        value = getattr(model, key)
        if value not in choices:
            yield unknown_name(key, str(value), choices, place=f"{place}.{key}" if place else key)
    if model.layers > MAX_LAYERS:
        yield error("layers", f"at most {MAX_LAYERS}, got {model.layers}")
    if (model.family == "traced") != (model.traced is not None):
        yield error("family", "a traced model is described by its `layers`")
    if model.traced is not None:
        return
    if model.family == "mlp":
        if len(model.dense_sizes) < 2 or min(model.dense_sizes, default=0) < 1:
            yield error("dense_sizes", "expected at least two positive layer widths")
        return
    positive = ["layers", "hidden", "heads", "kv_heads", "head_dim", "vocab"]
    if not (model.moe and model.first_dense_layers == 0 and model.moe_every == 1):
        positive.append("ffn")
    if model.moe:
        positive += ["top_k", "expert_ffn", "moe_every"]
    if model.mla:
        positive += ["qk_nope_dim", "qk_rope_dim", "v_dim"]
    for key in positive:
        if getattr(model, key) < 1:
            yield error(key, f"must be a positive integer, got {getattr(model, key)!r}")
    for field in fields(model):
        value = getattr(model, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            yield error(field.name, f"must not be negative, got {value}")
    if model.heads > 0 and model.kv_heads > 0 and model.heads % model.kv_heads:
        yield error("kv_heads", f"{model.kv_heads} does not divide the {model.heads} heads")
    if model.moe and model.top_k > model.n_experts:
        yield error("top_k", f"{model.top_k} is more than the {model.n_experts} experts")
    if model.moe and model.router_groups > 1:
        groups, limit = model.router_groups, model.router_group_limit
        if model.n_experts % groups:
            yield error("router_groups", f"{groups} does not divide the {model.n_experts} experts")
        elif not 1 <= limit <= groups:
            yield error("router_group_limit", f"expected 1 to {groups}, got {limit}")
        elif model.n_experts // groups * limit < model.top_k:
            yield error("router_group_limit", f"{limit} groups hold fewer than top_k experts")
    if not model.moe and model.top_k:
        yield error("n_experts", "top_k is given but n_experts is not")
    if model.encoder_layers > model.layers:
        yield error("encoder_layers", f"more than the {model.layers} layers")
    if model.first_dense_layers > model.layers:
        yield error("first_dense_layers", f"more than the {model.layers} layers")
    if model.family == "vit" and (
        model.patch_size < 1 or model.image_size < 1 or model.image_size % model.patch_size
    ):
        yield error("patch_size", "patch_size must divide image_size, both positive")
    if model.window is not None and model.window < 1:
        yield error("window", f"must be positive or left out, got {model.window}")
    if not model.window_pattern:
        yield error("window_pattern", "must not be empty")


def _linear(
    name: str, inputs: int, outputs: int, bias: bool, sharding: Sharding, *, row: bool = False
) -> Iterator[ParameterTensor]:
    """Weight and bias of a linear layer; the bias of a row-parallel one is replicated."""
    yield ParameterTensor(f"{name}.weight", inputs * outputs, sharding)
    if bias:
        yield ParameterTensor(
            f"{name}.bias", outputs, "replicated" if row else sharding, matrix=False
        )


def _norm(model: ModelSpec, name: str, width: int | None = None) -> ParameterTensor:
    elements = model.norm_size(width or model.hidden)
    return ParameterTensor(name, elements, "replicated", matrix=False)


def _attention_tensors(model: ModelSpec, prefix: str) -> Iterator[ParameterTensor]:
    h, bias = model.hidden, model.biases
    if model.mla:
        if model.q_lora_rank:
            yield from _linear(f"{prefix}.q_down", h, model.q_lora_rank, False, "replicated")
            yield ParameterTensor(f"{prefix}.q_norm", model.q_lora_rank, "replicated", matrix=False)
        q_in = model.q_lora_rank or h
        yield from _linear(f"{prefix}.q_up", q_in, model.heads * model.qk_dim, False, "tensor")
        kv_down = model.kv_lora_rank + model.qk_rope_dim
        yield from _linear(f"{prefix}.kv_down", h, kv_down, False, "replicated")
        yield ParameterTensor(f"{prefix}.kv_norm", model.kv_lora_rank, "replicated", matrix=False)
        kv_up = model.heads * (model.qk_nope_dim + model.v_dim)
        yield from _linear(f"{prefix}.kv_up", model.kv_lora_rank, kv_up, False, "tensor")
    else:
        d = model.head_dim
        qkv_bias = bias or model.qkv_bias
        yield from _linear(f"{prefix}.q", h, model.heads * d, qkv_bias, "tensor")
        yield from _linear(f"{prefix}.kv", h, 2 * model.kv_heads * d, qkv_bias, "tensor")
        if model.qk_norm == "head":
            yield _norm(model, f"{prefix}.q_norm", d)
            yield _norm(model, f"{prefix}.k_norm", d)
        elif model.qk_norm == "full":
            yield _norm(model, f"{prefix}.q_norm", model.heads * d)
            yield _norm(model, f"{prefix}.k_norm", model.kv_heads * d)
        if model.attention_sinks:
            yield ParameterTensor(f"{prefix}.sinks", model.heads, "tensor", matrix=False)
    yield from _linear(f"{prefix}.proj", model.query_width, h, bias, "tensor", row=True)


def _mlp_tensors(model: ModelSpec, prefix: str, ffn: int) -> Iterator[ParameterTensor]:
    up = 2 * ffn if model.gated_mlp else ffn
    yield from _linear(f"{prefix}.fc1", model.hidden, up, model.biases, "tensor")
    yield from _linear(f"{prefix}.fc2", ffn, model.hidden, model.biases, "tensor", row=True)


def _moe_tensors(model: ModelSpec) -> Iterator[ParameterTensor]:
    h, e, f = model.hidden, model.n_experts, model.expert_ffn
    yield from _linear("moe.router", h, e, model.router_bias, "replicated")
    up = 2 * f if model.gated_mlp else f
    yield ParameterTensor("moe.fc1.weight", e * h * up, "expert")
    yield ParameterTensor("moe.fc2.weight", e * h * f, "expert")
    if model.biases:
        yield ParameterTensor("moe.fc1.bias", e * up, "expert", matrix=False)
        yield ParameterTensor("moe.fc2.bias", e * h, "expert", matrix=False)
    if model.shared_ffn:
        yield from _mlp_tensors(model, "moe.shared", model.shared_ffn)
        if model.shared_gate:
            yield from _linear("moe.shared.gate", h, 1, False, "replicated")


def _block_tensors(model: ModelSpec, block: Block) -> Iterator[ParameterTensor]:
    if model.family == "mlp":
        sizes = model.dense_sizes
        yield from _linear(
            "dense", sizes[block.index], sizes[block.index + 1], model.biases, "tensor"
        )
        return
    for index in range(model.block_norms):
        yield _norm(model, f"norm{index}")
    yield from _attention_tensors(model, "attention")
    if block.cross_attention:
        yield _norm(model, "cross.norm")
        yield from _attention_tensors(model, "cross")
    if block.moe:
        yield from _moe_tensors(model)
    else:
        yield from _mlp_tensors(model, "mlp", model.ffn)


def _embedding_tensors(model: ModelSpec) -> Iterator[ParameterTensor]:
    if model.family == "mlp":
        return
    h = model.hidden
    if model.family == "vit":
        patch = model.channels * model.patch_size**2
        yield from _linear("embedding.patch", patch, h, True, "replicated")
        yield ParameterTensor("embedding.class", h, "replicated", matrix=False)
        patches = (model.image_size // model.patch_size) ** 2
        yield ParameterTensor("embedding.positions", (patches + 1) * h, "replicated")
        return
    width = model.embedding_dim or h
    yield ParameterTensor("embedding.tokens", model.vocab * width, "tensor")
    if model.embedding_dim:
        yield from _linear("embedding.project", width, h, False, "replicated")
    if model.positions == "learned":
        yield ParameterTensor("embedding.positions", model.max_seq * h, "replicated")
    if model.relative_buckets:
        stacks = 2 if model.encoder_layers else 1
        elements = stacks * model.relative_buckets * model.heads
        yield ParameterTensor("embedding.relative", elements, "tensor")
    if model.token_types:
        yield ParameterTensor("embedding.types", model.token_types * h, "replicated")
    if model.embedding_norm:
        yield _norm(model, "embedding.norm")


def _head_tensors(model: ModelSpec) -> Iterator[ParameterTensor]:
    if model.family == "mlp":
        return
    h = model.hidden
    if model.final_norm:
        yield _norm(model, "head.norm")
    if model.encoder_layers:
        yield _norm(model, "head.encoder_norm")
    if model.pooler:
        yield from _linear("head.pooler", h, h, True, "replicated")
    if model.lm_head_transform:
        yield from _linear("head.transform", h, h, True, "replicated")
        yield _norm(model, "head.transform_norm")
    width = model.embedding_dim or h
    if model.embedding_dim:
        yield from _linear("head.project", h, width, False, "replicated")
    if model.family == "vit":
        yield from _linear("head.classes", h, model.vocab, True, "tensor")
        return
    if not model.tied_embeddings:
        yield ParameterTensor("head.output.weight", model.vocab * width, "tensor")
    if model.head_bias:
        yield ParameterTensor("head.output.bias", model.vocab, "tensor", matrix=False)


def _mtp_tensors(model: ModelSpec) -> Iterator[ParameterTensor]:
    """Per depth: norms of hidden state and embedding, a 2h -> h projection, one block, a norm;
    embedding and output projection are shared (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    block = model.block(model.layers - 1)
    for depth in range(model.mtp_layers):
        yield _norm(model, f"mtp{depth}.hidden_norm")
        yield _norm(model, f"mtp{depth}.embedding_norm")
        yield from _linear(f"mtp{depth}.project", 2 * model.hidden, model.hidden, False, "tensor")
        yield from _block_tensors(model, block)
        yield _norm(model, f"mtp{depth}.norm")


@lru_cache(maxsize=4096)
def block_tensors(model: ModelSpec, layer: Block | str) -> tuple[ParameterTensor, ...]:
    """Parameter tensors of a kind of block, or of `embedding`, `head` or `mtp`."""
    if model.traced is not None:
        tensors: tuple[ParameterTensor, ...] = model.traced.tensors(layer)
        return tensors
    if isinstance(layer, Block):
        return tuple(_block_tensors(model, layer))
    makers = {"embedding": _embedding_tensors, "head": _head_tensors, "mtp": _mtp_tensors}
    return tuple(makers[layer](model))


def layer_tensors(model: ModelSpec, layer: LayerId) -> tuple[ParameterTensor, ...]:
    """Parameter tensors of one layer; a tied output projection counts in the embedding alone."""
    return block_tensors(model, model.block(layer) if isinstance(layer, int) else layer)


def count_parameters(model: ModelSpec, layer: LayerId) -> int:
    """Parameters of one layer over the whole model."""
    return sum(tensor.elements for tensor in layer_tensors(model, layer))
