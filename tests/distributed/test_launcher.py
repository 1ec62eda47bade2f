"""Local ranks: statuses, the one message of a failure, signals, and nobody left behind."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megapipe.distributed.launcher import launch_local
from megapipe.distributed.rendezvous import Rendezvous, init_process_group
from megapipe.errors import ConfigError, DataError, MegapipeError
from megapipe.train.signals import StopRequest

LIMIT = 10.0
"""Seconds in which all ranks have ended once one has failed."""


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT
    assert set(psutil.Process().children(recursive=True)) <= before


def join(meeting: Rendezvous) -> None:
    init_process_group(meeting, torch.device("cpu"))


def sleep(seconds: float = 60) -> None:
    time.sleep(seconds)


# --- Ranks that finish ---------------------------------------------------------------------------


def _sum_ranks(folder: Path, meeting: Rendezvous) -> int:
    join(meeting)
    total = torch.tensor(meeting.rank)
    dist.all_reduce(total)
    print(f"rank {meeting.rank} adds up to {total}")
    (folder / str(meeting.rank)).write_text(f"{os.getpid()} {meeting.local_rank} {int(total)}")
    return meeting.rank % 2


def test_ranks_meet_print_and_return_the_largest_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch_local(partial(_sum_ranks, tmp_path), 3) == 1
    words = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert len({pid for pid, *_ in words} | {str(os.getpid())}) == 4
    assert [rest for _, *rest in words] == [[str(rank), "3"] for rank in range(3)]
    out = capfd.readouterr().out  # lines of ranks that print at once may run into each other
    assert [out.count(f"rank {rank} adds up to 3") for rank in range(3)] == [1, 1, 1]


def test_one_rank_runs_in_this_process() -> None:
    seen: list[Rendezvous] = []

    def rank_main(meeting: Rendezvous) -> int:
        seen.append(meeting)
        join(meeting)  # which is nothing
        return 7

    assert launch_local(rank_main, 1) == 7
    assert seen == [Rendezvous()]
    assert not dist.is_initialized()


def _has_threads(expected: int, meeting: Rendezvous) -> int:
    a = torch.ones(300, 300)
    return int((a @ a).sum() != 300**3 or torch.get_num_threads() != expected)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_local(partial(_has_threads, 1), 2) == 0, "as OMP_NUM_THREADS says"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert launch_local(partial(_has_threads, 3), 2) == 0


# --- Ranks that fail -----------------------------------------------------------------------------


def _fails(error: Exception, rank: int, meeting: Rendezvous) -> int:
    """`rank` (or with -1 every one) raises the error while others wait for it."""
    join(meeting)
    if rank in (meeting.rank, -1):
        raise error
    dist.barrier()
    return 0


def test_a_user_error_is_raised_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MegapipeError, match=r"^data\.sources\[0\] is empty$"):
        launch_local(partial(_fails, DataError("data.sources[0] is empty"), 2), 3)
    with pytest.raises(MegapipeError, match=r"^the disk is full$"):
        launch_local(partial(_fails, MegapipeError("the disk is full"), -1), 3)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_notes_of_an_error_come_along() -> None:
    error = MegapipeError("pipeline rank 0 has said nothing for 600 s.")
    error.add_note("pipeline rank 1, in 1F0")
    with pytest.raises(MegapipeError, match=r"600 s\.\n  pipeline rank 1, in 1F0$"):
        launch_local(partial(_fails, error, 1), 2)


def test_config_errors_keep_their_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        launch_local(partial(_fails, ConfigError(["a.b is wrong", "c.d too"]), 0), 2)
    assert caught.value.problems == ["a.b is wrong", "c.d too"]


def test_another_error_is_one_traceback_with_the_rank(capfd: pytest.CaptureFixture[str]) -> None:
    failing = partial(_fails, ZeroDivisionError("by zero"), 1)
    assert launch_local(failing, 3, describe="rank {} of the test".format) == 1
    said = capfd.readouterr().err
    assert said.startswith("rank 1 of the test failed:\nTraceback")
    *_, error, last = said.splitlines()
    assert error == "ZeroDivisionError: by zero"
    assert last.startswith("megapipe: this is a fault of megapipe")
    assert said.count("Traceback") == 1


def _dies(number: int, meeting: Rendezvous) -> int:
    join(meeting)
    if meeting.rank == 1:
        if number != signal.SIGKILL:  # what a script runs in the background ignores SIGQUIT
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    dist.barrier()
    return 0


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGQUIT"])
def test_a_rank_that_a_signal_ended_is_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    dying = partial(_dies, signal.Signals[name])
    with pytest.raises(MegapipeError, match=rf"^rank 1 was ended by {name}"):
        launch_local(dying, 3)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def _dies_in_a_start(number: int, meeting: Rendezvous) -> int:
    """Ends before the others have met it; they neither fail nor return by themselves."""
    if meeting.rank == 1:
        os.kill(os.getpid(), number)
    sleep()
    return 0


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_rank_that_died_while_others_wait_is_named(name: str) -> None:
    """The others are then ended by the same signals, which must not look like the cause."""
    with pytest.raises(MegapipeError, match=rf"^rank 1 was ended by {name}"):
        launch_local(partial(_dies_in_a_start, signal.Signals[name]), 3)


def _dies_while_deaf_ranks_wait(meeting: Rendezvous) -> int:
    if meeting.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep()
    return 0


def test_a_killed_rank_is_named_though_others_had_to_be_killed() -> None:
    with pytest.raises(MegapipeError, match=r"^rank 1 was ended by SIGKILL"):
        launch_local(_dies_while_deaf_ranks_wait, 3)


def _leaves(meeting: Rendezvous) -> int:
    if meeting.rank == 1:
        os._exit(3)
    sleep()
    return 0


def test_a_rank_that_leaves_without_a_word_is_named() -> None:
    with pytest.raises(MegapipeError, match="rank 1 ended with status 3 and without a message"):
        launch_local(_leaves, 2)


def _suffers_before_the_cause(meeting: Rendezvous) -> int:
    if meeting.rank == 1:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    if meeting.rank == 0:
        sleep(0.3)
        raise DataError("the cause")
    try:
        raise ConnectionResetError
    except ConnectionResetError as error:
        raise ValueError("what was made of it") from error


def test_the_cause_is_told_rather_than_a_lost_connection() -> None:
    with pytest.raises(MegapipeError, match=r"^the cause$"):
        launch_local(_suffers_before_the_cause, 3)


def _hangs_deaf(meeting: Rendezvous) -> int:
    if meeting.rank == 0:
        raise DataError("no text")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep()
    return 0


def test_ranks_that_hang_and_hear_nothing_are_ended() -> None:
    with pytest.raises(MegapipeError, match="no text"):
        launch_local(_hangs_deaf, 2)


# --- Signals to the launcher ---------------------------------------------------------------------


def launch_apart(rank_main: Callable[[Rendezvous], int], ranks: int) -> BaseProcess:
    """The launcher in a process of its own, which ends with its status (130 interrupted)."""

    def launcher() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            sys.exit(launch_local(rank_main, ranks))
        except KeyboardInterrupt:
            sys.exit(130)

    process = multiprocessing.get_context("fork").Process(target=launcher)
    process.start()
    return process


def wait_for(folder: Path, count: int) -> None:
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)


def send(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def _steps_until_stopped(folder: Path, meeting: Rendezvous) -> int:
    join(meeting)
    with StopRequest() as stop:
        stop.begin()
        (folder / str(meeting.rank)).touch()
        while not stop.requested:
            sleep(0.01)
    (folder / f"{meeting.rank} saved").touch()
    assert stop.signal is not None
    return 128 + stop.signal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_ranks_are_told_to_stop_and_may_finish(tmp_path: Path, name: str) -> None:
    launcher = launch_apart(partial(_steps_until_stopped, tmp_path), 2)
    wait_for(tmp_path, 2)
    send(launcher, signal.Signals[name])
    launcher.join()
    assert launcher.exitcode == 128 + signal.Signals[name]
    assert {path.name for path in tmp_path.glob("* saved")} == {"0 saved", "1 saved"}


def _waits(folder: Path, hears: bool, meeting: Rendezvous) -> int:
    if not hears:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    sleep()
    return 0


def test_ranks_that_handle_no_signal_end_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(status)
        folder.mkdir()
        launcher = launch_apart(partial(_waits, folder, True), 2)
        wait_for(folder, 2)
        send(launcher, number)
        launcher.join()
        assert launcher.exitcode == status
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def _one_is_interrupted(meeting: Rendezvous) -> int:
    join(meeting)
    if meeting.rank == 0:
        raise KeyboardInterrupt
    sleep()
    return 0


def test_an_interrupted_rank_does_not_leave_the_others_waiting() -> None:
    """Ctrl-C in a start: some ranks hear it before they can hold on to it, others after."""
    with pytest.raises(KeyboardInterrupt):
        launch_local(_one_is_interrupted, 2)


def _loses_an_interrupted_rank(meeting: Rendezvous) -> int:
    if meeting.rank == 0:
        raise KeyboardInterrupt
    sleep(0.2)
    raise RuntimeError("Gloo connectFullMesh failed with Connection closed by peer")


def test_an_interrupted_rank_is_the_cause_of_a_lost_connection() -> None:
    with pytest.raises(KeyboardInterrupt):
        launch_local(_loses_an_interrupted_rank, 2)


def test_a_second_interrupt_waits_no_longer(tmp_path: Path) -> None:
    launcher = launch_apart(partial(_waits, tmp_path, False), 2)
    wait_for(tmp_path, 2)
    send(launcher, signal.SIGINT)
    launcher.join(0.5)
    assert launcher.is_alive()
    send(launcher, signal.SIGINT)
    launcher.join()
    assert launcher.exitcode == 130


def test_ranks_do_not_outlive_a_killed_launcher(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("meeting")))
    launcher = launch_apart(partial(_waits, tmp_path, False), 3)
    wait_for(tmp_path, 3)
    ranks = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    launcher.kill()
    launcher.join()
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
