"""Shared memory: what is sent arrives, memory is used again, nobody waits for one who is gone."""

import gc
import mmap
import os
import resource
import socket
import tempfile
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megapipe.distributed.mesh import build_mesh
from megapipe.distributed.shared_memory import connect
from megapipe.distributed.shared_memory.channel import AT_A_TIME, LARGE, Link, SharedMemoryChannel
from megapipe.errors import MegapipeError
from megapipe.layout.axes import Axes
from megapipe.pipeline.p2p import BackendChannel, make_channels
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class Ends(NamedTuple):
    source: SharedMemoryChannel
    destination: SharedMemoryChannel


@pytest.fixture
def ends() -> Ends:
    return make_ends()


def make_ends() -> Ends:
    file = os.memfd_create("test")
    there, here = socket.socketpair()
    second = timedelta(seconds=1)
    return Ends(
        SharedMemoryChannel(Link(there, file), "pipeline rank 1", second),
        SharedMemoryChannel(Link(here, os.dup(file)), "pipeline rank 0", second),
    )


def take(channel: SharedMemoryChannel, tag: int, count: int = 3) -> list[float]:
    buffer = torch.full((count,), -1.0)
    channel.receive(buffer, tag).wait()
    return buffer.tolist()


def ones(value: float, count: int = 3) -> torch.Tensor:
    return torch.full((count,), float(value))


# --- Messages ------------------------------------------------------------------------------------


def test_messages_meet_by_tag_and_of_one_tag_in_order(ends: Ends) -> None:
    for tag, value in ((7, 1.0), (8, 2.0), (7, 3.0), (9, 4.0)):
        ends.source.send(ones(value), tag)
    found = [take(ends.destination, tag)[0] for tag in (9, 7, 7, 8)]
    assert found == [4.0, 1.0, 3.0, 2.0]
    assert not ends.destination._arrived, "tags that were used leave nothing behind"


def test_ranks_that_differ_on_a_size_are_told(ends: Ends) -> None:
    ends.source.send(ones(1.0), 5)
    with pytest.raises(AssertionError, match="rank 0 has sent 12 bytes where 16 are awaited"):
        take(ends.destination, 5, 4)
    ends.source.send(ones(1.0), 6)
    with (
        pytest.raises(AssertionError, match="12 bytes where 8"),
        ends.destination.lend(ones(0, 2), 6),
    ):
        pass


def test_a_tensor_may_be_changed_once_it_is_sent_and_keeps_its_bits(ends: Ends) -> None:
    sent = torch.randn(5, 7).bfloat16()
    copy, buffer = sent.clone(), torch.empty_like(sent)
    arrival = ends.destination.receive(buffer, 0)
    ends.source.send(sent, 0)
    sent.zero_()
    arrival.wait()
    assert torch.equal(buffer, copy)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 300_000])
def test_tensors_of_any_size_about_a_page_and_larger_than_a_socket_takes(
    ends: Ends, count: int
) -> None:
    for value in (1.0, 2.0):  # side by side in the file
        ends.source.send(torch.arange(count) + value, 0)
    for value in (1.0, 2.0):
        assert take(ends.destination, 0, count) == (torch.arange(count) + value).tolist()


def test_a_buffer_counts_as_unchanged_for_autograd(ends: Ends) -> None:
    """Buffers are views of one tensor: a change of one would void what is saved in the others."""
    pool = torch.zeros(2, 3)
    version = pool._version
    ends.source.send(ones(2.0), 0)
    ends.destination.receive(pool[1], 0).wait()
    assert pool.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert pool._version == version


# --- Memory --------------------------------------------------------------------------------------


def slots(channel: SharedMemoryChannel) -> int:
    return len(channel._sizes)


def test_slots_are_used_again(ends: Ends) -> None:
    for step in range(20):
        for tag in range(3):
            ends.source.send(ones(step + tag), tag)
        assert [take(ends.destination, tag)[0] for tag in range(3)] == [step, step + 1, step + 2]
        ends.destination.finish()
        ends.source.finish()
    assert 3 <= slots(ends.source) < 3 + AT_A_TIME
    assert os.fstat(ends.source._file).st_size <= 2 * slots(ends.source) * mmap.PAGESIZE


def test_a_large_slot_is_used_again_at_once(ends: Ends) -> None:
    count = LARGE // 4
    for step in range(5):
        ends.source.send(ones(step, count), 0)
        assert take(ends.destination, 0, count) == [step] * count
    assert slots(ends.source) == 2, "one that is read, one to write to"


def test_a_slot_is_free_when_it_was_read_and_not_before(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source writes to what it is told of at once."""
    for tag in range(AT_A_TIME):
        ends.source.send(ones(tag), tag)

    def overwrite(*slots: int) -> None:
        assert len(slots) == AT_A_TIME
        ends.source._free[ones(0).nbytes].extend(slots)
        for _ in slots:
            ends.source.send(ones(-5), 99)

    monkeypatch.setattr(ends.destination, "_say", overwrite)
    assert [take(ends.destination, tag)[0] for tag in range(AT_A_TIME)] == list(range(AT_A_TIME))
    assert take(ends.destination, 99)[0] == -5


def test_sizes_have_slots_of_their_own(ends: Ends) -> None:
    for step in range(6):
        for count in (3, 2000):
            ends.source.send(ones(step, count), count)
            assert take(ends.destination, count, count) == [step] * count
    assert slots(ends.source) < 2 * (1 + AT_A_TIME)


def test_neither_end_waits_however_much_is_unread(ends: Ends) -> None:
    """Ten times what a socket holds, of tensors and of free slots."""
    count = 12_000
    for tag in range(count):
        ends.source.send(ones(tag), tag)
    assert all(take(ends.destination, tag)[0] == tag for tag in range(count))
    ends.destination.finish()
    for _ in range(2):
        ends.source.finish()
    ends.source.send(ones(0.5), 0)
    assert take(ends.destination, 0)[0] == 0.5
    assert slots(ends.source) == count, "a free one was used"


def test_a_source_is_at_most_a_run_ahead(ends: Ends) -> None:
    """What it sends in a run it need not wait for, be it much."""
    for tag in range(100):
        ends.source.send(ones(tag), tag)
    ends.source.finish()
    ends.source.send(ones(0.5), 100)
    with pytest.raises(MegapipeError, match="pipeline rank 1 has said nothing for 1 s"):
        ends.source.finish()
    assert [take(ends.destination, tag)[0] for tag in range(100)] == list(range(100))
    ends.destination.finish()
    ends.source.finish()
    assert take(ends.destination, 100)[0] == 0.5


# --- Ends ----------------------------------------------------------------------------------------


def test_who_waits_for_one_who_is_gone_is_told(ends: Ends) -> None:
    ends.source.send(ones(1.0), 0)
    ends.source._socket.close()
    assert take(ends.destination, 0)[0] == 1.0, "what was sent before is there"
    ends.destination.finish()  # has an empty slot to tell of, and nobody to tell
    with pytest.raises(ConnectionError, match="pipeline rank 0 has ended"):
        take(ends.destination, 1)


def test_who_sends_to_one_who_is_gone_is_told(ends: Ends) -> None:
    ends.destination._socket.close()
    with pytest.raises(ConnectionError, match="pipeline rank 1 has ended"):
        ends.source.send(ones(1.0), 0)


def test_one_may_go_when_it_has_what_it_needs(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it before the source has looked for free slots."""
    say = ends.source._say

    def say_and_be_left(*words: int) -> None:
        say(*words)
        ends.destination._socket.close()

    monkeypatch.setattr(ends.source, "_say", say_and_be_left)
    ends.source.send(ones(1.0), 0)
    monkeypatch.undo()
    with pytest.raises(ConnectionError, match="pipeline rank 1 has ended"):
        ends.source.send(ones(2.0), 0)


def test_a_late_sender_is_waited_for_only_so_long(ends: Ends) -> None:
    with pytest.raises(MegapipeError, match="pipeline rank 0 has said nothing for 1 s"):
        take(ends.destination, 0)


def open_files() -> int:
    gc.collect()  # what earlier tests have left goes first, and not while one counts
    return len(os.listdir("/proc/self/fd"))


def test_a_channel_takes_its_link_along() -> None:
    before = open_files()
    source, destination = make_ends()
    for count in (3, 10_000, 300_000):  # mapped anew
        source.send(ones(2.0, count), 0)
        assert take(destination, 0, count) == [2.0] * count
    del source, destination
    assert open_files() <= before


def no_files_in_memory(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "memfd_create")


def files_refused(patch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise PermissionError

    patch.setattr(os, "memfd_create", refuse)


def files_limited(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resource, "getrlimit", lambda _: (100_000, resource.RLIM_INFINITY))


Hinder = Callable[[pytest.MonkeyPatch], None]


def kind_of_channels(unable: int | None, hinder: Hinder) -> tuple[set[type], list[float]]:
    """Of this rank of a ring of three, of which `unable` is hindered; and what comes from the rank
    before and the one after."""
    mesh = build_mesh(Axes.of(pipeline=3, data=1, tensor=1), CPU)
    rank, after, before = mesh.rank, (mesh.rank + 1) % 3, (mesh.rank - 1) % 3
    with pytest.MonkeyPatch.context() as patch:
        if rank == unable:
            hinder(patch)
        files = open_files()
        channels = make_channels(mesh)
        if unable is not None:
            assert open_files() <= files
    found = torch.empty(2, 3)
    arrivals = [
        channels[other, rank].receive(buffer, 0)
        for other, buffer in zip((before, after), found, strict=True)
    ]
    channels[rank, after].send(ones(rank), 0)
    channels[rank, before].send(ones(10 + rank), 0)
    for arrival in arrivals:
        arrival.wait()
    channels.finish()
    return {type(channel) for channel in channels._channels.values()}, found[:, 0].tolist()


@pytest.mark.parametrize(
    ("unable", "hinder"),
    [
        (None, no_files_in_memory),
        (1, no_files_in_memory),
        (2, no_files_in_memory),
        (0, files_refused),
        (2, files_refused),
        (1, files_limited),
    ],
)
def test_all_ranks_share_memory_or_none(unable: int | None, hinder: Hinder) -> None:
    kind = SharedMemoryChannel if unable is None else BackendChannel
    answers = run_ranks(kind_of_channels, 3, unable, hinder)
    assert [kinds for kinds, _ in answers] == [{kind}] * 3
    assert [found for _, found in answers] == [[2, 11], [0, 12], [1, 10]]


def connect_under(folder: str, strangers: bool) -> bool:
    """Whether two ranks share memory, with this temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        if strangers:  # of another user, as each rank sees it
            patch.setattr(os, "getuid", lambda: 4711)
        channels = make_channels(build_mesh(Axes.of(pipeline=2, data=1, tensor=1), CPU))
    return isinstance(channels[0, 1], SharedMemoryChannel)


def test_connecting_needs_no_files(tmp_path: Path) -> None:
    """So that no signal at any moment leaves one."""
    assert run_ranks(connect_under, 2, str(tmp_path / "none"), False) == [True, True]


def test_other_users_are_refused(tmp_path: Path) -> None:
    assert run_ranks(connect_under, 2, str(tmp_path), True) == [False, False]


def test_a_stranger_who_connects_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The uid of the peer is asked for at the system, which a test can't do as another user."""
    with ExitStack() as stack:
        listener = connect._listen(stack, 2)
        assert listener is not None
        address = listener.getsockname()
        stranger, own = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for one in (stranger, own):
            one.connect(address)
        with tempfile.TemporaryFile() as file:
            socket.send_fds(own, [array("i", (3,))], [file.fileno()])
        judged = iter([False, True])
        monkeypatch.setattr(connect, "_is_own", lambda connection: next(judged))
        source, link = connect._accept(listener)
        assert source == 3
        assert stranger.recv(1) == b"", "closed"
        link.close()
        stranger.close()
        own.close()
