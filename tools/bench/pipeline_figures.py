"""The figures of `megapipe bench pipeline`: from the ranks' reports to bubble and overhead."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

from megapipe.pipeline.schedule import Action, Kind, Program, build_program, simulate

INPUT_GRADS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
"""What the stage before waits for."""


class Cell(NamedTuple):
    """What is measured together: one row of the table."""

    ranks: int
    unit_ms: float
    schedule: str
    virtual: int
    microbatches: int

    def __str__(self) -> str:
        return (
            f"{self.schedule}, p={self.ranks}, v={self.virtual}, m={self.microbatches}, "
            f"{self.unit_ms:g} ms"
        )

    def program(self) -> Program:
        """Raises ScheduleError where there is none."""
        return build_program(
            self.schedule,
            pipeline=self.ranks,
            virtual=self.virtual,
            microbatches=self.microbatches,
        )

    def order(self) -> dict[str, Any]:
        """For the worker; the unit, of a stage, in seconds."""
        return {
            "schedule": self.schedule,
            "virtual": self.virtual,
            "microbatches": self.microbatches,
            "unit": self.unit_ms / 1000,
        }

    def bubble(self) -> float:
        """Simulated, with F = I = W and messages that take no time."""
        return simulate(self.program()).bubble

    def seconds(self) -> float:
        """Of a step, as it would be without overhead."""
        actions = self.microbatches * self.virtual
        return 3 * actions * (1 + self.bubble()) * self.unit_ms / 1000


class MeasuredStep(NamedTuple):
    """One step of one contender, in seconds. `simulated` is how long its program takes if every
    action takes what it took in the stage, and all else nothing."""

    seconds: float
    simulated: float
    busy: float
    """Time within the stages, the mean of the ranks: what a step would take without bubble."""
    actions: int
    """Compute actions on the rank that has most."""
    units: dict[str, float]
    """Mean time of an action, by kind."""

    @property
    def bubble(self) -> float:
        return self.seconds / self.busy - 1

    @property
    def overhead(self) -> float:
        """Seconds for each action of the longest rank."""
        return (self.seconds - self.simulated) / self.actions


def replay(program: Program, took: Mapping[Action, float]) -> float:
    """How long the program takes if each action takes what it took, and all else nothing.

    `simulate` has one cost for a stage and kind. With means a sleep that happened to last long
    would count as overhead, so here each action has its own.
    """
    inputs = {(a.stage, a.microbatch): a for row in program for a in row if a.kind in INPUT_GRADS}
    ends: dict[Action | None, float] = {None: 0.0}

    def need(action: Action) -> Action | None:
        if action.kind is Kind.FORWARD and action.stage > 0:
            return action._replace(stage=action.stage - 1)
        if action.kind in INPUT_GRADS:
            return inputs.get((action.stage + 1, action.microbatch))
        return None

    free = [0.0] * len(program)
    rows = [deque(row) for row in program]
    while any(rows):
        for rank, row in enumerate(rows):
            while row and (needed := need(row[0])) in ends:
                free[rank] = max(free[rank], ends[needed]) + took[row[0]]
                ends[row.popleft()] = free[rank]
    return max(free)


def measured(answers: Sequence[dict[str, Any]]) -> MeasuredStep:
    """The step that all ranks report; see pipeline_worker.py for what they say."""
    program = [[Action.parse(text) for text in answer["actions"]] for answer in answers]
    took = {
        action: seconds
        for actions, answer in zip(program, answers, strict=True)
        for action, seconds in zip(actions, answer["took"], strict=True)
    }
    by_kind: dict[str, list[float]] = {}
    for action, seconds in took.items():
        by_kind.setdefault(action.kind, []).append(seconds)
    return MeasuredStep(
        seconds=max(answer["end"] for answer in answers)
        - min(answer["begin"] for answer in answers),
        simulated=replay(program, took),
        busy=sum(took.values()) / len(program),
        actions=max(map(len, program)),
        units={kind: fmean(seconds) for kind, seconds in sorted(by_kind.items())},
    )


@dataclass
class Steps:
    """A contender's steps in one cell, or why it `refused`."""

    refused: str | None = None
    steps: list[MeasuredStep] = field(default_factory=list)

    def add(self, step: MeasuredStep) -> None:
        self.steps.append(step)

    @property
    def bubble(self) -> float:
        return median(step.bubble for step in self.steps)

    @property
    def overhead(self) -> float:
        return median(step.overhead for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        if self.refused:
            return {"refused": self.refused}
        return {
            "bubble": self.bubble,
            "overhead_per_action": self.overhead,
            "actions": self.steps[0].actions,
            "steps": [
                step._asdict() | {"bubble": step.bubble, "overhead_per_action": step.overhead}
                for step in self.steps
            ],
        }


@dataclass
class CellResults:
    """A cell with what each contender did in it, by name."""

    cell: Cell
    contenders: dict[str, Steps]

    @property
    def ratio(self) -> float | None:
        """Our overhead over theirs; None without theirs, or where it is lost in the noise."""
        ours, *theirs = self.contenders.values()
        if not theirs or theirs[0].refused or theirs[0].overhead <= 0:
            return None
        return ours.overhead / theirs[0].overhead

    def as_json(self) -> dict[str, Any]:
        return {
            **self.cell._asdict(),
            "simulated_bubble": self.cell.bubble(),
            "overhead_ratio": self.ratio,
            "contenders": {name: steps.as_json() for name, steps in self.contenders.items()},
        }


def print_table(rows: Sequence[CellResults], contenders: Sequence[str]) -> None:
    """Medians, and for the step also the extremes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="overhead: ms per action beyond the simulation with the measured times")
    for name in ("p", "unit\nms", "schedule", "v", "m", "bubble\nsimulated"):
        table.add_column(name, no_wrap=True)
    for what in ("bubble", "overhead"):
        for name in contenders:
            table.add_column(f"{what}\n{name}", justify="right", no_wrap=True)
    if len(contenders) > 1:
        table.add_column("\nratio", justify="right", no_wrap=True)
    for name in contenders:
        table.add_column(f"step: min med max\n{name}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, len(contenders) > 1))
    Console(width=150).print(table)


def _cells(row: CellResults, compares: bool) -> list[str]:
    cell, all_steps = row.cell, row.contenders.values()
    words = [str(cell.ranks), f"{cell.unit_ms:g}", cell.schedule, str(cell.virtual)]
    words += [str(cell.microbatches), f"{cell.bubble():.3f}"]
    words += ["" if steps.refused else f"{steps.bubble:.3f}" for steps in all_steps]
    words += ["" if steps.refused else f"{steps.overhead * 1000:.3f}" for steps in all_steps]
    if compares:
        words.append("" if row.ratio is None else f"{row.ratio:.2f}")
    return words + [_spread(steps) for steps in all_steps]


def _spread(steps: Steps) -> str:
    times = [step.seconds * 1000 for step in steps.steps]
    return "" if steps.refused else f"{min(times):.0f} {median(times):.0f} {max(times):.0f}"
