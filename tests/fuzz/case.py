"""A case: a folder with random files, and the commands that are tried on them."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MEGAPIPE = "megapipe.tools.cli:main"
NAMES = (
    *("train", "verify", "plan", "inspect", "generate", "schema"),
    *("tokenizer", "tokenizer train", "tokenizer inspect"),
    *("bench", "bench kernels", "bench pipeline", "bench train"),
)
FEED = "tests.fuzz.feed_ids:main"


@dataclass(frozen=True)
class Command:
    """One start of the program, as a shell would do it.

    `words` may hold bytes that are not UTF-8, as Python's surrogates. `environment` is what differs
    from the usual one (None: not set). `signals`: which are sent, and after how many seconds;
    `signal_at_step`, a signal and a step, when the run's metrics.jsonl has that many lines.

    A stream is "file" (read by the fuzzer), "terminal" (of which SIGHUP is the end), "closed",
    "full" (a full disk), "broken" (a pipe that nobody reads) or, for stdin, "null". `outputs` are
    files that it is asked to write. With `feed` it is not megapipe's command but the program that
    prints what is read for training.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    streams: tuple[str, str, str] = ("null", "file", "file")
    folder: str = "."
    folder_gone: bool = False
    umask: int = 0o022
    ignored: tuple[int, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    signals: tuple[tuple[int, float], ...] = ()
    signal_at_step: tuple[int, int] | None = None
    run_dir: str = "run"
    outputs: tuple[str, ...] = ()
    warm: bool = True
    feed: bool = False

    @property
    def name(self) -> str:
        """What it counts as: `train`, `bench kernels`, `--help`."""
        if self.feed:
            return "(feed)"
        if any(word in ("--help", "-h") for word in self.words):
            return "--help"
        found = [name for name in NAMES if self.words[: name.count(" ") + 1] == (*name.split(),)]
        return max(found, key=len, default="(no command)")

    @property
    def trains(self) -> bool:
        return self.name == "train" and "--dry-run" not in self.words

    def shell(self) -> str:
        """The command as a line of a shell script."""
        unset = [f"-u {name}" for name, value in self.environment.items() if value is None]
        values = [
            f"{name}={value}" for name, value in self.environment.items() if value is not None
        ]
        program = ["python", "-m", "tests.fuzz.feed_ids"] if self.feed else ["megapipe"]
        parts = [*unset, *map(_quoted, values), *program, *map(_quoted, self.words)]
        redirected = {
            "closed": "{}>&-",
            "full": "{}>/dev/full",
            "broken": "{}> >(true)",
            "terminal": "",
            "file": "",
            "null": "<&-" if self.streams[0] == "closed" else "</dev/null",
        }
        for number, place in enumerate(self.streams):
            parts.append(
                "<&-" if (number, place) == (0, "closed") else redirected[place].format(number)
            )
        line = "env " + " ".join(part for part in parts if part)
        if self.signals or self.signal_at_step:
            at = [f"signal {number} after {seconds:.2f} s" for number, seconds in self.signals]
            if self.signal_at_step:
                at.append("signal {} after step {}".format(*self.signal_at_step))
            line = f"# {', '.join(at)}:\n{line}"
        extras = [f"ulimit {name}={value}" for name, value in self.limits.items()]
        extras += [f"ignored signals {self.ignored}"] if self.ignored else []
        extras += ["the working directory was removed"] if self.folder_gone else []
        notes = f"# with {', '.join(extras)}:\n" if extras else ""
        before = f"umask {self.umask:03o}; " if self.umask != 0o022 else ""
        before += f"cd {_quoted(self.folder)}; " if self.folder != "." else ""
        return f"{notes}({before}{line})" if before else f"{notes}{line}"


@dataclass(frozen=True)
class Ending:
    """How a command ended. `status` is an exit status, or minus the signal that ended it."""

    command: Command
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float
    sent: tuple[int, ...]
    timed_out: bool
    left: tuple[str, ...]
    attempts: int


@dataclass(frozen=True)
class Finding:
    """Something that must not be. `check` is a name of `checks.CHECKS`."""

    check: str
    text: str


def _quoted(word: str) -> str:
    """A word for bash; bytes that are not UTF-8 as $'\\xff'."""
    if word.isprintable() and word.isascii():
        return shlex.quote(word)
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in word.encode("utf-8", "surrogateescape")
    )
    return f"$'{escaped}'"


def script(commands: list[Command], folder: Path, again: str) -> str:
    """A shell script that runs a case's commands again; `again` is the fuzzer's command for it."""
    lines = [
        "#!/usr/bin/env bash",
        f"# For the files as they were at first: {again} --files DIR",
        f"cd {shlex.quote(str(folder))}",
        *(command.shell() for command in commands),
    ]
    return "\n".join(lines) + "\n"
