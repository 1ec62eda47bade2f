"""What people see of a run."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megapipe.train.loggers import Loggers
from megapipe.train.loggers.console import (
    BarConsole,
    Eta,
    PlainConsole,
    duration,
    open_console,
    plain_line,
    short,
)
from tests.train.samples import TOTAL, config, sample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def one_second_steps(total_steps: int) -> Eta:
    return Eta(total_steps, clock=iter(range(1000)).__next__)


# --- Plain lines ---------------------------------------------------------------------------------


def test_a_plain_line() -> None:
    assert plain_line(sample(4), 20, eta=83) == (
        "step 4/20  loss 4.6000  grad norm 1.50  rate 3.0e-04  12.3k tokens/s  memory 1.5 GiB  "
        "ETA 1:23"
    )
    assert plain_line(replace(sample(5), mfu=0.4567), 20, eta=0) == (
        "step 5/20  loss 4.5000  grad norm 1.50  rate 3.0e-04  12.3k tokens/s  MFU 45.7%  "
        "memory 1.5 GiB  ETA 0:00  validation loss 4.2500"
    )


def test_a_pipe_gets_plain_text_every_few_steps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = config('wandb = "off"\nevery = 8')
    with Loggers(few, run_dir=tmp_path, rank0=True, start=0, total_steps=TOTAL) as loggers:
        for step in range(1, TOTAL + 1):
            loggers.log(sample(step))
        loggers.event("[bold]Saved[/bold] \\[it]")
    out, err = capfd.readouterr()
    assert err == ""
    assert out.isprintable() or set(out) - {"\n"} <= set(map(chr, range(32, 127)))
    lines = out.splitlines()
    assert lines[0] == f"Run directory: {tmp_path}, with a line for each step in metrics.jsonl"
    shown = [line.split()[1] for line in lines if line.startswith("step ")]
    assert shown == ["5/20", "8/20", "10/20", "15/20", "16/20", "20/20"]  # validated at 5, 10, ...
    assert lines[-1] == "[bold]Saved[/bold] \\[it]"


# --- The bar -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_and_shows_everything(width: int) -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=width)
    bar = BarConsole(100_000, 500_000, console, one_second_steps(500_000))
    bar.event("before the bar")
    busy = replace(
        sample(123_456), loss=12.3456, mfu=0.4567, tokens_per_second=1.23e6, memory_bytes=75 * 2**30
    )
    bar.log(busy)
    bar.event("Saved [red]it[/red]")
    bar.log(replace(busy, step=123_460, validation_loss=3.5))
    bar.close(failed=False)
    drawn = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row)
        for row in re.split("[\r\n]+", terminal.getvalue())
    ]
    assert max(map(len, drawn)) <= width
    assert drawn[0] == "before the bar"
    assert "Saved [red]it[/red]" in drawn
    assert "step 123460: validation loss 3.5000" in drawn
    last = [row for row in drawn if row.startswith("step 123460/500000")][-1]
    assert "loss 12.3456  1.23M tok/s  MFU 46%  75 GiB  ETA 4 d 8 h" in last
    assert "━" in last


def test_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(open_console(0, TOTAL, 1, say=None), BarConsole)
    assert isinstance(open_console(0, TOTAL, 1, say=print), PlainConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(0, TOTAL, 1, say=None), PlainConsole)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours are not a terminal
    assert isinstance(open_console(0, TOTAL, 1, say=None), PlainConsole)


# --- Quantities ----------------------------------------------------------------------------------


def test_eta_follows_the_pace_and_forgets_a_slow_first_step() -> None:
    now = 0.0
    eta = Eta(1000, clock=lambda: now)
    now = 60.0
    assert eta.after(replace(sample(1), step_seconds=60.0)) == 60.0 * 999
    for step in range(2, 301):
        now += 2.0 if step <= 100 else 1.0  # it becomes faster
        left = eta.after(sample(step))
        if step == 2:
            assert left == 2.0 * 998
    assert left == 1.0 * 700


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (823.4, "823"), (999.6, "1.00k"), (12345, "12.3k"), (123456, "123k"),
     (999_999, "1.00M"), (1.2e6, "1.20M"), (3.45e9, "3.45G")],
)  # fmt: skip
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (3723, "1:02:03"), (86399, "23:59:59"),
     (100 * 3600, "4 d 4 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
