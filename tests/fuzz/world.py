"""One case while it runs: its folder, its random numbers, and what has been found so far."""

import shutil
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz.case import Command, Ending, Finding, script
from tests.fuzz.checks import check_ending
from tests.fuzz.files import make_removable
from tests.fuzz.runner import Runner, System
from tests.fuzz.stock import Stock
from tests.fuzz.whole import check_files, new_checkpoints, snapshot


class FilesOnly(Exception):
    """Raised at a case's first command where only its files are wanted."""


class World:
    """What the functions of `cases` are given. Every command of a case goes through `run`."""

    def __init__(
        self,
        seed: int,
        number: int,
        folder: Path,
        runner: Runner,
        stock: Stock,
        system: System,
        *,
        quick: bool = False,
        files_only: bool = False,
    ) -> None:
        self.seed, self.number, self.folder = seed, number, folder
        self.random = Random(f"{seed} {number}")
        self.stock = stock
        self.quick = quick
        self.commands: list[Command] = []
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self._runner, self._system = runner, system
        self._files_only = files_only
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)

    def run(self, command: Command) -> Ending:
        """Run a command and check what can be checked of any."""
        if self._files_only:
            raise FilesOnly
        before = snapshot(self.folder)
        ending = self._start(command)
        self.findings += check_ending(ending)
        self.findings += check_files(ending, self.folder, before)
        for checkpoint in new_checkpoints(self.folder, before)[:3]:
            seen = self._start(Command(("inspect", str(checkpoint))))
            if seen.status != 0:
                self.find("whole", f"{checkpoint.name} is there and is not whole")
        return ending

    def find(self, check: str, text: str) -> None:
        self.findings.append(Finding(check, text))

    def script(self, again: str) -> str:
        return script(self.commands, self.folder, again)

    def remove(self) -> None:
        make_removable(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, command: Command) -> Ending:
        self.commands.append(command)
        ending = self._runner.run(command, self.folder, self._system)
        self.counts[f"{command.name}{'' if self._runner.forks(command) else ' *'}"] += 1
        return ending
