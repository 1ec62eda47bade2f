"""What computes a run's kernels, by config and device."""

import sys
from pathlib import Path

import pytest
import torch
import triton

from megapipe.config import Config, load_config
from megapipe.config.checks import MAX_KERNEL_HEAD_DIM, MAX_KERNEL_HIDDEN
from megapipe.errors import MegapipeError
from megapipe.kernel_choice import choose_kernels
from tests.config.examples import write

MIXED = "triton, attention by scaled_dot_product_attention"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder), overrides)


@pytest.mark.parametrize(
    ("device", "overrides", "said"),
    [
        (CPU, (), "torch"),
        (GPU, (), MIXED),
        (GPU, ("--train.attention=triton",), "triton"),
        (GPU, ("--data.mask_documents=true",), "triton"),
        (GPU, ("--model.sliding_window=4",), "triton"),
        (
            GPU,
            ("--model.sliding_window=4096",),
            MIXED,
        ),
        (GPU, ("--model.attention_dropout=0.1",), "triton"),
        (
            GPU,
            ("--data.mask_documents=true", "--train.attention=sdpa"),
            MIXED,
        ),
        (GPU, ("--train.kernels=torch", "--data.mask_documents=true"), "torch"),
        (GPU, ("--train.precision=fp64",), "torch"),
    ],
)
def test_choice(
    tmp_path: Path, device: torch.device, overrides: tuple[str, ...], said: str
) -> None:
    assert str(choose_kernels(config(tmp_path, *overrides), device)) == said


@pytest.mark.parametrize("key", ["train.kernels", "train.attention"])
def test_a_cpu_cannot_run_triton(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, f"--{key}=triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "triton" in str(choose_kernels(given, CPU))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(MegapipeError, match=f'{key} = "triton" needs a GPU.* {key} = "auto"'):
        choose_kernels(given, CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("--model.hidden_size=16640",),
            r'train\.kernels = "auto".*hidden_size up to 16,384, and it is 16,640; use "torch"',
        ),
        (
            ("--model.head_dim=288", "--data.mask_documents=true"),
            r'train\.attention = "auto".* up to 256, and model\.head_dim = 288; use "sdpa"',
        ),
    ],
)
def test_auto_refuses_what_the_first_step_would(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    given = config(tmp_path, *overrides)
    assert str(choose_kernels(given, CPU)) == "torch"
    with pytest.raises(MegapipeError, match=message):
        choose_kernels(given, GPU)


def test_limits_are_those_of_the_kernels() -> None:
    assert sys.modules["megapipe.kernels.row_tiles"].MAX_COLUMNS == MAX_KERNEL_HIDDEN
    assert sys.modules["megapipe.kernels.attention"].MAX_HEAD_DIM == MAX_KERNEL_HEAD_DIM
