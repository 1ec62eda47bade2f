"""Local ranks: forked from this process and watched until the last one has ended.

Forked after torch was imported, 8 ranks are ready in 0.2 s; 8 interpreters of their own take 8 to
17 s. This is sound because this process has used neither a thread pool of torch nor a GPU: children
of one that has would hang.

A rank tells through a pipe how it failed. What the user sees is the first cause: ranks that lost
their connection because another one died are not it. The others are ended; and should this
process be killed, Linux ends them all.
"""

import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from megapipe.distributed.rendezvous import Rendezvous, allow_open_files
from megapipe.errors import (
    ConfigError,
    MegapipeError,
    explained,
    lost_connection,
    program_fault,
    rank_lost,
)
from megapipe.scratch import scratch_directory
from megapipe.stop_signals import STOP_SIGNALS

RankMain = Callable[[Rendezvous], int]

GRACE = 1.5
"""Seconds for other ranks to tell the cause of what the first one to fail has suffered."""
PATIENCE = 3.0
"""Seconds from SIGTERM to SIGKILL for ranks that outlive a failed one."""
POLL = 0.02
PASSED_ON = STOP_SIGNALS
REPORT_CHARACTERS = 8000  # as JSON at most six times as many bytes, and a pipe holds 65,536
PR_SET_PDEATHSIG = 1


def launch_local(
    rank_main: RankMain, ranks: int, describe: Callable[[int], str] = "rank {}".format
) -> int:
    """Run `rank_main` on `ranks` ranks of this machine; returns their largest exit status.

    One rank runs in this process. When one of several fails, the others are ended and its error is
    raised here (MegapipeError) or its traceback printed. The signals of PASSED_ON are passed on.
    Raises KeyboardInterrupt when ranks were interrupted, RendezvousError where this process may not
    open as many files as they need. Main thread only.
    """
    if ranks == 1:
        return rank_main(Rendezvous())
    allow_open_files(ranks)
    with scratch_directory() as folder:
        local_ranks = LocalRanks()
        try:
            local_ranks.start(rank_main, ranks, folder / "meeting")
            local_ranks.watch()
        finally:
            local_ranks.close()
    return local_ranks.verdict(describe)


@dataclass
class Rank:
    """A forked process. `status` is an exit status, or minus the signal that ended it; `sent` are
    the signals that the launcher gave it, its own and those it passed on."""

    number: int
    pid: int
    pipe: int
    status: int | None = None
    ended: float = math.inf
    report: dict[str, Any] | None = None
    sent: set[int] = field(default_factory=set)

    def reap(self) -> None:
        """Note the end of the process, if it has ended."""
        pid, wait_status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return
        self.ended = time.monotonic()
        self.status = os.waitstatus_to_exitcode(wait_status)
        # Read after the end: reports are short, so that the pipe holds them.
        with os.fdopen(self.pipe, "rb") as pipe:
            os.set_blocking(self.pipe, False)
            text = pipe.read()
        if text:
            self.report = json.loads(text)
            self.ended = min(self.ended, self.report["at"])

    @property
    def kind(self) -> str:
        """How it ended: "returned", "interrupted", "config", "user", "program" or "connection"
        (an error of that kind), or "died" without a word."""
        return self.report["kind"] if self.report else "died"

    @property
    def failed(self) -> bool:
        return self.status is not None and self.kind not in ("returned", "interrupted")

    def send(self, number: int) -> None:
        """Give a signal to the process, if it has not been seen to end."""
        if self.status is None:
            self.sent.add(number)
            os.kill(self.pid, number)


class LocalRanks:
    """The ranks of one run, and the signals that this process gets while they live."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self._arrived: list[int] = []
        self._passed_on: set[int] = set()
        self._previous: dict[int, Any] = {}

    def start(self, rank_main: RankMain, size: int, file: Path) -> None:
        """Fork the ranks. Signals wait meanwhile, so that none comes while some are missing."""
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        try:
            for number in PASSED_ON:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                    self._previous[number] = signal.signal(
                        number, lambda n, _: self._arrived.append(n)
                    )
            parent = os.getpid()
            for rank in range(size):
                theirs = Rendezvous(rank, size, rank, size, file=file)
                mine, reports = os.pipe()
                pid = os.fork()
                if pid == 0:
                    _become_rank(rank_main, theirs, parent, reports)
                os.close(reports)
                self.ranks.append(Rank(rank, pid, mine))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    def watch(self) -> None:
        """Return when all ranks have ended: by themselves, or made to once one has failed."""
        end_at = kill_at = math.inf
        while living := [rank for rank in self.ranks if rank.status is None]:
            for rank in living:
                rank.reap()
            ended = [rank for rank in self.ranks if rank.status is not None]
            now = time.monotonic()
            # One that was interrupted has left the others waiting, as one that failed has.
            if end_at == math.inf and any(r.failed or r.kind == "interrupted" for r in ended):
                end_at = now + GRACE
            while self._arrived:
                number = self._arrived.pop(0)
                # Ctrl-C twice: no more patience. A terminal that closes sends SIGHUP twice.
                if number == signal.SIGINT and number in self._passed_on:
                    end_at = min(end_at, now)
                self._passed_on.add(number)
                self._signal(number)
            if now >= end_at and kill_at == math.inf:
                kill_at = now + PATIENCE
                self._signal(signal.SIGTERM)
            if now >= kill_at:
                self._signal(signal.SIGKILL)
            time.sleep(POLL)

    def close(self) -> None:
        """No rank outlives this, whatever went wrong here."""
        self._signal(signal.SIGKILL)
        for rank in self.ranks:
            if rank.status is None:
                os.waitpid(rank.pid, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)

    def verdict(self, describe: Callable[[int], str]) -> int:
        """The exit status; raises or prints the first cause of a failure."""
        cause = self._cause()
        if cause is not None:
            return _tell(cause, describe(cause.number))
        if all(rank.kind == "returned" for rank in self.ranks):
            return max(rank.status or 0 for rank in self.ranks)
        if signal.SIGINT in self._passed_on or not self._passed_on:
            raise KeyboardInterrupt
        return 128 + max(self._passed_on)

    def _cause(self) -> Rank | None:
        """The rank that failed first, of those that did not merely lose their connection."""
        failed = [rank for rank in self.ranks if rank.failed and not self._is_ours(rank)]
        return min(failed, key=lambda rank: (rank.kind == "connection", rank.ended), default=None)

    def _is_ours(self, rank: Rank) -> bool:
        """The rank ended because the launcher, or an interrupted rank, stopped the run. One that
        another process killed did not, though the launcher may have sent the same signal to those
        that it left waiting."""
        stopped = self._passed_on or any(other.kind == "interrupted" for other in self.ranks)
        if stopped and rank.kind == "connection":
            return True
        status = rank.status or 0
        left = rank.kind == "died" and status - 128 in self._passed_on  # it waited in vain
        return left or -status in rank.sent


def _tell(cause: Rank, name: str) -> int:
    report = cause.report
    if report is None:
        assert cause.status is not None
        raise MegapipeError(f"{name} {_ending(cause.status)}. The other ranks were ended.")
    if report["kind"] == "config":
        raise ConfigError(report["problems"])
    if report["kind"] == "user":
        raise MegapipeError(report["text"])
    if report["kind"] == "connection":
        raise rank_lost(name, report["text"])
    print(f"{name} failed:\n{report['text']}{program_fault()}", file=sys.stderr, flush=True)
    return 1


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status} and without a message"
    name = signal.Signals(-status).name
    why = " (Linux ends processes so when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"


def _become_rank(rank_main: RankMain, rendezvous: Rendezvous, parent: int, pipe: int) -> NoReturn:
    """The life of a forked process; it never returns into the caller's code."""
    status, report = 1, {"kind": "returned"}
    try:
        _prepare(rendezvous, parent)
        status = rank_main(rendezvous)
    except KeyboardInterrupt:
        report = {"kind": "interrupted"}
    except BaseException as error:
        report = _report(error)
    try:
        os.write(pipe, json.dumps({"at": time.monotonic(), **report}).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _prepare(rendezvous: Rendezvous, parent: int) -> None:
    """Make a forked copy of the launcher a process of its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    os.setpgid(0, 0)  # Ctrl-C reaches the launcher alone, which passes it on once
    for number in PASSED_ON:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // rendezvous.local_size))
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # local ranks need no network, nor a host name that resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _report(error: BaseException) -> dict[str, Any]:
    if isinstance(error, ConfigError):
        return {"kind": "config", "problems": error.problems}
    lost = None if isinstance(error, MegapipeError) else lost_connection(error)
    if lost is not None:
        return {"kind": "connection", "text": lost[:REPORT_CHARACTERS]}
    told = explained(error) if isinstance(error, Exception) else None
    if told is not None:
        return {"kind": "user", "text": told.report[:REPORT_CHARACTERS]}
    text = "".join(traceback.format_exception(error))
    return {"kind": "program", "text": text[-REPORT_CHARACTERS:]}
