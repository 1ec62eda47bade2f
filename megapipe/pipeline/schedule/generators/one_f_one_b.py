"""1F1B (PipeDream-flush; Narayanan et al. 2021): backwards as soon as they can be."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.definition import Schedule


def one_f_one_b(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / m, with min(m, p - rank) microbatches live."""
    program = []
    for rank in range(pipeline):
        forwards = [Action(rank, Kind.FORWARD, m) for m in range(microbatches)]
        backwards = [Action(rank, Kind.BACKWARD, m) for m in range(microbatches)]
        program.append(alternate(forwards, backwards, warmup=pipeline - rank - 1))
    return program


def alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


SCHEDULE = Schedule("1f1b", one_f_one_b)
