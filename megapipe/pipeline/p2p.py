"""Channels between neighbouring pipeline ranks, one for each ordered pair, each one-way.

CPU, all neighbours on one machine: memory that both ends map; see
megapipe.distributed.shared_memory.

CPU, more machines: all channels of a pipeline use its one gloo group. Each message has a tag of its
own, and a thread of gloo's moves the data once both ends have asked for it.

NCCL has no tags and matches the k-th send of a communicator to its k-th receive, and an operation
at the head of a communicator's stream holds up those behind it. So each channel is a communicator
of two ranks that is only ever used in one direction. Why it can't deadlock: a validated program
posts the receives of a channel in the order of its sends, so the head of a channel always meets its
other end; channels don't wait for each other, being on streams of their own; and compute waits for
arrivals in program order, for which `validate` has shown that all of them come, even if something
waits for the whole device while receives are posted. (One communicator for both directions would
finish, too, but there a receive that was posted ahead would hold up the sends behind it, which have
nothing to do with it.)

Stages decide the channel only through their ranks: in a pipeline of two, looped or V-shaped,
forwards of some stages and gradients of others share a channel, in the order that `validate`
checks.
"""

from collections import deque
from collections.abc import Mapping
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh
from megapipe.distributed.shared_memory.connect import Pair, connect_pairs

UNDER_WAY = 2
"""Sends of a channel whose tensors are kept at a time. A validated program finishes with none; with
two, a rank need not wait for the transfer of what it has just computed."""


class Arrival(Protocol):
    """A receive that was posted."""

    def wait(self) -> object:
        """Returns when the tensor is in its buffer; on a GPU, when that is so for all that is
        given to the current stream from now on."""


class Channel(Protocol):
    """This rank's end of a one-way channel: the source only sends, the other only receives."""

    def send(self, tensor: Tensor, tag: int) -> None:
        """Hand over a contiguous tensor, which nobody may change any more."""

    def receive(self, buffer: Tensor, tag: int) -> Arrival:
        """Post a receive: `wait()` of the result."""

    def finish(self) -> None:
        """End a run of sends and receives: wait as far as what was sent needs this rank."""


class BackendChannel:
    """A channel over a process group's backend.

    It calls the backend, where dist.isend and dist.irecv arrive after checks and torch's
    dispatcher. Those took 25 of 60 us on gloo when called every 0.2 ms, and 75 of 240 us after 20
    ms in which other work had the caches.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device) -> None:
        """`peer` is the global rank of the other end; tensors are on `device`."""
        # The stubs do not know that backends have send and recv, like groups.
        self._backend = cast(dist.ProcessGroup, group._get_backend(device))
        self._peer = dist.get_group_rank(group, peer)
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor, tag: int) -> None:
        """Hand over a contiguous tensor; it is kept until sent.

        Waits where the other end is more than UNDER_WAY receives late.
        """
        while len(self._sending) >= UNDER_WAY:
            self._finish_oldest()
        work = self._backend.send([tensor], self._peer, tag)
        self._sending.append((work, tensor))

    def receive(self, buffer: Tensor, tag: int) -> dist.Work:
        """Post a receive; `wait()` of the result returns when the tensor is in `buffer`."""
        return self._backend.recv([buffer], self._peer, tag)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, _ = self._sending.popleft()
        work.wait()


class Channels:
    """This rank's channels to and from its neighbours on the ring of pipeline ranks."""

    def __init__(self, rank: int, channels: Mapping[Pair, Channel]) -> None:
        self.rank = rank
        self._channels = channels

    def __getitem__(self, pair: Pair) -> Channel:
        return self._channels[pair]

    def finish(self) -> None:
        for channel in self._channels.values():
            channel.finish()


def make_channels(mesh: Mesh) -> Channels:
    """Collective over the world. A pipeline of one rank has no channels and needs no group."""
    axis = mesh.pipeline
    if axis.group is None:
        return Channels(axis.rank, {})
    if mesh.device.type == "cpu":
        shared = connect_pairs(axis.group, ring_pairs(axis.size), axis.name, COLLECTIVE_TIMEOUT)
        return gloo_channels(mesh) if shared is None else Channels(axis.rank, shared)
    channels = _own_ends(mesh, pair_groups(mesh))
    connect_channels(channels, axis.size, mesh.device)
    return channels


def gloo_channels(mesh: Mesh) -> Channels:
    """All of them over the one group of the pipeline."""
    group = mesh.pipeline.group
    assert group is not None
    return _own_ends(mesh, dict.fromkeys(ring_pairs(mesh.pipeline.size), group))


def ring_pairs(size: int) -> list[Pair]:
    """Both directions between all neighbours, such that those next to each other share no rank
    where that can be: first the links that begin at even ranks, then the others."""
    links = sorted(
        ((rank, (rank + 1) % size) for rank in range(size)), key=lambda link: link[0] % 2
    )
    return list(dict.fromkeys(pair for a, b in links for pair in ((a, b), (b, a))))


def pair_groups(mesh: Mesh) -> dict[Pair, dist.ProcessGroup]:
    """A process group of two for each channel that this rank has an end of. Collective."""
    groups = {}
    for source, destination in ring_pairs(mesh.pipeline.size):
        pairs = mesh.axes.subgroups({"pipeline": (source, destination)})
        group = mesh.split(f"pipeline_{source}_to_{destination}", pairs).group
        if group is not None:
            groups[source, destination] = group
    return groups


def connect_channels(channels: Channels, size: int, device: torch.device) -> None:
    """Send one element over every channel, so that NCCL makes its communicators here: making one
    waits for the other end, which posting a receive must never do.

    All ranks go through the channels in the same order, so the first one that is not made yet can
    always be made. Collective over the pipeline.
    """
    element = torch.zeros(1, device=device)
    for pair in ring_pairs(size):
        if channels.rank == pair[0]:
            channels[pair].send(element, tag=0)
            channels[pair].finish()
        elif channels.rank == pair[1]:
            channels[pair].receive(element, tag=0).wait()


def _own_ends(mesh: Mesh, groups: Mapping[Pair, dist.ProcessGroup]) -> Channels:
    rank, ranks = mesh.pipeline.rank, mesh.pipeline.ranks
    return Channels(
        rank,
        {
            (source, destination): BackendChannel(
                group, ranks[destination if rank == source else source], mesh.device
            )
            for (source, destination), group in groups.items()
            if rank in (source, destination)
        },
    )
