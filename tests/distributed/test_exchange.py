"""JSON between ranks."""

from typing import Any

import torch.distributed as dist

from megapipe.distributed.exchange import all_gather_json, gather_json
from tests.ranks import run_ranks


def value_of(rank: int) -> dict[str, Any]:
    return {"rank": rank, "text": "ä" * 1000 * rank, "big": 2**100 + rank, "nothing": None}


def exchange() -> tuple[list[Any], list[Any] | None]:
    rank = dist.get_rank()
    pair = dist.new_group([0, 2])
    mine = all_gather_json(rank, pair) if rank in (0, 2) else [0, 2]
    assert mine == [0, 2]
    return all_gather_json(value_of(rank), None), gather_json(value_of(rank), dist.group.WORLD)


def test_values_of_any_length_arrive_in_rank_order() -> None:
    expected = [value_of(rank) for rank in range(3)]
    results = run_ranks(exchange, 3)
    assert [gathered for gathered, _ in results] == [expected] * 3
    assert [at_first for _, at_first in results] == [expected, None, None]
