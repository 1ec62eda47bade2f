"""The ranks of a run find each other in a store of keys, and say who has not come.

1. Rank 0 calls: it sets a name made up for this meeting, and the number of ranks.
2. Every rank that reads a new call answers it, with a name of its own and its host.
3. When all have answered, rank 0 sets the verdict, which is the names of all. A rank that finds its
   own name there goes on. Any rank may set the verdict to a refusal before, which ends them all.

The names make old keys harmless: torchrun keeps its store when it restarts the ranks, and a rank
that was started by hand may be ended while it waits, and started again. A rank that finds another
name in its place knows that two processes have its number.
"""

import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

from megapipe.errors import MegapipeError

PATIENCE = timedelta(minutes=10)
"""For all ranks of a job to come: nodes start apart, and read torch from one file system."""

FIRST_NOTICE = 10.0
"""Seconds until the missing ranks are named; then again after twice as long each time."""

POLL = 0.5
"""Seconds between two looks at the store, after a first second of shorter ones. For a job of a
thousand ranks and more it is longer in proportion, since one process answers all of them."""

FAREWELL = 3 * POLL
"""Seconds in which all ranks have read a refusal from the store, which this process may serve."""

MOST_SPANS = 16
"""Of ranks in one line."""


class RendezvousError(MegapipeError):
    """The processes of a job could not meet."""


class RefusedError(RendezvousError):
    """All ranks that wait know of it; one of them has to tell."""


class Notices:
    """When to speak: after FIRST_NOTICE seconds, then after twice as many each time."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.spoken = 0

    @property
    def waited(self) -> float:
        return time.monotonic() - self.began

    @property
    def next(self) -> float:
        """Seconds after the start at which the next one is due."""
        return FIRST_NOTICE * (2 ** (self.spoken + 1) - 1)

    def due(self) -> bool:
        """Whether to speak now. True once for each time."""
        if self.waited < self.next:
            return False
        self.spoken += 1
        return True


def say(text: str) -> None:
    print(f"megapipe: {text}", file=sys.stderr, flush=True)


@dataclass
class Meeting:
    """One rank's part in the meeting at `place`, in words.

    `hosts` names the machine of each rank where that is known before they come. Otherwise, with
    `group_size`, that many consecutive ranks share a machine. `kept`: the store outlives the ranks,
    so it may hold meetings of earlier ones, and `start` differs between the starts of ranks in it.
    """

    store: dist.Store
    rank: int
    size: int
    place: str
    hosts: Sequence[str] = ()
    group_size: int | None = None
    kept: bool = False
    start: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    answered: str = ""

    def attend(self) -> None:
        """Return when all ranks have come.

        Raises RefusedError when the ranks do not fit together or some have not come within
        PATIENCE, RendezvousError when another process has taken this one's place.
        """
        notices, pause = Notices(), 0.01
        if self.rank == 0:
            call = {"name": self.name, "size": self.size, "host": socket.gethostname()}
            self.store.set("call", json.dumps(call))
        while not (self._answer() and self._all_have_come()):
            if notices.waited > PATIENCE.total_seconds():
                self._refuse(
                    f"Gave up after {PATIENCE.total_seconds():.0f} s: {self.missing()}. See that "
                    f"all {self.size} processes were started and can reach that address."
                )
            if notices.due() and self._first_to_say(notices.spoken):
                limit = PATIENCE.total_seconds()
                say(f"waiting for {notices.waited:.0f} of {limit:.0f} s: {self.missing()}.")
            time.sleep(pause)
            pause = min(1.5 * pause, POLL * max(1, self.size / 1024))

    def part_of(self, store: dist.Store) -> dist.Store:
        """The meeting's own part of the store, for those who have met; `store` may be any
        connection to it."""
        return dist.PrefixStore(self.answered, store)

    def _first_to_say(self, number: int) -> bool:
        """Whether no other rank of this start has said this notice."""
        return self.store.add(f"notice/{self.start}/{self.answered}/{number}", 1) == 1

    def missing(self) -> str:
        """`4 of 8 ranks have not connected to node1:29500: 3 (node1), 5-7 (node2)`."""
        came: dict[int, str] = {}
        for rank in range(self.size):
            key = f"answer/{self.answered}/{rank}"
            if self.answered and self.store.check([key]):
                came[rank] = json.loads(self.store.get(key))["host"]
        if not self.answered:  # nobody answers before rank 0 has called
            return f"rank 0{self._host_of(0, came)} has not connected to {self.place}"
        return self._tell_missing(came)

    def _tell_missing(self, came: Mapping[int, str]) -> str:
        absent = [rank for rank in range(self.size) if rank not in came]
        ranks = spans(absent, lambda rank: self._host_of(rank, came))
        if len(absent) == 1:
            return f"rank {ranks} of {self.size} has not connected to {self.place}"
        return f"{len(absent)} of {self.size} ranks have not connected to {self.place}: {ranks}"

    def _host_of(self, rank: int, came: Mapping[int, str]) -> str:
        """` (node1)`, or nothing where no host is known."""
        if self.hosts:
            return f" ({self.hosts[rank]})"
        if self.group_size is None:
            return ""
        node = rank // self.group_size
        known = [host for other, host in came.items() if other // self.group_size == node]
        return f" ({known[0] if known else f'node rank {node}'})"

    def _answer(self) -> bool:
        """Answer rank 0's call if there is one; whether this rank has done so."""
        if not self.store.check(["call"]):
            return False
        call = json.loads(self.store.get("call"))
        key = f"answer/{call['name']}/{self.rank}"
        if self.rank == 0 and call["name"] != self.name:
            self.answered = call["name"]
            self._refuse_twice(call["host"])
        if call["name"] == self.answered:
            own = json.loads(self.store.get(key))
            if own["name"] != self.name:
                self._refuse_twice(own["host"])
            return True
        if self.kept and self.store.check([f"verdict/{call['name']}"]):
            return False  # a meeting of those before; rank 0 will call again
        self.answered = call["name"]
        if call["size"] != self.size:
            self._refuse(
                f"WORLD_SIZE={self.size} for rank {self.rank} on {socket.gethostname()}, and "
                f"WORLD_SIZE={call['size']} for rank 0 on {call['host']}. Start all processes of "
                "the job with the same number."
            )
        self.store.set(key, json.dumps({"name": self.name, "host": socket.gethostname()}))
        self.store.add(f"answers/{self.answered}", 1)
        return True

    def _all_have_come(self) -> bool:
        """Whether the verdict is that all go on; rank 0 finds it."""
        key = f"verdict/{self.answered}"
        if self.rank == 0 and (names := self._names()):
            self.store.compare_set(key, "", json.dumps({"names": names}))
        if not self.store.check([key]):
            return False
        verdict = json.loads(self.store.get(key))
        if "refused" in verdict:
            raise RefusedError(verdict["refused"])
        if verdict["names"][self.rank] != self.name:
            raise RendezvousError(
                f"The job at {self.place} has started with another process of RANK={self.rank}. "
                "Give each process a number of its own."
            )
        return True

    def _names(self) -> list[str]:
        """Of all ranks once they have answered; empty before."""
        if self.store.add(f"answers/{self.name}", 0) < self.size:
            return []
        keys = [f"answer/{self.name}/{rank}" for rank in range(self.size)]
        if not self.store.check(keys):  # some rank has answered twice, from two processes
            return []
        return [json.loads(answer)["name"] for answer in self.store.multi_get(keys)]

    def _refuse_twice(self, other: str) -> None:
        self._refuse(
            f"Two processes have RANK={self.rank}, on {socket.gethostname()} and on {other}. Give "
            f"each of the {self.size} a number of its own, from 0 to {self.size - 1}."
        )

    def _refuse(self, text: str) -> None:
        """End the meeting for all, by the first refusal that there was."""
        key = f"verdict/{self.answered}"
        if self.answered:
            verdict = json.loads(self.store.compare_set(key, "", json.dumps({"refused": text})))
            text = verdict.get("refused", text)
        raise RefusedError(text)


def spans(ranks: Sequence[int], host_of: Callable[[int], str]) -> str:
    """`0, 4-7 (node1), 9 (node2)`; of many, the first."""
    runs = []
    for host, of_host in groupby(ranks, host_of):
        for _, steps in groupby(enumerate(of_host), lambda pair: pair[1] - pair[0]):
            run = [rank for _, rank in steps]
            numbers = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
            runs.append((len(run), f"{numbers}{host}"))
    rest = sum(count for count, _ in runs[MOST_SPANS:])
    texts = [text for _, text in runs[:MOST_SPANS]]
    return ", ".join(texts) + (f" and {rest} more" if rest else "")


@contextmanager
def watch_connecting(
    connect: Callable[[], dist.Store], store: dist.Store, rank: int, size: int
) -> Iterator[None]:
    """While ranks that have met connect to each other, say who has not got through.

    In a thread, with a connection of its own to the same part of the store by `connect`: this
    one's is busy. Ends in silence where the store is gone, since then it counts what rank 0 says.
    """
    done = threading.Event()

    def look() -> None:
        notices = Notices()
        while not done.wait(max(0.0, notices.next - notices.waited)):
            notices.due()
            try:
                other = connect()
                if other.add(f"connecting/{notices.spoken}", 1) > 1:
                    continue
                absent = [r for r in range(size) if not other.check([f"connected/{r}"])]
            except (dist.DistError, RendezvousError):
                return
            if not done.is_set():
                say(
                    f"waiting for {notices.waited:.0f} s: all {size} ranks have met, and "
                    f"{len(absent)} of them {'has' if len(absent) == 1 else 'have'} not connected "
                    f"to all others: {spans(absent, lambda _: '')}."
                )

    thread = threading.Thread(target=look, name="connecting", daemon=True)
    thread.start()
    try:
        yield
        store.set(f"connected/{rank}", "")
    finally:
        done.set()
        thread.join(POLL)  # no longer: it may be waiting for a store that is gone
