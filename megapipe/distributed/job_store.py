"""The store in which the processes of a job meet, at MASTER_ADDR:MASTER_PORT.

Rank 0 serves it, or torchrun does. Torch's own client would wait for a server in silence and leave
a trace of its stack when that fails, so here it connects to a port that is known to answer.
"""

import errno
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from megapipe.distributed.meeting import PATIENCE, Notices, RefusedError, RendezvousError, say

Address = tuple[str, int]

LOOK = 1.0
"""Seconds between two attempts to reach the store."""

ANSWER = timedelta(seconds=3)
"""For each of these attempts."""

ALL_GIVE_UP = 5 * LOOK
"""Seconds in which all processes of a machine have given up, and left the word to one of them."""


def open_store(rank: int, size: int, address: Address, *, served: bool) -> dist.Store:
    """The store of a job; rank 0 serves it unless it is `served` already.

    Waits until the address can be reached and names it meanwhile, in one process of each machine.
    Raises RendezvousError for a port that is taken, or that nobody serves within PATIENCE.
    """
    host, port = address
    if rank != 0 or served:
        _await(partial(_connect, address), rank, size, address)
        return _client(address, PATIENCE)
    with _listen(port) as listener:  # from now on others reach the port
        _await(partial(_connect, address), rank, size, address)
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=PATIENCE,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def connect(address: Address) -> dist.Store:
    """One more connection to a store that this process has reached before.

    Raises RendezvousError, after some seconds at most, when it is gone.
    """
    try:
        _connect(address)
    except OSError as error:
        raise RendezvousError(
            f"MASTER_ADDR:MASTER_PORT={join_address(address)} can't be reached any more: "
            f"{_reason(error)}. See what ended rank 0."
        ) from error
    return _client(address, ANSWER)


def _client(address: Address, timeout: timedelta) -> dist.Store:
    host, port = address
    try:
        return dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise RendezvousError(
            f"What answers at MASTER_ADDR:MASTER_PORT={join_address(address)} is not rank 0 of "
            f"this job ({str(error).splitlines()[0]}). Set MASTER_PORT to a free port, for all "
            "processes alike."
        ) from error


def _listen(port: int) -> socket.socket:
    """A socket at this port of all of this machine's addresses."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True
            )
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RendezvousError(
                f"MASTER_PORT={port} is in use on {socket.gethostname()}, so the ranks can't meet "
                "there: by another program, or by another process with RANK=0. Set MASTER_PORT to "
                "a free port, for all processes of the job alike (torchrun --master-port, or "
                "--standalone on one machine)."
            ) from error
        raise RendezvousError(
            f"MASTER_PORT={port} can't be used on {socket.gethostname()}: {error.strerror}. Set "
            "MASTER_PORT to a free port above 1023, for all processes of the job alike."
        ) from error


def _await(attempt: Callable[[], None], rank: int, size: int, address: Address) -> None:
    """Return once the attempt raises no OSError."""
    place, notices = join_address(address), Notices()
    chosen = OnePerMachine(place)
    whose = "this process's own address" if rank == 0 else "rank 0"
    limit = PATIENCE.total_seconds()
    while True:
        try:
            return attempt()
        except OSError as error:
            why = _reason(error)
        if notices.waited > limit:
            text = (
                f"Gave up after {limit:.0f} s: {whose} "
                f"(MASTER_ADDR:MASTER_PORT={place}) could not be reached from "
                f"{socket.gethostname()}: {why}. See that all {size} processes were started and "
                "can reach that address, which has to be one of rank 0's machine."
            )
            if not chosen.is_this_process():
                raise RefusedError(text)
            time.sleep(ALL_GIVE_UP)  # while this process lives, no other one is chosen
            raise RendezvousError(text)
        if notices.due() and chosen.is_this_process():
            say(
                f"waiting for {notices.waited:.0f} of {limit:.0f} s: rank {rank} of {size} on "
                f"{socket.gethostname()} can't reach {whose} "
                f"(MASTER_ADDR:MASTER_PORT={place}) yet: {why}."
            )
        time.sleep(min(LOOK, 0.05 + notices.waited / 10))


def _connect(address: Address) -> None:
    socket.create_connection(address, timeout=ANSWER.total_seconds()).close()


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror or str(error)).lower()


def join_address(address: Address) -> str:
    """`host:port`, or `[host]:port` for a host of IPv6."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class OnePerMachine:
    """The one process of this machine that prints messages on a subject: the first that asks.

    It holds a name that Linux gives to one socket at a time, and frees when the process ends.
    Elsewhere, and where no such name can be had, it is every process.
    """

    def __init__(self, subject: str) -> None:
        digest = hashlib.sha256(subject.encode()).hexdigest()  # names end at 107 bytes
        self._name = f"\0megapipe/{os.getuid()}/{digest}"
        self._socket: socket.socket | None = None

    def is_this_process(self) -> bool:
        if sys.platform != "linux" or self._socket is not None:
            return True
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(self._name)
        except OSError as error:
            holder.close()
            return error.errno != errno.EADDRINUSE
        self._socket = holder
        return True
