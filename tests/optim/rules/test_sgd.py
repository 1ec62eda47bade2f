"""SGD on flat buffers is torch.optim.SGD on the parameters, after the decoupled decay."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from megapipe.optim import parameter_groups
from megapipe.optim.rules.sgd import SGDConfig
from tests.optim.stepping import RATES, check_steps


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_updates_are_those_of_torch(momentum: float) -> None:
    config = SGDConfig(weight_decay=0.3, momentum=momentum)

    def of_torch(name: str, weights: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        parameter = nn.Parameter(weights)
        decay = 0.0 if name in ("norm", "bias") else 0.3
        sgd = torch.optim.SGD([parameter], momentum=momentum)
        for rate, gradient in zip(RATES, gradients, strict=True):
            parameter.data.mul_(1 - rate * decay)  # torch's own would go through the momentum
            sgd.param_groups[0]["lr"] = rate
            parameter.grad = gradient
            sgd.step()
        return parameter.data

    check_steps(config, of_torch)


def test_nothing_is_kept_without_momentum() -> None:
    def kept(momentum: float) -> list[list[str]]:
        groups = parameter_groups(SGDConfig(momentum=momentum))
        return [[one.name for one in group.state] for group in groups]

    assert kept(0.0) == [[], []]
    assert kept(0.9) == [["momentum_buffer"], ["momentum_buffer"]]
