"""GPipe (Huang et al. 2019): all forwards, then all backwards."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.definition import Schedule


def gpipe(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / m; every microbatch's activations are live at once."""
    return [
        [
            Action(rank, kind, m)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for m in range(microbatches)
        ]
        for rank in range(pipeline)
    ]


SCHEDULE = Schedule("gpipe", gpipe)
