"""AdamW on flat buffers is torch.optim.AdamW on the parameters."""

import subprocess
import sys

import torch
from torch import Tensor, nn

from megapipe.config import OptimizerConfig
from megapipe.data_parallel.buffer import build_buffers
from megapipe.kernels import Backend
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.parameter import Piece, ShardedParameter
from megapipe.train.optimizer import GROUPS, Optimizer
from tests.interpreter import needs_interpreter

SHAPES = {"matrix": (5, 7), "embedding": (33, 4), "norm": (7,), "bias": (5,)}


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sharded(name: str, dtype: torch.dtype) -> ShardedParameter:
    shape = SHAPES[name]
    piece = Piece(name, shape, (0,) * len(shape), shape)
    made = ShardedParameter(shape, (piece,), role=Role(name), dtype=dtype, device="cpu")
    made.data.copy_(values(shape, 0))
    return made


def build(
    dtype: torch.dtype, main_dtype: torch.dtype, backend: Backend = "torch"
) -> tuple[nn.Module, Optimizer]:
    module = nn.Module()
    for name in SHAPES:
        module.register_parameter(name, sharded(name, dtype))
    buffers = build_buffers([module], GROUPS, main_dtype=main_dtype, replicas=2)
    return module, Optimizer(buffers, CONFIG, backend)


BACKENDS: tuple[Backend, ...] = ("torch", "triton")
CONFIG = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, betas=(0.8, 0.9))


def step(
    module: nn.Module, optimizer: Optimizer, number: int, rate: float, scale: float = 1.0
) -> None:
    for name, parameter in module.named_parameters():
        parameter.main_grad.copy_(values(SHAPES[name], 10 + number))
    optimizer.step(rate, scale)


def test_updates_are_those_of_torch() -> None:
    module, optimizer = build(torch.float64, torch.float64)
    theirs = {name: nn.Parameter(values(shape, 0)) for name, shape in SHAPES.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.epsilon, fused=True)
    for number, rate in enumerate([0.1, 0.05, 0.01]):
        step(module, optimizer, number, rate)
        for name, parameter in theirs.items():
            parameter.grad = values(SHAPES[name], 10 + number)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        for name, parameter in module.named_parameters():
            # The last elements of a tensor go through other instructions than its vectors do.
            torch.testing.assert_close(parameter.data, theirs[name].data, rtol=1e-14, atol=1e-15)
    assert optimizer.steps == 3


def test_bfloat16_weights_are_the_rounded_float32_masters() -> None:
    module, optimizer = build(torch.bfloat16, torch.float32)
    exact, reference = build(torch.float32, torch.float32)
    for name, parameter in exact.named_parameters():
        parameter.data.copy_(dict(module.named_parameters())[name].float())
    for number in range(5):
        step(module, optimizer, number, 1e-4)  # too small a step for bfloat16 to show each
        step(exact, reference, number, 1e-4)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, dict(exact.named_parameters())[name].bfloat16())


@needs_interpreter
def test_triton_steps_as_torch() -> None:
    """Masters and moments over five steps, clipped and averaged; narrow weights are rounded masters
    (float16: the interpreter cuts off what bfloat16 rounds)."""
    made = {backend: build(torch.float16, torch.float32, backend) for backend in BACKENDS}
    for number in range(5):
        for module, optimizer in made.values():
            step(module, optimizer, number, 0.1, scale=0.3)
    states = [list(optimizer.state()) for _, optimizer in made.values()]
    for (kind, piece, one), (_, _, other) in zip(*states, strict=True):
        difference = float((one - other).abs().max() / one.abs().max())
        assert difference <= 1e-6, (kind, piece.name, difference)
    for _, optimizer in made.values():
        for buffer in optimizer.buffers:
            assert torch.equal(buffer.weights, buffer.master.half())


def test_state_goes_over_to_another_optimizer() -> None:
    module, optimizer = build(torch.float64, torch.float64)
    for number in range(2):
        step(module, optimizer, number, 0.1)
    other_module, other = build(torch.float64, torch.float64)
    saved = {(kind, piece.name): view.clone() for kind, piece, view in optimizer.state()}
    assert len(saved) == 3 * len(SHAPES)
    for kind, piece, view in other.state():
        view.copy_(saved[kind, piece.name])
    other.steps = optimizer.steps
    step(module, optimizer, 2, 0.1)
    step(other_module, other, 2, 0.1)
    for one, two in zip(module.parameters(), other_module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_step_does_not_import_the_compiler() -> None:
    code = (
        "import sys, tests.train.test_optimizer as t, torch\n"
        "module, optimizer = t.build(torch.float32, torch.float32)\n"
        "t.step(module, optimizer, 0, 0.1)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
