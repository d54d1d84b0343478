"""Model FLOPs: what a step must compute, whatever a framework recomputes or pads."""

from __future__ import annotations

from functools import lru_cache

from simulator.model.spec import LayerId, ModelSpec, layer_tensors


def _matmul_parameters(model: ModelSpec, layer: LayerId) -> float:
    """Weights that a token is multiplied by in one layer (`top_k` experts, output projection)."""
    total = 0.0
    for tensor in layer_tensors(model, layer):
        if not tensor.matrix or tensor.name.startswith("embedding."):
            continue
        share = model.top_k / model.n_experts if tensor.sharding == "expert" else 1.0
        total += tensor.elements * share
    return total


@lru_cache(maxsize=512)
def _matmul_total(model: ModelSpec) -> float:
    total = sum(_matmul_parameters(model, layer) for layer in model.layer_ids)
    if model.tied_embeddings:
        total += model.vocab * (model.embedding_dim or model.hidden)
    if model.mtp_layers:
        total += model.mtp_layers * model.vocab * model.hidden  # each depth's shared head
    if model.family == "vit":
        total += model.channels * model.patch_size**2 * model.hidden
    return total


@lru_cache(maxsize=4096)
def attention_flops(model: ModelSpec, seq: int, *, causal: bool | None = None) -> float:
    """Forward FLOPs of all score and value products of one sequence.

    2 * pairs * heads * (qk + v) per block. `causal` False counts the whole score matrix, as
    Megatron's, PaLM's and most published MFU formulas do; True counts half of it (and only the
    window of a sliding-window block); None: True for causal models.
    """
    if model.family in ("mlp", "traced"):
        return 0.0
    half = model.causal if causal is None else causal
    total = 0.0
    for layer in range(model.layers):
        block = model.block(layer)
        pairs = float(seq) * seq
        if half:
            window = block.window
            if window is not None and window < seq:
                pairs = seq * float(window) - window * window / 2.0
            elif block.causal:
                pairs /= 2.0
        if block.cross_attention:
            pairs += float(seq) * seq
        total += 2.0 * pairs * model.heads * (model.qk_dim + model.value_dim)
    if model.mtp_layers:
        last = model.block(model.layers - 1)
        pairs = seq * seq / 2.0 if half and last.causal else float(seq) * seq
        total += model.mtp_layers * 2.0 * pairs * model.heads * (model.qk_dim + model.value_dim)
    return total


def forward_flops(model: ModelSpec, seq: int, *, causal: bool | None = None) -> float:
    """Forward FLOPs of one sequence: 2 per matrix weight and token, plus attention.

    For a GPT with the whole score matrix this is 24 s h^2 L (1 + s/(6h) + V/(12 h L)), a third of
    the 72 of Narayanan et al. (arXiv 2104.04473, appendix).
    """
    if model.traced is not None:
        return float(model.traced.flops_per_sample(backward=False))
    tokens = seq
    if model.encoder_layers:
        # each token passes one of the two stacks: every weight sees its own stack's tokens
        return 2.0 * _matmul_total(model) * seq + attention_flops(model, seq, causal=causal)
    return 2.0 * _matmul_total(model) * tokens + attention_flops(model, seq, causal=causal)


def training_flops(model: ModelSpec, seq: int, *, causal: bool | None = None) -> float:
    """Model FLOPs of one sequence's forward and backward: three times the forward."""
    if model.traced is not None:
        return float(model.traced.flops_per_sample(backward=True))
    return 3.0 * forward_flops(model, seq, causal=causal)


def flops_per_token(model: ModelSpec, seq: int, *, causal: bool | None = None) -> float:
    """Training FLOPs per token: 6 N (without lookup tables) plus attention."""
    return training_flops(model, seq, causal=causal) / seq
