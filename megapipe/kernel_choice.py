"""Which implementation of the kernels a run uses: decided once, from the config and the device.

It does not depend on shapes or on what happens later; a kernel that cannot take what it is given
is an error.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megapipe.config import Config, ModelConfig
from megapipe.config.checks import MAX_KERNEL_HEAD_DIM, MAX_KERNEL_HIDDEN
from megapipe.errors import MegapipeError

if TYPE_CHECKING:  # what is planned needs neither torch nor triton
    import torch

    from megapipe.kernels import Backend


@dataclass(frozen=True)
class KernelChoice:
    """Of all kernels, and of attention apart ("torch" is torch's scaled_dot_product_attention)."""

    kernels: "Backend"
    attention: "Backend"

    def __str__(self) -> str:
        if self.kernels == self.attention:
            return self.kernels
        words = {"torch": "scaled_dot_product_attention", "triton": "triton"}
        return f"{self.kernels}, attention by {words[self.attention]}"


def choose_kernels(config: Config, device: "torch.device") -> KernelChoice:
    """Raises MegapipeError where Triton kernels would run that the device or the model's sizes do
    not allow."""
    choice = wanted_kernels(config, on_gpu=device.type == "cuda")
    if "triton" in (choice.kernels, choice.attention) and device.type == "cpu":
        _check_interpreting(choice)
    _check_sizes(config.model, choice)
    return choice


def wanted_kernels(config: Config, on_gpu: bool) -> KernelChoice:
    """What the config asks for there, whether or not it can run."""
    train, model = config.train, config.model
    kernels: Backend
    if train.kernels == "auto":
        kernels = "triton" if on_gpu else "torch"
    else:
        kernels = train.kernels
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
    return KernelChoice(kernels, attention)


def _check_interpreting(choice: KernelChoice) -> None:
    if not interpreting():
        key = "train.kernels" if choice.kernels == "triton" else "train.attention"
        raise MegapipeError(
            f'{key} = "triton" needs a GPU, and train.device gives the CPU. Write {key} = "auto".'
        )


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
    import triton

    return bool(triton.knobs.runtime.interpret)
