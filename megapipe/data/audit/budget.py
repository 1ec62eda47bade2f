"""How much of each source a run reads, and how often: by weights, phases and changes of files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from megapipe.data.order.timeline import Phase, phase_at


class FileTokens(NamedTuple):
    """Tokens of files that join a source behind step `joins` and leave it behind step `leaves`."""

    tokens: int
    joins: int
    leaves: int | None


@dataclass(frozen=True)
class Supply:
    """What a source has, and what max_epochs asks for."""

    files: Sequence[FileTokens]
    max_epochs: int | None
    after_max_epochs: Literal["error", "end"]

    def tokens(self, step: int) -> int:
        """In an epoch of the batch behind step `step`."""
        return sum(
            part.tokens
            for part in self.files
            if part.joins <= step and (part.leaves is None or step < part.leaves)
        )


@dataclass
class BudgetUse:
    """What a run takes of a source: tokens, passes, and the step behind which max_epochs ends it.
    `ran_dry`: a phase asks for it while no file of it has text."""

    tokens: float = 0.0
    epochs: float = 0.0
    ends_after: int | None = None
    ran_dry: bool = False

    def take(self, tokens: float, size: int) -> None:
        """Read so many tokens while an epoch has `size` of them."""
        self.ran_dry |= not size and tokens > 0
        if size:
            self.tokens += tokens
            self.epochs += tokens / size


@dataclass
class RunUse:
    """`uses` by the name of the source; `stops`: the step behind which the run stops, and the
    source whose max_epochs is why."""

    uses: dict[str, BudgetUse]
    stops: tuple[int, str] | None = None

    def share(self, name: str) -> float:
        """Of all tokens of the run."""
        total = sum(use.tokens for use in self.uses.values())
        return self.uses[name].tokens / total if total else 0.0


def plan_budget(
    supplies: Mapping[str, Supply], phases: Sequence[Phase], steps: int, tokens_per_step: int
) -> RunUse:
    """Goes through the run from change to change. The streams end a source at about the same step,
    so where max_epochs takes effect is known to about a document of each."""
    budget = RunUse({name: BudgetUse() for name in supplies})
    ended: set[str] = set()
    borders = {border for border in _borders(supplies, phases) if border < steps}
    for begin, end in pairwise(sorted({0, steps} | borders)):
        now = float(begin)
        sizes = {name: supply.tokens(begin) for name, supply in supplies.items()}
        while now < end and budget.stops is None:
            weights = _left(phase_at(phases, begin).weights, ended)
            if not weights:
                budget.stops = (math.ceil(now), max(ended))
                break
            speeds = {name: weight * tokens_per_step for name, weight in weights.items()}
            lasts = {
                name: _lasts(budget.uses[name], supplies[name], sizes[name], speed)
                for name, speed in speeds.items()
            }
            first = min(lasts, key=lasts.__getitem__)
            passed = min(lasts[first], end - now)
            for name, speed in speeds.items():
                budget.uses[name].take(speed * passed, sizes[name])
            now += passed
            if passed == lasts[first]:
                ended.add(first)
                budget.uses[first].ends_after = math.ceil(now)
                if supplies[first].after_max_epochs == "error":
                    budget.stops = (math.ceil(now), first)
    return budget


def _lasts(use: BudgetUse, supply: Supply, size: int, speed: float) -> float:
    """Steps until max_epochs ends a source that is read with a speed in tokens per step."""
    if supply.max_epochs is None or not size:
        return math.inf
    return max(0.0, supply.max_epochs - use.epochs) * size / speed


def _borders(supplies: Mapping[str, Supply], phases: Sequence[Phase]) -> set[int]:
    steps = {phase.after_step for phase in phases}
    files = [file for supply in supplies.values() for file in supply.files]
    steps |= {file.joins for file in files}
    return steps | {file.leaves for file in files if file.leaves is not None}


def _left(weights: Mapping[str, float], ended: set[str]) -> dict[str, float]:
    left = {name: weight for name, weight in weights.items() if name not in ended}
    total = sum(left.values())
    return {name: weight / total for name, weight in left.items()}
