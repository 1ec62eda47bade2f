"""Which implementation of the kernels a run uses: a function of the config and the device.

It is chosen once for all stages of an engine, and does not depend on shapes or on what happens
later; a kernel that cannot take what it is given is an error.
"""

import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megapipe.config import Config, ModelConfig
from megapipe.errors import MegapipeError

if TYPE_CHECKING:  # what is planned needs neither torch nor triton
    import torch

    from megapipe.kernels import Backend, WeightGradBackend


@dataclass(frozen=True)
class KernelChoice:
    """The implementation of the kernels, and of two that may differ: attention ("torch" is torch's
    scaled_dot_product_attention) and weight gradients ("matmul" is torch.addmm onto float32)."""

    kernels: "Backend"
    attention: "Backend"
    weight_gradients: "WeightGradBackend"

    def __str__(self) -> str:
        words = [str(self.kernels)]
        if self.attention != self.kernels:
            attention = {"torch": "scaled_dot_product_attention", "triton": "triton"}
            words.append(f"attention by {attention[self.attention]}")
        if self.weight_gradients != self.kernels:
            products = {"torch": "factors widened first", "matmul": "addmm", "triton": "triton"}
            words.append(f"weight gradients by {products[self.weight_gradients]}")
        return ", ".join(words)

    @property
    def uses_triton(self) -> bool:
        return "triton" in (self.kernels, self.attention, self.weight_gradients)


def start_triton() -> None:
    """Have Triton make ready for the GPU: it compiles a small driver, or finds it in its cache."""
    import triton

    triton.runtime.driver.active.get_current_target()


def _matmul_adds(device: "torch.device") -> bool:
    """Whether torch.addmm adds bf16 factors to a float32 sum on the device without rounding."""
    from megapipe import kernels

    return kernels.matmul_adds(device)


@dataclass(frozen=True)
class Trials:
    """What is tried on the device before the choice is made."""

    start_triton: Callable[[], None] = start_triton
    matmul_adds: Callable[["torch.device"], bool] = _matmul_adds


def choose_kernels(
    config: Config, device: "torch.device", trials: Trials | None = None
) -> KernelChoice:
    """Raises MegapipeError where Triton kernels would run that the device, what is installed or the
    model's sizes do not allow, or where train.weight_gradients can't be what was asked for."""
    trials = trials or Trials()
    on_gpu = device.type == "cuda"
    adds = config.train.precision != "bf16" or not _may_multiply(config, on_gpu)
    choice = wanted_kernels(config, on_gpu, adds or trials.matmul_adds(device))
    if choice.uses_triton and device.type == "cpu":
        _check_interpreting(choice)
    elif choice.uses_triton and on_gpu:
        _check_triton(choice, trials)
    _check_sizes(config.model, choice)
    return choice


def wanted_kernels(config: Config, on_gpu: bool, matmul_adds: bool = True) -> KernelChoice:
    """What the config asks for there, whether or not it can run.

    `matmul_adds`: torch.addmm adds the model's factors to the main gradients there. Raises
    MegapipeError where it does not and was asked for by name.
    """
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
        beyond_causal = config.data.mask_documents or model.masks_attention(train.sequence_length)
        attention = kernels if beyond_causal else "torch"
    weight_gradients: WeightGradBackend = kernels
    if train.weight_gradients == "triton":
        weight_gradients = "triton"
    elif train.weight_gradients == "matmul":
        if not matmul_adds:
            raise MegapipeError(
                'train.weight_gradients = "matmul": torch.addmm of this version of torch does not '
                f"add products of {train.precision} matrices to a float32 sum on this device. "
                'Write train.weight_gradients = "auto".'
            )
        weight_gradients = "matmul"
    elif on_gpu and matmul_adds:  # cuBLAS is expected to be faster; no GPU has measured it yet
        weight_gradients = "matmul"
    return KernelChoice(kernels, attention, weight_gradients)


def _may_multiply(config: Config, on_gpu: bool) -> bool:
    """Whether weight gradients are to be "matmul" where the device can."""
    asked = config.train.weight_gradients
    return asked == "matmul" or (asked == "auto" and on_gpu)


def _check_interpreting(choice: KernelChoice) -> None:
    if not interpreting():
        raise MegapipeError(
            f'{_triton_key(choice)} = "triton" needs a GPU, and train.device gives the CPU. Write '
            f'{_triton_key(choice)} = "auto".'
        )


def _triton_key(choice: KernelChoice) -> str:
    """A key by which Triton was chosen."""
    if choice.kernels == "triton":
        return "train.kernels"
    return "train.attention" if choice.attention == "triton" else "train.weight_gradients"


def _check_triton(choice: KernelChoice, trials: Trials) -> None:
    """Find out before the first step whether Triton can start here."""
    try:
        trials.start_triton()
    except (RuntimeError, OSError, AssertionError, subprocess.CalledProcessError) as error:
        without = (
            'train.kernels = "torch", train.attention = "sdpa" and train.weight_gradients = "auto" '
            "together do without Triton."
        )
        raise MegapipeError(
            f"{_triton_key(choice)} takes Triton, which compiles a small driver at its first use, "
            f"and {_why_triton_fails(error)}. {without}"
        ) from error


def _why_triton_fails(error: Exception) -> str:
    version = sysconfig.get_python_version()
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if "C compiler" in str(error):
        missing = "there is no C compiler"
    elif not header.is_file():
        missing = f"there is no {header}"
    else:
        return f"that failed: {error}"
    return (
        f"{missing}. Install gcc and Python's headers (Debian and Ubuntu: apt install gcc "
        f"python{version}-dev; Fedora and Red Hat: dnf install gcc python{version}-devel)"
    )


def _check_sizes(model: ModelConfig, choice: KernelChoice) -> None:
    """What "auto" chose against the model's sizes, before the first step would refuse them; what
    was chosen by name, the config has checked."""
    uses = {"kernels": choice.kernels == "triton", "attention": choice.attention == "triton"}
    for problem in model.kernel_problems(**uses):
        raise MegapipeError(f'{problem.key} = "auto" is Triton here, which {problem.text}.')


def interpreting() -> bool:
    """Triton's interpreter is on (TRITON_INTERPRET=1): kernels run on a CPU, for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)
