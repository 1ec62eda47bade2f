"""What must hold for every command, whatever it was given.

words     nothing that only a programmer can read: no traceback, no warning of a library
status    the exit status is not 0 exactly when the output says that something failed
whole     nothing half-written, no scratch file, no program left running (see `whole`)
network   nothing but loopback is spoken to
account   every byte of a source is delivered or reported (see `account`)
resume    a run that was killed and started again logs the losses of one that was not
"""

import re
import signal

from tests.fuzz.case import Ending, Finding

CHECKS = ("words", "status", "whole", "network", "account", "resume")

PROGRAMMERS_WORDS = re.compile(
    rb"Traceback \(most recent call last\)|Exception ignored|Fatal Python error|"
    rb"Segmentation fault|terminate called|what\(\):|core dumped|\w*Warning: |"
    rb"Error in sys\.excepthook|lost sys\.std|Assertion .* failed"
)
STARTING = re.compile(rb"^Traceback .*\n(  .*\n)*KeyboardInterrupt", re.MULTILINE)
OWN = b"megapipe: "
JUDGEMENT = re.compile(rb"\bDAMAGED\b|\bFAILED\b|^ *whole +NO\b", re.MULTILINE)
JUDGES = ("inspect", "verify")
"""Commands whose answer, on stdout, may be that something else is wrong."""
PIPE_CLOSED = 141
"""128 + SIGPIPE: the reader of a pipe has seen enough."""
DONE = (b"Done: step", b"Nothing to do:")


def check_ending(ending: Ending) -> list[Finding]:
    """What is wrong with how a command ended and with what it printed."""
    return [
        *(Finding("words", text) for text in _words(ending)),
        *(Finding("status", text) for text in _status(ending)),
        *(Finding("network", text) for text in _network(ending)),
        *(Finding("whole", f"still runs: {name}") for name in ending.left),
    ]


def _words(ending: Ending) -> list[str]:
    if _was_starting(ending):
        return []
    for data in (ending.stderr, ending.stdout):
        found = PROGRAMMERS_WORDS.search(data)
        if found is not None:
            lines = data[found.start() :].decode(errors="replace").strip().splitlines()
            return [f"{lines[0]} ... {lines[-1]}"]
    return []


def _was_starting(ending: Ending) -> bool:
    """Ctrl-C while Python itself starts, before the program has any say, prints a traceback."""
    found = STARTING.search(ending.stderr)
    starting = found is not None and b"in main" not in found[0] and b"in run" not in found[0]
    return starting and signal.SIGINT in ending.sent and not ending.command.warm


def _status(ending: Ending) -> list[str]:
    status, command = ending.status, ending.command
    if ending.timed_out:
        return ["it did not end within two minutes of SIGTERM"]
    if status < 0:
        expected = -status in ending.sent
        return [] if expected else [f"it was ended by {signal.Signals(-status).name}"]
    readable = command.streams[2] == "file" and "RLIMIT_FSIZE" not in command.limits
    told = _last_line(ending.stderr).startswith(OWN)
    judged = JUDGEMENT.search(ending.stdout) or command.streams[1] not in ("file", "terminal")
    if status == 0:
        if told:
            return [f"status 0, and it says: {_text(_last_line(ending.stderr))}"]
        done = any(word in ending.stdout for word in DONE)
        if command.trains and command.name == "train" and command.streams[1] == "file" and not done:
            return ["status 0, and it does not say that the run is done"]
        if not command.trains and command.streams[1] in ("closed", "full", "broken"):
            return ["status 0, and what it was asked for could not be printed"]
        return []
    if status > 128 and status - 128 in ending.sent:
        name = signal.Signals(status - 128).name.encode()
        told = told or name in ending.stdout or name in ending.stderr
        readable = readable and command.streams[1] == "file"
        return [] if told or not readable else [f"status {status} without a word"]
    if status == PIPE_CLOSED and {"broken", "terminal"} & set(command.streams):
        return []
    if status > 2:
        return [f"status {status} stands for nothing; last: {_text(_last_line(ending.stderr))}"]
    if readable and not told and not (command.name in JUDGES and judged):
        return [f"status {status}, and the last line is: {_text(_last_line(ending.stderr))}"]
    return []


def _network(ending: Ending) -> list[str]:
    """One that is given a MASTER_ADDR may look for its peers there."""
    if "MASTER_ADDR" in ending.command.environment:
        return []
    return [f"{ending.attempts} attempts to reach a network"] if ending.attempts else []


def _last_line(data: bytes) -> bytes:
    """The last line that begins a message; a message's further lines are indented."""
    lines = [line for line in data.splitlines() if line and not line.startswith(b" ")]
    return lines[-1] if lines else b""


def _text(line: bytes) -> str:
    return repr(line.decode(errors="replace")[:200])
