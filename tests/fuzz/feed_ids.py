"""`python -m tests.fuzz.feed_ids CONFIG PASSES TOKENS`: prints the ids that a run would train on.

A checkpoint doesn't hold them, so this asks the project's own feed, the part that is under test. It
prints one JSON object: the ids of each stream in order, what the feed has said, and its account of
what it has not delivered, as it is in metrics.jsonl; or the error that it ended with. It stops when
a stream has begun pass number PASSES (counted from 0), or has given a number of tokens.
"""

import json
import sys
from typing import Any

import numpy as np


def main() -> int:
    config, passes, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(read(config, passes, tokens)))
    return 0


def read(path: str, passes: int, most: int) -> dict[str, Any]:
    """What the feed of one process gives; {"error": text} where it refuses."""
    from megapipe.config import load_config
    from megapipe.data.feed import BatchFeed
    from megapipe.data.tokenizer import load_tokenizer
    from megapipe.errors import MegapipeError
    from megapipe.models.families import FAMILIES

    said: list[str] = []
    config = load_config(path, [], FAMILIES)
    streams = config.streams
    ids: dict[int, list[int]] = {stream: [] for stream in range(streams)}
    try:
        feed = BatchFeed(
            config.data,
            seed=config.train.seed,
            tokenizer=load_tokenizer(config.data.tokenizer),
            replica=0,
            replicas=1,
            global_batch_size=streams,
            sequence_length=config.train.sequence_length,
            say=said.append,
        )
        while feed.epoch < passes and sum(map(len, ids.values())) < most:
            for stream, row in enumerate(np.asarray(next(feed).tokens).tolist()):
                ids[stream] += row[1 if ids[stream] else 0 :]  # a row begins with the last token
        account = feed.account
        feed.close()
    except MegapipeError as error:
        return {"error": str(error), "said": said}
    return {
        "streams": list(ids.values()),
        "said": said,
        "skipped_rows": account.skipped.total(),
        "skipped_bytes": account.skipped_bytes,
        "empty_rows": account.empty_rows,
    }


if __name__ == "__main__":
    sys.exit(main())
