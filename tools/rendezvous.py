"""Where the ranks of a run meet, and each one's place among them.

Started alone, a run's local ranks meet in a file, without any port. In a job of torchrun or Slurm
they meet at MASTER_ADDR:MASTER_PORT. The variables of both are read here and nowhere else.
"""

import hashlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megapipe.errors import MegapipeError
from megapipe.mesh import COLLECTIVE_TIMEOUT

JOIN_TIMEOUT = timedelta(minutes=10)
"""For all processes of a job to arrive: nodes start apart, and read torch from one file system."""

SLURM_PORTS = range(10_000, 30_000)  # below the ports that Linux gives to outgoing connections


class RendezvousError(MegapipeError):
    """The processes of a job could not meet."""


@dataclass(frozen=True)
class Rendezvous:
    """One rank's place, and where it meets the others: a `file`, or an `address` (host:port).

    `local_rank` of `local_size` counts the processes on this machine; with `own_gpu` each of them
    sees one GPU, its own. One rank alone needs no place to meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    file: Path | None = None
    address: str | None = None
    own_gpu: bool = False


def init_process_group(rendezvous: Rendezvous, device: torch.device) -> dist.Store | None:
    """Join the other ranks: NCCL between GPUs, gloo between CPUs. Nothing to do for one rank.

    Returns the store in which they met. Raises RendezvousError when the port is taken, or not all
    processes come.
    """
    if rendezvous.world_size == 1:
        return None
    rank, size = rendezvous.rank, rendezvous.world_size
    store: dist.Store
    if rendezvous.file is not None:
        store = dist.FileStore(str(rendezvous.file), size)
    else:
        store = _join(rendezvous)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return store


def first_to_tell(store: dist.Store, text: str) -> bool:
    """Whether no rank has asked this of `text` before: one of many ranks then tells what all know.

    True also where the store is gone, so that nothing remains untold.
    """
    try:
        return store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except dist.DistError:
        return True


def _join(rendezvous: Rendezvous) -> dist.Store:
    """The key-value store of the job; rank 0 serves it, or torchrun does."""
    rank, size, address = rendezvous.rank, rendezvous.world_size, rendezvous.address
    try:
        # Not `TCPStore`: this knows whether torchrun's agent serves the port already.
        handshake = dist.rendezvous(f"tcp://{address}", rank, size, timeout=JOIN_TIMEOUT)
        store: dist.Store = next(handshake)[0]
        return store
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        text = str(error).splitlines()[0]
        if "EADDRINUSE" in text:
            assert address is not None
            port = address.rpartition(":")[2]
            raise RendezvousError(
                f"MASTER_PORT={port} is in use on {socket.gethostname()}, so the ranks can't "
                "meet there. Set MASTER_PORT to a free port, for all processes of the job alike "
                "(torchrun --master-port, or --standalone on one machine)."
            ) from error
        raise RendezvousError(
            f"rank {rank} of {size} waited at MASTER_ADDR:MASTER_PORT={address} for the other "
            f"processes, and gave up ({text}). See that all {size} were started and can reach that "
            "address."
        ) from error


def from_environment(environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """This process's place in a job of torchrun or srun; None when it was started alone.

    A job step of one task (`srun --pty bash`) counts as alone. Raises RendezvousError for variables
    that are missing or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    # SLURM_PROCID alone says nothing: batch scripts have it too, outside of any srun.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _of_srun(environment)
    return None


def _of_torchrun(environment: Mapping[str, str]) -> Rendezvous:
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    return Rendezvous(
        rank=rank,
        world_size=size,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", size),
        address=_address(_text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT")),
    )


def _of_srun(environment: Mapping[str, str]) -> Rendezvous | None:
    tasks = _number(environment, "SLURM_NTASKS", 1)
    size = _number(environment, "SLURM_STEP_NUM_TASKS", tasks)
    if size == 1:
        return None
    job = _number(environment, "SLURM_JOB_ID", _number(environment, "SLURM_JOBID", 0))
    step = _number(environment, "SLURM_STEP_ID")
    port = SLURM_PORTS[(job * 16 + step) % len(SLURM_PORTS)]
    local = _number(environment, "SLURM_LOCALID")
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    host = environment.get("MASTER_ADDR") or _first_host(environment)
    return Rendezvous(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=size,
        local_rank=local,
        local_size=_tasks_on_node(counts, _number(environment, "SLURM_NODEID", 0)),
        address=_address(host, _number(environment, "MASTER_PORT", port)),
        own_gpu="SLURM_GPUS_PER_TASK" in environment,
    )


def _first_host(environment: Mapping[str, str]) -> str:
    """The node of task 0; where its name does not resolve, the address from which srun came."""
    nodes = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST")
    host = first_node(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu007` of `gpu[007-012,020],cpu1`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _tasks_on_node(counts: str, node: int) -> int:
    """Entry `node` of a list like `4(x2),3`."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise RendezvousError(
                f"SLURM_STEP_TASKS_PER_NODE={counts} in the environment is not understood."
            )
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[min(node, len(expanded) - 1)]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise RendezvousError(
            f"{name} is not set, and other variables say that this is one process of a job. Start "
            "it with torchrun or srun, which set it; or, to start all ranks on this machine, unset "
            "RANK and WORLD_SIZE."
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    text = _text(environment, name)
    if not text.isdecimal():
        raise RendezvousError(f"{name}={text} in the environment is not a number.")
    return int(text)
