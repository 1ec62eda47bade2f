"""A process's place in a job, by the variables of torchrun and Slurm, and meeting the others."""

import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapipe.tools import rendezvous
from megapipe.tools.rendezvous import (
    Rendezvous,
    RendezvousError,
    first_node,
    first_to_tell,
    from_environment,
    init_process_group,
)
from tests.ranks import run_ranks

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
    "SLURM_JOB_NODELIST": "localhost,n[1-3]",
}


def test_started_alone() -> None:
    assert from_environment({"PATH": "/bin", "RANK": "0"}) is None


def test_torchrun() -> None:
    assert from_environment(TORCHRUN) == Rendezvous(5, 8, 1, 4, address="node0:29500")
    ipv6 = from_environment(TORCHRUN | {"MASTER_ADDR": "fe80::1"})
    assert ipv6 is not None
    assert ipv6.address == "[fe80::1]:29500"


def test_srun() -> None:
    port = 10_000 + 4711 * 16
    while port >= 30_000:
        port -= 20_000
    place = from_environment(SRUN)
    assert place == Rendezvous(5, 7, 1, 3, address=f"localhost:{port}")
    given = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_GPUS_PER_TASK": "1"}
    place = from_environment(given)
    assert place == Rendezvous(5, 7, 1, 3, address="head:1234", own_gpu=True)


def test_srun_at_a_node_whose_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    place = from_environment(SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})
    assert place is not None
    assert place.address is not None
    assert place.address.startswith("10.0.0.1:")


def test_a_batch_script_and_a_step_of_one_task_are_alone() -> None:
    script = {name: text for name, text in SRUN.items() if "STEP" not in name}
    assert from_environment(script | {"SLURM_PROCID": "0"}) is None
    shell = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert from_environment(shell) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-012,020],cpu1", "gpu007"),
        ("n[3,5]", "n3"),
        ("rack[0-1]node[01-04]-ib", "rack0node01-ib"),
    ],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "first"}, "RANK=first in the environment is not a number"),
    ],
)
def test_variables_that_are_missing_or_wrong(changed: dict[str, str], said: str) -> None:
    with pytest.raises(RendezvousError, match=said):
        from_environment(TORCHRUN | changed)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _joins(rank: int, port: int) -> None:
    store = init_process_group(Rendezvous(rank, 2, rank, 2, address=f"localhost:{port}"), CPU)
    assert store is not None
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    os._exit(int(total))


def test_ranks_of_a_job_meet_at_the_port() -> None:
    port = free_port()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_joins, args=(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [3, 3]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            RendezvousError, match=rf"MASTER_PORT={port} is in use .* --master-port"
        ):
            init_process_group(Rendezvous(0, 2, address=f"localhost:{port}"), CPU)


def test_a_rank_that_waits_in_vain_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", rendezvous.JOIN_TIMEOUT / 600)
    address = f"localhost:{free_port()}"
    with pytest.raises(RendezvousError, match=f"rank 0 of 2 waited .*{address}"):
        init_process_group(Rendezvous(0, 2, address=address), CPU)


def _tells() -> list[bool]:
    store = dist.distributed_c10d._get_default_store()
    return [first_to_tell(store, text) for text in ("known to all", f"of {dist.get_rank()}")]


def test_what_many_ranks_know_is_told_by_one() -> None:
    told = run_ranks(_tells, 3)
    assert sum(known for known, _ in told) == 1
    assert all(own for _, own in told)
