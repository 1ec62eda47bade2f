"""What a rank did and when: always on, for the last few runs of its program.

Three times of each action: when it was taken up, when all that it waits for was there, and when it
was done. From the second to the third is work; from the first to the second, a wait for another
rank; what lies between two actions is the executor's own. On a CPU they are read from the host's
clock: 0.4 us an action (one core of a server's CPU), where actions take milliseconds. On a GPU they
are CUDA events on the stream that computes, so a wait is that of the GPU and not of the host, which
runs ahead; posting sends and receives takes no time of that stream and gets no events.

Memory is taken once: 24 bytes for an action and run, and on a GPU three events for each compute
action.
"""

from array import array
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from megapipe.pipeline.schedule import Action, Span


class Moment(NamedTuple):
    """One action's times, in seconds of the host's `perf_counter`."""

    began: float
    ready: float  # equals `began` where there was nothing to wait for
    ended: float


class ProgramRun(NamedTuple):
    """A run of a rank's program: when it was entered, and a moment for each action, in order."""

    entered: float
    moments: list[Moment]


class Recorder:
    """Keeps the last `kept` runs of `program`, by the host's clock.

    The executor calls `enter` once, then for each action `begin`, `ready` if it has waited for an
    arrival, and `end`; `count` is the number of actions done. `run` answers between runs.
    """

    def __init__(self, program: Sequence[Action], kept: int = 1) -> None:
        assert kept > 0
        self.program = list(program)
        self.kept = kept
        self.count = 0
        self._entered = array("d", bytes(8 * kept))
        self._counts = array("q", bytes(8 * kept))
        self._ring = [array("d", bytes(24 * len(self.program))) for _ in range(kept)]
        self._runs = 0
        self._times = self._ring[0]

    def enter(self) -> None:
        self._counts[self._slot(0)] = self.count  # of the run before
        self._runs += 1
        self.count = 0
        self._times = self._ring[self._slot(0)]
        self._entered[self._slot(0)] = perf_counter()

    def begin(self) -> None:
        now = perf_counter()
        first = 3 * self.count
        self._times[first] = self._times[first + 1] = now

    def ready(self) -> None:
        self._times[3 * self.count + 1] = perf_counter()

    def end(self) -> None:
        self._times[3 * self.count + 2] = perf_counter()
        self.count += 1

    def settle(self) -> None:
        """Make the last run readable. On a GPU this waits for the run's last action, so it is
        called when the host has given the GPU more to do; a run that is followed by another before
        it was settled is lost."""

    def run(self, ago: int = 0) -> ProgramRun:
        """The last run, or the one `ago` before it; an aborted one has its first actions only."""
        assert 0 <= ago < min(self.kept, self._runs), (ago, self.kept, self._runs)
        if ago == 0:
            self.settle()
        slot = self._slot(ago)
        times = self._ring[slot]
        count = self._counts[slot] if ago else self.count
        moments = [Moment(*times[3 * i : 3 * i + 3]) for i in range(count)]
        return ProgramRun(self._entered[slot], moments)

    def _slot(self, ago: int) -> int:
        return (self._runs - 1 - ago) % self.kept

    def spans(self) -> list[Span]:
        """The last run as spans: work alone, without the wait for arrivals."""
        if self._runs == 0:
            return []
        pairs = zip(self.program, self.run().moments, strict=False)
        return [Span(action, moment.ready, moment.ended) for action, moment in pairs]


class CudaRecorder(Recorder):
    """The same by CUDA events; `settle` turns them into times of the host's clock."""

    def __init__(self, program: Sequence[Action], kept: int, device: torch.device) -> None:
        super().__init__(program, kept)
        self._computes = [action.kind.computes for action in self.program]
        self._events = [
            torch.cuda.Event(enable_timing=True) for _ in range(3 * sum(self._computes))
        ]
        self._side = torch.cuda.Stream(device)
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._waited = bytearray(len(self.program))
        self._used = 0
        self._settled = True

    def enter(self) -> None:
        super().enter()
        self._waited[:] = bytes(len(self._waited))
        self._used = 0
        self._settled = False

    def begin(self) -> None:
        if self._computes[self.count]:
            self._events[self._used].record()

    def ready(self) -> None:
        self._events[self._used + 1].record()
        self._waited[self.count] = True

    def end(self) -> None:
        if self._computes[self.count]:
            self._events[self._used + 2].record()
            self._used += 3
        self.count += 1

    def settle(self) -> None:
        """Elapsed times count from the run's first event; that one is placed on the host's clock by
        an event on an idle stream, which happens within some 20 us of the host's reading."""
        if self._settled or self._used == 0:
            return
        self._settled = True
        origin = self._events[0]
        self._events[self._used - 1].synchronize()
        self._anchor.record(self._side)
        self._anchor.synchronize()
        zero = perf_counter() - 1e-3 * origin.elapsed_time(self._anchor)

        def at(event: int) -> float:
            return zero + 1e-3 * origin.elapsed_time(self._events[event])

        event, before = 0, zero
        for index in range(self.count):
            moment = Moment(before, before, before)  # SEND and RECEIVE: no time of the GPU's
            if self._computes[index]:
                began = at(event)
                ready = at(event + 1) if self._waited[index] else began
                moment = Moment(began, ready, at(event + 2))
                event += 3
            self._times[3 * index : 3 * index + 3] = array("d", moment)
            before = moment.ended


def make_recorder(program: Sequence[Action], kept: int, device: torch.device) -> Recorder:
    """By the clock of the device that computes."""
    if device.type == "cuda":
        return CudaRecorder(program, kept, device)
    return Recorder(program, kept)
