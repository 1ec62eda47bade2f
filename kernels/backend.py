"""Which of a kernel's two implementations runs: chosen by the caller once, never in silence.

"triton" is the fused kernel, "torch" the reference: torch operations that compute the same formula.
A public function takes `backend`; None means triton for tensors on a GPU and torch elsewhere.
Triton kernels run on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1, for tests).
"""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]

FP_FUSION = True
"""Multiply and add may become one instruction with one rounding. Given with each launch, because
Triton's default differs between releases."""


class UnsupportedError(ValueError):
    """A Triton kernel cannot take this shape or dtype; torch can."""

    def __init__(self, kernel: str, problem: str) -> None:
        key = 'train.attention = "sdpa"' if kernel == "attention" else 'train.kernels = "torch"'
        super().__init__(
            f'{kernel}: {problem}. With {key} (backend="torch" in a call) torch computes it.'
        )


def backend_of(device: torch.device) -> Backend:
    """What runs on tensors of this device unless the caller says otherwise."""
    return "triton" if device.type == "cuda" else "torch"


def choose(backend: Backend | None, x: Tensor) -> Backend:
    """The caller's choice, or the device's."""
    return backend_of(x.device) if backend is None else backend


def check_dtype(kernel: str, *tensors: Tensor | None) -> None:
    """Raises UnsupportedError for anything but float32, bfloat16 and float16."""
    for x in tensors:
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UnsupportedError(
                kernel, f"{str(x.dtype).removeprefix('torch.')} is not supported"
            )
