"""Cases of what is done to flat shards and main gradients: AdamW, norm, weight gradients."""

import math

import torch
from torch import Tensor

from megapipe import kernels
from megapipe.kernels.examples import optimizer as examples
from megapipe.kernels.examples.example import LayerShape
from megapipe.kernels.examples.optimizer import BETAS, DECAY, EPSILON, RATE, STEP
from megapipe.tools.bench.kernels_cases import Case, Work
from megapipe.tools.bench.kernels_elementwise import narrow, wide


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


def _adamw_work(shape: LayerShape) -> Work:
    moved = {
        "master weights, moments, read and written": 2 * 3 * shape.shard * wide,
        "gradient": shape.shard * wide,
        "weights": shape.shard * narrow,
    }
    return Work(moved, 14 * shape.shard)


ADAMW = Case(
    examples.ADAMW,
    bound="memory",
    eager=_adamw_eager,
    forward=_adamw_work,
)


def _grad_norm_eager(x: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.vector_norm(x).square(), x.isfinite().logical_not().sum()


GRAD_NORM = Case(
    examples.GRAD_NORM,
    bound="memory",
    eager=_grad_norm_eager,
    forward=lambda shape: Work({"gradient": shape.shard * wide}, 3 * shape.shard),
)

# --- Weight gradients ----------------------------------------------------------------------------


def _weight_eager(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """A narrow product, then a wide sum."""
    main_grad += grad_out.t() @ inputs
    return (main_grad,)


def _weight_matmul(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """Narrow factors onto a wide sum, by cuBLAS: train.weight_gradients = "matmul"."""
    kernels.add_weight_grad(main_grad, grad_out, inputs, backend="matmul")
    return (main_grad,)


def _weight_work(shape: LayerShape) -> Work:
    moved = {
        "dy": shape.tokens * shape.ffn * narrow,
        "x": shape.tokens * shape.hidden * narrow,
        "main gradient, read and written": 2 * shape.ffn * shape.hidden * wide,
    }
    return Work(moved, 2 * shape.tokens * shape.ffn * shape.hidden)


WEIGHT_GRAD = Case(
    examples.WEIGHT_GRAD,
    bound="matmul",
    eager=_weight_eager,
    others={"megapipe by addmm": _weight_matmul},
    forward=_weight_work,
)

CASES = (ADAMW, GRAD_NORM, WEIGHT_GRAD)
