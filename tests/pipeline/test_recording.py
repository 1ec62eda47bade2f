"""The recorder: order, waits apart from work, and memory that does not grow."""

import tracemalloc
from typing import Any

import pytest
import torch

from megapipe.pipeline import recording
from megapipe.pipeline.recording import CudaRecorder, Moment, Recorder, make_recorder
from megapipe.pipeline.schedule import Action, Span

PROGRAM = [Action.parse(word) for word in ["1RECV_F0", "1F0", "1SEND_F0", "1B0"]]


class Clock:
    """A `perf_counter` that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recording, "perf_counter", clock)
    return clock


def play(recorder: Recorder, clock: Clock, start: float) -> None:
    """Each action is taken up 1 after the one before; the forward waits 4; all take 10."""
    clock.now = start
    recorder.enter()
    for action in recorder.program:
        clock.now += 1
        recorder.begin()
        if str(action) == "1F0":
            clock.now += 4
            recorder.ready()
        clock.now += 10
        recorder.end()


def test_waits_are_apart_from_work(clock: Clock) -> None:
    recorder = Recorder(PROGRAM)
    assert recorder.spans() == []
    play(recorder, clock, 100)
    assert recorder.run() == (
        100,
        [
            Moment(101, 101, 111),
            Moment(112, 116, 126),
            Moment(127, 127, 137),
            Moment(138, 138, 148),
        ],
    )
    assert recorder.spans()[1] == Span(PROGRAM[1], 116, 126)
    assert recorder.count == 4


def test_a_ring_of_the_last_runs(clock: Clock) -> None:
    recorder = Recorder(PROGRAM, kept=3)
    for start in (0, 100, 200, 300, 400):
        play(recorder, clock, start)
    assert [recorder.run(ago).entered for ago in range(3)] == [400, 300, 200]
    assert [recorder.run(ago).moments[0].began for ago in range(3)] == [401, 301, 201]
    with pytest.raises(AssertionError):
        recorder.run(3)


def test_what_an_aborted_run_did(clock: Clock) -> None:
    recorder = Recorder(PROGRAM, kept=2)
    play(recorder, clock, 0)
    clock.now = 100
    recorder.enter()
    recorder.begin()
    recorder.end()
    recorder.begin()
    assert recorder.count == 1
    assert [len(recorder.run(ago).moments) for ago in (0, 1)] == [1, 4]
    play(recorder, clock, 200)
    assert [len(recorder.run(ago).moments) for ago in (0, 1)] == [4, 1]


def test_memory_is_taken_once() -> None:
    program = [Action(0, PROGRAM[1].kind, m) for m in range(1000)]
    recorder = Recorder(program, kept=4)

    def step() -> None:
        recorder.enter()
        for _ in program:
            recorder.begin()
            recorder.ready()
            recorder.end()

    step()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(8):
            step()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1000  # bytes, for 8,000 actions
    assert peak - before < 2000


# --- On a GPU ------------------------------------------------------------------------------------


class Gpu:
    """A stream that runs `lag` behind the host: an event happens when the stream gets to it."""

    def __init__(self, clock: Clock, lag: float) -> None:
        self.clock, self.lag = clock, lag

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, float("nan")

    def record(self, stream: Any = None) -> None:
        idle = stream is not None
        self.at = self.gpu.clock.now + (0 if idle else self.gpu.lag)

    def synchronize(self) -> None:
        self.gpu.clock.now = max(self.gpu.clock.now, self.at)

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


def test_events_become_times_of_the_host(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's times, not those at which the host asked; sends and receives take none."""
    gpu = Gpu(clock, lag=1000)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "an idle stream")
    recorder = make_recorder(PROGRAM, 2, torch.device("cuda", 0))
    assert isinstance(recorder, CudaRecorder)
    play(recorder, clock, 100)
    assert clock.now == 148
    moments = recorder.run().moments
    assert clock.now == 1148, "reading waits for the last action"
    expected = [(1112, 1112, 1112), (1112, 1116, 1126), (1126, 1126, 1126), (1138, 1138, 1148)]
    assert moments == [pytest.approx(times) for times in expected]
    play(recorder, clock, 2000)
    assert recorder.run(1).moments == moments
    assert recorder.run().moments[1].ready == pytest.approx(3016)
