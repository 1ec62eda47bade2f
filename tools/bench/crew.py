"""Processes that wait for the word to take a step, so that contenders can take turns.

A crew is the ranks of one contender. All crews live at once; only one works at a time, which puts
the machine's ups and downs on all of them alike.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapipe.errors import MegapipeError


class Crew:
    """The processes of one contender; a context manager that ends them.

    Each runs `module` and gets `spec` as JSON, with its rank and a file for the rendezvous added.
    """

    def __init__(
        self,
        name: str,
        ranks: int,
        spec: Mapping[str, Any],
        folder: Path,
        module: str = "megapipe.tools.bench.worker",
    ) -> None:
        self.name, self.ranks, self._module = name, ranks, module
        self._logs = [folder / f"{name}-{rank}.log" for rank in range(ranks)]
        self._workers = [
            self._start(dict(spec) | {"rank": rank, "store": str(folder / f"{name}.store")})
            for rank in range(ranks)
        ]

    def _start(self, spec: dict[str, Any]) -> subprocess.Popen[str]:
        with self._logs[spec["rank"]].open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self._module, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def wait_until_ready(self) -> dict[str, Any]:
        """What rank 0 says of itself once all ranks have built their model."""
        return self._answers()[0]

    def step(self) -> tuple[float, list[dict[str, Any]]]:
        """One step on all ranks: its seconds, and each rank's report."""
        began = time.perf_counter()
        answers = self.order({})
        return time.perf_counter() - began, answers

    def order(self, what: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Have all ranks do what their worker understands by this; each rank's report."""
        line = json.dumps(what) + "\n"
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(line)
            worker.stdin.flush()
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank, worker in enumerate(self._workers):
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                said = self._logs[rank].read_text().replace(f"[rank{rank}]:", "").split("\n")
                last = next(filter(None, map(str.strip, reversed(said))), "no message")
                raise MegapipeError(f"bench: rank {rank} of {self.name} ended: {last}")
            answers.append(json.loads(line))
        return answers

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()
