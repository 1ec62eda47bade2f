"""What this rank's stages and the links to its neighbours take, measured before the first step.

A synthetic microbatch goes through each real stage the way the executor takes it: forward, input
gradient with the weight gradients put off, weight gradients. All ranks of the mesh measure at the
same time, so that what they share (tensor ranks their collectives, processes of one machine its
memory) counts. Nothing is left behind: gradients are zero afterwards, and no generator that
anything else draws from is touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from megapipe.microbatch import MicroBatch
from megapipe.pipeline.p2p import Channels, ring_pairs
from megapipe.tensor_parallel.parameter import sharded_parameters
from megapipe.tensor_parallel.weight_grad import WeightGradStore

REPEATS = 5
"""Timed runs of a stage, after one that is not; the median counts."""
ROUND_TRIPS = 10


@dataclass(frozen=True)
class StageTimes:
    """Seconds for one microbatch."""

    forward: float
    backward_input: float
    backward_weight: float


def measure_stages(
    stages: Mapping[int, nn.Module], batch: MicroBatch, hidden: Tensor
) -> dict[int, StageTimes]:
    """Times of each stage. `hidden` has shape, type and device of the tensors between stages.

    Gradients are zeroed afterwards, so this is for before the first step. Collective over tensor
    ranks.
    """
    draw = torch.Generator(hidden.device).manual_seed(0)
    values = torch.randn(hidden.shape, generator=draw, dtype=hidden.dtype, device=hidden.device)
    found = {}
    for number, stage in stages.items():
        runs = [_run(stage, number, values, batch) for _ in range(1 + REPEATS)][1:]
        found[number] = StageTimes(*(median(times) for times in zip(*runs, strict=True)))
        for parameter in sharded_parameters(stage):
            parameter.main_grad.zero_()
    return found


def _run(
    stage: nn.Module, number: int, values: Tensor, batch: MicroBatch
) -> tuple[float, float, float]:
    """Seconds of forward, input gradient and weight gradient, once."""
    store = cast(WeightGradStore, stage.weight_grads)
    inputs = values.clone().requires_grad_() if number > 0 else None
    began = _now(values)
    output: Tensor = stage(inputs, batch)
    edge = get_gradient_edge(output)
    gradient = values if output.shape == values.shape else None  # that of a loss is one
    del output
    ran = _now(values)
    with store.defer() as weight_grads:
        torch.autograd.backward(edge, gradient)
    returned = _now(values)
    weight_grads.reverse()
    while weight_grads:
        weight_grads.pop()()
    return ran - began, returned - ran, _now(values) - returned


def _now(like: Tensor) -> float:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return perf_counter()


def activation_bytes(
    stages: Mapping[int, nn.Module], batch: MicroBatch, hidden: Tensor
) -> dict[int, int]:
    """For each stage, bytes that one microbatch takes from its forward to the end of its backward:
    what autograd saves, parameters left out, and the input. Collective over tensor ranks."""
    return {number: _saved_bytes(stage, number, batch, hidden) for number, stage in stages.items()}


def _saved_bytes(stage: nn.Module, number: int, batch: MicroBatch, hidden: Tensor) -> int:
    inputs = torch.zeros_like(hidden).requires_grad_() if number > 0 else None
    not_counted = {_storage(parameter) for parameter in stage.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in not_counted:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # keeps the storage, or the next tensor would get its address

    if inputs is not None:
        pack(inputs)
    with saved_tensors_hooks(pack, _never):
        output = stage(inputs, batch)
    del output
    return sum(sizes.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _never(_: Any) -> NoReturn:
    raise AssertionError("nothing is computed backwards here")


def measure_latency(channels: Channels, ranks: int, hidden: Tensor) -> float:
    """Seconds that a tensor shaped like `hidden` takes to the next of `ranks` pipeline ranks, the
    slowest link of this rank: half of a round trip. Collective over the pipeline."""
    slowest = 0.0
    links = [pair for pair in ring_pairs(ranks) if pair[0] < pair[1]]
    for first, second in links:  # all ranks in one order, so that no two wait for each other
        if channels.rank in (first, second):
            slowest = max(slowest, _round_trip(channels, first, second, hidden) / 2)
    return slowest


def _round_trip(channels: Channels, first: int, second: int, hidden: Tensor) -> float:
    """The median time of a tensor to a neighbour and back."""
    tensor = torch.zeros_like(hidden)
    begins = channels.rank == first
    peer = second if begins else first
    there, back = channels[channels.rank, peer], channels[peer, channels.rank]
    times = []
    for _ in range(1 + ROUND_TRIPS):
        began = _now(tensor)  # before the receive: on a GPU it waits for all that was posted
        answer = back.receive(tensor, tag=0)
        if begins:
            there.send(tensor, tag=0)
        answer.wait()
        if not begins:
            there.send(tensor, tag=0)
        times.append(_now(tensor) - began)
    channels.finish()
    return median(times[1:])
