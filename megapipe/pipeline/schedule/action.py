"""Actions and programs, and their text form, which is that of torch's pipelining CSV files."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from megapipe.errors import ScheduleError


class Kind(StrEnum):
    """What an action does with a microbatch at a stage.

    RECEIVE posts a receive into a free buffer without waiting; the action that uses the arrival
    waits. SEND hands the tensor over and may wait until its RECEIVE has been posted. A SEND names
    the stage that sends, a RECEIVE the stage that receives. OVERLAP is a forward and a backward of
    two microbatches (`Action.parts`) that may run at the same time; `lower` makes them run one
    after the other, which they also may.
    """

    FORWARD = "F"
    BACKWARD = "B"  # gradients of input and weights
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    OVERLAP = "OVERLAP_F_B"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"

    @property
    def computes(self) -> bool:
        return self in COMPUTE

    @property
    def sends(self) -> bool:
        return self in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)

    @property
    def receives(self) -> bool:
        return self in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)


COMPUTE = frozenset(
    {Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.OVERLAP}
)
LAST_OF_A_BACKWARD = frozenset({Kind.BACKWARD, Kind.BACKWARD_WEIGHT})
"""What ends a microbatch's work at a stage: its activations are freed."""

_COUNTERPART = {
    Kind.SEND_FORWARD: (1, Kind.RECEIVE_FORWARD),
    Kind.RECEIVE_FORWARD: (-1, Kind.SEND_FORWARD),
    Kind.SEND_BACKWARD: (-1, Kind.RECEIVE_BACKWARD),
    Kind.RECEIVE_BACKWARD: (1, Kind.SEND_BACKWARD),
}
_TEXT = re.compile(r"([0-9]{1,9})(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)([0-9]{1,9})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_SHARDING = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD)")
_KINDS = {str(kind): kind for kind in Kind}


class Action(NamedTuple):
    """One step of a rank: `2F0` is stage 2, forward, microbatch 0.

    An OVERLAP, `(0F4;3B1)OVERLAP_F_B`, has the stage and microbatch of its forward.
    """

    stage: int
    kind: Kind
    microbatch: int
    parts: "tuple[Action, ...]" = ()
    """Of an OVERLAP: the forward and the backward."""

    @property
    def counterpart(self) -> "Action":
        """The RECEIVE of a SEND, the SEND of a RECEIVE."""
        step, kind = _COUNTERPART[self.kind]
        return Action(self.stage + step, kind, self.microbatch)

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> "Action":
        """The action that `str` wrote. Raises ScheduleError."""
        text = text.strip()
        if match := _TEXT.fullmatch(text):
            stage, kind, microbatch = match.groups()
            return Action(int(stage), _KINDS[kind], int(microbatch))
        if pair := _PAIR.fullmatch(text):
            return overlap(*map(Action.parse, pair.groups()))
        raise ScheduleError(f"{text!r} is not an action: expected, say, 2F0 or 1SEND_B3")


def overlap(forward: Action, backward: Action) -> Action:
    """Both as one action. Raises ScheduleError for kinds that can't be."""
    backwards = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    if forward.kind is not Kind.FORWARD or backward.kind not in backwards:
        raise ScheduleError(f"{forward} and {backward} are not a forward and a backward")
    return Action(forward.stage, Kind.OVERLAP, forward.microbatch, (forward, backward))


Program = list[list[Action]]
"""For each pipeline rank, its actions in order. Idle time is what a simulation shows, no entry."""


def compute_only(program: Program) -> Program:
    """The program without its communication."""
    return [[action for action in actions if action.kind.computes] for actions in program]


def sequential(program: Program) -> Program:
    """The program with each OVERLAP as its forward and then its backward."""
    return [
        [part for action in actions for part in action.parts or (action,)] for actions in program
    ]


def stage_ranks(program: Program) -> dict[int, int]:
    """Which rank computes each stage. Raises ScheduleError where two do."""
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(sequential(program)):
        for action in actions:
            if action.kind in COMPUTE and ranks.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"stage {action.stage} is computed on rank {ranks[action.stage]} and, by "
                    f"{action}, on rank {rank}"
                )
    if sorted(ranks) != list(range(len(ranks))):
        missing = [stage for stage in range(len(ranks)) if stage not in ranks]
        raise ScheduleError(f"no rank computes stages {missing}")
    return ranks


def to_csv(program: Program) -> str:
    """One line per rank, actions between commas."""
    return "".join(",".join(map(str, actions)) + "\n" for actions in program)


def from_csv(text: str) -> Program:
    """The program that `to_csv` or torch's pipelining wrote; empty cells are idle time.

    Torch's UNSHARD, RESHARD and REDUCE_GRAD are left out: they say when sharded parameters are
    gathered and gradients reduced, which is not the pipeline's matter here. Raises ScheduleError.
    """
    return [_parse_row(line.split(",")) for line in text.splitlines() if line.strip()]


def _parse_row(cells: Iterable[str]) -> list[Action]:
    words = [word for word in map(str.strip, cells) if word and not _SHARDING.fullmatch(word)]
    return list(map(Action.parse, words))
