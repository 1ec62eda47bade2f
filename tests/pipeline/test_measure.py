"""Measuring: what takes long is seen to take long, what is saved is counted, nothing is left."""

from pathlib import Path

import pytest
import torch

from megapipe.config import Config, load_config
from megapipe.data.synthetic import synthetic_microbatch
from megapipe.data_parallel.buffer import build_buffers
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.layout.axes import Axes
from megapipe.microbatch import MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.parameter_role import Role
from megapipe.pipeline.measure import activation_bytes, measure_latency, measure_stages
from megapipe.pipeline.p2p import make_channels
from tests.layouts import layout_of, stages_of
from tests.pipeline.sleeping import SleepingStage
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"
SHAPE = (8, 2, 4)
NOBODY = MicroBatch(None, None, None, torch.arange(2))


def test_each_part_of_each_stage_takes_at_least_what_it_sleeps() -> None:
    times = {1: (0.004, 0.008, 0.002), 3: (0.002, 0.003, 0.006)}
    stages = {number: SleepingStage(t, SHAPE, number == 3) for number, t in times.items()}
    found = measure_stages(stages, NOBODY, torch.empty(SHAPE))
    for number, (forward, backward_input, backward_weight) in times.items():
        assert found[number].forward >= forward
        assert found[number].backward_input >= backward_input
        assert found[number].backward_weight >= backward_weight
    # The order of what a stage takes is not lost in the noise of a busy machine: 4 ms apart.
    assert found[1].backward_input > found[1].backward_weight


def gpt2(*overrides: str) -> Config:
    return load_config(CONFIGS / "gpt2_shape.toml", overrides, FAMILIES)


def test_nothing_is_left_behind() -> None:
    config = gpt2("--parallel.data=1")
    layout = layout_of(config)
    stages = stages_of(layout)
    buffers = build_buffers(stages.values(), [tuple(Role)], main_dtype=torch.float32, replicas=1)
    before = [buffer.weights.clone() for buffer in buffers]
    random = torch.get_rng_state()
    hidden = torch.empty(layout.hidden_shape)
    batch = synthetic_microbatch(config, range(config.train.micro_batch_size), CPU)
    found = measure_stages(stages, batch, hidden)[0]
    activation_bytes(stages, batch, hidden)
    assert min(found.forward, found.backward_input, found.backward_weight) > 0
    for buffer, weights in zip(buffers, before, strict=True):
        assert torch.equal(buffer.weights, weights)
        assert not buffer.gradients.any()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in stages[0].parameters())


class Saving(torch.nn.Module):
    """Saves its input (twice, once as a view), two tensors of its own, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1000))

    def forward(self, inputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = inputs * 2  # saves nothing
        y = x.exp()  # its result
        return y[0] * inputs[0] * self.weight.sum() + (x.view(-1)[:3] ** 2).sum()


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    """Input, exp's result, x under the square, one product, and scalars."""
    hidden = torch.empty(16, 1, 1000)
    found = activation_bytes({1: Saving()}, NOBODY, hidden)[1]
    whole, row = hidden.numel() * 4, 1000 * 4
    assert 3 * whole + row <= found <= 3 * whole + row + 64


def round_trips(size: int) -> tuple[float, float]:
    mesh = build_mesh(Axes.of(pipeline=size), CPU)
    channels = make_channels(mesh)
    return tuple(measure_latency(channels, size, torch.empty(n)) for n in (8, 10**6))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 3])
def test_latency_of_all_links(size: int) -> None:
    for small, large in run_ranks(round_trips, size, size):
        assert 0 < small < 1
        assert 0 < large < 1
    assert measure_latency(make_channels(Mesh.single(CPU)), 1, torch.empty(8)) == 0
