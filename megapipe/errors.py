"""What a user can cause. The command line prints these as one message, without a traceback."""


class MegapipeError(Exception):
    """A failure that the user can mend; its text names the key or file, the value, and the fix."""

    @property
    def told(self) -> str:
        """The text, and the notes of those that passed the error on, such as where in a program."""
        return "\n".join([str(self), *getattr(self, "__notes__", [])])


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


def explained(error: Exception) -> MegapipeError | None:
    """The error as one that the user can mend, where it is one; None for a fault of the program.

    Files that can't be read or written, disks that are full and text that can't be encoded are
    the user's to mend, wherever they turn up.
    """
    if isinstance(error, MegapipeError):
        return error
    if isinstance(error, OSError) and error.strerror is not None:
        what = f"{error.filename}: " if error.filename is not None else ""
        return MegapipeError(f"{what}{error.strerror}.")
    if isinstance(error, UnicodeError):
        return MegapipeError(f"text that can't be read or written: {error}.")
    return None
