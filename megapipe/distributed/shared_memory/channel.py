"""Channels between processes of one Linux machine: tensors in shared memory, a socket that tells.

Why not gloo's, which carries everything else on a CPU: there a thread stands at either end, so an
arrival wakes that thread, which wakes the one that waits; and a posted receive wakes the other
end's thread, be it needed or not. Here the rank that waits reads the socket itself, and to write to
a socket at which nobody waits is one call. Between two ranks that sleep 20 ms in between, from
before the send to the end of the wait: gloo 215 us, a socket 70 us (a virtual machine of 2 cores).

Each channel has a socket and a file in memory, which both ends map. The source says "tensor `tag`,
of `n` bytes, is in slot `s`"; the destination says, some at a time, which slots are free again. A
slot is a part of the file, named by its first page; the source adds one when none is free. So a
send waits for nothing, less than `validate` allows it to: what is validated finishes. And how far a
source may be ahead of its destination is bounded all the same: `finish` waits until all was taken
that was sent before the `finish` before it. (A program that trains never waits there, since its
ranks need each other in each run; one that only goes forward might.)
"""

import math
import mmap
import os
import socket
import weakref
from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import addressof, c_char, memmove
from datetime import timedelta
from queue import SimpleQueue
from struct import calcsize, iter_unpack, pack
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from megapipe.errors import MegapipeError

AT_A_TIME = 4
LARGE = 64 * 1024
"""Free slots that a destination tells of at a time, as to tell takes a call. Of a large one, in
bytes, it tells at once, that the same memory be used again while it is in the caches."""

_PAGE = mmap.ALLOCATIONGRANULARITY
_SENT, _EMPTIED = "qqq", "q"
"""What an end says: tag, slot and bytes of a tensor; slots that are free again."""
_BYTES_READ = 170 * calcsize(_SENT)
"""At most, at a time: nothing that was said is cut."""

Queue = SimpleQueue["array[int] | None"]


class Link(NamedTuple):
    """What the ends of a channel share: a connected Unix socket, and the file of the slots."""

    socket: socket.socket
    file: int

    def close(self) -> None:
        self.socket.close()
        os.close(self.file)


class SharedMemoryChannel:
    """This rank's end of a one-way channel: the source only sends, the other only receives.

    A receive gets the send of the same tag; of one tag, they meet in order. Tensors are a CPU's.
    Raises ConnectionError where the other end has gone, as groups do, and MegapipeError where it
    says nothing for `timeout`, in whole seconds.
    """

    def __init__(self, link: Link, peer: str, timeout: timedelta) -> None:
        """Takes the link over. `peer`, such as "pipeline rank 1", is for messages."""
        seconds = math.ceil(timeout.total_seconds())
        # By settimeout, Python would poll before each call.
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, pack("ll", seconds, 0))
        weakref.finalize(self, link.close)
        self._socket, self._file = link
        self._peer = peer
        self._seconds = seconds
        self._queue: Queue | None = None
        self._memory: mmap.mmap | None = None
        self._base = self._mapped = 0  # address and size
        # The source's: slots' sizes, those that are free, by size, the pages of all, and how many
        # tensors were sent and taken.
        self._sizes: dict[int, int] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._pages = 0
        self._sent = self._sent_before = self._taken = 0
        # The destination's: slots that have come, and bytes in them, by tag; and those that it has
        # not told of.
        self._arrived: dict[int, deque[tuple[int, int]]] = {}
        self._emptied: list[int] = []

    def finish(self) -> None:
        """End a run of sends and receives. Waits for what was sent in the run before it, not for
        that of this run: a rank goes when all others are done, too."""
        if self._emptied:
            self._tell()
        while self._taken < self._sent_before:
            self._hear()
        self._sent_before = self._sent

    # --- The source ------------------------------------------------------------------------------

    def send(self, tensor: Tensor, tag: int) -> None:
        """Copy a contiguous tensor to where the other end reads it; it may be changed then."""
        nbytes = tensor.nbytes
        free = self._free[nbytes]
        slot = free.pop() if free else self._add_slot(nbytes)
        memmove(self._address(slot, nbytes), tensor.data_ptr(), nbytes)
        try:
            self._say(tag, slot, nbytes)
        except ConnectionError:
            raise self._gone() from None
        self._sent += 1
        if not free:  # for the next, while this is on its way, which may be the last that is needed
            with suppress(ConnectionError):
                self._hear(socket.MSG_DONTWAIT)

    def _add_slot(self, nbytes: int) -> int:
        slot = self._pages
        self._sizes[slot] = nbytes
        self._pages += 1 + nbytes // _PAGE
        if self._pages * _PAGE > self._mapped:  # what nobody writes to takes no memory
            os.truncate(self._file, 2 * self._pages * _PAGE)
        return slot

    def _hear(self, flags: int = 0) -> None:
        """What the destination says next; with MSG_DONTWAIT, what it has said."""
        for (slot,) in iter_unpack(_EMPTIED, self._read(flags)):
            self._free[self._sizes[slot]].append(slot)
            self._taken += 1

    # --- The destination -------------------------------------------------------------------------

    def receive(self, buffer: Tensor, tag: int) -> "SharedMemoryArrival":
        """Post a receive; `wait()` of the result returns when the tensor is in `buffer`."""
        return SharedMemoryArrival(self, buffer, tag)

    def take(self, buffer: Tensor, tag: int) -> None:
        """Wait for the tensor of a posted receive."""
        nbytes = buffer.nbytes
        slot = self._await_slot(tag, nbytes)
        memmove(buffer.data_ptr(), self._address(slot, nbytes), nbytes)
        self._empty(slot, nbytes)

    @contextmanager
    def lend(self, like: Tensor, tag: int) -> Iterator[Tensor]:
        """Wait for a tensor like this one, and read it where it lies; not beyond the `with`."""
        slot = self._await_slot(tag, like.nbytes)
        self._map(slot, like.nbytes)
        count, begin = like.numel(), slot * _PAGE
        if self._memory is None or count == 0:  # which torch takes for a mistake
            yield like
        else:
            lying = torch.frombuffer(self._memory, dtype=like.dtype, count=count, offset=begin)
            yield lying.view(like.shape)
        self._empty(slot, like.nbytes)

    def _await_slot(self, tag: int, nbytes: int) -> int:
        """Where the next tensor of the tag is, which has to be of that size."""
        while tag not in self._arrived:
            for came, slot, of_bytes in iter_unpack(_SENT, self._read()):
                self._arrived.setdefault(came, deque()).append((slot, of_bytes))
        arrived = self._arrived[tag]
        slot, found = arrived.popleft()
        if not arrived:
            del self._arrived[tag]
        assert found == nbytes, f"{self._peer} has sent {found} bytes where {nbytes} are awaited"
        return slot

    def _empty(self, slot: int, nbytes: int) -> None:
        self._emptied.append(slot)
        if len(self._emptied) == AT_A_TIME or nbytes >= LARGE:
            self._tell()

    def _tell(self) -> None:
        with suppress(ConnectionError):  # a source that has ended needs no slots
            self._say(*self._emptied)
        self._emptied.clear()

    # --- Both ------------------------------------------------------------------------------------

    def _address(self, slot: int, nbytes: int) -> int:
        """Of a slot."""
        self._map(slot, nbytes)
        return self._base + slot * _PAGE

    def _map(self, slot: int, nbytes: int) -> None:
        """All of the file, where a slot lies beyond what is mapped."""
        if slot * _PAGE + nbytes > self._mapped:
            self._memory = mmap.mmap(self._file, 0)
            self._mapped = len(self._memory)
            self._base = addressof(c_char.from_buffer(self._memory))

    def _say(self, *words: int) -> None:
        """Never waits. A socket is full with some 270 messages that were not read, and the other
        end may need something else of this rank before it reads: from then on a thread says all."""
        message = array("q", words)
        if self._queue is None:
            try:
                self._socket.send(message, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._queue = SimpleQueue()
                Thread(target=_say_all, args=(self._socket, self._queue), daemon=True).start()
                weakref.finalize(self, self._queue.put, None)
        if self._queue is not None:
            self._queue.put(message)

    def _read(self, flags: int = 0) -> bytes:
        """What the other end says next; nothing where it has said nothing and MSG_DONTWAIT."""
        try:
            data = self._socket.recv(_BYTES_READ, flags)
        except ConnectionError:
            raise self._gone() from None
        except BlockingIOError:
            if flags & socket.MSG_DONTWAIT:
                return b""
            raise MegapipeError(
                f"{self._peer} has said nothing for {self._seconds} s. It hangs, or does something "
                "that takes that long."
            ) from None
        if not data:
            raise self._gone()
        return data

    def _gone(self) -> ConnectionError:
        return ConnectionError(f"{self._peer} has ended")


class SharedMemoryArrival:
    """A receive that was posted."""

    __slots__ = ("_buffer", "_channel", "_tag")

    def __init__(self, channel: SharedMemoryChannel, buffer: Tensor, tag: int) -> None:
        self._channel = channel
        self._buffer = buffer
        self._tag = tag

    def wait(self) -> None:
        """Returns when the tensor is in the buffer."""
        self._channel.take(self._buffer, self._tag)


def _say_all(connection: socket.socket, queue: Queue) -> None:
    with suppress(OSError):  # it was closed, or the other end has: who reads will see
        while (message := queue.get()) is not None:
            connection.sendall(message)
