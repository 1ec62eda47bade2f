"""Runs cases one after the other and prints what came of each as a line of JSON."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.cases import choose
from tests.fuzz.runner import Runner, System
from tests.fuzz.stock import make_stock
from tests.fuzz.world import FilesOnly, World


class Worker:
    """`work` is a folder of its own. Failing cases stay there, others are removed."""

    def __init__(
        self,
        work: Path,
        runner: Runner,
        system: System,
        *,
        seed: int,
        only: str | None,
        quick: bool,
    ) -> None:
        self.runner = runner
        self._system = system
        self._work, self._seed, self._only, self._quick = work, seed, only, quick
        self._stock = make_stock(work / "stock", runner)

    def run(self, number: int, *, keep: bool = False) -> dict[str, Any]:
        """One case: its number, kind, commands by name, findings and seconds."""
        began = time.monotonic()
        world = self.world(number, self._system)
        kind = choose(world.random, self._only)
        kind.run(world)
        findings = [f for f in world.findings if self._only in (None, f.check)]
        if not findings and not keep:
            world.remove()
        return {
            "case": number,
            "kind": kind.run.__name__,
            "counts": dict(world.counts),
            "findings": [[f.check, f.text] for f in findings],
            "again": self._again(number),
            "script": world.script(self._again(number)),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _again(self, number: int) -> str:
        """The command that runs a case again."""
        only = f" --only {self._only}" if self._only else ""
        quick = " --quick" if self._quick else ""
        return f"python -m tests.fuzz --seed {self._seed} --case {number}{only}{quick}"

    def world(self, number: int, system: System) -> World:
        """An empty folder for a case, and what the case needs."""
        folder = self._work / f"case-{number}"
        return World(
            self._seed, number, folder, self.runner, self._stock, system, quick=self._quick
        )

    def make_files(self, number: int, folder: Path) -> None:
        """The files of a case as they are before its first command."""
        world = World(
            self._seed,
            number,
            folder,
            self.runner,
            self._stock,
            self._system,
            quick=self._quick,
            files_only=True,
        )
        with contextlib.suppress(FilesOnly):
            choose(world.random, self._only).run(world)


@contextlib.contextmanager
def open_worker(
    work: Path, system: System, *, seed: int, only: str | None, quick: bool
) -> Iterator[Worker]:
    """A worker with a server of its own."""
    work.mkdir(parents=True, exist_ok=True)
    with Runner(work) as runner:
        yield Worker(work, runner, system, seed=seed, only=only, quick=quick)


def work_through(worker: Worker, numbers: Iterator[int], end: float) -> None:
    """Cases until the numbers or the time are used up, a line for each."""
    print(json.dumps({"isolated": worker.runner.isolated}), flush=True)
    for number in numbers:
        if time.monotonic() >= end:
            return
        print(json.dumps(worker.run(number)), flush=True)
