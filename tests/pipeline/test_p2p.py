"""Channels: order, tags, what is kept, and communicators of two for backends without tags."""

from collections.abc import Callable

import pytest
import torch

from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.layout.axes import Axes
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import (
    UNDER_WAY,
    BackendChannel,
    Channels,
    _own_ends,
    connect_channels,
    gloo_channels,
    make_channels,
    pair_groups,
    ring_pairs,
)
from megapipe.pipeline.schedule import Program, lower
from tests.pipeline.programs import make
from tests.pipeline.test_executor import own_stages
from tests.pipeline.toy import HIDDEN, Outcome, ToyStage, make_batches, outcome
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_one_rank_needs_no_process_group() -> None:
    channels = make_channels(Mesh.single(CPU))
    channels.finish()
    assert channels.rank == 0


@pytest.mark.parametrize("size", range(2, 9))
def test_all_neighbours_both_ways_once(size: int) -> None:
    pairs = ring_pairs(size)
    assert sorted(pairs) == sorted(
        {(a, b) for a in range(size) for b in range(size) if (a - b) % size in (1, size - 1)}
    )
    at_once = pairs[: 2 * (size // 2)]
    assert len({rank for pair in at_once for rank in pair}) == 2 * (size // 2), (
        "no rank in two links"
    )


def send_and_receive() -> list[float]:
    mesh = build_mesh(Axes.of(pipeline=2, data=1, tensor=1), CPU)
    channels = gloo_channels(mesh)
    there, back = channels[0, 1], channels[1, 0]
    count = 5
    if mesh.pipeline.rank == 1:
        buffers = [torch.empty(2) for _ in range(count)]
        works = [there.receive(buffer, tag) for tag, buffer in reversed(list(enumerate(buffers)))]
        for work in works:
            work.wait()
        back.send(torch.stack(buffers).sum(0), 7)
        back.finish()
        return [float(buffer[0]) for buffer in buffers]
    answer = torch.empty(2)
    work = back.receive(answer, 7)
    for tag in range(count):
        there.send(torch.full((2,), float(tag)), tag)
        assert isinstance(there, BackendChannel)
        assert len(there._sending) <= UNDER_WAY
    there.finish()
    assert not there._sending
    work.wait()
    return answer.tolist()


def test_messages_meet_by_tag_and_few_are_kept() -> None:
    answer, received = run_ranks(send_and_receive, 2)
    assert received == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert answer == [10.0, 10.0]


def paired_channels(mesh: Mesh) -> Channels:
    """As on NCCL: a group of two for each channel, made by `pair_groups` and `connect_channels`."""
    size = mesh.pipeline.size
    groups = pair_groups(mesh)
    assert len(groups) == len([pair for pair in ring_pairs(size) if mesh.pipeline.rank in pair])
    assert len({id(group) for group in groups.values()}) == len(groups)
    channels = _own_ends(mesh, groups)
    connect_channels(channels, size, CPU)
    return channels


def run_with(build: Callable[[Mesh], Channels], program: Program, data: int) -> Outcome:
    mesh = build_mesh(Axes.of(pipeline=len(program), data=data, tensor=1), CPU)
    channels = build(mesh)
    stages = own_stages(program, mesh.pipeline.rank, ToyStage)
    executor = PipelineExecutor(
        program, stages, channels, hidden_shape=HIDDEN, dtype=torch.float64, device=CPU
    )
    return outcome(executor.run(make_batches(4)), stages)


@pytest.mark.parametrize("channels", [gloo_channels, paired_channels])
@pytest.mark.parametrize(("pipeline", "data"), [(2, 1), (3, 1), (2, 2)])
def test_all_channels_give_the_same(
    channels: Callable[[Mesh], Channels], pipeline: int, data: int
) -> None:
    program = lower(make("interleaved-1f1b", pipeline, 2, 4))
    these = run_ranks(run_with, pipeline * data, channels, program, data)
    shared = run_ranks(run_with, pipeline * data, make_channels, program, data)
    for mine, other in zip(these, shared, strict=True):
        assert mine.losses == other.losses
        torch.testing.assert_close(mine.gradients, other.gradients, rtol=0, atol=0)
