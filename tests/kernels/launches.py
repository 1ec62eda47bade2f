"""Every public kernel launched as on a GPU, up to the point where the GPU would be needed.

    python -m tests.kernels.launches        without TRITON_INTERPRET; a line for each kernel

Triton's interpreter takes what a launch does not: it hands on None where a pointer belongs, and
knows no types of arguments. Here the launch itself works on the arguments, an H100 being said to be
there, and the kernel is translated to Triton's intermediate language for just these types. The
compiler behind that is the business of `tests.kernels.compile_kernels`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megapipe import kernels as K
from megapipe.kernels.examples import EXAMPLES
from megapipe.kernels.examples.example import LayerShape, RandomInputs, values_and_gradients
from tests.kernels.proof import TOY

CPU = torch.device("cpu")
ONES = LayerShape("ones", *[1] * 7, head_dim=2, ffn=1, vocab=1, shard=1)
"""All numbers are 1, which a launch turns into constants."""


class Driver:
    """What a launch asks of a GPU's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def get_device_interface(self) -> Any:
        return torch.cpu


class Translated(Exception):
    """A launch has come as far as it can here."""


@contextmanager
def launches_translated(seen: Counter[str]) -> Iterator[None]:
    """Count each launch, by its kernel's name, that could be translated."""
    translate, launch = ASTSource.make_ir, JITFunction.run

    def make_ir(self: Any, *args: Any, **options: Any) -> None:
        assert translate(self, *args, **options).verify()
        raise Translated

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        try:
            launch(self, *args, warmup=True, **options)
        except Translated:
            seen[self.__name__] += 1
        else:
            raise AssertionError(f"{self.__name__} was not translated")

    triton.runtime.driver.set_active(Driver())  # for good: there is no other to go back to
    ASTSource.make_ir, JITFunction.run = make_ir, run
    try:
        yield
    finally:
        ASTSource.make_ir, JITFunction.run = translate, launch


# --- What is launched ----------------------------------------------------------------------------

Call = Callable[[], Any]


def narrow(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.bfloat16).requires_grad_()


def both_passes(function: Call) -> None:
    outputs = function()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def examples() -> Iterator[Call]:
    """The examples, of all sizes 1 and of others."""
    forms = ((TOY, torch.bfloat16), (ONES, torch.float32))
    for example, (shape, dtype) in product(EXAMPLES.values(), forms):
        call = partial(example.call, backend="triton")
        inputs = example.inputs(shape, RandomInputs(CPU, dtype))
        yield partial(values_and_gradients, example, call, inputs)


def plain_forms() -> Iterator[Call]:
    """Without the residual, the bias or the copy that the examples have."""
    x, weight, samples = narrow(4, 1, 16), narrow(16), torch.arange(1)
    triton_ = {"backend": "triton"}
    yield partial(K.rms_norm, x, weight, 1e-5, **triton_)
    yield partial(K.layer_norm, x, weight, weight, 1e-5, **triton_)
    yield partial(K.gelu, x, approximate=False, **triton_)
    yield partial(K.dropout, x, 0.1, 7, samples, 0, **triton_)


def rotations() -> Iterator[Call]:
    length, batch, heads, kv_heads, width = 32, 1, 2, 1, 64
    table = torch.rand(length, width // 2)
    places = torch.arange(length)[:, None].expand(length, batch)
    q, k = (narrow(length, batch, n, width) for n in (heads, kv_heads))
    weight = narrow(width)
    for positions in (None, places, places.int()):
        rest = {"positions_SB": positions, "backend": "triton"}
        qkv = narrow(length, batch, heads + 2 * kv_heads, width) * 1
        yield partial(K.rope, q, k, table, table, **rest)
        yield partial(K.rope_qkv_, qkv, heads, kv_heads, table, table, **rest)
        yield partial(K.norm_rope, q, k, weight, weight, table, table, 1e-5, **rest)


def attentions() -> Iterator[Call]:
    """Without masks, with each, with all."""
    batch, length, width = 1, 32, 64
    q, k, v = (narrow(batch, heads, length, width) for heads in (2, 1, 1))
    bounds = K.document_bounds(torch.zeros(batch, length, dtype=torch.int64))
    drop = {"dropout": 0.1, "dropout_key": 7, "samples_B": torch.arange(batch)}
    masks = ({}, {"window": 8}, {"bounds_2BS": bounds}, drop)
    for given in (*masks, {k: v for mask in masks for k, v in mask.items()}):
        yield partial(K.attention, q, k, v, **given, backend="triton")


def adamw_without_a_copy() -> None:
    flat = [torch.rand(32) for _ in range(4)]
    rates = {"step": 1, "learning_rate": 1e-3, "betas": (0.9, 0.95), "epsilon": 1e-8}
    K.adamw_(*flat, **rates, weight_decay=0.0, gradient_scale=1.0, backend="triton")


# --- That a launch is looked at ------------------------------------------------------------------


@triton.jit
def _moved(pointer, THERE: tl.constexpr):  # type: ignore[no-untyped-def]
    moved = pointer
    if THERE:
        moved += 1
    return moved, 0.0


@triton.jit
def _hands_on(out, pointer, THERE: tl.constexpr):  # type: ignore[no-untyped-def]
    moved, value = _moved(pointer, THERE)
    if THERE:
        value += tl.load(moved)
    tl.store(out, value)


def refuses_a_wrong_one() -> None:
    """As the interpreter does not: a pointer that is None, handed on; and a missing argument."""
    for arguments in ((torch.zeros(1), None), (torch.zeros(1),)):
        try:
            _hands_on[(1,)](*arguments, THERE=False)
        except Exception:
            continue
        raise AssertionError(f"a wrong launch was translated: {arguments}")


def main() -> int:
    seen: Counter[str] = Counter()
    with launches_translated(seen):
        refuses_a_wrong_one()
        for call in examples():
            call()
        for forms in (plain_forms, rotations, attentions):
            for call in forms():
                both_passes(call)
        adamw_without_a_copy()
    for name, count in sorted(seen.items()):
        print(name, count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
