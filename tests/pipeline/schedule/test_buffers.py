from hypothesis import given

from megapipe.pipeline.schedule import Program, assign_buffers, lower, simulate
from megapipe.pipeline.schedule.action import LAST_OF_A_BACKWARD, Kind
from tests.pipeline.programs import make, parse, programs


@given(programs)
def test_no_buffer_is_filled_while_it_is_needed(program: Program) -> None:
    for actions in lower(program):
        numbers = assign_buffers(actions)
        trains = any(action.kind in LAST_OF_A_BACKWARD for action in actions)
        last = LAST_OF_A_BACKWARD if trains else {Kind.FORWARD}
        until = {
            (action.stage, action.microbatch): index
            for index, action in enumerate(actions)
            if action.kind in last
        }
        busy: dict[int, int] = {}
        for index, action in enumerate(actions):
            if action.kind.receives:
                number = numbers[action]
                assert busy.get(number, -1) < index
                busy[number] = until[action.stage, action.microbatch]
        assert sorted(busy) == list(range(len(busy)))


def test_buffers_are_few() -> None:
    """1F1B holds the inputs of the live microbatches, a gradient, and a tensor that is under way,
    whatever m is."""
    for m in (8, 64):
        lowered = lower(make("1f1b", 4, 1, m))
        live = simulate(lowered).peak_live
        counts = [1 + max(assign_buffers(actions).values()) for actions in lowered]
        assert counts[0] == 1, "the first stage receives gradients only"
        assert all(count <= peak + 2 for count, peak in zip(counts[1:], live[1:], strict=True))
    forwards = lower(make("forward", 4, 2, 32))
    assert all(1 + max(assign_buffers(actions).values()) <= 4 for actions in forwards)


def test_a_weight_gradient_holds_input_and_gradient() -> None:
    (_, second) = parse(
        "0F0",
        "1RECV_F0 1F0 1RECV_B0 1I0 1RECV_F1 1RECV_F2 1W0 1F1 1RECV_F3",
    )
    numbers = assign_buffers(second)
    assert len(set(list(numbers.values())[:4])) == 4
    assert list(numbers.values())[4] in list(numbers.values())[:2]
