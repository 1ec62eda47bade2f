"""`megapipe`: finds the command, runs it, and turns what went wrong into one message.

A command is a file of this folder with `run(argv) -> int`, imported when it is chosen, so that
`megapipe --help` costs nothing.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from megapipe import __version__
from megapipe.errors import MegapipeError, explained, program_fault, render
from megapipe.tools.console import PIPE_CLOSED, OutputError, console

COMMANDS = {
    "train": "pretrain the model of a config; --dry-run shows what would run where",
    "verify": "check that a config's layout computes what one process computes",
    "plan": "draw a config's pipeline schedule, or compare all schedules, without running",
    "tokenizer": "train a tokenizer on text files, or look into one",
    "data": "what the data of a config holds; which rows a step saw or will see",
    "convert": "bring a model in from Hugging Face, or take one out",
    "export": "write the newest checkpoint of a run as a Hugging Face directory",
    "merge": "average checkpoints",
    "inspect": "what is in a checkpoint, and is it whole; how two differ",
    "generate": "continue a text with a checkpoint",
    "bench": "measure speed on this machine",
    "schema": "print the JSON schema of config files, for editors",
}
ALLOCATOR_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
)
"""What configures torch's allocator; torch reads the first of them that is set."""
MOVES_BYTES = ("convert", "export", "merge")
"""Commands that fill and drop large tensors all the time."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Has torch ask for huge pages on CPUs: a fresh tensor then takes a 500th of the page faults, which
cost as much as the writing of it."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 only where everything asked for was done and said."""
    words = list(sys.argv[1:] if argv is None else argv)
    _settle_allocator()
    if words[:1] and words[0] in MOVES_BYTES:
        os.environ.setdefault(HUGE_PAGES, "1")
    _settle_umask()
    with console(lasting=_trains(words)):
        try:
            status = _run(words)
            sys.stdout.flush()
            return status
        except OutputError as error:
            if error.reader_left:  # `| head` has seen enough
                return PIPE_CLOSED
            return _tell(render(error))
        except KeyboardInterrupt:
            _tell("megapipe: interrupted")
            return INTERRUPTED
        except Exception as error:
            told = explained(error)
            if told is not None:
                return _tell(render(told))
            traceback.print_exc()
            return _tell(program_fault())


def _settle_umask() -> None:
    """Leave the owner all rights to what the command creates: it has to read and replace that."""
    os.umask(os.umask(0o077) & 0o077)


def _trains(words: Sequence[str]) -> bool:
    """The command is a training, whose purpose is not what it prints."""
    return words[:1] == ["train"] and not {"--dry-run", "--help", "-h"} & set(words)


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if words[0] in ("--version", "-V"):
        print(f"megapipe {__version__}")
        return 0
    _check_current_directory()
    return _command(words[0])(words[1:])


def _check_current_directory() -> None:
    """Paths start there, and libraries end the process without it."""
    try:
        os.getcwd()
    except OSError as error:
        raise MegapipeError(
            f"the current directory can't be used ({error.strerror}): it was removed, or is closed "
            "to this user. Change to another one, for example with cd ~."
        ) from error


def _tell(text: str) -> int:
    """Say why the command ends; returns the exit status for that."""
    print(text, file=sys.stderr, flush=True)
    return 1


def _settle_allocator() -> None:
    """Have torch's allocator grow its blocks, unless the user has set it in any way. It then needs
    no new blocks of other sizes, so it rarely frees any, for which a GPU waits. torch reads this
    once, when it is imported."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def help_text() -> str:
    """What `megapipe --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "Pretrain GPT models under tensor, pipeline and data parallelism.",
            "",
            "usage: megapipe COMMAND ...",
            "       megapipe COMMAND --help      (train --help lists every key of a config)",
            "       megapipe --version",
            "",
            "commands:",
            *lines,
        ]
    )


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name not in COMMANDS:
        from megapipe.tools.arguments import unknown_command

        options = ("--help", "--version")
        raise MegapipeError(unknown_command(name, "a command", "megapipe", COMMANDS, options))
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"megapipe.tools.{name}").run
    return run
