"""Making channels between the ranks of a group that share a machine."""

import os
import resource
import secrets
import socket
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch.distributed as dist

from megapipe.distributed.rank_group import RankGroup
from megapipe.distributed.shared_memory.channel import Link, SharedMemoryChannel

Pair = tuple[int, int]
"""Ranks of a group: source, destination."""


def connect_pairs(
    group: dist.ProcessGroup, pairs: Sequence[Pair], axis: str, timeout: timedelta
) -> dict[Pair, SharedMemoryChannel] | None:
    """The channels that this rank has an end of, by source and destination within `group`. None, on
    all its ranks, where two of a pair can't share memory: on two machines, in two containers, on
    another system than Linux, or under a limit of files' sizes, which would hold for this memory.
    `axis` is what the group's ranks are called. Collective over `group`."""
    ranks = RankGroup.of(group)
    rank = ranks.rank
    with ExitStack() as stack:
        listener = _listen(stack, len(pairs))
        address: str | None = listener.getsockname().decode() if listener is not None else None
        addresses = ranks.all_gather(address)
        outward = [pair for pair in pairs if pair[0] == rank]
        reached = [] if listener is None else _connect([addresses[to] for _, to in outward], rank)
        links = dict(zip(outward, reached, strict=False))
        if not all(ranks.all_gather(len(links) == len(outward))) or listener is None:
            for link in links.values():
                link.close()
            return None
        for _ in range(sum(to == rank for _, to in pairs)):
            source, link = _accept(listener)
            links[source, rank] = link
    return {
        (source, to): SharedMemoryChannel(
            link, f"{axis} rank {to if source == rank else source}", timeout
        )
        for (source, to), link in links.items()
    }


def _listen(stack: ExitStack, most: int) -> socket.socket | None:
    """A socket under a name that is no file, so that nothing is left of it; as long as `stack`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not hasattr(os, "memfd_create") or limit != resource.RLIM_INFINITY:
        return None
    try:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"\0megapipe-{secrets.token_hex(16)}")  # a NUL in front: no file
        listener.listen(most)
    except OSError:
        return None
    return listener


def _connect(addresses: Iterable[str | None], rank: int) -> Iterator[Link]:
    """Links to those that listen there, up to the first that can't be had. They are told the rank,
    and get the file."""
    for address in addresses:
        if address is None:
            return
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            if not _is_own(connection):
                raise PermissionError
            link = Link(connection, os.memfd_create("megapipe"))
        except OSError:
            connection.close()
            return
        socket.send_fds(connection, [array("i", (rank,))], [link.file])
        yield link


def _accept(listener: socket.socket) -> tuple[int, Link]:
    """A rank that has connected. Other users might, who could guess the name; they are refused."""
    connection, _ = listener.accept()
    while not _is_own(connection):
        connection.close()
        connection, _ = listener.accept()
    words, files, _, _ = socket.recv_fds(connection, array("i").itemsize, 1)
    return array("i", words)[0], Link(connection, files[0])


def _is_own(connection: socket.socket) -> bool:
    """A process of this user is at the other end."""
    size = struct.calcsize("3i")  # process, user, group
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return bool(struct.unpack("3i", peer)[1] == os.getuid())
