"""What only a GPU shows: bfloat16's rounding, real sizes, compiled code, a step of the engine.

    pytest -m gpu tests/kernels

The same checks run here on a toy shape in the interpreter, so that they are known to work before a
GPU is paid for.
"""

from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.config import load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import build_mesh
from megapipe.kernels import Vocabulary, cross_entropy_stats_, grad_norm, rms_norm, swiglu
from megapipe.kernels.examples import EXAMPLES
from megapipe.kernels.examples.example import (
    Example,
    LayerShape,
    RandomInputs,
    values_and_gradients,
    widened,
)
from megapipe.layout.axes import Axes
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.kernel_shapes import shape_of
from megapipe.tools.cli import main
from megapipe.train.source_metrics import SOURCE_LOSSES
from tests.kernels.proof import TOY, assert_as_accurate, assert_same_bits
from tests.layouts import engine_of
from tests.ranks import run_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EACH = pytest.mark.parametrize("example", EXAMPLES.values(), ids=list(EXAMPLES))
SHAPES = pytest.mark.parametrize(
    ("preset", "tensor"), [("llama3-8b", 1), ("llama3-8b", 8), ("gpt2", 1)]
)


def check_accuracy(
    example: Example, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> None:
    """1.5 times the error of the torch reference in the same dtype, both against float64."""
    inputs = [example.inputs(shape, RandomInputs(device, dtype)) for _ in range(3)]
    torch_way, triton_way = (partial(example.call, backend=b) for b in ("torch", "triton"))
    exact = values_and_gradients(example, torch_way, widened(inputs[0]))
    reference = values_and_gradients(example, torch_way, inputs[1])
    kernel = values_and_gradients(example, triton_way, inputs[2])
    if example.name == "grad_norm":  # whose bound is absolute: see its docstring
        torch.testing.assert_close(kernel, exact, rtol=1.6e-5, atol=0)
        return
    assert_as_accurate(kernel, reference, exact)


def check_bits(
    example: Example, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> None:
    """Nothing depends on which program comes first."""
    triton_way = partial(example.call, backend="triton")
    runs = [
        values_and_gradients(
            example, triton_way, example.inputs(shape, RandomInputs(device, dtype))
        )
        for _ in range(3)
    ]
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def check_ends(device: torch.device, rows: int) -> None:
    """The last rows of very many are computed as if they were alone: no offset overflows."""
    width, last = 4096, slice(-4, None)
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    x[last].normal_(generator=torch.Generator(device).manual_seed(0))
    weight = torch.ones(width, dtype=x.dtype, device=device)
    targets = torch.arange(rows, device=device) % width
    assert torch.equal(
        rms_norm(x, weight, 1e-5, backend="triton")[last],
        rms_norm(x[last], weight, 1e-5, backend="triton"),
    )
    assert torch.equal(swiglu(x, backend="triton")[last], swiglu(x[last], backend="triton"))
    vocabulary = Vocabulary(0, width)._asdict()
    of_all = cross_entropy_stats_(x, targets, **vocabulary, backend="triton")
    alone = cross_entropy_stats_(x[last], targets[last], **vocabulary, backend="triton")
    assert_same_bits([y[last] for y in of_all], alone)
    squares, _ = grad_norm(x.float().view(-1), backend="triton")
    assert float(squares) == pytest.approx(float(x[last].double().square().sum()), rel=1.6e-5)


def training_losses(config: Path, words: tuple[str, ...], device: torch.device) -> list[float]:
    """Of five steps on one rank, in a process group."""
    given = load_config(config, words, FAMILIES)
    mesh = build_mesh(Axes.of(pipeline=1, data=1, tensor=1), device)
    engine, tokens = engine_of(given, mesh), synthetic_tokens(given)
    results = [engine.train_step(tokens(number, mesh), 1e-2) for number in range(5)]
    for totals in (result.totals for result in results):
        assert sum(totals.all(SOURCE_LOSSES)) == pytest.approx(totals["loss"], rel=1e-6)
    return [result.loss for result in results]


def on_a_gpu(store: Path, config: Path, words: tuple[str, ...]) -> list[float]:
    """In a process of its own, whose group ends with it."""
    dist.init_process_group("nccl", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    return training_losses(config, words, GPU)


def check_training(folder: Path, device: torch.device, *words: str) -> None:
    """In float32 as with torch's operations."""
    config = Path(__file__).parents[1] / "configs" / "llama_shape.toml"
    found = []
    for kernels, attention in (("torch", "sdpa"), ("triton", "triton")):
        keys = (f"--train.kernels={kernels}", f"--train.attention={attention}")
        keys += ("--train.weight_gradients=triton",) * (kernels == "triton")
        keys = (*keys, "--train.precision=fp32", "--parallel.data=1", *words)
        if device.type == "cuda":  # forked ranks cannot use one that their parent has used
            with get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(on_a_gpu, (folder / kernels, config, keys)))
        else:
            found += run_ranks(training_losses, 1, config, keys, device)
    assert len(set(found[0])) == 5
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# --- The checks, here ----------------------------------------------------------------------------


@EACH
def test_each_check_in_the_interpreter(example: Example) -> None:
    for check in (check_accuracy, check_bits):
        check(example, TOY, CPU, torch.float32)


def test_ends_in_the_interpreter() -> None:
    check_ends(CPU, rows=6)


def test_a_wrong_kernel_is_found() -> None:
    def wrong(*inputs: Tensor, backend: str) -> tuple[Tensor, ...]:
        factor = 1.001 if backend == "triton" else 1.0
        return (inputs[0] * inputs[0] * factor,)

    example = replace(EXAMPLES["rms_norm"], call=wrong, differentiable=(0,))
    with pytest.raises(AssertionError, match="allowed"):
        check_accuracy(example, TOY, CPU, torch.float32)


def test_training_in_the_interpreter(tmp_path: Path) -> None:
    words = ("--model.num_layers=1", "--model.num_heads=2", "--model.vocab_size=50")
    batch = ("--train.global_batch_size=1", "--train.micro_batch_size=1")
    check_training(tmp_path, CPU, *words, *batch, "--train.sequence_length=4")


# --- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@EACH
@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_accurate_as_torch(
    example: Example, preset: str, tensor: int, dtype: torch.dtype
) -> None:
    shape = shape_of(preset, tensor)
    assert shape is not None
    torch.backends.cuda.matmul.allow_tf32 = False
    check_accuracy(example, shape.checked(), GPU, dtype)


@pytest.mark.gpu
@EACH
@SHAPES
def test_the_same_bits_each_time(example: Example, preset: str, tensor: int) -> None:
    shape = shape_of(preset, tensor)
    assert shape is not None
    check_bits(example, shape.checked(), GPU, torch.bfloat16)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    check_ends(GPU, rows=2**19 + 100)


@pytest.mark.gpu
@EACH
def test_compiled_by_torch(example: Example) -> None:
    """A custom operator inside torch.compile gives what it gives outside."""
    triton_way = partial(example.call, backend="triton")
    runs = [
        values_and_gradients(
            example, function, example.inputs(TOY, RandomInputs(GPU, torch.float32))
        )
        for function in (triton_way, torch.compile(triton_way))
    ]
    for own, other in zip(*runs, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["--model.position=rope", "--model.position=learned"])
def test_training(tmp_path: Path, positions: str) -> None:
    check_training(tmp_path, GPU, positions)


@pytest.mark.gpu
def test_the_benches_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kernels", "rms_norm,weight_grad", "--shapes", "gpt2", "--runs", "3"]
    assert main(["bench", "kernels", *words]) == 0
    assert "failed" not in capsys.readouterr().out
    small = ["--sequence-length", "128", "--breakdown"]
    assert main(["bench", "train", "--preset", "gpt2", *small]) == 0
