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
