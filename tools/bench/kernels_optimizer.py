"""Cases of what is done to flat shards and main gradients: AdamW, norm, weight gradients."""

import math

import torch
from torch import Tensor

from megapipe import kernels
from megapipe.kernels import Backend
from megapipe.tools.bench.kernels_cases import Case, Shape, Source, Work
from megapipe.tools.bench.kernels_elementwise import narrow, wide

EPSILON = 1e-8
RATE, BETAS, DECAY, STEP = 3e-4, (0.9, 0.95), 0.1, 100


def _adamw_inputs(shape: Shape, source: Source) -> list[Tensor]:
    """Master weights, gradient, moments, weights."""
    master, gradient, exp_avg, root = (source.normal(shape.shard, wide=True) for _ in range(4))
    return [master, gradient, exp_avg, root.square(), master.to(source.dtype)]


def _adamw_ours(
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


def _adamw_eager(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """torch.optim.AdamW's single-tensor form."""
    first, second = BETAS
    master.mul_(1 - RATE * DECAY)
    exp_avg.lerp_(gradient, 1 - first)
    exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (exp_avg_sq.sqrt() / math.sqrt(1 - second**STEP)).add_(EPSILON)
    master.addcdiv_(exp_avg, root, value=-RATE / (1 - first**STEP))
    weights.copy_(master)
    return master, exp_avg, exp_avg_sq, weights


def _adamw_work(shape: Shape) -> Work:
    moved = {
        "master weights, moments, read and written": 2 * 3 * shape.shard * wide,
        "gradient": shape.shard * wide,
        "weights": shape.shard * narrow,
    }
    return Work(moved, 14 * shape.shard)


ADAMW = Case(
    name="adamw",
    bound="memory",
    make=_adamw_inputs,
    differentiable=(),
    ours=_adamw_ours,
    eager=_adamw_eager,
    forward=_adamw_work,
)


def _grad_norm_inputs(shape: Shape, source: Source) -> list[Tensor]:
    return [source.normal(shape.shard, wide=True)]


def _grad_norm_ours(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    return kernels.grad_norm(x, backend=backend)


def _grad_norm_eager(x: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.vector_norm(x).square(), x.isfinite().logical_not().sum()


GRAD_NORM = Case(
    name="grad_norm",
    bound="memory",
    make=_grad_norm_inputs,
    differentiable=(),
    ours=_grad_norm_ours,
    eager=_grad_norm_eager,
    forward=lambda shape: Work({"gradient": shape.shard * wide}, 3 * shape.shard),
)

# --- Weight gradients ----------------------------------------------------------------------------


def _weight_inputs(shape: Shape, source: Source) -> list[Tensor]:
    """Of the layer into the feed-forward width."""
    return [
        source.normal(shape.ffn, shape.hidden, wide=True),
        source.normal(shape.tokens, shape.ffn),
        source.normal(shape.tokens, shape.hidden),
    ]


def _weight_ours(
    main_grad: Tensor, grad_out: Tensor, inputs: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    kernels.add_weight_grad(main_grad, grad_out, inputs, backend=backend)
    return (main_grad,)


def _weight_eager(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """A narrow product, then a wide sum."""
    main_grad += grad_out.t() @ inputs
    return (main_grad,)


def _weight_matmul(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """Narrow factors onto a wide sum, by cuBLAS: train.weight_gradients = "matmul"."""
    kernels.add_weight_grad(main_grad, grad_out, inputs, backend="matmul")
    return (main_grad,)


def _weight_work(shape: Shape) -> Work:
    moved = {
        "dy": shape.tokens * shape.ffn * narrow,
        "x": shape.tokens * shape.hidden * narrow,
        "main gradient, read and written": 2 * shape.ffn * shape.hidden * wide,
    }
    return Work(moved, 2 * shape.tokens * shape.ffn * shape.hidden)


WEIGHT_GRAD = Case(
    name="weight_grad",
    bound="matmul",
    make=_weight_inputs,
    differentiable=(),
    ours=_weight_ours,
    eager=_weight_eager,
    others={"megapipe by addmm": _weight_matmul},
    forward=_weight_work,
)

CASES = (ADAMW, GRAD_NORM, WEIGHT_GRAD)
