"""What the processes of a crew have in common: a group of their own, and answers of one line."""

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def join(spec: dict[str, Any], ranks: int) -> None:
    """Make the process group of the crew; one process needs none."""
    if ranks > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(spec["store"], ranks),
            rank=spec["rank"],
            world_size=ranks,
            timeout=timedelta(minutes=5),
        )


def answer(**fields: object) -> None:
    """What `Crew` waits for after a start and after each order."""
    print(json.dumps(fields), flush=True)
