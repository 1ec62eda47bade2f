"""The store of a job: who serves it, how long one waits for it, and what is said meanwhile."""

import errno
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megapipe.distributed import job_store, meeting
from megapipe.distributed.job_store import OnePerMachine, connect, join_address, open_store
from megapipe.distributed.meeting import RefusedError, RendezvousError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FIRST_NOTICE", 0.1)
    monkeypatch.setattr(job_store, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(job_store, "ALL_GIVE_UP", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only in sleep."""
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens, and says nothing."""
    with socket.create_server(("localhost", 0)) as server:
        yield server.getsockname()[1]


def test_rank_0_serves_what_others_read(port: int) -> None:
    served = open_store(0, 2, ("localhost", port), served=False)
    served.set("key", "value")
    other = open_store(1, 2, ("localhost", port), served=False)
    assert other.get("key") == b"value"


def test_rank_0_serves_nothing_where_torchrun_does() -> None:
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    open_store(0, 2, ("localhost", agent.port), served=True).set("key", "value")
    assert agent.get("key") == b"value"


def test_a_store_that_is_gone_is_not_waited_for(port: int) -> None:
    with pytest.raises(RendezvousError, match="can't be reached any more: connection refused"):
        connect(("localhost", port))


def test_a_port_in_use_is_named(taken: int) -> None:
    with pytest.raises(RendezvousError, match=rf"MASTER_PORT={taken} is in use .* --master-port"):
        open_store(0, 2, ("localhost", taken), served=False)


def _hangs_up(server: socket.socket) -> None:
    while True:
        server.accept()[0].close()


def test_what_is_no_store_is_named() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=_hangs_up, args=(server,), daemon=True).start()
        with pytest.raises(RendezvousError, match=rf"at MASTER_ADDR:MASTER_PORT=localhost:{port} "):
            open_store(1, 2, ("localhost", port), served=False)


@pytest.mark.parametrize(
    ("host", "rank", "said"),
    [
        ("localhost", 1, "rank 1 of 4 on .* can't reach rank 0 .* yet: connection refused"),
        ("no.invalid", 1, "rank 1 of 4 on .* can't reach rank 0 .* the name does not resolve"),
        ("no.invalid", 0, "rank 0 of 4 on .* can't reach this process's own address"),
    ],
)
def test_an_address_that_nobody_serves_is_named_again_and_again(
    host: str,
    rank: int,
    said: str,
    port: int,
    clock: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resolve = socket.getaddrinfo

    def knows_localhost(name: str, *rest: Any) -> Any:
        if name == "no.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(name, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", knows_localhost)
    with pytest.raises(RendezvousError, match=rf"Gave up after 1 s: .*={host}:{port}\) could not"):
        open_store(rank, 4, (host, port), served=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, "after 0.1, 0.3 and 0.7 s"
    for line in lines:
        assert re.search(rf"^megapipe: waiting for \d+ of \d+ s: {said}", line)


def test_a_rank_goes_on_once_rank_0_is_there(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "PATIENCE", timedelta(minutes=1))
    served: list[dist.Store] = []

    def serve() -> None:
        served.append(open_store(0, 2, ("localhost", port), served=False))
        served[0].set("key", "value")

    late = threading.Timer(0.5, serve)
    late.start()
    other = open_store(1, 2, ("localhost", port), served=False)
    late.join()
    assert other.get("key") == b"value"


def test_one_process_of_a_machine_prints(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    address = ("localhost", port)
    chosen = OnePerMachine(join_address(address))
    assert chosen.is_this_process()
    assert chosen.is_this_process(), "again"
    assert OnePerMachine("another subject").is_this_process()
    with pytest.raises(RefusedError):
        open_store(1, 2, address, served=False)
    assert capsys.readouterr().err == ""


def test_one_process_prints_for_a_long_address() -> None:
    address = "node." * 50 + "example:29500"
    chosen = OnePerMachine(address)
    assert chosen.is_this_process()
    assert not OnePerMachine(address).is_this_process()
    assert OnePerMachine(address + "1").is_this_process()


def test_all_processes_print_where_no_name_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuses)
    assert OnePerMachine("subject").is_this_process()
    assert OnePerMachine("subject").is_this_process()


def test_addresses() -> None:
    assert join_address(("node1", 29500)) == "node1:29500"
    assert join_address(("fe80::1", 29500)) == "[fe80::1]:29500"
