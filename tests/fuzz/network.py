"""A place without a network, in which every attempt to reach one is counted.

In a new network namespace there is nothing but loopback. The kernel counts each packet and each
connection that finds no route, over TCP, UDP and for names that are looked up, so that an attempt
is seen whether or not the program tells of it.
"""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
NAME_SERVER_ON_LOOPBACK = "NoPorts"  # a query to 127.0.0.53, at which nothing listens here


def leave_network() -> bool:
    """Move this process, and all that it starts, to where there is only loopback.

    Returns False, and changes nothing, where the system doesn't permit it.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


def attempts(process: int | str = "self") -> int:
    """How often the processes of a namespace have tried to reach something but loopback."""
    folder = Path(f"/proc/{process}/net")
    four = _table(folder / "snmp")
    six = dict(line.split() for line in (folder / "snmp6").read_text().splitlines())
    counts = four["Ip:"]["OutNoRoutes"], four["Udp:"][NAME_SERVER_ON_LOOPBACK]
    return sum(counts) + int(six["Ip6OutNoRoutes"])


def _table(path: Path) -> dict[str, dict[str, int]]:
    """Pairs of lines, names above numbers, each pair behind the same word."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {
        names[0]: dict(zip(names[1:], map(int, values[1:]), strict=True))
        for names, values in zip(lines[::2], lines[1::2], strict=True)
    }
