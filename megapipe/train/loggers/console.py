"""Progress for people: a bar on a terminal, else one plain line every few steps."""

import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from megapipe.train.metrics import Metrics

_WINDOW = 64
"""Steps over which the time of a step is smoothed, saves and validations in between included."""


class Eta:
    """Seconds that the rest of the run takes at the pace of its last steps."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_steps
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    def after(self, metrics: Metrics) -> float:
        """Call it once after each step. The first, often slow, counts only until the second."""
        self._ends.append(self._clock())
        steps = len(self._ends) - 1
        pace = (self._ends[-1] - self._ends[0]) / steps if steps else metrics.step_seconds
        return pace * (self._total - metrics.step)


class PlainConsole:
    """Lines without control characters, every `every` steps and after the last."""

    def __init__(self, total_steps: int, every: int, say: Callable[[str], None], eta: Eta) -> None:
        self._total, self._every = total_steps, every
        self._say, self._eta = say, eta

    def log(self, metrics: Metrics) -> None:
        seconds = self._eta.after(metrics)
        last = metrics.step == self._total
        if last or metrics.step % self._every == 0 or metrics.validation_loss is not None:
            self.event(plain_line(metrics, self._total, seconds))

    def event(self, text: str) -> None:
        self._say(text)

    def close(self, failed: bool) -> None:
        """Nothing to do."""


class BarConsole:
    """One line at the bottom of a terminal that follows the run; events scroll by above it."""

    def __init__(self, step: int, total_steps: int, console: Console, eta: Eta) -> None:
        self._console = console
        self._eta = eta
        self._step, self._total = step, total_steps
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None

    def log(self, metrics: Metrics) -> None:
        text = bar_text(metrics, self._eta.after(metrics))
        if self._task is None:
            self._task = self._progress.add_task(
                "", completed=self._step, total=self._total, text=""
            )
            self._progress.start()
        self._progress.update(self._task, completed=metrics.step, text=text)
        if metrics.validation_loss is not None:
            self.event(f"step {metrics.step}: validation loss {metrics.validation_loss:.4f}")

    def event(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, failed: bool) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()


def open_console(
    step: int, total_steps: int, every: int, say: Callable[[str], None] | None
) -> PlainConsole | BarConsole:
    """A bar where standard output is a terminal that can show one, else (or to `say`) lines."""
    eta = Eta(total_steps)
    if say is None and sys.stdout.isatty():
        console = Console(file=sys.stdout)
        if not console.is_dumb_terminal:
            return BarConsole(step, total_steps, console, eta)
    return PlainConsole(total_steps, every, say or _print, eta)


def _print(text: str) -> None:
    print(text, flush=True)


# --- How quantities look -------------------------------------------------------------------------


def plain_line(metrics: Metrics, total_steps: int, eta: float) -> str:
    """`step 20/200  loss 3.2145  grad norm 0.83  rate 3.0e-04  12.3k tokens/s  ...`"""
    parts = [
        f"step {metrics.step}/{total_steps}",
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.2f}",
        f"rate {metrics.learning_rate:.1e}",
        f"{short(metrics.tokens_per_second)} tokens/s",
        *_machine(metrics, mfu_digits=1, memory="memory "),
        f"ETA {duration(eta)}",
    ]
    if metrics.validation_loss is not None:
        parts.append(f"validation loss {metrics.validation_loss:.4f}")
    return "  ".join(parts)


def bar_text(metrics: Metrics, eta: float) -> str:
    """What stands right of the bar, short enough for a terminal of 80 columns."""
    parts = [
        f"loss {metrics.loss:.4f}",
        f"{short(metrics.tokens_per_second)} tok/s",
        *_machine(metrics, mfu_digits=0),
        f"ETA {duration(eta)}",
    ]
    return "  ".join(parts)


def _machine(metrics: Metrics, mfu_digits: int, memory: str = "") -> list[str]:
    mfu = [] if metrics.mfu is None else [f"MFU {metrics.mfu:.{mfu_digits}%}"]
    gib = metrics.memory_bytes / 2**30
    return [*mfu, f"{memory}{gib:.{int(gib < 10)}f} GiB"]


def short(number: float) -> str:
    """Three digits: `823`, `12.3k`, `1.20M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor * 0.9995:
            scaled = number / factor
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`0:07`, `1:02:03`, `3 d 4 h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
