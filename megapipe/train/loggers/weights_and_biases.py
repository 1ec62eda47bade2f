"""Weights & Biases, which may be slow, away or broken without the training noticing.

A process of its own (follow.py) reads metrics.jsonl and hands it on. So the start waits for nothing
(an online start takes seconds, and minutes where the server can't be reached), no step waits,
W&B's signal and exit hooks stay out of the training, and a run that is killed still gets its last
lines across. Both cost a second Python, about 100 MB on the machine of rank 0.

All starts of a run are one curve: they share the id in <train.run_dir>/wandb-id.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megapipe.config import Config
from megapipe.files import replace_durably
from megapipe.train.loggers import follow
from megapipe.train.loggers.jsonl import MetricsFile
from megapipe.train.loggers.wandb_environment import Choice
from megapipe.train.metrics import SERIES, Metrics

INIT_SECONDS = 8.0
"""For the server to answer at the start, while training is under way, before W&B writes offline."""
UPLOAD_SECONDS = 15.0
"""For the upload to end after training."""
CLOSE_SECONDS = 30.0
"""Longest wait at the end of a run, whatever hangs."""


class WeightsAndBiases:
    """The process that follows metrics.jsonl, and what it has to say."""

    def __init__(
        self,
        config: Config,
        choice: Choice,
        run_dir: Path,
        step: int,
        file: MetricsFile,
        event: Callable[[str], None],
    ) -> None:
        self._event = event
        self._text = b""
        self._dead = False
        with file.path.open("rb") as lines:
            order = _order(config, choice, run_dir, step, file.kept.last_step, lines.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", follow.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[lines.fileno()],
                start_new_session=True,  # Ctrl-C is for the training
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._words = self._process.stdin, self._process.stdout
        os.set_blocking(self._words.fileno(), False)
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()

    def log(self, metrics: Metrics) -> None:
        """The line is in metrics.jsonl already; pass on what the process has to say. No waiting."""
        self._listen()

    def picture(self, path: Path, step: int) -> None:
        """Show a PNG beside the metrics; it goes along with the next row. No waiting."""
        with suppress(BrokenPipeError):
            self._orders.write(json.dumps({"picture": str(path), "step": step}).encode() + b"\n")
            self._orders.flush()

    def close(self, failed: bool) -> None:
        """Wait until W&B has everything, but not for long; not at all if training failed.

        A process that is not waited for hands the rest over by itself.
        """
        with suppress(BrokenPipeError):  # it ended before, and said why
            self._orders.write(b"failed\n" if failed else b"done\n")
            self._orders.close()
        deadline = time.monotonic() + (0 if failed else CLOSE_SECONDS)
        while self._process.poll() is None and time.monotonic() < deadline:
            self._listen()
            time.sleep(0.05)
        self._listen()
        if self._process.poll() is None and not failed:
            self._process.kill()
            self._process.wait()
            self._event(f"W&B did not end within {CLOSE_SECONDS:.0f} s and was ended.")
        self._words.close()

    def _listen(self) -> None:
        self._text += self._words.read() or b""
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            self._event(line.decode(errors="replace"))
        status = self._process.poll()
        if status and not self._dead:  # status 0: it said why, or all is done
            self._dead = True
            self._event(f"W&B's process died (status {status}); the run goes on without it.")


def _order(
    config: Config, choice: Choice, run_dir: Path, step: int, last_step: int, descriptor: int
) -> follow.Order:
    anew = step == 0 and config.checkpoint.resume == "never"
    id_, known = _run_id(run_dir / "wandb-id", anew)
    return {
        "mode": choice.mode,
        "id": id_,
        "project": choice.project,
        "name": choice.name,
        "run_dir": str(run_dir),
        "metrics": descriptor,
        "config": config.model_dump(mode="json"),
        "series": SERIES,
        "step": step,
        "first": last_step + 1 if known else 1,
        "init_seconds": INIT_SECONDS,
        "upload_seconds": UPLOAD_SECONDS,
    }


def _run_id(path: Path, anew: bool) -> tuple[str, bool]:
    """The id of this run in W&B, and whether an earlier start of the run made it."""
    known = "" if anew else _read(path)
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        return known, True
    made = secrets.token_hex(8)
    replace_durably(path, [made.encode()])
    return made, False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""
