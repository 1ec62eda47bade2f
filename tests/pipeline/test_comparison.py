"""Where the difference went: known causes are charged what they cost, and nothing is left over."""

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.pipeline.comparison import (
    Comparison,
    Reality,
    compare,
    equal_costs,
    measured_costs,
    median_times,
)
from megapipe.pipeline.recording import Moment, ProgramRun
from megapipe.pipeline.schedule import Action, Costs, Kind, Program, build_program, lower, simulate
from megapipe.pipeline.schedule.action import sequential
from megapipe.pipeline.schedule.dependencies import Numbered, completion_order, find_needs


def act(
    program: Program,
    work: Mapping[Action, float],
    *,
    entered: list[float] | None = None,
    between: float = 0.0,
    travel: float = 0.0,
) -> Reality:
    """What ranks would record whose actions take as long as `work` says: `between` passes before
    each compute action, a tensor is under way for `travel`."""
    numbered = Numbered(program)
    needs = find_needs(numbered)
    entries = entered or [0.0] * len(program)
    free = list(entries)
    ends: dict[Action, float] = {}
    moments: list[list[Moment]] = [[] for _ in program]
    for number in completion_order(numbered, needs):
        rank, action = numbered.rank_of[number], numbered.actions[number]
        needed = [numbered.actions[need] for need in needs[number]]
        began = free[rank] + (between if action.kind.computes else 0.0)
        arrivals = [ends[n] + (travel if n.kind.sends else 0.0) for n in needed]
        ready = max([began, *arrivals]) if action.kind.computes else began
        ends[action] = free[rank] = ready + work.get(action, 0.0)
        moments[rank].append(Moment(began, ready, ends[action]))
    runs = [ProgramRun(entry, rows) for entry, rows in zip(entries, moments, strict=True)]
    return Reality(7, program, runs)


def equal_work(program: Program) -> dict[Action, float]:
    costs = Costs(forward=1.0, backward_input=1.5, backward_weight=0.5)
    return {action: costs.of(action) for row in program for action in row if action.kind.computes}


def rows(comparison: Comparison) -> dict[str, float]:
    return {row.label: row.seconds for row in comparison.reality_rows}


def program_of(name: str = "1f1b", virtual: int = 1) -> Program:
    return lower(build_program(name, pipeline=4, virtual=virtual, microbatches=8))


def test_a_step_as_planned() -> None:
    program = program_of()
    comparison = compare(act(program, equal_work(program)))
    assert comparison.plan.spans == comparison.real.spans
    assert all(seconds == 0 for seconds in rows(comparison).values())
    assert comparison.equal_bubble == pytest.approx(3 / 8)
    share, bubble, unequal = (row.seconds for row in comparison.plan_rows)
    assert (share, bubble, unequal) == pytest.approx((24, 9, 0))


def test_one_slow_action_is_charged_to_its_rank_and_named() -> None:
    program = program_of()
    work = equal_work(program)
    slow = Action(3, Kind.BACKWARD, 4)  # on the last rank, which never waits
    work[slow] += 5
    comparison = compare(act(program, work))
    found = rows(comparison)
    assert found.pop("uneven actions, rank 3") == pytest.approx(5)
    assert all(seconds == pytest.approx(0) for seconds in found.values())
    notes = [row.note for row in comparison.reality_rows if row.label.endswith("rank 3")]
    assert notes == ["most: 3B4 took 7,000 ms, usually 2,000"]


def test_a_slow_stage_is_part_of_the_plan() -> None:
    """Its costs are what they are: what can be changed is the balance of the stages."""
    program = program_of()
    work = {
        a: seconds * (1.5 if a.stage == 2 else 1.0) for a, seconds in equal_work(program).items()
    }
    comparison = compare(act(program, work))
    assert all(seconds == pytest.approx(0) for seconds in rows(comparison).values())
    unequal = comparison.plan_rows[2]
    assert unequal.seconds > 0
    assert "stage 2 4,500" in unequal.note
    assert comparison.plan.bubble > comparison.equal_bubble


def test_transfers_executor_and_late_entry_are_told_apart() -> None:
    program = program_of()
    work = equal_work(program)
    # The way there and back of the first microbatch, and the ways back at the end.
    travel = rows(compare(act(program, work, travel=0.1)))
    assert travel.pop("transfers") > 0.55
    assert all(seconds == pytest.approx(0) for seconds in travel.values())
    # Rank 3 never waits: 16 actions, the first of which the others' first ones hide.
    between = rows(compare(act(program, work, between=0.01)))
    assert between.pop("executor, between actions") > 0.15
    assert all(seconds == pytest.approx(0) for seconds in between.values())
    late = rows(compare(act(program, work, entered=[0.0, 4.0, 0.0, 0.0])))
    assert late.pop("ranks that began late") == pytest.approx(3)
    assert all(seconds == pytest.approx(0) for seconds in late.values())


@settings(max_examples=25)
@given(
    case=st.sampled_from([("1f1b", 1), ("zb-v", 2), ("interleaved-1f1b", 2), ("dualpipe-v", 2)]),
    random=st.randoms(use_true_random=False),
)
def test_everything_adds_up(case: tuple[str, int], random: "st.DataObject") -> None:
    program = program_of(*case)
    work = {a: seconds * random.uniform(0.5, 2) for a, seconds in equal_work(program).items()}
    entered = [random.uniform(0, 2) for _ in program]
    reality = act(program, work, entered=entered, between=0.1, travel=random.uniform(0, 1))
    comparison = compare(reality)
    planned, real = comparison.plan.makespan, comparison.real.makespan
    assert sum(row.seconds for row in comparison.plan_rows) == pytest.approx(planned)
    assert planned + sum(rows(comparison).values()) == pytest.approx(real)
    for rank in comparison.ranks:
        assert rank.work + rank.waits + rank.between + rank.outside == pytest.approx(real)
    assert rows(comparison)["transfers"] > -1e-9
    for row in comparison.reality_rows:
        if row.label.startswith("uneven actions, rank"):
            assert bool(row.note) == (row.seconds > 0), "the slowest action, where one was slow"
    busy = sum(work.values())
    assert comparison.real.bubble == pytest.approx(4 * real / busy - 1)


def test_costs_of_whole_and_split_backwards() -> None:
    for name, virtual in (("1f1b", 1), ("zb-h1", 1), ("dualpipe-v", 2)):
        program = program_of(name, virtual)
        real = act(program, equal_work(program)).work()
        stages = 4 * virtual
        medians = median_times(span for spans in real.spans for span in spans)
        for costs in (measured_costs(medians, stages), equal_costs(medians, stages)):
            for spans in real.spans:
                for action, begin, end in spans:
                    assert costs.of(action) == pytest.approx(end - begin)
        assert simulate(program, measured_costs(medians, stages)).makespan >= real.makespan - 1e-9


def join_first_stage(program: Program) -> Program:
    """As `auto` has it: stage 0's I and W as one B where one follows the other."""
    row: list[Action] = []
    for action in program[0]:
        if row and action == row[-1]._replace(kind=Kind.BACKWARD_WEIGHT) and action.stage == 0:
            row[-1] = action._replace(kind=Kind.BACKWARD)
        else:
            row.append(action)
    return [row, *program[1:]]


@pytest.mark.parametrize(("name", "virtual"), [("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)])
def test_stages_that_split_their_backward_may_be_equal_to_one_that_does_not(
    name: str, virtual: int
) -> None:
    split = build_program(name, pipeline=4, virtual=virtual, microbatches=8)
    joined = join_first_stage(sequential(split))
    kinds = {action.kind for action in joined[0] if action.stage == 0}
    assert Kind.BACKWARD in kinds
    apart, together = (
        compare(act(lower(program), equal_work(sequential(program)))) for program in (split, joined)
    )
    assert [row.seconds for row in together.plan_rows] == pytest.approx(
        [row.seconds for row in apart.plan_rows]
    )
    assert together.plan_rows[-1].seconds == pytest.approx(0.0)
    assert together.equal_bubble == pytest.approx(apart.equal_bubble)
