"""A request to stop: remembered, told, taken back when the run is over."""

import os
import signal
import time

import pytest

from megapipe.train.signals import ASKING, StopRequest


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in ASKING]
    with StopRequest() as stop:
        assert (stop.requested, stop.reason) == (False, None)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason, stop.signal) == (True, number.name, number)
    assert [signal.getsignal(each) for each in ASKING] == before


def test_the_first_reason_stays() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.reason == "SIGTERM"


def test_a_second_interrupt_is_raised_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_request_is_told_once() -> None:
    said: list[str] = []
    with StopRequest(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        while not said:
            time.sleep(0.001)
    assert said == ["SIGTERM: saving and leaving after this step."]
