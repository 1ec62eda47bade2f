"""AdamW on flat buffers is torch.optim.AdamW on the parameters."""

import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapipe.kernels import Backend
from megapipe.optim.rules.adamw import AdamWConfig
from tests.interpreter import needs_interpreter
from tests.optim.stepping import RATES, build, check_steps, step

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
CONFIG = AdamWConfig(learning_rate=0.1, weight_decay=0.3, betas=(0.8, 0.9))


def of_torch(name: str, weights: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    parameter = nn.Parameter(weights)
    decay = 0.0 if name in ("norm", "bias") else CONFIG.weight_decay
    adamw = torch.optim.AdamW(
        [parameter], betas=CONFIG.betas, eps=CONFIG.epsilon, weight_decay=decay, fused=True
    )
    for rate, gradient in zip(RATES, gradients, strict=True):
        adamw.param_groups[0]["lr"] = rate
        parameter.grad = gradient
        adamw.step()
    return parameter.data


def test_updates_are_those_of_torch() -> None:
    check_steps(CONFIG, of_torch)


@needs_interpreter
def test_triton_steps_as_torch() -> None:
    """Masters and moments over five steps, clipped and averaged; narrow weights are rounded masters
    (float16: the interpreter cuts off what bfloat16 rounds)."""
    made = {backend: build(CONFIG, torch.float16, torch.float32, backend) for backend in BACKENDS}
    for number in range(5):
        for module, optimizer in made.values():
            step(module, optimizer, number, 0.1, scale=0.3)
    states = [list(optimizer.state()) for _, optimizer in made.values()]
    for (kind, shard, one), (_, _, other) in zip(*states, strict=True):
        difference = float((one - other).abs().max() / one.abs().max())
        assert difference <= 1e-6, (kind, shard.name, difference)
    for _, optimizer in made.values():
        for buffer in optimizer.buffers:
            assert torch.equal(buffer.weights, buffer.master.half())


def test_a_step_does_not_import_the_compiler() -> None:
    code = (
        "import sys, tests.optim.rules.test_adamw as t, torch\n"
        "module, optimizer = t.build(t.CONFIG, torch.float32, torch.float32)\n"
        "t.step(module, optimizer, 0, 0.1)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
