"""Vocabulary parallelism: one pipeline rank's share of embedding, output projection and loss.

Vocabulary parallelism (Yeung et al., "Balancing Pipeline Parallelism with Vocabulary Parallelism",
arXiv 2411.05288) splits the rows of the token table and of the output projection over all pipeline
ranks (and, as ever, over the tensor ranks of each). Of a micro-batch every rank executes

* a lookup of the tokens in its rows; an all-reduce over the pipeline gives the first stage the sum;
* pass S, its logits and its part of the softmax, of the last stage's output, which is broadcast;
  then all-reduces of every token's maximum, sum and target logit over all rows (barrier C1);
* pass T, the gradients of its logits, of its weights and its part of the hidden state's gradient,
  which is summed over the pipeline for the last stage's backward (barrier C2): Algorithm 1 of the
  paper, "Vocab-1";
* the gradient of its rows of the table, from the first stage's input gradient, which is broadcast.

What does not grow with the vocabulary (norms, positions, a BERT head's transform) stays where it is
without vocabulary parallelism: `simulator.model.layers` leaves the rest out of embedding and head
where `LayerContext.vocabulary_ranks` is more than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from simulator.errors import InputError
from simulator.model.activations import stored_tensors, transient_bytes
from simulator.model.context import LayerContext
from simulator.model.layers import LayerParameters, is_vocabulary, layer_operations
from simulator.model.operations import Collective, Operation, Phase
from simulator.model.spec import ModelSpec, layer_tensors


@dataclass(frozen=True, slots=True)
class VocabularyOperations:
    """Operations of one pipeline rank's share, per micro-batch, and the traffic between ranks."""

    lookup: tuple[Operation, ...]
    lookup_gradient: tuple[Operation, ...]
    scores: tuple[Operation, ...]
    """Pass S."""
    gradients: tuple[Operation, ...]
    """Pass T."""
    embedded: Collective
    """Sum of the ranks' lookups, for the first stage."""
    embedded_gradient: Collective
    """Gradient of the first stage's input, to all."""
    hidden: Collective
    """Output of the last stage, to all."""
    statistics: tuple[Collective, ...]
    """Barrier C1."""
    hidden_gradient: Collective
    """Barrier C2."""


def check_vocabulary(model: ModelSpec, place: str) -> None:
    """Raise `InputError` for models whose vocabulary layers cannot be spread."""
    reason = ""
    if model.traced is not None:
        reason = "is traced, so that its vocabulary layers are unknown"
    elif model.family in ("mlp", "vit"):
        reason = "has no vocabulary"
    elif model.mtp_layers:
        reason = "has multi-token prediction, whose heads are not spread"
    if reason:
        raise InputError(f"model {model.name!r} {reason}; expected false", place=place)


def vocabulary_share(model: ModelSpec, ctx: LayerContext) -> tuple[ModelSpec, LayerContext]:
    """A model with one pipeline rank's rows of the vocabulary, and its context.

    The rows of the padded vocabulary are spread evenly, rounded up to whole rows per tensor rank.
    """
    rows = ctx.padded_vocab(model.vocab) // ctx.tensor
    own = math.ceil(rows / ctx.vocabulary_ranks) * ctx.tensor
    return replace(model, vocab=own), replace(ctx, vocabulary_ranks=1, vocab_padding=1)


def vocabulary_parameters(model: ModelSpec, ctx: LayerContext) -> LayerParameters:
    """Parameters of one rank's share: rows of the table, and of the projection unless tied."""
    share, own = vocabulary_share(model, ctx)
    elements = sum(
        tensor.elements
        for layer in ("embedding", "head")
        for tensor in layer_tensors(share, layer)
        if is_vocabulary(tensor.name)
    )
    return LayerParameters(elements / own.tensor, 0.0)


def vocabulary_activation_bytes(model: ModelSpec, ctx: LayerContext) -> float:
    """Bytes that a rank keeps of one micro-batch from its pass S to its pass T."""
    share, own = vocabulary_share(model, ctx)
    return sum(t.bytes for t in stored_tensors(share, "head", own) if is_vocabulary(t.name))


def vocabulary_transient_bytes(model: ModelSpec, ctx: LayerContext) -> float:
    """Working set of a pass T: the gradient of its logits."""
    share, own = vocabulary_share(model, ctx)
    return transient_bytes(share, "head", own)


def _boundary(model: ModelSpec, ctx: LayerContext, layer: str) -> float:
    """Bytes per rank of the embedding's output, or of the projection's input."""
    tokens = ctx.sharded_tokens
    if layer == "head" and model.encoder_layers and ctx.decoder_seq is not None:
        tokens = ctx.micro_batch * math.ceil(ctx.decoder_seq / ctx.context)
        tokens = math.ceil(tokens / ctx.tensor) if ctx.sharded else tokens
    return ctx.element * tokens * (model.embedding_dim or model.hidden)


@lru_cache(maxsize=256)
def vocabulary_operations(model: ModelSpec, ctx: LayerContext) -> VocabularyOperations:
    """What one of `ctx.vocabulary_ranks` pipeline ranks does for the vocabulary layers."""
    share, own = vocabulary_share(model, ctx)
    embedding = layer_operations(share, "embedding", own)
    head = layer_operations(share, "head", own)
    scores = _vocabulary(head.forward)
    tokens = _boundary(model, replace(ctx, sequence_parallel=False), "head") / (
        ctx.element * (model.embedding_dim or model.hidden)
    )
    # maximum; then sum and target's logit, in one message where the loss is fused
    fused = ctx.profile.fused_cross_entropy or ctx.profile.compiled
    sizes = {"max": 4.0, "sums": 8.0} if fused else {"max": 4.0, "target": 4.0, "sum": 4.0}
    everyone = "model" if ctx.tensor > 1 else "pipeline"
    gradient = Phase.INPUT_GRADIENT
    inner, outer = (_boundary(model, ctx, layer) for layer in ("head", "embedding"))
    return VocabularyOperations(
        lookup=_vocabulary(embedding.forward),
        lookup_gradient=_vocabulary(embedding.backward),
        # the all-reduces over the tensor ranks alone are part of those over all rows
        scores=tuple(op for op in scores if not _is_statistic(op)),
        gradients=_vocabulary(head.backward),
        embedded=Collective("vocabulary.embedded", "all_reduce", "pipeline", outer),
        embedded_gradient=Collective(
            "vocabulary.embedded_grad", "broadcast", "pipeline", outer, gradient
        ),
        hidden=Collective("vocabulary.hidden", "broadcast", "pipeline", inner),
        statistics=tuple(
            Collective(f"vocabulary.{name}", "all_reduce", everyone, size * tokens)
            for name, size in sizes.items()
        ),
        hidden_gradient=Collective(
            "vocabulary.hidden_grad", "all_reduce", "pipeline", inner, gradient
        ),
    )


def _vocabulary(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    return tuple(op for op in operations if is_vocabulary(op.name))


def _is_statistic(op: Operation) -> bool:
    return isinstance(op, Collective) and op.name.startswith("head.cross_entropy")
