"""A process's place in a job, by the variables of torchrun and Slurm, and meeting the others."""

import io
import multiprocessing
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapipe.distributed import job_store, meeting
from megapipe.distributed.launcher import launch_local
from megapipe.distributed.meeting import RendezvousError
from megapipe.distributed.rendezvous import (
    Rendezvous,
    allow_open_files,
    from_environment,
    init_process_group,
)

CPU = torch.device("cpu")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost,n1",
    "SLURM_JOB_NODELIST": "localhost,n[1-3]",
}


def test_started_alone() -> None:
    assert from_environment({"PATH": "/bin", "RANK": "0"}) is None


def test_torchrun() -> None:
    own = Rendezvous(5, 8, 1, 4, address=("node0", 29500), grouped=True)
    assert from_environment(TORCHRUN) == own
    served = from_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert served == replace(own, served=True)
    again = from_environment(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert again == replace(own, start="2")
    by_hand = {name: text for name, text in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert from_environment(by_hand) == Rendezvous(5, 8, 5, 8, address=("node0", 29500))


def test_srun() -> None:
    port = 10_000 + 4711 * 16
    while port >= 30_000:
        port -= 20_000
    place = from_environment(SRUN)
    hosts = ("localhost",) * 4 + ("n1",) * 3
    own = Rendezvous(5, 7, 1, 3, address=("localhost", port), hosts=hosts)
    assert place == own
    given = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_GPUS_PER_TASK": "1"}
    place = from_environment(given)
    assert place == replace(own, address=("head", 1234), own_gpu=True)
    dealt = from_environment(SRUN | {"SLURM_DISTRIBUTION": "cyclic"})
    assert dealt is not None
    assert dealt.hosts == ("localhost", "n1", "localhost", "n1", "localhost", "n1", "localhost")


def test_srun_at_a_node_whose_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    place = from_environment(SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})
    assert place is not None
    assert place.address is not None
    assert place.address[0] == "10.0.0.1"


def test_a_batch_script_and_a_step_of_one_task_are_alone() -> None:
    script = {name: text for name, text in SRUN.items() if "STEP" not in name}
    assert from_environment(script | {"SLURM_PROCID": "0"}) is None
    shell = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert from_environment(shell) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "first"}, "RANK=first in the environment is not a number"),
        ({"RANK": "-1"}, "RANK=-1 in the environment is not a number"),
        ({"RANK": "٣"}, "RANK=٣ in the environment is not a number"),
        ({"RANK": "8"}, "^RANK=8 with WORLD_SIZE=8: processes are numbered from 0 to 7"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is not a number of 1 or more"),
        ({"LOCAL_RANK": "4"}, "^LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4: .* from 0 to 3"),
        ({"LOCAL_RANK": ""}, "^LOCAL_RANK is not set, and RANK=5 with LOCAL_WORLD_SIZE=4"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 in the environment is not a number of 1 or more"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: ports end at 65535"),
        pytest.param(
            {"WORLD_SIZE": "1" * 5000},
            r"^WORLD_SIZE=1{18}\.\.\. .* is too long for a number",
            id="long",
        ),
    ],
)
def test_variables_that_are_missing_or_wrong(changed: dict[str, str], said: str) -> None:
    with pytest.raises(RendezvousError, match=said):
        from_environment(TORCHRUN | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"SLURM_PROCID": "7"}, "^SLURM_PROCID=7 with SLURM_STEP_NUM_TASKS=7: .* from 0 to 6"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,x"}, "SLURM_STEP_TASKS_PER_NODE=4,x .* not understood"),
        ({"SLURM_STEP_NODELIST": "gpu[1-x]"}, r"SLURM_STEP_NODELIST=gpu\[1-x\] .* not understood"),
        (
            {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "gpu[1-"},
            r"SLURM_JOB_NODELIST=gpu\[1- .* not understood",
        ),
    ],
)
def test_variables_of_slurm_that_are_wrong(changed: dict[str, str], said: str) -> None:
    with pytest.raises(RendezvousError, match=said):
        from_environment(SRUN | changed)


def test_a_list_of_nodes_that_does_not_fit_names_no_hosts() -> None:
    place = from_environment(SRUN | {"SLURM_STEP_NODELIST": "localhost"})
    assert place is not None
    assert place.hosts == ()


def start(rank_main: Callable[[int, int], None], rank: int, port: int) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=rank_main, args=(rank, port))
    process.start()
    return process


def finish(processes: Iterable[BaseProcess]) -> list[int | None]:
    """Their statuses."""
    running = list(processes)
    for process in running:
        process.join(120)
        process.kill()
    return [process.exitcode for process in running]


def _joins(rank: int, port: int) -> None:
    address = ("localhost", port)
    store = init_process_group(Rendezvous(rank, 2, rank, 2, address=address), CPU)
    assert store is not None
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    os._exit(int(total))


def test_ranks_of_a_job_meet_at_the_port(port: int) -> None:
    assert finish(start(_joins, rank, port) for rank in range(2)) == [3, 3]


def _restarts(rank: int, port: int) -> None:
    """Under torchrun, which serves the store and keeps it: twice, as two generations of ranks."""
    place = Rendezvous(rank, 2, rank, 2, address=("localhost", port), served=True)
    for generation in range(2):
        init_process_group(place, CPU)
        total = torch.tensor(rank + generation)
        dist.all_reduce(total)
        assert int(total) == 1 + 2 * generation
        dist.destroy_process_group()
    os._exit(3)


def test_ranks_that_torchrun_restarts_meet_again_in_the_same_store() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert finish(start(_restarts, rank, store.port) for rank in range(2)) == [3, 3]


def _waits_in_vain(rank: int, port: int) -> None:
    meeting.PATIENCE = job_store.PATIENCE = timedelta(seconds=1)
    place = Rendezvous(rank, 4, rank, 4, address=("localhost", port))
    try:
        init_process_group(place, CPU)
    except RendezvousError as error:
        said = str(error)
        assert f"2 of 4 ranks have not connected to localhost:{port}" in said
        assert "(MASTER_ADDR:MASTER_PORT): 2-3. See that all 4" in said
        os._exit(3)


def test_what_all_ranks_know_is_raised_by_one(port: int) -> None:
    """The others end with status 1, and after it."""
    ranks = [start(_waits_in_vain, rank, port) for rank in range(2)]
    assert set(finish(ranks)) == {1, 3}


class Tripwire(io.StringIO):
    """Ends the process with status 3 once it is given these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def write(self, text: str) -> int:
        if self.words in text:
            os._exit(3)
        return super().write(text)


def _connects(rank: int, port: int) -> None:
    """Rank 2 ends when all have come, before it has connected to the others."""
    meeting.FIRST_NOTICE = 0.5
    sys.stderr = Tripwire("3 of them have not connected to all others: 0-2.")
    if rank == 2:
        dist.init_process_group = lambda *_, **__: os._exit(0)
    init_process_group(Rendezvous(rank, 3, rank, 3, address=("localhost", port)), CPU)


def test_ranks_that_end_after_the_meeting_are_missed(port: int) -> None:
    ranks = [start(_connects, rank, port) for rank in range(3)]
    try:
        ended = connection.wait([rank.sentinel for rank in ranks[:2]], timeout=60)
        assert 3 in finish(rank for rank in ranks[:2] if rank.sentinel in ended)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _one_connects(rank: int, port: int) -> None:
    """Rank 1 has connected, as it believes, and rank 0 waits for what no other rank does."""
    meeting.FIRST_NOTICE = 0.5
    sys.stderr = Tripwire("1 of them has not connected to all others: 0.")
    if rank == 1:
        dist.init_process_group = lambda *_, **__: None
    place = Rendezvous(rank, 2, rank, 2, address=("localhost", port), served=True)
    init_process_group(place, CPU)
    os._exit(0)


def test_a_rank_that_has_connected_is_not_missed() -> None:
    """Nor does it matter what earlier ranks have said in a store that torchrun keeps."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        assert finish(start(_one_connects, rank, store.port) for rank in range(2)) == [3, 0]


def _loses_another(rank: int, port: int) -> None:
    dist.init_process_group = _fails_to_connect if rank == 0 else _leaves
    try:
        init_process_group(Rendezvous(rank, 2, rank, 2, address=("localhost", port)), CPU)
    except RendezvousError as error:
        start = "rank 0 of 2 met the others, and then could not connect to all of them: Gloo: "
        os._exit(3 if re.match(f"{start}Connection closed by peer\\. .*$", str(error)) else 4)


def _leaves(*_: Any, store: dist.Store, **__: Any) -> None:
    store.set("left", "")
    os._exit(0)


def _fails_to_connect(*_: Any, store: dist.Store, **__: Any) -> None:
    store.wait(["left"])
    raise RuntimeError("Gloo: Connection closed by peer.\nframe #0")


def test_a_failure_to_connect_is_one_line(port: int) -> None:
    assert finish(start(_loses_another, rank, port) for rank in range(2)) == [3, 0]


def _fails_on_its_gpu(rank: int, port: int) -> None:
    def fails(*_: Any, store: dist.Store, **__: Any) -> None:
        store.wait(["left"])
        raise torch.AcceleratorError("CUDA error: out of memory")

    dist.init_process_group = fails if rank == 0 else _leaves
    try:
        init_process_group(Rendezvous(rank, 2, rank, 2, address=("localhost", port)), CPU)
    except torch.AcceleratorError as error:
        os._exit(3 if str(error) == "CUDA error: out of memory" else 4)


def test_a_failure_of_the_own_gpu_is_not_one_to_connect(port: int) -> None:
    assert finish(start(_fails_on_its_gpu, rank, port) for rank in range(2)) == [3, 0]


# --- Open files ----------------------------------------------------------------------------------


def limit_of_open_files(soft: int, hard: int, ranks: int) -> str | tuple[int, int]:
    """What becomes of such limits in a process of their own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_allow_open_files, args=(soft, hard, ranks, there)
    )
    process.start()
    answer: str | tuple[int, int] = here.recv()
    process.join()
    return answer


def _allow_open_files(soft: int, hard: int, ranks: int, answer: connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        allow_open_files(ranks)
    except RendezvousError as error:
        answer.send(str(error))
    else:
        answer.send(resource.getrlimit(resource.RLIMIT_NOFILE))


def test_a_low_limit_on_open_files_is_raised_as_far_as_it_may() -> None:
    assert limit_of_open_files(256, 500, 400) == (500, 500)
    assert limit_of_open_files(300, 300, 4) == (300, 300)


def test_a_limit_on_open_files_that_can_not_suffice_is_refused() -> None:
    assert limit_of_open_files(256, 256, 300) == (
        "A process may have 256 files open here, and one of 300 ranks needs 332 or more. Raise the "
        "limit on open files (ulimit -n)."
    )


def test_ranks_that_may_not_open_enough_files_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    for start in (
        lambda: launch_local(lambda place: 0, 2),
        lambda: init_process_group(Rendezvous(0, 2, file=Path("none")), CPU),
    ):
        with pytest.raises(RendezvousError, match="may have 20 files open here, and one of 2"):
            start()
