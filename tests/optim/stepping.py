"""A small module with a parameter of each role, stepped by any optimizer on given gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megapipe.data_parallel.buffer import build_buffers
from megapipe.data_parallel.optimizer import Optimizer
from megapipe.kernels import Backend
from megapipe.layout.parameters import Init, ParameterShard, ParameterSpec
from megapipe.optim import OptimizerConfig, parameter_groups
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.parameter import ShardedParameter

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (5, 7),
    "embedding": (33, 4),
    "norm": (7,),
    "bias": (5,),
    "output": (3, 5),
}
"""By role, of which each parameter has the name."""

RATES = (0.1, 0.05, 0.01)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(name: str, number: int) -> Tensor:
    """Of the parameter in the step of this number."""
    return values(SHAPES[name], 10 + number)


def sharded(name: str, dtype: torch.dtype) -> ShardedParameter:
    shape = SHAPES[name]
    spec = ParameterSpec(name, shape, (0,), Init("zeros"), Role(name))
    shard = ParameterShard(spec, (0,) * len(shape), shape)
    made = ShardedParameter((shard,), dtype=dtype, device="cpu")
    made.data.copy_(values(shape, 0))
    return made


def build(
    config: OptimizerConfig,
    dtype: torch.dtype = torch.float64,
    main_dtype: torch.dtype = torch.float64,
    backend: Backend = "torch",
) -> tuple[nn.Module, Optimizer]:
    """The module, and the optimizer on its parameters."""
    module = nn.Module()
    for name in SHAPES:
        module.register_parameter(name, sharded(name, dtype))
    groups = [group.roles for group in parameter_groups(config)]
    buffers = build_buffers([module], groups, main_dtype=main_dtype, replicas=2)
    return module, Optimizer(buffers, config, backend)


def step(
    module: nn.Module, optimizer: Optimizer, number: int, rate: float, scale: float = 1.0
) -> None:
    for name, parameter in module.named_parameters():
        parameter.main_grad.copy_(gradient(name, number))
    optimizer.step(rate, scale)


def check_steps(
    config: OptimizerConfig, reference: Callable[[str, Tensor, Sequence[Tensor]], Tensor]
) -> None:
    """Steps in float64, at RATES, with clipped gradients, are those of
    reference(name, weights before, a gradient for each step) -> weights after."""
    module, optimizer = build(config)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    scale = 0.7
    for number, rate in enumerate(RATES):
        step(module, optimizer, number, rate, scale)
    for name, parameter in module.named_parameters():
        gradients = [scale * gradient(name, number) for number in range(len(RATES))]
        expected = reference(name, before[name].clone(), gradients)
        assert not torch.equal(parameter, before[name])
        # The last elements of a tensor go through other instructions than its vectors do.
        torch.testing.assert_close(parameter.data, expected, rtol=1e-14, atol=1e-15)
