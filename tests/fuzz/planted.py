"""Programs with one fault each, which the fuzzer has to find: they stand for megapipe's.

Each runs the real program and does one thing wrong besides. `PLANTED` names the check that has to
find it.
"""

import io
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from tests.fuzz import feed_ids


def shows_a_traceback() -> int:
    raise ValueError("planted")


def warns_like_a_library() -> int:
    print("planted.py:1: FutureWarning: planted", file=sys.stderr)
    return _megapipe()


def fails_in_silence() -> int:
    return _megapipe() + 1


def fails_with_success() -> int:
    status = _megapipe()
    print("megapipe: planted: something failed", file=sys.stderr)
    return status


def stops_before_the_end() -> int:
    """Status 0, and nothing trained."""
    return 0 if sys.argv[1] == "train" else _megapipe()


def loses_its_output() -> int:
    """Status 0, and nothing printed."""
    with redirect_stdout(io.StringIO()):
        return _megapipe()


def leaves_a_scratch_file() -> int:
    Path(".run.toml.1234").write_text("planted")
    return _megapipe()


def leaves_a_temporary_folder() -> int:
    Path(os.environ["TMPDIR"], "megapipe-planted").mkdir()
    return _megapipe()


def cuts_the_metrics() -> int:
    status = _megapipe()
    metrics = Path("run/metrics.jsonl")
    metrics.write_bytes(metrics.read_bytes()[:-10])
    return status


def misses_a_step() -> int:
    status = _megapipe()
    metrics = Path("run/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], *lines[2:]]))
    return status


def damages_a_checkpoint() -> int:
    status = _megapipe()
    for shard in Path("run/checkpoints").glob("*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-8])
    return status


def writes_over_the_config() -> int:
    status = _megapipe()
    Path("run.toml").write_text(Path("run.toml").read_text() + "# planted")
    return status


def removes_a_file() -> int:
    Path("text.txt").rename("text.old")
    return _megapipe()


def leaves_a_program_running() -> int:
    if os.fork() == 0:
        os.setsid()
        os.execvp("sleep", ["sleep", "60"])
    return _megapipe()


def looks_up_a_name() -> int:
    with suppress(OSError):
        socket.getaddrinfo("example.org", 443)
    return _megapipe()


def connects_elsewhere() -> int:
    with suppress(OSError):
        socket.create_connection(("192.0.2.1", 443))
    return _megapipe()


def sends_a_packet() -> int:
    with suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.sendto(b"planted", ("2001:db8::1", 443))
    return _megapipe()


def forgets_what_it_had_learned() -> int:
    """After a resume, losses are a little different."""
    metrics = Path("run/metrics.jsonl")
    resumed = metrics.exists()
    status = _megapipe()
    if resumed:
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        rows[-1]["loss"] += 1e-12 + abs(rows[-1]["loss"]) * 1e-15
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return status


def drops_a_row() -> int:
    """In no pass does it come."""

    def without_first(ids: list[int], end: int) -> list[int]:
        documents: list[list[int]] = [[]]
        for number in ids:
            documents[-1].append(number)
            if number == end:
                documents.append([])
        return [number for text in documents if text != documents[0] for number in text]

    return _feed(without_first)


def delivers_a_row_twice() -> int:
    return _feed(lambda ids, end: ids[: ids.index(end) + 1] + ids)


def changes_a_character() -> int:
    return _feed(lambda ids, end: [ids[1], ids[0], *ids[2:]])


def hides_a_bad_row() -> int:
    return _feed(lambda ids, end: ids, skipped_rows=0)


def hides_bytes() -> int:
    return _feed(lambda ids, end: ids, skipped_bytes=0)


PLANTED: dict[Callable[[], int], str] = {
    shows_a_traceback: "words",
    warns_like_a_library: "words",
    fails_in_silence: "status",
    fails_with_success: "status",
    stops_before_the_end: "status",
    loses_its_output: "status",
    leaves_a_scratch_file: "whole",
    leaves_a_temporary_folder: "whole",
    cuts_the_metrics: "whole",
    misses_a_step: "whole",
    damages_a_checkpoint: "whole",
    writes_over_the_config: "whole",
    removes_a_file: "whole",
    leaves_a_program_running: "whole",
    looks_up_a_name: "network",
    connects_elsewhere: "network",
    sends_a_packet: "network",
    forgets_what_it_had_learned: "resume",
    drops_a_row: "account",
    delivers_a_row_twice: "account",
    changes_a_character: "account",
    hides_a_bad_row: "account",
    hides_bytes: "account",
}


def _megapipe() -> int:
    from megapipe.tools.cli import main

    return main()


def _feed(change: Callable[[list[int], int], list[int]], **others: Any) -> int:
    """The feed's own answer with the first stream's ids changed. 2 is the end token's id."""
    text = io.StringIO()
    with redirect_stdout(text):
        status = feed_ids.main()
    answer = json.loads(text.getvalue())
    first, *rest = answer["streams"]
    print(json.dumps(answer | {"streams": [change(first, 2), *rest]} | others))
    return status
