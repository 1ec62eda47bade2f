"""Where the ranks of a run meet, and each one's place among them.

Started alone, a run's local ranks meet in a file, without any port. In a job of torchrun or Slurm
they meet at MASTER_ADDR:MASTER_PORT. The variables of both are read here and nowhere else.
"""

import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megapipe.distributed.job_store import ALL_GIVE_UP, Address, connect, join_address, open_store
from megapipe.distributed.meeting import (
    FAREWELL,
    Meeting,
    RefusedError,
    RendezvousError,
    watch_connecting,
)
from megapipe.distributed.mesh import COLLECTIVE_TIMEOUT
from megapipe.distributed.node_list import expand_counts, expand_nodes, place_tasks
from megapipe.distributed.rank_group import first_to_report
from megapipe.errors import RAISE_OPEN_FILES

MOST_DIGITS = 18  # of a number in the environment

LEAST_FILES = 32
"""What a rank has open besides a connection to each rank, at the very least."""
MANY_FILES = 65_536
"""More than a rank needs."""

SLURM_PORTS = range(10_000, 30_000)  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Rendezvous:
    """One rank's place, and where it meets the others: a `file`, or an `address`.

    `local_rank` of `local_size` counts the processes on this machine; with `own_gpu` each of them
    sees one GPU, its own. `served`: torchrun serves the address, rather than rank 0, and `start`
    counts its restarts. `hosts` names each rank's machine where that is known from the start;
    otherwise, where `grouped`, each machine has `local_size` consecutive ranks. One rank alone
    needs no place to meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    file: Path | None = None
    address: Address | None = None
    own_gpu: bool = False
    served: bool = False
    start: str = ""
    hosts: tuple[str, ...] = ()
    grouped: bool = False


def init_process_group(rendezvous: Rendezvous, device: torch.device) -> dist.Store | None:
    """Join the other ranks: NCCL between GPUs, gloo between CPUs. Nothing to do for one rank.

    Returns the store in which they met. Says who is missing while it waits. Raises RendezvousError
    when the port is taken, not all processes come, or their numbers don't fit together; ends
    the process with status 1 where another rank raises what all of them know.
    """
    if rendezvous.world_size == 1:
        return None
    allow_open_files(rendezvous.world_size)
    meeting = _meet(rendezvous)
    store = meeting.part_of(meeting.store)
    with _connecting(rendezvous, meeting):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return store


def allow_open_files(ranks: int) -> None:
    """Raise this process's limit on open files as far as it may, for connections to all ranks.

    Raises RendezvousError where they can't suffice: torch would end the process without a word.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if highest == resource.RLIM_INFINITY else min(highest, MANY_FILES)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, highest))
        limit = wanted
    if 0 <= limit < LEAST_FILES + ranks:
        raise RendezvousError(
            f"A process may have {limit} files open here, and one of {ranks} ranks needs "
            f"{LEAST_FILES + ranks} or more. {RAISE_OPEN_FILES}"
        )


def _meet(rendezvous: Rendezvous) -> Meeting:
    """The meeting, once all ranks have come to it."""
    rank, size, address = rendezvous.rank, rendezvous.world_size, rendezvous.address
    store: dist.Store | None = None
    try:
        if address is None:
            store, place = dist.FileStore(str(rendezvous.file), size), "this machine"
        else:
            store, place = (
                open_store(rank, size, address, served=rendezvous.served),
                (f"{join_address(address)} (MASTER_ADDR:MASTER_PORT)"),
            )
        group_size = rendezvous.local_size if rendezvous.grouped else None
        meeting = Meeting(
            store,
            rank,
            size,
            place,
            rendezvous.hosts,
            group_size,
            kept=rendezvous.served,
            start=rendezvous.start,
        )
        meeting.attend()
        return meeting
    except RefusedError as error:
        # Not the first to leave, which has the others ended, unless this one tells why.
        if store is not None and (address is None or first_to_report(store, str(error))):
            time.sleep(FAREWELL if rank == 0 else 0)  # the store ends with the process
            raise
        time.sleep(2 * ALL_GIVE_UP if store is None else 2 * FAREWELL)
        sys.exit(1)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {rank} of {size} lost the connection to {place} while it waited for other "
            "ranks. See what ended rank 0."
        ) from error


@contextmanager
def _connecting(rendezvous: Rendezvous, meeting: Meeting) -> Iterator[None]:
    """Watch over ranks that have met; what local ranks lack, the launcher sees."""
    rank, size, address = rendezvous.rank, rendezvous.world_size, rendezvous.address
    if address is None:
        yield
        return

    def connect_again() -> dist.Store:
        return meeting.part_of(connect(address))

    try:
        with watch_connecting(connect_again, meeting.part_of(meeting.store), rank, size):
            yield
    except RuntimeError as error:
        if not _is_of_network(error):
            raise
        raise RendezvousError(
            f"rank {rank} of {size} met the others, and then could not connect to all of them: "
            f"{str(error).splitlines()[0]} See whether one of them has ended. Between machines "
            "all ports must be open; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network "
            "interface to use."
        ) from error


def _is_of_network(error: RuntimeError) -> bool:
    """Whether torch could not reach others or the store, rather than use this rank's own GPU.

    Gloo's errors have no type of their own; each names gloo, if only in the path of its source.
    """
    kinds = (dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or "gloo" in str(error).lower()


def from_environment(environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """This process's place in a job of torchrun or srun; None when it was started alone.

    A job step of one task (`srun --pty bash`) counts as alone. Raises RendezvousError for variables
    that are missing, no numbers, or don't fit together.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    # SLURM_PROCID alone says nothing: batch scripts have it too, outside of any srun.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _of_srun(environment)
    return None


def _of_torchrun(environment: Mapping[str, str]) -> Rendezvous:
    """Also of processes that were started by hand, which may lack the LOCAL variables."""
    size = _number(environment, "WORLD_SIZE", least=1)
    rank = _below(environment, "RANK", "WORLD_SIZE", size)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", size, least=1)
    return Rendezvous(
        rank=rank,
        world_size=size,
        local_rank=_below(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE", local_size, rank),
        local_size=local_size,
        address=(_text(environment, "MASTER_ADDR"), _port(environment)),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        start=environment.get("TORCHELASTIC_RESTART_COUNT", ""),
        grouped="LOCAL_WORLD_SIZE" in environment and size % local_size == 0,
    )


def _of_srun(environment: Mapping[str, str]) -> Rendezvous | None:
    tasks = _number(environment, "SLURM_NTASKS", 1, least=1)
    size = _number(environment, "SLURM_STEP_NUM_TASKS", tasks, least=1)
    if size == 1:
        return None
    job = _number(environment, "SLURM_JOB_ID", _number(environment, "SLURM_JOBID", 0))
    step = _number(environment, "SLURM_STEP_ID")
    port = SLURM_PORTS[(job * 16 + step) % len(SLURM_PORTS)]
    counts = _task_counts(environment, size)
    nodes = _nodes(environment)
    hosts = place_tasks(nodes, counts, environment.get("SLURM_DISTRIBUTION", ""))
    node = _number(environment, "SLURM_NODEID", 0)
    return Rendezvous(
        rank=_below(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", size),
        world_size=size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=counts[min(node, len(counts) - 1)],
        address=(
            environment.get("MASTER_ADDR") or _reachable(nodes[0], environment),
            _port(environment, port),
        ),
        own_gpu="SLURM_GPUS_PER_TASK" in environment,
        hosts=hosts if len(hosts) == size else (),
    )


def _nodes(environment: Mapping[str, str]) -> list[str]:
    """The names of the step's nodes, or else of the job's."""
    step = "SLURM_STEP_NODELIST"
    name = step if environment.get(step) else "SLURM_JOB_NODELIST"
    nodes = _text(environment, name)
    try:
        return expand_nodes(nodes)
    except ValueError:
        raise RendezvousError(f"{name}={nodes} in the environment is not understood.") from None


def _reachable(host: str, environment: Mapping[str, str]) -> str:
    """The host; where its name does not resolve, the address from which srun came."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def _task_counts(environment: Mapping[str, str], size: int) -> list[int]:
    """The number of tasks on each node of the step."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    try:
        return expand_counts(counts)
    except ValueError:
        raise RendezvousError(
            f"SLURM_STEP_TASKS_PER_NODE={counts} in the environment is not understood."
        ) from None


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise RendezvousError(
            f"{name} is not set, and other variables say that this is one process of a job. Start "
            "it with torchrun or srun, which set it; or, to start all ranks on this machine, unset "
            "RANK and WORLD_SIZE."
        )
    return environment[name]


def _number(
    environment: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0
) -> int:
    if default is not None and not environment.get(name):
        return default
    text = _text(environment, name)
    if len(text) > MOST_DIGITS:
        raise RendezvousError(
            f"{name}={text[:MOST_DIGITS]}... in the environment is too long for a number."
        )
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        what = "a number" if least == 0 else f"a number of {least} or more"
        raise RendezvousError(f"{name}={text} in the environment is not {what}.")
    return int(text)


def _below(
    environment: Mapping[str, str], name: str, of: str, size: int, default: int | None = None
) -> int:
    """The number of one of `size` processes, of which the variable `of` says how many they are."""
    number = _number(environment, name, default)
    if number >= size:
        given = (
            f"{name}={number}" if environment.get(name) else f"{name} is not set, and RANK={number}"
        )
        raise RendezvousError(
            f"{given} with {of}={environment.get(of) or size}: processes are numbered from 0 to "
            f"{size - 1}. Set {name} for this process, or {of} for all of them."
        )
    return number


def _port(environment: Mapping[str, str], default: int | None = None) -> int:
    port = _number(environment, "MASTER_PORT", default, least=1)
    if port > 65535:
        raise RendezvousError(f"MASTER_PORT={port}: ports end at 65535. Set it to a free one.")
    return port
