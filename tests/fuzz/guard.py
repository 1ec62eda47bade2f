"""megapipe under a guard: each name that Python looks up, and each address elsewhere that it speaks
to, is reported on stderr. Audit hooks of Python can't be removed, so it is a process of its own.
"""

import os
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

REACHED_OUT = b"reached out: "
EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
"""Audit events, and which of their arguments says where to."""


def main() -> int:
    """megapipe's command line."""
    from megapipe.tools.cli import main as megapipe

    return under_guard(megapipe)


def planted() -> int:
    """One that looks up a name and sends a packet."""
    from tests.fuzz.planted import looks_up_a_name, sends_a_packet

    return under_guard(lambda: looks_up_a_name() + sends_a_packet())


def under_guard(function: Callable[[], int]) -> int:
    sys.addaudithook(_watch)
    return function()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS:
        place = arguments[EVENTS[event]]
        host = place[0] if isinstance(place, tuple) else place
        unix = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
        if not unix and not _is_here(host):
            os.write(2, REACHED_OUT + f"{event} {host!r}\n".encode())


def _is_here(host: object) -> bool:
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ip_address(host if isinstance(host, str) else "").is_loopback
    except ValueError:
        return False
