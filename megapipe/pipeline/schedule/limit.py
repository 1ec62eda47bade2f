"""How much a rank may hold for backward passes to come, and what programs hold.

An activation lives from the begin of its forward to the end of its backward, or of its weight
gradient where that is apart: the order of a rank's actions says how many it holds, whatever they
take. A limit is in microbatches of a full rank (all of its chunks) or in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import LAST_OF_A_BACKWARD, Kind, Program, sequential

KEY = "parallel.activation_limit"
ROUNDING = 1e-9
"""Sums of sizes may exceed the limit by this share, which is what adding them may cost."""


class Memory(NamedTuple):
    """An amount of bytes, and the `text` by which the config gives it."""

    bytes: float
    text: str


@dataclass(frozen=True)
class Limit:
    """`sizes` is what one microbatch takes at each stage, `most` what a rank may hold, in bytes or
    in microbatches of a full rank, and `value` the same as the config has it."""

    sizes: tuple[float, ...]
    most: float
    value: str
    bytes: bool = False

    @staticmethod
    def in_microbatches(most: float, pipeline: int, virtual: int) -> "Limit":
        return Limit((1 / virtual,) * (pipeline * virtual), most, f"{most:.15g}")

    @staticmethod
    def in_bytes(most: Memory, sizes: Sequence[float]) -> "Limit":
        """`sizes` in bytes, by stage."""
        return Limit(tuple(sizes), most.bytes, f'"{most.text}"', bytes=True)

    @property
    def ceiling(self) -> float:
        """What a sum of sizes must not exceed."""
        return self.most * (1 + ROUNDING)

    def least(self, ranks: Sequence[int]) -> float:
        """What any schedule needs: a microbatch's activations at all stages of a rank live at one
        time, when its loss is computed."""
        held = [0.0] * (max(ranks) + 1)
        for stage, rank in enumerate(ranks):
            held[rank] += self.sizes[stage]
        return max(held)

    def show(self, amount: float) -> str:
        """An amount for people, rounded up to two digits: a limit of that much is enough."""
        unit, name = 1.0, ""
        if self.bytes:
            unit, name = (2.0**30, " GiB") if amount >= 2**30 else (2.0**20, " MiB")
        return f"{ceil(amount / unit * 100 - 1e-6) / 100:g}{name}"

    def written(self, amount: float) -> str:
        """As `show`, with what is counted."""
        text = self.show(amount)
        return text if self.bytes else f"{text} microbatch{'es' * (text != '1')}"


def peak_amounts(program: Program, sizes: Sequence[float]) -> list[float]:
    """The most that each rank of a program holds, a microbatch at stage s taking `sizes[s]`."""
    found, forward = [], Kind.FORWARD
    for actions in sequential(program):
        live = most = 0.0
        for stage, kind, _, _ in actions:
            if kind is forward:
                live += sizes[stage]
                if live > most:
                    most = live
            elif kind in LAST_OF_A_BACKWARD:
                live -= sizes[stage]
        found.append(most)
    return found


def check_least(limit: Limit, ranks: Sequence[int]) -> None:
    """Raises ScheduleError for a limit below what any schedule needs, with the least possible."""
    least = limit.least(ranks)
    if least > limit.ceiling:
        raise ScheduleError(
            f"{KEY} = {limit.value} is below what any schedule needs: the activations of one "
            f"microbatch at all stages of a rank. Raise it to at least {limit.show(least)}"
            + (", lower train.micro_batch_size, or recompute more." if limit.bytes else ".")
        )
