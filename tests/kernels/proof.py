"""How kernels are judged: by their distance from float64, against that of the torch reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapipe.kernels.examples.example import LayerShape

TOY = LayerShape(
    model="toy",
    tensor=2,
    batch=2,
    sequence=8,
    sequence_part=4,
    hidden=16,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn=12,
    vocab=31,
    shard=100,
)
"""What one of two ranks computes of a layer that the interpreter can run."""

Outputs = Sequence[Tensor]
"""What a function gives, then the gradients of its inputs."""


def values_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 5
) -> list[Tensor]:
    """Call it on copies of the inputs; its outputs and, for random gradients of those (the same
    whatever the dtype), the gradient of each floating input."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)
        for y in outputs
    ]
    wanted = [x for x in leaves if x.requires_grad]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, grads))


def assert_as_accurate(kernel: Outputs, reference: Outputs, exact: Outputs) -> None:
    """Each tensor's error is at most 1.5 times the reference's in the same dtype.

    Errors are root mean squares of the difference from `exact`, computed in float64 from the same
    inputs. One unit in the last place of the tensor's root mean square is allowed on top: where
    the reference happens to be exact, one rounding must not count as infinitely worse.
    """
    for index, (own, other, truth) in enumerate(zip(kernel, reference, exact, strict=True)):
        assert own.dtype == other.dtype, (index, own.dtype, other.dtype)
        assert own.shape == other.shape == truth.shape, (index, own.shape, truth.shape)
        error, allowed = rms(own - truth), 1.5 * rms(other - truth)
        allowed += torch.finfo(own.dtype).eps * rms(truth)
        assert error <= allowed, f"output {index}: error {error:.3g}, allowed {allowed:.3g}"


def rms(x: Tensor) -> float:
    """Root mean square in float64; 0 for an empty tensor."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def assert_same_bits(first: Outputs, second: Outputs) -> None:
    """NaNs in the same places count as equal."""
    for index, (own, other) in enumerate(zip(first, second, strict=True)):
        assert own.dtype == other.dtype, index
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True, msg=f"at {index}")


@contextmanager
def programs_in_reverse() -> Iterator[None]:
    """In the interpreter, a grid's programs run last to first: what depends on their order (on a
    GPU, a race) gives other bits."""
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx

    def reversed_index(*index: int) -> None:
        in_order(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    builder.set_grid_idx = reversed_index
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextmanager
def accesses_checked() -> Iterator[None]:
    """In the interpreter, a launch fails that reads or writes outside the tensors it was given
    (on the CPU).

    Values need not show a mask that is missing: what is read there may be multiplied by 0, and what
    is written there may be nobody's. Such an access is not made (it might end the process).
    """
    from triton.runtime.interpreter import GridExecutor, TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    launch, load, store = (
        GridExecutor.__call__,
        builder.create_masked_load,
        builder.create_masked_store,
    )
    spans: list[tuple[int, int]] = []
    strays: list[str] = []

    def launch_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        spans[:] = [_span(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        strays.clear()
        launch(self, *args, **kwargs)
        assert not strays, f"{self.fn.__name__} {strays[0]} outside its tensors"

    def within(pointers: Any, mask: Any, access: str) -> Any:
        """The mask, of what is in one of the tensors."""
        used = pointers.data[mask.data]
        if not used.size or any(a <= used.min() and used.max() < b for a, b in spans):
            return mask
        inside = np.zeros(mask.data.shape, dtype=bool)
        for start, stop in spans:
            inside |= (pointers.data >= start) & (pointers.data < stop)
        if (mask.data & ~inside).any():
            strays.append(access)
        return TensorHandle(mask.data & inside, mask.dtype)

    builder.create_masked_load = lambda pointers, mask, *rest: load(
        pointers, within(pointers, mask, "reads"), *rest
    )
    builder.create_masked_store = lambda pointers, values, mask, *rest: store(
        pointers, values, within(pointers, mask, "writes"), *rest
    )
    GridExecutor.__call__ = launch_checked
    try:
        yield
    finally:
        GridExecutor.__call__ = launch
        del builder.create_masked_load, builder.create_masked_store


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses from a tensor's first byte to after its last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
