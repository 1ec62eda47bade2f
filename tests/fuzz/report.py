"""What a run of the fuzzer has tried and found, for people."""

import json
import threading
from collections import Counter
from typing import IO, Any


class Report:
    """Gathers the lines of all workers. Findings are printed as they come."""

    def __init__(self) -> None:
        self.findings: Counter[str] = Counter()
        self._cases = 0
        self._commands: Counter[str] = Counter()
        self._unwatched = False
        self._lock = threading.Lock()

    def read(self, lines: IO[str]) -> None:
        """Take in a worker's lines until it has ended."""
        for line in lines:
            with self._lock:
                self._add(json.loads(line))

    def _add(self, answer: dict[str, Any]) -> None:
        if "isolated" in answer:
            self._unwatched |= not answer["isolated"]
            return
        self._cases += 1
        self._commands.update(answer["counts"])
        for check, text in answer["findings"]:
            self.findings[check] += 1
            print(f"{check}: case {answer['case']} ({answer['kind']}): {text}", flush=True)
        if answer["findings"]:
            print(f"  again: {answer['again']}\n{_indented(answer['script'])}", flush=True)

    def table(self) -> str:
        """Commands by name: started as programs, and forked from a warmed process."""
        names = sorted({name.removesuffix(" *") for name in self._commands})
        lines = [f"{'command':<20}{'started':>9}{'forked':>9}"]
        rows = [(name, self._commands[f"{name} *"], self._commands[name]) for name in names]
        started = sum(row[1] for row in rows)
        forked = sum(row[2] for row in rows)
        for name, real, warm in [*rows, ("all", started, forked)]:
            lines.append(f"{name:<20}{real:>9}{warm:>9}")
        found = ", ".join(f"{count} {check}" for check, count in self.findings.items())
        lines.append(f"{self._cases} cases; findings: {found or 'none'}")
        if self._unwatched:
            lines.append("network: not watched, since no network namespace could be made here")
        return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
