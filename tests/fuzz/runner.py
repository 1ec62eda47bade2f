"""Runs commands one after the other, through a server that starts them."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fuzz.case import FEED, MEGAPIPE, Command, Ending
from tests.fuzz.terminal import Terminal

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 120.0
"""A command that takes longer is asked to stop (SIGTERM): a valid config may just be a long run."""
STOPPING_SECONDS = 120.0
MEMORY = 6 << 30

IN_WARM = ("COLUMNS", "NO_COLOR", "TERM", "PYTHONIOENCODING")
IN_WARM_PREFIXES = ("WANDB_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MEGAPIPE")
"""Environment variables that no import looks at. Others need a start of their own."""


@dataclass(frozen=True)
class System:
    """What is tried: the functions that stand for `megapipe` and for the feed's program."""

    megapipe: str = MEGAPIPE
    feed: str = FEED

    def function(self, command: Command) -> str:
        return self.feed if command.feed else self.megapipe

    def program(self, command: Command) -> list[str]:
        """The words that start it in a process of its own."""
        function = self.function(command)
        if function == MEGAPIPE:
            return [str(Path(sys.executable).with_name("megapipe"))]
        module, _, name = function.partition(":")
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {name}"
        return [sys.executable, "-c", f"{code}; sys.exit({name}())"]


class Runner:
    """Starts the server and speaks to it. `work` holds what does not belong to a case."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.base = base_environment(work)
        self._log = (work / "server.log").open("ab")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"],
            cwd=ROOT,
            env=self.base,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._lines = b""
        self.isolated = self._answer(120.0)["isolated"]

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()

    def run(self, command: Command, case: Path, system: System) -> Ending:
        """Run a command in the case's folder, send its signals, and wait for its end."""
        outputs = [self.work / "stdout", self.work / "stderr"]
        for path in outputs:
            path.unlink(missing_ok=True)
        terminal = Terminal() if "terminal" in command.streams else None
        request = self._request(command, case, outputs, system, terminal)
        started = time.monotonic()
        self._send(request)
        pid = self._answer(30.0)["pid"]
        watch = _Watch(command, case, pid, terminal)
        answer = None
        while answer is None:
            watch.act(time.monotonic() - started)
            answer = self._poll(watch.pause)
        shown = terminal.close() if terminal else b""
        stdout, stderr = (path.read_bytes() if path.exists() else b"" for path in outputs)
        return Ending(
            command=command,
            status=answer["status"],
            stdout=stdout + shown,
            stderr=stderr,
            seconds=time.monotonic() - started,
            sent=tuple(watch.sent),
            timed_out=watch.timed_out,
            left=tuple(answer["left"]),
            attempts=answer["attempts"],
        )

    def forks(self, command: Command) -> bool:
        """Whether the command is forked from the server, and not started as a program."""
        return command.warm and all(map(_in_warm, command.environment))

    def _request(
        self,
        command: Command,
        case: Path,
        outputs: list[Path],
        system: System,
        terminal: Terminal | None,
    ) -> dict[str, Any]:
        environment = {**self.base, "TMPDIR": str(case / "tmp"), **command.environment}
        places = {"null": os.devnull, "full": "/dev/full", "closed": "closed", "broken": "broken"}
        if terminal:
            places["terminal"] = terminal.name
        streams = [
            str(outputs[number - 1]) if place == "file" else places[place]
            for number, place in enumerate(command.streams)
        ]
        return {
            "function": system.function(command),
            "program": system.program(command),
            "warm": self.forks(command),
            "words": command.words,
            "environment": {k: v for k, v in environment.items() if v is not None},
            "streams": streams,
            "folder": str(case / command.folder),
            "folder_gone": command.folder_gone,
            "umask": command.umask,
            "ignored": command.ignored,
            "limits": {"RLIMIT_DATA": MEMORY, "RLIMIT_CORE": 0, **command.limits},
        }

    def _send(self, request: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()

    def _answer(self, patience: float) -> dict[str, Any]:
        answer = self._poll(patience)
        if answer is None:
            raise RuntimeError(f"the server says nothing; see {self.work / 'server.log'}")
        return answer

    def _poll(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, or None when there is none within that many seconds."""
        assert self._server.stdout is not None
        descriptor = self._server.stdout.fileno()
        end = time.monotonic() + seconds
        while b"\n" not in self._lines:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise RuntimeError(f"the server has ended; see {self.work / 'server.log'}")
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Watch:
    """Sends a command's signals when their time has come, and ends one that takes too long."""

    def __init__(self, command: Command, case: Path, pid: int, terminal: Terminal | None) -> None:
        self.sent: list[int] = []
        self.timed_out = False
        self._command = command
        self._metrics = case / command.folder / command.run_dir / "metrics.jsonl"
        self._pid = pid
        self._terminal = terminal
        self._due = sorted(command.signals, key=lambda pair: pair[1])
        self._at_step = command.signal_at_step
        self._end, self._kill = COMMAND_SECONDS, COMMAND_SECONDS + STOPPING_SECONDS
        self.pause = 0.01 if self._due or self._at_step else 0.2

    def act(self, passed: float) -> None:
        while self._due and passed >= self._due[0][1]:
            self._signal(self._due.pop(0)[0])
        if self._at_step and _count_lines(self._metrics) >= self._at_step[1]:
            self._signal(self._at_step[0])
            self._at_step = None
        if passed > self._end:
            self._end = float("inf")
            self._signal(signal.SIGTERM)
        if passed > self._kill:
            self._kill = float("inf")
            self.timed_out = True
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGHUP and self._terminal:
                self._terminal.hang_up()
            else:
                os.kill(self._pid, number)
            self.sent.append(number)


def base_environment(work: Path) -> dict[str, str]:
    """A small, quiet environment. Compiled modules are kept, for starts of their own."""
    home = work / "home"
    home.mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPYCACHEPREFIX": f"{tempfile.gettempdir()}/megapipe-fuzz-compiled-{os.getuid()}",
        "TMPDIR": str(work),
    }


def _in_warm(name: str) -> bool:
    return name in IN_WARM or name.startswith(IN_WARM_PREFIXES)


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
