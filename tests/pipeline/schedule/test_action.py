import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Action, Kind, Program, from_csv, lower, to_csv
from megapipe.pipeline.schedule.action import compute_only, stage_ranks
from tests.pipeline.programs import parse, programs

actions = st.builds(Action, st.integers(0, 200), st.sampled_from(Kind), st.integers(0, 5000))


@given(actions)
def test_text_form_round_trips(action: Action) -> None:
    assert Action.parse(str(action)) == action


def test_text_form_is_that_of_torch() -> None:
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for kind in Kind:
        text = str(Action(2, kind, 13))
        assert str(torch_schedules._Action.from_str(text)) == text


@pytest.mark.parametrize(
    "text", ["", "F0", "2F", "2X0", "2SEND_0", "-1F0", "2F0 2F1", "2REDUCE_GRAD"]
)
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not an action: expected, say, 2F0"):
        Action.parse(text)


@given(programs)
def test_csv_round_trips(program: Program) -> None:
    lowered = lower(program)
    assert from_csv(to_csv(lowered)) == lowered
    assert compute_only(lowered) == program


def test_csv_may_hold_idle_time() -> None:
    assert from_csv("0F0,,\n,1F0, 1B0\n\n") == parse("0F0", "1F0 1B0")


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
