"""Programs by name: as published, and errors for what can't be."""

import gc

import pytest

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import SCHEDULES, Program, build_program
from megapipe.pipeline.schedule.definition import Schedule
from tests.pipeline.programs import make, parse


def test_small_programs_as_published() -> None:
    assert make("gpipe", 2, 1, 2) == parse("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    assert make("1f1b", 2, 1, 3) == parse("0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")
    assert make("forward", 2, 2, 3) == parse("0F0 0F1 0F2 2F0 2F1 2F2", "1F0 1F1 1F2 3F0 3F1 3F2")


@pytest.mark.parametrize(
    ("name", "virtual", "microbatches", "message"),
    [
        ("1f2b", 1, 4, 'parallel.schedule = "1f2b" is not a schedule. There are 1f1b, dualpipe-v'),
        (
            "1f1b",
            2,
            4,
            'parallel.virtual = 2 must be 1 with parallel.schedule = "1f1b", which',
        ),
        ("zb-v", 1, 4, r'parallel.virtual = 1 must be 2 with parallel.schedule = "zb-v"\.'),
        ("v-min", 3, 4, r'parallel.virtual = 3 must be 2 with parallel.schedule = "v-min"\.'),
        ("interleaved-1f1b", 1, 4, "parallel.virtual = 1 must be 2 or more with"),
        (
            "dualpipe-v",
            2,
            3,
            "needs 4 microbatches or more in a pipeline of 2; there are 3. Raise ",
        ),
        ("gpipe", 1, 0, "0 microbatches leave nothing to do: raise train.global_batch_size"),
        ("interleaved-1f1b", 0, 4, "parallel.virtual = 0 must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, virtual: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_program(name, pipeline=2, virtual=virtual, microbatches=microbatches)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    """Also where a schedule fails on the way."""

    def fails(pipeline: int, virtual: int, microbatches: int) -> Program:
        assert not gc.isenabled()
        raise ArithmeticError

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        build_program("1f1b", pipeline=2, virtual=1, microbatches=2)
        assert gc.isenabled() == enabled
        monkeypatch.setitem(SCHEDULES, "1f1b", Schedule("1f1b", fails))
        with pytest.raises(ArithmeticError):
            build_program("1f1b", pipeline=2, virtual=1, microbatches=2)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
