"""Starts commands for the fuzzer, from a process that has imported what they need.

A command is either started as a user does, or forked from here: that saves the seconds which Python
takes to import torch, and is otherwise the same (arguments, environment, standard streams, limits,
the interpreter's end). This process has no network and may not pass over permissions, so that none
of its children can. Children whose parent has ended come back to it, which shows what a command has
left running.

It reads one JSON object a line from its standard input: a request (see `runner`). It answers
{"pid": ...} when the command has started, and {"status": ..., "left": [...], "attempts": ...} when
it has ended.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.fuzz.network import attempts, leave_network

Request = dict[str, Any]

PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
GRACE = 10.0
"""Seconds in which what a command started may end after it."""

WARM = (
    "megapipe.data.tokenizer_description",
    "megapipe.data.tokenizer_training",
    "megapipe.equivalence.report",
    "megapipe.models.gpt.generation",
    "megapipe.plan.dry_run",
    "megapipe.plan.schedules",
    "megapipe.tools.bench",
    "megapipe.tools.generate",
    "megapipe.tools.inspect",
    "megapipe.tools.plan",
    "megapipe.tools.schema",
    "megapipe.tools.tokenizer",
    "megapipe.tools.train",
    "megapipe.tools.verify",
    "megapipe.train.start",
    "pyarrow.parquet",
    "sentencepiece",
    "tokenizers",
)


def main() -> int:
    """Serve requests until standard input ends."""
    replies = os.dup(1)
    os.dup2(2, 1)
    isolated = leave_network()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # a fork that looks for garbage would copy all of this process's memory
    _reply(replies, {"isolated": isolated})
    requests = os.fdopen(os.dup(0), "rb")
    os.close(0)
    for line in requests:
        request = json.loads(line)
        before = attempts() if isolated else 0
        pid = os.fork()
        if pid == 0:
            requests.close()
            os.close(replies)
            _drop_rights(libc)
            _leave(_become(request))
        _reply(replies, {"pid": pid})
        _, wait_status = os.waitpid(pid, 0)
        ending = {"status": os.waitstatus_to_exitcode(wait_status), "left": _left()}
        _reply(replies, ending | {"attempts": attempts() - before if isolated else 0})
    return 0


def _reply(descriptor: int, answer: Request) -> None:
    os.write(descriptor, json.dumps(answer).encode() + b"\n")


def _left() -> list[str]:
    """Programs that still run some seconds after the command that started them. Ends them."""
    end = time.monotonic() + GRACE
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while (running := children.read_text().split()) and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)
    names = []
    for pid in running:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            names.append(b" ".join(words).decode(errors="replace").strip())
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)
    return names


def _drop_rights(libc: ctypes.CDLL) -> None:
    """Let permissions hold for the superuser too, now and in programs started from here."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        lost = (1 << CAP_DAC_OVERRIDE) | (1 << CAP_DAC_READ_SEARCH)
        for index in range(3):
            sets[index] &= ~lost
        libc.capset(header, sets)


def _become(request: Request) -> int:
    """Turn this fork into the command. Returns its exit status, unless a program replaces it."""
    os.setsid()
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    _enter(request["folder"], gone=request["folder_gone"])
    os.umask(request["umask"])
    for descriptor, place in enumerate(request["streams"]):
        _connect(descriptor, place)
    if not request["warm"]:
        os.closerange(3, 256)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, a shell does not
            signal.signal(number, signal.SIG_DFL)
        words = [os.fsencode(word) for word in [*request["program"], *request["words"]]]
        os.execve(words[0], words, request["environment"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.argv = [request["program"][0], *request["words"]]
    _open_streams(request["environment"].get("PYTHONIOENCODING", ""))
    module, _, function = request["function"].partition(":")
    return _call(getattr(importlib.import_module(module), function))


def _call(function: Callable[[], object]) -> int:
    """The exit status of `sys.exit(function())`, and Python's words for what it raises."""
    try:
        code = function()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _leave(status: int) -> NoReturn:
    """End as Python does: threads, exit functions, then what is still in the buffers. Python would
    also take its modules apart, which in a fork costs more than all the rest."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            if stream is sys.stdout and sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    print(f"Exception ignored in: {stream}\n{error!r}", file=sys.stderr, flush=True)
            status = 120
    os._exit(status & 0xFF)


def _enter(folder: str, *, gone: bool) -> None:
    """Make the folder the working directory; with `gone`, one in it that is then removed."""
    os.chdir(folder)
    if gone:
        place = tempfile.mkdtemp(dir=folder)
        os.chdir(place)
        os.rmdir(place)


def _connect(descriptor: int, place: str) -> None:
    """Lead a standard stream to a path, or to nowhere: "closed", or "broken" (no reader)."""
    if place == "closed":
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return
    if place == "broken":
        reader, found = os.pipe()
        os.close(reader)
    elif place.startswith("/dev/pts/"):
        found = os.open(place, os.O_RDWR)
    elif descriptor == 0:
        found = os.open(place, os.O_RDONLY)
    else:
        found = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if found != descriptor:
        os.dup2(found, descriptor)
        os.close(found)
    os.set_inheritable(descriptor, True)


def _open_streams(wanted: str) -> None:
    """Standard streams as Python makes them at its start; None where they are closed."""
    encoding, _, errors = wanted.partition(":")
    handlers = (errors or "strict", errors or "strict", "backslashreplace")
    names = ("stdin", "stdout", "stderr")
    for descriptor, (name, handler) in enumerate(zip(names, handlers, strict=True)):
        stream = None
        with contextlib.suppress(OSError):
            raw = open(  # noqa: SIM115 (open as long as the process lives)
                descriptor, "rb" if descriptor == 0 else "wb", closefd=False
            )
            stream = io.TextIOWrapper(
                raw,
                encoding or "utf-8",
                handler,
                line_buffering=descriptor == 2 or raw.isatty(),
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.exit(main())
