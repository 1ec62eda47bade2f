"""The least time of each kernel by what it moves and computes, and what unfused torch moves."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapipe.kernels.examples.example import LayerShape, RandomInputs, gradients_for
from megapipe.tools.bench.kernels_cases import Case, Work

BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes per second (NVIDIA's data sheets, SXM)."""
PEAK = 989e12
"""bf16 FLOP/s of both, dense."""

_NOTHING = ("_unsafe_view", "empty_like", "empty", "new_empty")
_OVERWRITES = ("copy_", "zero_", "fill_")

Operations = list[tuple[str, int]]
"""Names of torch's operations and the bytes each moves, in order."""


class Traffic(TorchDispatchMode):
    """Notes of every operation of torch the bytes that it reads and writes: each tensor once,
    whatever is in a cache. Works on the meta device, so without a GPU at any size."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NOTHING:
            read = args[1:] if name in _OVERWRITES else args
            moved = _distinct_bytes(tree_leaves((read, kwargs)))
            moved += _distinct_bytes(tree_leaves(result))
            if moved:
                self.operations.append((name, moved))
        return result


def _distinct_bytes(leaves: Iterable[Any]) -> int:
    """Of the tensors among them; the square of one reads it once."""
    tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
    return sum(_bytes(x) for x in tensors.values())


def _bytes(x: Tensor) -> int:
    """Expanded dimensions are in memory once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size() if x.numel() else 0


def unfused(case: Case, shape: LayerShape) -> tuple[Operations, Operations]:
    """What the eager composition moves, forward and backward."""
    inputs = case.example.inputs(shape, RandomInputs(torch.device("meta"), torch.bfloat16))
    with Traffic() as forward:
        outputs = case.eager(*inputs)
    if not case.example.differentiable:
        return forward.operations, []
    gradients = gradients_for(outputs)
    with Traffic() as backward:
        torch.autograd.grad(outputs, [inputs[i] for i in case.example.differentiable], gradients)
    return forward.operations, backward.operations


@dataclass(frozen=True)
class RooflineRow:
    """One direction of one kernel at one shape."""

    kernel: str
    shape: LayerShape
    direction: str
    work: Work
    unfused: Operations

    @property
    def unfused_bytes(self) -> int:
        return sum(moved for _, moved in self.unfused)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: self.work.seconds(speed, PEAK) for name, speed in BANDWIDTHS.items()}


def roofline(cases: Iterable[Case], shapes: Iterable[LayerShape]) -> Iterator[RooflineRow]:
    """Kernel by kernel."""
    shapes = list(shapes)
    for case in cases:
        for shape in shapes:
            forward, backward = unfused(case, shape)
            yield RooflineRow(case.name, shape, "forward", case.forward(shape), forward)
            if case.backward is not None:
                yield RooflineRow(case.name, shape, "backward", case.backward(shape), backward)


def print_roofline(rows: Iterable[RooflineRow]) -> None:
    """MB and GFLOP are 10^6 bytes and 10^9 operations."""
    from rich.console import Console
    from rich.table import Column, Table

    speeds = ", ".join(f"{name} {speed / 1e12:.2f} TB/s" for name, speed in BANDWIDTHS.items())
    table = Table(
        *(Column(name, no_wrap=True) for name in ("kernel", "one rank of", "", "MB", "GFLOP")),
        *(f"us, {name}" for name in BANDWIDTHS),
        *("MB unfused", "ratio"),
        title=f"bf16; {speeds}, {PEAK / 1e12:.0f} TFLOP/s; fused: each tensor moved once",
    )
    last = ""
    for row in rows:
        if row.kernel != last and last:
            table.add_section()
        table.add_row(
            row.kernel if row.kernel != last else "",
            row.shape.label,
            row.direction,
            f"{row.work.bytes / 1e6:.1f}",
            f"{row.work.flops / 1e9:.1f}",
            *(f"{seconds * 1e6:.1f}" for seconds in row.seconds.values()),
            f"{row.unfused_bytes / 1e6:.1f}",
            f"{row.unfused_bytes / row.work.bytes:.1f} x",
        )
        last = row.kernel
    Console(width=124).print(table)
