"""What computes a run's kernels, by config and device."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megapipe.config import Config, load_config
from megapipe.errors import MegapipeError
from megapipe.kernel_choice import Trials, choose_kernels
from megapipe.kernel_limits import MAX_KERNEL_HEAD_DIM, MAX_KERNEL_HIDDEN
from megapipe.models.families import FAMILIES
from tests.config.examples import write

SDPA, ADDMM = "attention by scaled_dot_product_attention", "weight gradients by addmm"
MIXED = f"triton, {SDPA}, {ADDMM}"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trials(adds: bool = True, fails: Exception | None = None) -> Trials:
    """What the device answers, on a machine without one."""

    def start() -> None:
        if fails is not None:
            raise fails

    return Trials(start_triton=start, matmul_adds=lambda device: adds)


def config(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder), overrides, FAMILIES)


@pytest.mark.parametrize(
    ("device", "overrides", "said"),
    [
        (CPU, (), "torch"),
        (GPU, (), MIXED),
        (GPU, ("--train.attention=triton",), f"triton, {ADDMM}"),
        (GPU, ("--data.mask_documents=true",), f"triton, {ADDMM}"),
        (GPU, ("--model.sliding_window=4",), f"triton, {ADDMM}"),
        (
            GPU,
            ("--model.sliding_window=4096",),
            MIXED,
        ),
        (GPU, ("--model.attention_dropout=0.1",), f"triton, {ADDMM}"),
        (
            GPU,
            ("--data.mask_documents=true", "--train.attention=sdpa"),
            MIXED,
        ),
        (GPU, ("--train.kernels=torch", "--data.mask_documents=true"), f"torch, {ADDMM}"),
        (GPU, ("--train.precision=fp64",), f"torch, {ADDMM}"),
        (GPU, ("--train.weight_gradients=triton",), f"triton, {SDPA}"),
        (GPU, ("--train.weight_gradients=matmul",), MIXED),
        (
            GPU,
            ("--train.kernels=torch", "--train.weight_gradients=triton"),
            "torch, weight gradients by triton",
        ),
        (CPU, ("--train.weight_gradients=matmul",), f"torch, {ADDMM}"),
    ],
)
def test_choice(
    tmp_path: Path, device: torch.device, overrides: tuple[str, ...], said: str
) -> None:
    assert str(choose_kernels(config(tmp_path, *overrides), device, trials())) == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), f"triton, {SDPA}"),
        (("--train.kernels=torch",), "torch"),
        (("--train.precision=fp32",), MIXED),  # nothing narrow is added to anything wide
        (("--train.precision=fp64",), f"torch, {ADDMM}"),
    ],
)
def test_weight_gradients_where_addmm_rounds(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    given = config(tmp_path, "--train.precision=bf16", *overrides)
    assert str(choose_kernels(given, GPU, trials(adds=False))) == said


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_matmul_that_cannot_be_is_refused(tmp_path: Path, device: torch.device) -> None:
    given = config(tmp_path, "--train.precision=bf16", "--train.weight_gradients=matmul")
    message = (
        r'train\.weight_gradients = "matmul": .* bf16 .* Write train\.weight_gradients = "auto"'
    )
    with pytest.raises(MegapipeError, match=message):
        choose_kernels(given, device, trials(adds=False))


def test_a_cpu_is_tried_and_has_no_wide_matmul(tmp_path: Path) -> None:
    given = config(tmp_path, "--train.precision=bf16", "--train.weight_gradients=matmul")
    with pytest.raises(MegapipeError, match=r"train\.weight_gradients"):
        choose_kernels(given, CPU)
    assert str(choose_kernels(config(tmp_path, "--train.precision=bf16"), CPU)) == "torch"


def test_the_device_is_not_tried_for_what_is_not_wanted(tmp_path: Path) -> None:
    def never(device: torch.device) -> bool:
        raise AssertionError

    only = Trials(start_triton=lambda: None, matmul_adds=never)
    for words in (["--train.weight_gradients=triton"], ["--train.precision=fp32"]):
        choose_kernels(config(tmp_path, *words), GPU, only)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((), "train.kernels"),
        (("--train.kernels=torch", "--train.attention=triton"), "train.attention"),
        (("--train.kernels=torch", "--train.weight_gradients=triton"), "train.weight_gradients"),
    ],
)
def test_triton_that_cannot_start_is_told(tmp_path: Path, words: tuple[str, ...], key: str) -> None:
    """No compiler, no headers, and anything else: what Triton raises for each."""
    given = config(tmp_path, *words)
    compiler = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    with pytest.raises(MegapipeError, match="no C compiler") as caught:
        choose_kernels(given, GPU, trials(fails=compiler))
    assert str(caught.value).startswith(f"{key} takes Triton")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt install gcc python{version}-dev" in str(caught.value)
    advice = re.findall(r'(train\.\w+) = "(\w+)"', str(caught.value))
    advised = config(tmp_path, *words, *(f"--{key}={value}" for key, value in advice))
    assert not choose_kernels(advised, GPU, trials(fails=compiler)).uses_triton
    with pytest.raises(MegapipeError, match="that failed: libcuda"):
        choose_kernels(given, GPU, trials(fails=AssertionError("libcuda.so cannot found!")))


def test_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path / name))
    failed = subprocess.CalledProcessError(1, ["gcc"])
    with pytest.raises(
        MegapipeError, match=rf"there is no {tmp_path}/include/Python\.h.*python.*-dev"
    ):
        choose_kernels(config(tmp_path), GPU, trials(fails=failed))


@pytest.mark.parametrize("key", ["train.kernels", "train.attention", "train.weight_gradients"])
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
        choose_kernels(given, GPU, trials())


def test_limits_are_those_of_the_kernels() -> None:
    assert sys.modules["megapipe.kernels.row_tiles"].MAX_COLUMNS == MAX_KERNEL_HIDDEN
    assert sys.modules["megapipe.kernels.attention"].MAX_HEAD_DIM == MAX_KERNEL_HEAD_DIM
