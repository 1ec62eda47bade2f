"""Each operation against its formula in float64, forward and backward, and in lower precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapipe import kernels
from megapipe.models.gpt.config import RopeScaling


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def compare(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    *inputs: Tensor,
    tolerance: float = 1e-12,
) -> None:
    """Values and gradients of all inputs agree."""
    grad = randn(*formula(*inputs).shape, seed=9)
    found = []
    for function in (ours, formula):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


def rms_formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def swiglu_formula(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def gelu_tanh_formula(x: Tensor) -> Tensor:
    return x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


@pytest.mark.parametrize("shape", [(3, 2, 8), (1, 1, 1), (5, 2, 3, 7)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    ours = lambda x, w: kernels.rms_norm(x, w, 1e-5)  # noqa: E731
    compare(ours, rms_formula, randn(*shape), randn(shape[-1], seed=1))


def test_rms_norm_of_a_view_with_strides() -> None:
    x = randn(3, 2, 12)[..., 2:10]
    torch.testing.assert_close(
        kernels.rms_norm(x, torch.ones(8, dtype=x.dtype), 1e-5), rms_formula(x, torch.ones(8))
    )


def test_layer_norm() -> None:
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + bias

    ours = lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5)  # noqa: E731
    compare(ours, formula, randn(4, 2, 9), randn(9, seed=1), randn(9, seed=2))


def test_swiglu() -> None:
    compare(kernels.swiglu, swiglu_formula, randn(4, 3, 10))


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(approximate: bool) -> None:
    exact = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2  # noqa: E731
    formula = gelu_tanh_formula if approximate else exact
    compare(lambda x: kernels.gelu(x, approximate=approximate), formula, randn(4, 5))


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu", "layer_norm"])
def test_bfloat16_is_no_less_exact_than_rounding_the_result(operation: str) -> None:
    """Inside is float32: the error is that of rounding inputs' and outputs' last bits."""
    x, weight = randn(64, 32, dtype=torch.bfloat16), randn(32, seed=1, dtype=torch.bfloat16)
    calls: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "rms_norm": (lambda x: kernels.rms_norm(x, weight.to(x.dtype), 1e-5),) * 2,
        "layer_norm": (
            lambda x: kernels.layer_norm(x, weight.to(x.dtype), weight.to(x.dtype), 1e-5),
        )
        * 2,
        "swiglu": (kernels.swiglu, swiglu_formula),
    }
    ours, exact = calls[operation]
    error = (ours(x).double() - exact(x.double())).abs() / exact(x.double()).abs().clamp(1e-2)
    assert float(error.max()) < 2**-6, "a few units of bfloat16's last place"


def test_rope_turns_by_the_angle_and_back() -> None:
    q, k = randn(6, 2, 4, 8), randn(6, 2, 2, 8, seed=1)
    angles = torch.arange(6.0, dtype=torch.float64)[:, None] * kernels.rope_frequencies(
        8, 1e4, None
    )
    cos, sin = angles.cos(), angles.sin()
    turned_q, turned_k = kernels.rope(q, k, cos, sin)
    for x, turned in ((q, turned_q), (k, turned_k)):
        pairs = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)[:, None, None]
        torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], -1))
    compare(
        lambda x: kernels.rope(x, k, cos, sin)[0],
        lambda x: torch.view_as_real(
            torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)[:, None, None]
        ).movedim(-1, -2).flatten(-2),
        q,
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
def test_rope_frequencies_are_those_of_transformers(scaled: bool) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = RopeScaling(
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_max_sequence_length=8192,
    )
    theirs = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    }
    frequencies = kernels.rope_frequencies(128, 5e5, ours if scaled else None)
    if scaled:
        config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=theirs)
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    else:
        expected = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(frequencies.float(), expected, rtol=1e-6, atol=0)


def split_loss(logits: Tensor, targets: Tensor, parts: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Loss sum and gradient as the engine combines the halves over `parts` parts."""
    pieces = [part.clone() for part in logits.chunk(parts, dim=1)]
    width = pieces[0].shape[1]
    valid = [min(max(vocab - width * i, 0), width) for i in range(parts)]
    firsts = [width * i for i in range(parts)]
    stats = [
        kernels.cross_entropy_stats_(piece, targets, first=first, valid=n, backend="torch")
        for piece, first, n in zip(pieces, firsts, valid, strict=True)
    ]
    maxima, sums, at_targets = (torch.stack(kind) for kind in zip(*stats, strict=True))
    scales = kernels.rescale(maxima, maxima.amax(0))
    total = (sums * scales).sum(0)
    lse = total.log() + maxima.amax(0)
    loss = torch.zeros(())
    for i, piece in enumerate(pieces):
        found = kernels.Combined(lse, scales[i] / total, at_targets.sum(0))
        loss = kernels.token_losses(found, targets, 0.0).sum()
        kernels.cross_entropy_gradient_(
            piece,
            maxima[i],
            found,
            targets,
            first=firsts[i],
            valid=valid[i],
            grad=torch.tensor(0.5, dtype=loss.dtype),
            z_loss=0.0,
            backend="torch",
        )
    grads = pieces
    return loss, torch.cat(grads, dim=1)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("vocab", [16, 13, 3])
def test_cross_entropy_in_parts_is_cross_entropy(parts: int, vocab: int) -> None:
    """Padding columns hold anything; a part may be all padding; ignored targets count nothing."""
    logits = randn(7, 16) * 10
    targets = torch.arange(7) * 5 % vocab
    targets[2] = -100
    whole = logits[:, :vocab].clone().requires_grad_()
    expected = F.cross_entropy(whole, targets, reduction="sum", ignore_index=-100)
    (expected_grad,) = torch.autograd.grad(0.5 * expected, whole)
    loss, grad = split_loss(logits, targets, parts, vocab)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad[:, :vocab], expected_grad, rtol=1e-12, atol=1e-14)
    assert not grad[:, vocab:].any(), "padding has no gradient"


def test_cross_entropy_survives_logits_that_overflow_exp() -> None:
    logits = torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]], dtype=torch.float64)
    loss, grad = split_loss(logits, torch.tensor([0, 1]), 1, 2)
    torch.testing.assert_close(float(loss), 0.313261687518 + 1.313261687518)
    assert grad.isfinite().all()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = randn(4, 4096, dtype=torch.bfloat16)
    exact, _ = split_loss(logits.double(), torch.arange(4), 1, 4096)
    loss, grad = split_loss(logits, torch.arange(4), 1, 4096)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("margin", [0.0, 12.0, 14.0, 16.0, 18.0])
def test_bfloat16_gradient_keeps_its_digits_where_the_model_is_sure(
    parts: int, margin: float
) -> None:
    """Up to a probability of 0.9999 of the target: rounded once, to bfloat16's 8 bits, after p - 1
    in float32, which knows a p near 1 to 2^-24."""
    logits = randn(6, 4096, dtype=torch.bfloat16)
    targets = torch.arange(6) * 700
    logits[torch.arange(6), targets] = margin
    _, exact = split_loss(logits.double(), targets, parts, 4096)
    _, grad = split_loss(logits, targets, parts, 4096)
    torch.testing.assert_close(grad.double(), exact, rtol=2**-8, atol=2**-23)
