"""Calls of kernels with matrix products or whole vocabularies: losses, attention."""

from torch import Tensor

from megapipe import kernels
from megapipe.kernels.backend import Backend
from megapipe.kernels.examples.example import Example, LayerShape, RandomInputs


def _loss_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    logits = draw.normal(shape.tokens, shape.vocab, scale=3)
    return [logits, draw.below(shape.vocab, shape.tokens)]


def _loss_call(logits: Tensor, targets: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    """As in training, the gradient takes the logits' place; so does Liger's."""
    return (kernels.cross_entropy(logits, targets, overwrite=True, backend=backend),)


CROSS_ENTROPY = Example("cross_entropy", _loss_inputs, _loss_call, differentiable=(0,))


def _linear_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    hidden = draw.normal(shape.tokens, shape.hidden)
    weight = draw.normal(shape.vocab, shape.hidden, scale=shape.hidden**-0.5)
    return [hidden, weight, draw.below(shape.vocab, shape.tokens)]


def _linear_call(
    hidden: Tensor, weight: Tensor, targets: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    return (kernels.linear_cross_entropy(hidden, weight, targets, backend=backend),)


LINEAR_CROSS_ENTROPY = Example(
    "linear_cross_entropy", _linear_inputs, _linear_call, differentiable=(0, 1)
)


def _attention_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    """[B, heads, S, D], in memory [S, B, heads, D]."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    made = [draw.normal(shape.sequence, shape.batch, n, shape.head_dim) for n in heads]
    return [x.permute(1, 2, 0, 3) for x in made]


def _attention_call(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    """In torch that is scaled_dot_product_attention."""
    return (kernels.attention(q, k, v, backend=backend),)


ATTENTION = Example("attention", _attention_inputs, _attention_call, differentiable=(0, 1, 2))


EXAMPLES = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, ATTENTION)
