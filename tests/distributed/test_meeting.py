"""Ranks that meet in a store, as threads: who goes on, who is refused, and what is said."""

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from megapipe.distributed import meeting
from megapipe.distributed.meeting import (
    Meeting,
    RefusedError,
    RendezvousError,
    spans,
    watch_connecting,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "POLL", 0.02)
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=30))


class Attendance:
    """Ranks that attend meetings in one store, each in a thread."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.ended: dict[str, BaseException | None] = {}
        self.threads: list[threading.Thread] = []

    def begin(self, name: str, rank: int, size: int, *, kept: bool = False) -> None:
        part = Meeting(self.store, rank, size, "node1:29500", kept=kept)

        def attend() -> None:
            try:
                part.attend()
                self.ended[name] = None
            except BaseException as error:
                self.ended[name] = error

        self.threads.append(threading.Thread(target=attend, daemon=True))
        self.threads[-1].start()

    def results(self) -> dict[str, BaseException | None]:
        """How each has ended: None if it goes on."""
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.ended


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def ranks() -> Attendance:
    return Attendance()


def answers(ranks: Attendance) -> int:
    if not ranks.store.check(["call"]):
        return 0
    call = json.loads(ranks.store.get("call"))["name"]
    return ranks.store.add(f"answers/{call}", 0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_meet_in_any_order(ranks: Attendance, order: tuple[int, ...]) -> None:
    for rank in order:
        ranks.begin(f"{rank}", rank, 3)
    assert ranks.results() == {"0": None, "1": None, "2": None}


def test_nobody_goes_on_before_all_have_come(ranks: Attendance) -> None:
    ranks.begin("0", 0, 3)
    ranks.begin("1", 1, 3)
    wait_until(lambda: answers(ranks) == 2)
    time.sleep(0.2)
    assert ranks.ended == {}
    ranks.begin("2", 2, 3)
    assert ranks.results() == {"0": None, "1": None, "2": None}


def test_ranks_meet_again_in_a_store_with_the_keys_of_others(ranks: Attendance) -> None:
    for generation in "ab":
        # Rank 1 comes first, and finds the call and the verdict of those before.
        ranks.begin(f"1{generation}", 1, 2, kept=True)
        time.sleep(0.1)
        assert f"1{generation}" not in ranks.ended
        ranks.begin(f"0{generation}", 0, 2, kept=True)
        ranks.results()
    assert ranks.ended == {"0a": None, "1a": None, "0b": None, "1b": None}


def test_a_rank_that_was_started_again_takes_its_place(ranks: Attendance) -> None:
    ranks.begin("0", 0, 3)
    wait_until(lambda: answers(ranks) == 1)
    dead = Meeting(ranks.store, 1, 3, "node1:29500")
    assert dead._answer()
    ranks.begin("1", 1, 3)
    wait_until(lambda: answers(ranks) == 3)
    time.sleep(0.1)
    assert ranks.ended == {}, "three answers, of two ranks"
    ranks.begin("2", 2, 3)
    assert ranks.results() == {"0": None, "1": None, "2": None}


def refusals(ranks: Attendance) -> set[str]:
    results = ranks.results()
    assert all(isinstance(error, RefusedError) for error in results.values()), results
    return {str(error) for error in results.values()}


def test_two_processes_of_one_number_are_refused(ranks: Attendance) -> None:
    for number in (0, 1):
        ranks.begin(f"{number}", number, 3)
    wait_until(lambda: answers(ranks) == 2)
    ranks.begin("1 again", 1, 3)
    (said,) = refusals(ranks)
    assert said.startswith("Two processes have RANK=1, on ")


def test_two_processes_of_number_0_are_refused(ranks: Attendance) -> None:
    ranks.begin("0", 0, 3)
    ranks.begin("1", 1, 3)
    wait_until(lambda: answers(ranks) == 2)
    ranks.begin("0 again", 0, 3)
    (said,) = refusals(ranks)
    assert said.startswith("Two processes have RANK=0, on ")


def test_processes_of_jobs_of_different_sizes_are_refused(ranks: Attendance) -> None:
    ranks.begin("0", 0, 3)
    wait_until(lambda: answers(ranks) == 1)
    ranks.begin("1", 1, 4)
    (said,) = refusals(ranks)
    assert "WORLD_SIZE=4 for rank 1 on " in said
    assert "WORLD_SIZE=3 for rank 0 on " in said


def test_one_that_comes_when_the_job_has_started_is_refused(ranks: Attendance) -> None:
    for number in (0, 1):
        ranks.begin(f"{number}", number, 2)
    assert ranks.results() == {"0": None, "1": None}
    with pytest.raises(RendezvousError, match="has started with another process of RANK=1"):
        Meeting(ranks.store, 1, 2, "node1:29500").attend()


# --- What is said --------------------------------------------------------------------------------


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FIRST_NOTICE", 0.2)
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=1))


@pytest.mark.usefixtures("_soon")
def test_missing_ranks_are_named_by_one_and_sparsely(
    ranks: Attendance, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1, 4):
        ranks.begin(f"{number}", number, 6)
    (said,) = refusals(ranks)
    missing = "3 of 6 ranks have not connected to node1:29500: 2-3, 5"
    assert said.startswith(f"Gave up after 1 s: {missing}. See that all 6 processes were started")
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2, "after 0.2 and 0.6 s"
    for line in lines:
        assert re.fullmatch(rf"megapipe: waiting for \d of 1 s: {missing}\.", line)


@pytest.mark.usefixtures("_soon")
def test_rank_0_is_missed_where_another_serves_the_store(
    ranks: Attendance, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        ranks.begin(f"{number}", number, 3)
    (said,) = refusals(ranks)
    assert "rank 0 has not connected to node1:29500. See" in said
    assert len(capsys.readouterr().err.splitlines()) <= 2


@pytest.mark.usefixtures("_soon")
def test_rank_0_is_missed_at_each_start_in_a_store_that_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = dist.HashStore()
    for start in ("0", "1"):
        with pytest.raises(RefusedError):
            Meeting(store, 1, 2, "node1:29500", kept=True, start=start).attend()
        assert "rank 0 has not connected to node1:29500." in capsys.readouterr().err


def test_notices_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    notices, spoken = meeting.Notices(), []
    for second in range(601):
        now = 100.0 + second
        if notices.due():
            spoken.append(second)
    assert spoken == [10, 30, 70, 150, 310]


def came(store: dist.Store, part: Meeting, numbers: tuple[int, ...]) -> None:
    part.answered = "call"
    for number in numbers:
        host = f"gpu{number // 4}"
        store.set(f"answer/call/{number}", json.dumps({"name": "", "host": host}))


def test_hosts_of_missing_ranks() -> None:
    store = dist.HashStore()
    slurm = Meeting(store, 0, 4, "h:1", hosts=("a", "a", "b", "b"))
    came(store, slurm, (0,))
    assert slurm.missing() == "3 of 4 ranks have not connected to h:1: 1 (a), 2-3 (b)"
    by_four = Meeting(store, 0, 12, "h:1", group_size=4)
    came(store, by_four, (0, 1, 2, 5))
    assert by_four.missing() == (
        "8 of 12 ranks have not connected to h:1: "
        "3 (gpu0), 4 (gpu1), 6-7 (gpu1), 8-11 (node rank 2)"
    )
    others = dist.HashStore()
    alone = Meeting(others, 0, 4, "h:1")
    came(others, alone, (0, 1, 3))
    assert alone.missing() == "rank 2 of 4 has not connected to h:1"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lost_store_ends_the_watch_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "FIRST_NOTICE", 0.0)
    watches = []

    def connect() -> dist.Store:
        watches.append(threading.current_thread())
        raise RendezvousError("it is gone")

    with watch_connecting(connect, dist.HashStore(), 0, 2):
        wait_until(lambda: bool(watches) and not watches[0].is_alive())
    assert len(watches) == 1
    assert capsys.readouterr().err == ""


def test_a_rank_that_fails_does_not_wait_for_the_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "FIRST_NOTICE", 0.0)
    watches, release, store = [], threading.Event(), dist.HashStore()

    def connect() -> dist.Store:
        watches.append(threading.current_thread())
        release.wait(60)
        return store

    def fail() -> None:
        with watch_connecting(connect, store, 0, 2):
            wait_until(lambda: bool(watches))
            raise ValueError("of the rank")

    with pytest.raises(ValueError, match="of the rank"):
        fail()
    assert watches[0].is_alive()
    release.set()
    watches[0].join(60)
    assert capsys.readouterr().err == "", "too late to say anything"


def test_many_spans_are_cut() -> None:
    said = spans(range(0, 100, 2), lambda _: "")
    assert said.endswith("28, 30 and 34 more")
    assert spans(range(100), lambda _: "") == "0-99"
