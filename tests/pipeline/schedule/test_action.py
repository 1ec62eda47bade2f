import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Action, Kind, Program, from_csv, lower, to_csv
from megapipe.pipeline.schedule.action import compute_only, overlap, sequential, stage_ranks
from tests.pipeline.programs import parse, programs


def of_kinds(*kinds: Kind) -> st.SearchStrategy[Action]:
    parts = st.tuples(st.integers(0, 200), st.sampled_from(kinds), st.integers(0, 5000))
    return parts.map(lambda drawn: Action(*drawn))


single = of_kinds(*(kind for kind in Kind if kind is not Kind.OVERLAP))
pairs = st.builds(overlap, of_kinds(Kind.FORWARD), of_kinds(Kind.BACKWARD, Kind.BACKWARD_INPUT))
actions = single | pairs


@given(actions)
def test_text_form_round_trips(action: Action) -> None:
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    "text",
    [
        *("", "F0", "2F", "2X0", "2SEND_0", "-1F0", "2F0 2F1", "2REDUCE_GRAD", "2F\u0663"),
        *("1" * 5000 + "F0", "2F1234567890", "()OVERLAP_F_B", "(0F1;1B0;2F0)OVERLAP_F_B"),
        *("(0F1;1B0)", "((0F1;1B0)OVERLAP_F_B;1B0)OVERLAP_F_B"),
    ],
)
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not an action: expected, say, 2F0"):
        Action.parse(text)


@given(programs)
def test_csv_round_trips(program: Program) -> None:
    lowered = lower(program)
    assert from_csv(to_csv(lowered)) == lowered
    assert from_csv(to_csv(program)) == program
    assert compute_only(lowered) == sequential(program)


def test_csv_may_hold_idle_time() -> None:
    assert from_csv("0F0,,\n,1F0, 1B0\n\n") == parse("0F0", "1F0 1B0")


def test_what_torch_adds_for_sharded_parameters_is_left_out() -> None:
    text = "0UNSHARD,0F0,0B0,0RESHARD,0REDUCE_GRAD\r\n1UNSHARD,2UNSHARD,1F0,1B0\r\n"
    assert from_csv(text) == parse("0F0 0B0", "1F0 1B0")
    for cell in ("UNSHARD", "0RESHARD1", "0UNSHARDED"):
        with pytest.raises(ScheduleError, match=f"'{cell}' is not an action"):
            from_csv(f"0F0,{cell}")


def test_an_overlap_is_a_forward_and_a_backward() -> None:
    forward, backward = parse("0F4 7I1")[0]
    both = overlap(forward, backward)
    assert str(both) == "(0F4;7I1)OVERLAP_F_B"
    assert sequential([[both]]) == [[forward, backward]]
    for wrong in ((backward, forward), (forward, forward), (forward, both)):
        with pytest.raises(ScheduleError, match="are not a forward and a backward"):
            overlap(*wrong)
    with pytest.raises(ScheduleError, match="0B1 and 7F4 are not a forward and a backward"):
        Action.parse("(0B1;7F4)OVERLAP_F_B")


def test_counterpart_is_the_other_end() -> None:
    assert str(Action.parse("2SEND_F5").counterpart) == "3RECV_F5"
    assert str(Action.parse("2SEND_B5").counterpart) == "1RECV_B5"
    for text in ("2SEND_F5", "2SEND_B5", "2RECV_F5", "2RECV_B5"):
        action = Action.parse(text)
        assert action.counterpart.counterpart == action


def test_a_stage_lies_on_one_rank() -> None:
    assert stage_ranks(parse("0F0 3F0", "1F0 2F0")) == {0: 0, 1: 1, 2: 1, 3: 0}
    with pytest.raises(ScheduleError, match="stage 0 is computed on rank 0 and, by 0B0, on rank 1"):
        stage_ranks(parse("0F0", "1F0 0B0"))
    with pytest.raises(ScheduleError, match=r"no rank computes stages \[1\]"):
        stage_ranks(parse("0F0", "2F0"))
    assert stage_ranks(parse("0F0 (0F1;1B0)OVERLAP_F_B")) == {0: 0, 1: 0}


def test_stages_that_are_missing_are_few_in_the_message() -> None:
    """Not the list of all up to a number that a broken file may hold."""
    with pytest.raises(ScheduleError, match=r"no rank computes stages \[1\]$"):
        stage_ranks(parse("0F0 999999999F0"))
