"""AdamW on a flat shard: the Triton kernel against torch's and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, adamw_
from megapipe.kernels import adamw as module
from tests.kernels.proof import assert_as_accurate, assert_same_bits, programs_in_reverse


def state(length: int) -> list[Tensor]:
    """Master weights, gradients, moments."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(length, generator=generator) for _ in range(4)]
    return [*made[:3], made[3].square()]


pytestmark = pytest.mark.usefixtures("_scalars_as_on_a_gpu")


def scalars_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """A launch rounds scalars to float32; the interpreter leaves them as they are."""
    kernel = module._adamw

    class Rounding:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def launch(*arguments: Any, **constants: Any) -> Any:
                rounded = [
                    torch.tensor(x, dtype=torch.float32).item() if isinstance(x, float) else x
                    for x in arguments
                ]
                return kernel[grid](*rounded, **constants)

            return launch

    patch.setattr(module, "_adamw", Rounding())


@pytest.fixture
def _scalars_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    scalars_as_on_a_gpu(monkeypatch)


def updated(
    given_: list[Tensor],
    backend: Backend,
    step: int = 3,
    scale: float = 0.5,
    decay: float = 0.1,
    learning_rate: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[Tensor]:
    """Master weights and both moments after one step."""
    master, gradient, *moments = (x.clone() for x in given_)
    adamw_(
        master,
        gradient,
        *moments,
        step=step,
        learning_rate=learning_rate,
        betas=betas,
        epsilon=1e-8,
        weight_decay=decay,
        gradient_scale=scale,
        backend=backend,
    )
    return [master, *moments]


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(0, 3000),
    step=st.integers(1, 100_000),
    scale=st.sampled_from([1.0, 0.3]),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_as_accurate_as_torch(length: int, step: int, scale: float, decay: float) -> None:
    inputs = state(length)
    kernel = updated(inputs, "triton", step, scale, decay)
    reference = updated(inputs, "torch", step, scale, decay)
    exact = updated([x.double() for x in inputs], "torch", step, scale, decay)
    assert_as_accurate(kernel, reference, exact)


def test_differences_from_1_keep_their_digits() -> None:
    """Where float32(b) and float32(1 - lr * decay) lose them: new moments, small steps."""
    master, gradient, _, _ = state(1500)
    inputs = [master, gradient, torch.zeros(1500), torch.zeros(1500)]
    close_to_1: dict[str, Any] = {
        "betas": (0.99, 0.9999),
        "learning_rate": 1e-6,
        "decay": 0.3,
        "step": 1,
    }
    kernel, reference = (updated(inputs, b, **close_to_1) for b in ("triton", "torch"))
    exact = updated([x.double() for x in inputs], "torch", **close_to_1)
    assert_as_accurate(kernel, reference, exact)
    # No gradient: decay alone, by 1 to 3 units in the last place, is right on the mean.
    weights = 1 + torch.rand(1500, generator=torch.Generator().manual_seed(0))
    still = [weights, torch.zeros(1500), torch.zeros(1500), torch.ones(1500)]
    decayed = updated(still, "triton", decay=0.15, learning_rate=1e-6)[0]
    exact_mean = float((weights.double() * -0.15e-6).mean())
    assert float((decayed.double() - weights).mean()) == pytest.approx(exact_mean, rel=0.1)


def test_torch_path_is_torchs_optimizer() -> None:
    master, gradient, _, _ = state(100)
    parameter = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([parameter], 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    own, moments = master.clone(), [torch.zeros(100), torch.zeros(100)]
    for step in (1, 2, 3):
        parameter.grad = gradient.clone() * step
        optimizer.step()
        adamw_(
            own,
            gradient.clone() * step,
            *moments,
            step=step,
            learning_rate=0.01,
            betas=(0.9, 0.95),
            epsilon=1e-8,
            weight_decay=0.1,
            backend="torch",
        )
    torch.testing.assert_close(own, parameter.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_weights_are_the_masters(backend: Backend) -> None:
    master, gradient, *moments = state(1500)
    weights = torch.zeros(1500, dtype=torch.float16)
    adamw_(
        master,
        gradient,
        *moments,
        step=1,
        learning_rate=0.01,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        weight_decay=0.1,
        weights=weights,
        backend=backend,
    )
    assert torch.equal(weights, master.half())


def test_any_order_padding_and_what_is_not_finite() -> None:
    inputs = state(3000)
    for x in inputs:
        x[100:200] = 0  # as padding is
    in_order = updated(inputs, "triton")
    assert all((x[100:200] == 0).all() for x in in_order)
    with programs_in_reverse():
        assert_same_bits(in_order, updated(inputs, "triton"))
    inputs[1][5] = torch.inf
    for own, other in zip(updated(inputs, "triton"), updated(inputs, "torch"), strict=True):
        assert torch.equal(own.isfinite(), other.isfinite())


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="float16 master weights"):
        updated([x.half() for x in state(4)], "triton")


def test_operator() -> None:
    scalars = (0.5, 1e-3, 0.1, 0.95, 0.05, 1e-8, 0.01, 1.5)
    for weights in (None, torch.zeros(7, dtype=torch.float16)):
        arguments = (*state(7), weights, *scalars)
        torch.library.opcheck(torch.ops.megapipe.adamw_, arguments)
