"""Which implementation of the kernels a run uses: decided once, from the config and the device.

It does not depend on shapes or on what happens later; a kernel that cannot take what it is given
is an error.
"""

from dataclasses import dataclass

import torch
import triton

from megapipe.config import Config
from megapipe.errors import MegapipeError
from megapipe.kernels import Backend, backend_of


@dataclass(frozen=True)
class KernelChoice:
    """Of all kernels, and of attention apart ("torch" is torch's scaled_dot_product_attention)."""

    kernels: Backend
    attention: Backend

    def __str__(self) -> str:
        if self.kernels == self.attention:
            return self.kernels
        words: dict[Backend, str] = {"torch": "scaled_dot_product_attention", "triton": "triton"}
        return f"{self.kernels}, attention by {words[self.attention]}"


def choose_kernels(config: Config, device: torch.device) -> KernelChoice:
    """Raises MegapipeError where Triton kernels are asked for on a device that cannot run them."""
    train, model = config.train, config.model
    given = train.kernels
    kernels: Backend = backend_of(device) if given == "auto" else given
    if kernels == "triton" and train.precision == "fp64":
        kernels = "torch"  # only by "auto": asked for together they are refused by the config
    attention: Backend
    if train.attention == "sdpa":
        attention = "torch"
    elif train.attention == "triton":
        attention = "triton"
    else:
        beyond_causal = (
            config.data.mask_documents
            or model.attention_dropout > 0
            or (model.sliding_window or train.sequence_length) < train.sequence_length
        )
        attention = kernels if beyond_causal else "torch"
    if "triton" in (kernels, attention) and device.type == "cpu" and not interpreting():
        key = "train.kernels" if kernels == "triton" else "train.attention"
        raise MegapipeError(
            f'{key} = "triton" needs a GPU, and train.device gives the CPU. Write {key} = "auto".'
        )
    return KernelChoice(kernels, attention)


def interpreting() -> bool:
    """Triton's interpreter is on (TRITON_INTERPRET=1): kernels run on a CPU, for tests."""
    return bool(triton.knobs.runtime.interpret)
