"""Many ranks in one test: `run_ranks(fn, n, *args)` calls fn in n processes that share gloo, or
with `device="cuda"` NCCL, each with a GPU of its own.

Workers are forked once and reused, since forking and joining costs 0.3 s and a call 0.05 s. Those
with GPUs are started anew instead: a fork cannot use CUDA once its parent has asked for it. Each
call gets a process group of its own. A worker that died, hangs or failed is replaced with its
companions, so that one test never spoils the next.

torch must have run no multi-threaded operation in this process before (the children would hang):
tests/conftest.py sets OMP_NUM_THREADS=1.
"""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

GRACE = 2.0
"""Seconds that the other ranks get to report once one has failed."""


class RankFailedError(Exception):
    """A rank died, hung, or raised what can't be sent; the text says which and how."""


class Worker:
    """A forked process that answers (function, rank, world size, store, arguments)."""

    def __init__(self, others: list["Worker"]) -> None:
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for other in (self, *others):  # or the end of this process would go unnoticed
                other.connection.close()
            _serve(theirs)
        theirs.close()

    def death(self) -> str:
        """How it came to an end, of one that closed its connection."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"

    def end(self) -> None:
        self.connection.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class StartedWorker(Worker):
    """The same in a Python of its own, which imports what it needs: some seconds."""

    def __init__(self, others: list[Worker]) -> None:
        self.connection, theirs = Pipe()
        process = get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        assert process.pid is not None
        self.pid = process.pid
        theirs.close()


def _serve(connection: Connection) -> NoReturn:
    """A worker's life: answer calls until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, size, backend, store, seconds, args = connection.recv()
        except EOFError:
            os._exit(0)
        except BaseException:  # what was sent can't be read here
            connection.send(("failed", traceback.format_exc()))
            continue
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                backend,
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=seconds),
            )
            dist.barrier()  # a rank that needs nobody may leave while others still connect to it
            answer = ("returned", function(*args))
            ForkingPickler.dumps(answer)
        except BaseException as error:
            answer = _failure(error, rank)
        connection.send(answer)
        if dist.is_initialized():
            dist.destroy_process_group()


def _failure(error: BaseException, rank: int) -> tuple[str, Any]:
    error.add_note(f"--- on rank {rank} ---\n{traceback.format_exc()}")
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return "failed", f"rank {rank}: {traceback.format_exc()}"
    return "raised", error


class Pool:
    """The workers of a test session that share a backend.

    Their stores' files stay until all have ended: a store's destructor looks whether its file is
    there, then opens it; where the directory goes in between, it tries for as long as the group's
    timeout and aborts the process.
    """

    def __init__(self, backend: str = "gloo", worker: type[Worker] = Worker) -> None:
        self.backend, self.worker = backend, worker
        self.workers: list[Worker] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.calls = 0

    def run(self, function: Callable[..., Any], size: int, *args: Any, timeout: float) -> list[Any]:
        while len(self.workers) < size:
            self.workers.append(self.worker(self.workers))
        crew = self.workers[:size]
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="megapipe-ranks-")
        self.calls += 1
        store = str(Path(self.folder.name, str(self.calls)))
        for rank, worker in enumerate(crew):
            with suppress(BrokenPipeError, ConnectionResetError):  # has died: see _collect
                call = (function, rank, size, self.backend, store, timeout, args)
                worker.connection.send(call)
        answers = _collect(crew, timeout)
        if all(answer is not None and answer[0] == "returned" for answer in answers.values()):
            return [answers[rank][1] for rank in range(size)]
        self._replace(crew)
        raise _root_cause(answers, timeout)

    def close(self) -> None:
        self._replace(list(self.workers))
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None

    def _replace(self, crew: list[Worker]) -> None:
        self.workers = [worker for worker in self.workers if worker not in crew]
        for worker in crew:
            worker.end()


Answer = tuple[str, Any]


def _collect(crew: list[Worker], timeout: float) -> dict[int, Answer]:
    """Each rank's answer, in order of arrival; what did not come in time is ("hangs", None)."""
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout + GRACE
    while len(answers) < len(crew) and (left := deadline - time.monotonic()) > 0:
        waiting = {worker.connection: r for r, worker in enumerate(crew) if r not in answers}
        for connection in wait(list(waiting), left):
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                answer: Answer = connection.recv()
            except (EOFError, ConnectionResetError):
                answer = ("died", crew[rank].death())
            answers[rank] = answer
            if answer[0] != "returned":
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers | {rank: ("hangs", None) for rank in range(len(crew)) if rank not in answers}


def _root_cause(answers: dict[int, Answer], timeout: float) -> BaseException:
    """A rank that died explains the others' errors; else the first error does."""
    for rank, (kind, how) in answers.items():
        if kind == "died":
            return RankFailedError(f"rank {rank} died {how}")
    for kind, value in answers.values():
        if kind == "raised":
            assert isinstance(value, BaseException)
            return value
        if kind == "failed":
            return RankFailedError(value)
    hanging = [rank for rank, (kind, _) in answers.items() if kind == "hangs"]
    return RankFailedError(f"ranks {hanging} did not finish within {timeout:g} s")


POOL = Pool()
GPU_POOL = Pool("nccl", StartedWorker)


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 60, device: str = "cpu"
) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks of a process group, in order.

    `function` is a module-level function, `args` and results can be pickled. Raises what the first
    failing rank raised, with its traceback as a note, or RankFailedError for one that died or hung.
    """
    pool = GPU_POOL if device == "cuda" else POOL
    return pool.run(function, size, *args, timeout=timeout)
