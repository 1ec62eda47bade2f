"""Calls of kernels that memory bounds: norms, activations, rotary positions, dropout."""

import torch
from torch import Tensor

from megapipe import kernels
from megapipe.kernels.backend import Backend
from megapipe.kernels.examples.example import Example, LayerShape, RandomInputs

EPSILON = 1e-5
DROPOUT, KEY = 0.1, 1234


def _tokens(shape: LayerShape, draw: RandomInputs) -> Tensor:
    return draw.normal(shape.sequence_part, shape.batch, shape.hidden)


def _rms_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    return [_tokens(shape, draw), _tokens(shape, draw), draw.normal(shape.hidden)]


def _rms_call(x: Tensor, residual: Tensor, weight: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    return kernels.add_rms_norm(x, residual, weight, EPSILON, backend=backend)


RMS_NORM = Example("rms_norm", _rms_inputs, _rms_call, differentiable=(0, 1, 2))


def _layer_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    return [*_rms_inputs(shape, draw), draw.normal(shape.hidden)]


def _layer_call(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    return kernels.add_layer_norm(x, residual, weight, bias, EPSILON, backend=backend)


LAYER_NORM = Example("layer_norm", _layer_inputs, _layer_call, differentiable=(0, 1, 2, 3))


def _swiglu_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    return [draw.normal(shape.sequence, shape.batch, 2 * shape.ffn)]


def _swiglu_call(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    return (kernels.swiglu(x, backend=backend),)


SWIGLU = Example("swiglu", _swiglu_inputs, _swiglu_call, differentiable=(0,))


def _gelu_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    return [draw.normal(shape.sequence, shape.batch, shape.ffn), draw.normal(shape.ffn)]


def _gelu_call(x: Tensor, bias: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    return (kernels.bias_gelu(x, bias, approximate=True, backend=backend),)


BIAS_GELU = Example("gelu", _gelu_inputs, _gelu_call, differentiable=(0, 1))


def _rope_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    """Queries and keys as views of the output of one projection, and angles of positions. (The
    model turns them in place, `rope_qkv_`, which moves as much.)"""
    qkv = draw.normal(shape.sequence, shape.batch, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, _ = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    frequencies = kernels.rope_frequencies(shape.head_dim, 10000.0, None)
    angles = torch.outer(torch.arange(shape.sequence, dtype=torch.float64), frequencies)
    tables = [f(angles).to(draw.wide).to(draw.device) for f in (torch.cos, torch.sin)]
    return [q.detach(), k.detach(), *tables]


def _rope_call(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    return kernels.rope(q, k, cos, sin, backend=backend)


ROPE = Example("rope", _rope_inputs, _rope_call, differentiable=(0, 1))


def _dropout_inputs(shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
    samples_B = torch.arange(shape.batch, device=draw.device)
    return [_tokens(shape, draw), _tokens(shape, draw), samples_B]


def _dropout_call(
    x: Tensor, residual: Tensor, samples_B: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    return (kernels.dropout_add(x, residual, DROPOUT, KEY, samples_B, 0, backend=backend),)


DROPOUT_ADD = Example("dropout", _dropout_inputs, _dropout_call, differentiable=(0, 1))


EXAMPLES = (RMS_NORM, LAYER_NORM, SWIGLU, BIAS_GELU, ROPE, DROPOUT_ADD)
