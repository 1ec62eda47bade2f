"""Calls of kernels on flat shards and main gradients: AdamW, norm, weight gradients."""

from torch import Tensor

from megapipe import kernels
from megapipe.kernels.backend import Backend
from megapipe.kernels.examples.example import Example, LayerShape, RandomInputs

EPSILON = 1e-8
RATE, BETAS, DECAY, STEP = 3e-4, (0.9, 0.95), 0.1, 100


def _adamw_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    """Master weights, gradient, moments, weights."""
    master, gradient, exp_avg, root = (draw.normal(shape.shard, wide=True) for _ in range(4))
    return [master, gradient, exp_avg, root.square(), master.to(draw.dtype)]


def _adamw_call(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor,
    backend: Backend,
) -> tuple[Tensor, ...]:
    kernels.adamw_(
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        step=STEP,
        learning_rate=RATE,
        betas=BETAS,
        epsilon=EPSILON,
        weight_decay=DECAY,
        weights=weights,
        backend=backend,
    )
    return master, exp_avg, exp_avg_sq, weights


ADAMW = Example("adamw", _adamw_inputs, _adamw_call, differentiable=())


def _grad_norm_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    return [draw.normal(shape.shard, wide=True)]


def _grad_norm_call(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    return kernels.grad_norm(x, backend=backend)


GRAD_NORM = Example("grad_norm", _grad_norm_inputs, _grad_norm_call, differentiable=())


def _weight_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    """Of the layer into the feed-forward width."""
    return [
        draw.normal(shape.ffn, shape.hidden, wide=True),
        draw.normal(shape.tokens, shape.ffn),
        draw.normal(shape.tokens, shape.hidden),
    ]


def _weight_call(
    main_grad: Tensor, grad_out: Tensor, inputs: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    kernels.add_weight_grad(main_grad, grad_out, inputs, backend=backend)
    return (main_grad,)


WEIGHT_GRAD = Example("weight_grad", _weight_inputs, _weight_call, differentiable=())


EXAMPLES = (ADAMW, GRAD_NORM, WEIGHT_GRAD)
