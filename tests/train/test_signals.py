"""A request to stop: remembered, told, taken back when the run is over, and never waited for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megapipe.stop_signals import STOP_SIGNALS
from megapipe.train.signals import StopRequest

Left = tuple[str, int]


def wait_for(condition: Callable[[], object]) -> None:
    """Generous: the thread that hears of signals may have to wait for a core."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest() as stop:
        stop.begin()
        assert (stop.requested, stop.reason) == (False, None)
        send(number)
        assert (stop.requested, stop.reason, stop.signal) == (True, number.name, number)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_the_first_reason_stays() -> None:
    with StopRequest() as stop:
        stop.begin()
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        assert stop.reason == "SIGTERM"
    assert stop.reason == "SIGTERM"  # when the thread has heard of all of them, too


def test_a_second_interrupt_is_raised_at_once() -> None:
    with StopRequest() as stop:
        stop.begin()
        send(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_two_interrupts_end_a_process_whose_main_thread_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megapipe.train.signals.INTERRUPT_SECONDS", 0.0)
    left: list[Left] = []
    with StopRequest(timeout=600, leave=lambda *how: left.append(how)) as stop:
        stop.begin()
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        wait_for(lambda: left)
    assert left[0] == ("interrupted", 128 + signal.SIGINT)


def test_a_process_leaves_with_its_status_where_the_console_is_gone() -> None:
    script = (
        "import os\n"
        "from megapipe.train.signals import leave_at_once\n"
        "os.close(2)\n"
        "leave_at_once('nobody reads this', 143)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 143


@pytest.mark.parametrize(
    ("numbers", "more"),
    [
        ((signal.SIGTERM, signal.SIGTERM), ""),
        ((signal.SIGINT,), " Ctrl-C again stops at once, without saving."),
    ],
)
def test_the_request_is_told_once(numbers: tuple[signal.Signals, ...], more: str) -> None:
    said: list[str] = []
    with StopRequest(said.append) as stop:
        stop.begin()
        send(*numbers)
        wait_for(lambda: said)
    assert said == [f"{numbers[0].name}: saving and stopping after the current step.{more}"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup megapipe train ...`: a closed terminal is none of its business."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.begin()
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_others_handle_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another library in Python, and of one that Python knows nothing of (None)."""
    heard: list[int] = []
    said: list[str] = []
    before = signal.signal(signal.SIGURG, lambda number, _: heard.append(number))
    known = signal.getsignal
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGUSR2 else known(number)
    )
    try:
        with StopRequest(said.append) as stop:
            stop.begin()
            assert known(signal.SIGUSR2) == signal.SIG_DFL
            send(signal.SIGURG)
            wait_for(lambda: heard)
    finally:
        signal.signal(signal.SIGURG, before)
    assert not stop.requested  # when the thread has heard of it, too
    assert said == []


def test_the_descriptor_that_signals_were_written_to_is_given_back() -> None:
    """An event loop of asyncio has one, for example."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with StopRequest():
            pass
        assert signal.set_wakeup_fd(before) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("first", [True, False])
def test_before_the_first_step_there_is_nothing_to_wait_for(first: bool) -> None:
    left: list[Left] = []
    with StopRequest(leave=lambda *how: left.append(how), first=first):
        send(signal.SIGTERM)
        wait_for(lambda: left)
    said = "SIGTERM before the first step: nothing to save." if first else ""
    assert left == [(said, 128 + signal.SIGTERM)]


def test_where_no_step_ends_it_leaves() -> None:
    left: list[Left] = []
    with StopRequest(timeout=0.2, leave=lambda *how: left.append(how)) as stop:
        stop.begin()
        send(signal.SIGHUP)
        wait_for(lambda: left)
    text, status = left[0]
    assert text.startswith("SIGHUP, and no step has ended for 0 s")
    assert "train.stop_timeout_seconds" in text
    assert status == 128 + signal.SIGHUP


def test_a_step_that_began_long_before_the_request_has_its_time_from_then_on() -> None:
    left: list[Left] = []
    said: list[str] = []
    with StopRequest(said.append, timeout=600, leave=lambda *how: left.append(how)) as stop:
        stop.begin()
        stop._heard -= 1000
        send(signal.SIGTERM)
        wait_for(lambda: said)
        time.sleep(0.5)
    assert left == []


def test_whatever_the_ranks_end_together_starts_the_time_anew() -> None:
    stop = StopRequest()  # not entered: nobody looks at the clock

    def save() -> None:
        with stop.saving():
            pass

    for end in (stop.alive, lambda: stop.step_ended(1.0), save):
        stop._heard = 0.0
        end()
        assert stop._heard > 0


def test_after_the_loop_a_request_is_not_announced() -> None:
    """There is no step left after which it could stop."""
    said: list[str] = []
    with StopRequest(said.append) as stop:
        stop.begin()
        stop.end()
        send(signal.SIGTERM)
        assert stop.requested
    assert said == []


def test_a_save_and_steps_that_end_are_not_cut_short() -> None:
    left: list[Left] = []
    said: list[str] = []
    with StopRequest(said.append, timeout=600, leave=lambda *how: left.append(how)) as stop:
        stop.begin()
        send(signal.SIGTERM)
        wait_for(lambda: said)
        with stop.saving():
            stop._timeout = 1e-9  # any moment is too long now
            time.sleep(0.5)
            assert left == []
            stop.end()
        time.sleep(0.5)
        assert left == []


def test_the_time_follows_the_steps() -> None:
    """A request in a step of ten minutes waits for longer than one in a step of a second."""
    left: list[Left] = []
    with StopRequest(leave=lambda *how: left.append(how)) as stop:
        stop.begin()
        send(signal.SIGTERM)
        wait_for(lambda: stop._told)
        for seconds, limit in ((1.0, 60), (600.0, 6000)):
            stop.step_ended(seconds)
            stop._heard = time.monotonic() - limit + 30
            time.sleep(0.5)
            assert left == []
            stop._heard = time.monotonic() - limit - 1
            wait_for(lambda: left)
            assert f"no step has ended for {limit} s" in left[0][0]
            stop.step_ended(seconds)
            left.clear()


def test_a_main_thread_that_is_stuck_in_a_collective() -> None:
    """No Python code runs in it, so that no handler of Python's would ever be called."""
    script = (
        "import ctypes\n"
        "from megapipe.train.signals import StopRequest\n"
        "with StopRequest(print, timeout=0.3) as stop:\n"
        "    stop.begin()\n"
        "    print('stuck', flush=True)\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    for _ in range(2):  # the second time waits for ever\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert b"SIGTERM, and no step has ended" in process.stderr.read()


def test_a_signal_that_comes_as_its_handler_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Left] = []
    install = signal.signal

    def install_and_send(number: int, handler: object) -> object:
        before = install(number, handler)
        if number == signal.SIGTERM and not left:
            send(number)
            wait_for(lambda: left)  # the thread hears of it
        return before

    monkeypatch.setattr(signal, "signal", install_and_send)
    with StopRequest(leave=lambda *how: left.append(how)) as stop:
        pass
    assert stop.reason == "SIGTERM"
    assert left[0] == ("SIGTERM before the first step: nothing to save.", 128 + signal.SIGTERM)
