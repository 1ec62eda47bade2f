"""What a user can cause. The command line prints these as one message, without a traceback."""

import errno
import os
import re

from megapipe import __version__

COMMUNICATION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
"""In what torch's communication says when it fails."""

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
RAISE_OPEN_FILES = "Raise the limit on open files (ulimit -n)."


class MegapipeError(Exception):
    """A failure that the user can mend; its text names the key or file, the value, and the fix."""

    @property
    def report(self) -> str:
        """The text, and below it, indented, the notes of those that passed the error on, such as
        where in a program."""
        return "\n  ".join([str(self), *self.notes])

    @property
    def notes(self) -> list[str]:
        """What `add_note` has added."""
        return list(getattr(self, "__notes__", []))


class UsageError(MegapipeError):
    """A command line that can't be understood; the text says what to type."""


class ConfigError(MegapipeError):
    """The config can't be honoured. `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ScheduleError(MegapipeError):
    """A pipeline program that can't be built or would not finish."""


class DataError(MegapipeError):
    """A source, tokenizer or row that can't be used."""


class CheckpointError(MegapipeError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class ConversionError(MegapipeError):
    """A model that can't be converted, or whose conversion is not proven."""


def explained(error: Exception) -> MegapipeError | None:
    """The error as one that the user can mend, where it is one; None for a fault of the program.

    Files that can't be read or written, disks and memory that are full, and text that can't be
    encoded are the user's to mend, wherever they turn up.
    """
    if isinstance(error, MegapipeError):
        return error
    if isinstance(error, OSError) and error.strerror is not None:
        what = f"{error.filename}: " if error.filename is not None else ""
        advice = f" {RAISE_OPEN_FILES}" if error.errno in TOO_MANY_OPEN else ""
        return MegapipeError(f"{what}{error.strerror}.{advice}")
    if isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error):
        return MegapipeError(f"{os.strerror(errno.EMFILE)}, for torch. {RAISE_OPEN_FILES}")
    if isinstance(error, UnicodeError):
        return MegapipeError(f"text that can't be read or written: {error}.")
    if _is_out_of_memory(error):
        said = str(error).split(" Of the allocated memory")[0].splitlines()
        what = f" ({said[0].rstrip('. ')})" if said else ""
        return MegapipeError(
            f"out of memory{what}. In a training, lower train.micro_batch_size, set "
            'train.recompute = "full", or spread the model over more ranks: raise tensor or '
            "pipeline of [parallel]."
        )
    return None


def lost_connection(error: BaseException | None) -> str | None:
    """What the error says where it, or one that led to it, is what a rank gets when another one is
    gone; None for any other error."""
    while error is not None:
        text = str(error)
        lost = _comes_from(error, "torch.distributed", "DistError") or (
            isinstance(error, RuntimeError)
            and any(word in text for word in COMMUNICATION)
            and "enforce fail" not in text  # calls that don't fit together: a fault of the program
        )
        if lost or isinstance(error, ConnectionError):
            # gloo begins with the line of its source: [/gloo/transport/tcp/pair.cc:534]
            return re.sub(r"^\[\S*:\d+\] ", "", text).split("\n")[0].rstrip(". ")
        error = error.__cause__ or error.__context__
    return None


def rank_lost(name: str, said: str) -> MegapipeError:
    """The error of a rank whose connection to others is gone; `said` is from `lost_connection`."""
    return MegapipeError(
        f"{name} lost its connection to other ranks ({said}). See what ended them; the same "
        "command goes on from the newest checkpoint."
    )


def program_fault() -> str:
    """The line that follows a traceback."""
    return (
        f"megapipe: this is a fault of megapipe {__version__}, not of yours: please report it with "
        "the lines above."
    )


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or _comes_from(error, "torch", "OutOfMemoryError")
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error))
    )


def _comes_from(error: BaseException, module: str, name: str) -> bool:
    """The error is of this class, which is looked for without importing its module."""
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(error).__mro__)


def render(error: MegapipeError) -> str:
    """The message a user sees; many problems with a config are listed under their number."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        lines = [f"  {problem}" for problem in error.problems]
        return "\n".join([f"megapipe: {len(lines)} problems with the config:", *lines])
    return f"megapipe: {error.report}"
