"""Writing down a rank's program as phases: so many times these actions, then those."""

from collections import Counter, deque

from megapipe.pipeline.schedule.action import Action, Kind, overlap

B, I, W = Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741

Step = tuple[int, Kind]
"""Stage and kind; microbatches are counted."""


class Counting:
    """Collects actions, each with the next microbatch of its stage and kind.

    A full backward counts as an input gradient and a weight gradient.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._done: Counter[Step] = Counter()
        self._pending: deque[int] = deque()  # stages whose weight gradients are to come

    def __call__(self, times: int, *steps: Step | tuple[Step, Step]) -> None:
        """`times` times the steps in order; a pair of steps is one OVERLAP."""
        for _ in range(times):
            for step in steps:
                if isinstance(step[0], tuple):
                    forward, backward = step
                    self.actions.append(overlap(self._next(forward), self._next(backward)))
                else:
                    self.actions.append(self._next(step))

    def oldest_weight_grad(self) -> None:
        """The weight gradient that has waited longest."""
        self(1, (self._pending[0], W))

    def count(self, stage: int, kind: Kind) -> int:
        """How many microbatches have done this."""
        return self._done[stage, kind]

    def _next(self, step: Step) -> Action:
        stage, kind = step
        if kind is B:
            microbatch = self._done[stage, I]
            self._done[stage, I] += 1
            self._done[stage, W] += 1
        else:
            microbatch = self._done[step]
            self._done[step] += 1
        if kind is I:
            self._pending.append(stage)
        elif kind is W:
            self._pending.remove(stage)
        return Action(stage, kind, microbatch)
