"""Which implementation of the kernels a run uses: decided once, from the config and the device.

It does not depend on shapes or on what happens later; a kernel that cannot take what it is given
is an error.
"""

from dataclasses import dataclass

import torch
import triton

from megapipe.config import Config, ModelConfig
from megapipe.config.checks import MAX_KERNEL_HEAD_DIM, MAX_KERNEL_HIDDEN
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
    """Raises MegapipeError where Triton kernels would run that the device or the model's sizes do
    not allow."""
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
    choice = KernelChoice(kernels, attention)
    _check_sizes(model, choice)
    return choice


def _check_sizes(model: ModelConfig, choice: KernelChoice) -> None:
    """What "auto" chose against the model's sizes, before the first step would refuse them; what
    was chosen by name, the config has checked."""
    if choice.kernels == "triton" and model.hidden_size > MAX_KERNEL_HIDDEN:
        raise MegapipeError(
            f'train.kernels = "auto" is Triton on a GPU, which takes model.hidden_size up to '
            f'{MAX_KERNEL_HIDDEN:,}, and it is {model.hidden_size:,}; use "torch".'
        )
    if choice.attention == "triton" and model.head_dim > MAX_KERNEL_HEAD_DIM:
        raise MegapipeError(
            f'train.attention = "auto" is Triton for these masks, which takes heads of up to '
            f'{MAX_KERNEL_HEAD_DIM}, and model.head_dim = {model.head_dim}; use "sdpa".'
        )


def interpreting() -> bool:
    """Triton's interpreter is on (TRITON_INTERPRET=1): kernels run on a CPU, for tests."""
    return bool(triton.knobs.runtime.interpret)
