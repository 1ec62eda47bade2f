"""The harness itself: results in order, errors of the failing rank, workers replaced."""

import os
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from megapipe.errors import DataError
from tests.ranks import Pool, RankFailedError, StartedWorker, run_ranks


def _sum_of_ranks(extra: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + extra)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def test_every_rank_returns_its_result_in_order() -> None:
    assert run_ranks(_sum_of_ranks, 3, 10) == [(rank, 33) for rank in range(3)]
    assert run_ranks(_sum_of_ranks, 2, 0) == [(0, 1), (1, 1)]


def test_ranks_may_be_started_instead_of_forked() -> None:
    """As they are on GPUs."""
    pool = Pool("gloo", StartedWorker)
    try:
        assert pool.run(_sum_of_ranks, 1, 10, timeout=120) == [(0, 10)]
        assert pool.workers[0].pid != os.getpid()
        with pytest.raises(RankFailedError, match="rank 0 died by SIGKILL"):
            pool.run(_kills_itself, 1, timeout=120)
    finally:
        pool.close()


def _kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails_on_one() -> None:
    if dist.get_rank() == 1:
        raise DataError("no text")
    dist.barrier()


def test_the_failing_ranks_error_is_raised_with_its_traceback() -> None:
    with pytest.raises(DataError, match="no text") as caught:
        run_ranks(_fails_on_one, 3)
    assert "on rank 1" in caught.value.__notes__[0]
    assert "_fails_on_one" in caught.value.__notes__[0]
    assert run_ranks(_sum_of_ranks, 3, 0)[0] == (0, 3), "the next call has a sound pool"


def _dies() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_dead_rank_is_named_and_replaced() -> None:
    with pytest.raises(RankFailedError, match="rank 0 died by SIGKILL"):
        run_ranks(_dies, 2)
    assert run_ranks(_sum_of_ranks, 2, 0)[0] == (0, 1)


def _dies_after_its_answer() -> None:
    def end_badly() -> None:
        time.sleep(0.1)
        os._exit(3)

    Thread(target=end_badly).start()


def test_a_rank_that_died_between_calls_is_named_and_replaced() -> None:
    run_ranks(_dies_after_its_answer, 1)
    time.sleep(0.5)
    with pytest.raises(RankFailedError, match="rank 0 died with exit status 3"):
        run_ranks(_sum_of_ranks, 2, 0)
    assert run_ranks(_sum_of_ranks, 2, 0)[0] == (0, 1)


def _parts_from_its_group_late() -> None:
    path = Path(dist.distributed_c10d._get_default_store().underlying_store.path)
    destroy = dist.destroy_process_group

    def late() -> None:
        time.sleep(0.3)
        if not path.exists():
            os._exit(4)
        dist.destroy_process_group = destroy
        destroy()

    dist.destroy_process_group = late


def test_a_store_keeps_its_file_until_all_have_parted() -> None:
    run_ranks(_parts_from_its_group_late, 2)
    assert run_ranks(_sum_of_ranks, 2, 0)[0] == (0, 1)


def _hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_a_hanging_rank_is_named_and_replaced() -> None:
    with pytest.raises(RankFailedError, match=r"ranks \[1\] did not finish within 1 s"):
        run_ranks(_hangs, 2, timeout=1)
    assert run_ranks(_sum_of_ranks, 2, 0)[0] == (0, 1)
