"""Programs that no generator makes: hand-written, split into input and weight gradients, random."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

from megapipe.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Program,
    build_program,
    forward_program,
    from_csv,
)
from megapipe.pipeline.schedule.generators.zb_h1 import defer_weight_grads
from megapipe.pipeline.schedule.placement import looped

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def make(name: str, pipeline: int, virtual: int, microbatches: int) -> Program:
    if name == "forward":
        return forward_program(looped(pipeline, virtual), microbatches)
    return build_program(name, pipeline=pipeline, virtual=virtual, microbatches=microbatches)


def parse(*rows: str) -> Program:
    """A program from one string of words per rank."""
    return from_csv("".join(",".join(row.split()) + "\n" for row in rows))


def split_backwards(program: Program, delay: int) -> Program:
    """Each backward as input gradient, its weight gradient `delay` backwards later."""
    return [defer_weight_grads(actions, delay) for actions in program]


def v_shaped(microbatches: int) -> Program:
    """Stages 0 1 2 3 on ranks 0 1 1 0: the way back goes over the same ranks."""
    order = {0: (0, 3), 1: (1, 2)}
    return [
        [
            Action(stage, kind, microbatch)
            for kind, stages in ((F, order[rank]), (B, order[rank][::-1]))
            for stage in stages
            for microbatch in range(microbatches)
        ]
        for rank in order
    ]


def random_program(seed: int, placement: list[int], microbatches: int, *, split: bool) -> Program:
    """An order that works, drawn at random: any action whose inputs are there may be next."""
    draw = random.Random(seed)
    last, backward = len(placement) - 1, I if split else B
    program: Program = [[] for _ in range(max(placement) + 1)]
    ready = [Action(0, F, microbatch) for microbatch in range(microbatches)]
    while ready:
        action = ready.pop(draw.randrange(len(ready)))
        stage, kind, microbatch, _ = action
        program[placement[stage]].append(action)
        if kind is F and stage < last:
            ready.append(Action(stage + 1, F, microbatch))
        elif kind is F:
            ready.append(Action(stage, backward, microbatch))
        elif kind is backward and stage > 0:
            ready.append(Action(stage - 1, backward, microbatch))
        if kind is I:
            ready.append(Action(stage, W, microbatch))
    return program


def shuffle_weight_grads(program: Program, seed: int) -> Program:
    """The same with each weight gradient anywhere after its input gradient."""
    draw = random.Random(seed)
    shuffled = []
    for row in program:
        kept = [action for action in row if action.kind is not W]
        for late in draw.sample(weights := [a for a in row if a.kind is W], len(weights)):
            first = kept.index(late._replace(kind=I)) + 1
            kept.insert(draw.randint(first, len(kept)), late)
        shuffled.append(kept)
    return shuffled


class Shape(NamedTuple):
    """What a program is made from."""

    name: str
    pipeline: int
    virtual: int
    microbatches: int

    def program(self) -> Program:
        return make(*self)


@st.composite
def shapes(draw: st.DrawFn, names: Sequence[str] = tuple(SCHEDULES), ranks: int = 6) -> Shape:
    """What the schedules of these names can be asked for; none needs more than 2 p microbatches."""
    name = draw(st.sampled_from(names))
    pipeline = draw(st.integers(1, ranks))
    fewest, most = SCHEDULES[name].chunks
    virtual = draw(st.integers(fewest, most or 4))
    least = SCHEDULES[name].least_microbatches(pipeline)
    return Shape(name, pipeline, virtual, draw(st.integers(least, least + 12)))


@st.composite
def generated_programs(draw: st.DrawFn) -> Program:
    """What the generators make, a forward-only one, full backwards split or not."""
    if draw(st.integers(0, 9)) == 0:
        ranks = looped(draw(st.integers(1, 6)), draw(st.integers(1, 4)))
        return forward_program(ranks, draw(st.integers(1, 14)))
    program = draw(shapes()).program()
    delay = draw(st.none() | st.integers(0, 4))
    overlaps = any(action.parts for row in program for action in row)
    return program if delay is None or overlaps else split_backwards(program, delay)


@st.composite
def random_programs(draw: st.DrawFn) -> Program:
    """Orders that only chance would choose, for looped and V-shaped placements."""
    ranks = draw(st.integers(1, 4))
    loop = list(range(ranks))
    placement = draw(st.sampled_from([loop, loop * 2, loop + loop[::-1], loop + loop[::-1] + loop]))
    seed = draw(st.integers(0, 2**32))
    return random_program(seed, placement, draw(st.integers(1, 6)), split=draw(st.booleans()))


programs = generated_programs() | random_programs()
