"""A run as far as its data goes: several starts, in layouts of their own, without a model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import Config, dump_config, load_config, parse_config
from megapipe.config.data import ChangeConfig, DataConfig, ExcludeConfig, PhaseConfig
from megapipe.data import Batch, BatchFeed, merge_states
from megapipe.data.order.record import RECORD
from megapipe.data.positions import begin_positions, write_position
from megapipe.data.trace.replay import Replay
from megapipe.models.families import FAMILIES
from tests.config.examples import write as write_config
from tests.data.samples import ByteTokenizer, data_config, document, source, write

BATCH, LENGTH, EVERY = 8, 32, 50


@dataclass
class Start:
    """One start of a run: up to which step, over how many replicas, and with which data."""

    until: int
    replicas: int
    data: DataConfig


@dataclass
class Simulated:
    """A run that was trained: its directory, and what each step's replicas read."""

    directory: Path
    steps: dict[int, list[Batch]] = field(default_factory=dict)


class Tokens(ByteTokenizer):
    """One that decodes parts of characters too."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id_ - 1 for id_ in ids if id_).decode(errors="replace")


def run_config(directory: Path, data: DataConfig) -> Config:
    config = load_config(write_config(directory), [], FAMILIES)
    train = {"run_dir": str(directory / "run"), "global_batch_size": BATCH, "seed": 1}
    return config.model_copy(
        update={
            "data": data,
            "train": config.train.model_copy(
                update={**train, "micro_batch_size": 1, "sequence_length": LENGTH}
            ),
        }
    )


def simulate(directory: Path, starts: Sequence[Start], every: int = EVERY) -> Simulated:
    """Train without a model: positions, records and metrics are those of a run."""
    run = Simulated(directory / "run")
    data = run.directory / RECORD
    step, state = 0, None
    for start in starts:
        config = run_config(directory, start.data)
        feeds = [
            BatchFeed(
                start.data,
                seed=1,
                tokenizer=Tokens(),
                replica=replica,
                replicas=start.replicas,
                global_batch_size=BATCH,
                sequence_length=LENGTH,
                record=data,
            )
            for replica in range(start.replicas)
        ]
        for feed in feeds if state is not None else ():
            assert state is not None
            feed.load_state_dict(json.loads(json.dumps(state)))
        run.directory.mkdir(exist_ok=True)
        (run.directory / "resolved-config.toml").write_text(dump_config(config))
        begin_positions(data, step, merge_states([feed.state_dict() for feed in feeds]))
        with (run.directory / "metrics.jsonl").open("a") as metrics:
            while step < start.until:
                step += 1
                run.steps[step] = [next(feed) for feed in feeds]
                total = sum(batch.hash for batch in run.steps[step]) % 2**64
                line: dict[str, Any] = {"step": step, "loss": 1.0}
                line |= {"epoch": max(feed.epoch for feed in feeds), "batch_hash": f"{total:016x}"}
                metrics.write(json.dumps(line) + "\n")
                if step % every == 0 or step == start.until:
                    state = merge_states([feed.state_dict() for feed in feeds])
                    write_position(data, step, state)
        for feed in feeds:
            feed.close()
    return run


def rows(first: int, count: int) -> list[dict[str, str]]:
    return [{"id": f"id-{n}", "text": document(n)} for n in range(first, first + count)]


def write_sources(directory: Path) -> tuple[list[Any], DataConfig]:
    """Files of several kinds, in which some rows are bad or empty."""
    for number in range(3):
        lines = [json.dumps(row) for row in rows(1000 * number, 60)]
        lines[7:7] = ["{", json.dumps({"id": "empty", "text": ""}), ""]
        write(directory / "web" / f"{number}.jsonl", "\n".join(lines).encode() + b"\n")
    table = pa.Table.from_pylist(rows(5000, 90))
    (directory / "books").mkdir()
    pq.write_table(table, directory / "books" / "a.parquet", row_group_size=40)
    lines = [json.dumps(row) for row in rows(7000, 80)]
    write(directory / "packed" / "a.jsonl.zst", "\n".join(lines).encode())
    write(directory / "notes" / "a.txt", "\n".join(document(n) for n in range(9000, 9050)).encode())
    sources = [
        source(directory / "web" / "*.jsonl", "web", weight=3.0, id_field="id"),
        source(directory / "books" / "*.parquet", "books", id_field="id"),
        source(directory / "packed" / "*.zst", "packed", id_field="id"),
        source(directory / "notes" / "*.txt", "notes", documents="line"),
    ]
    return sources, data_config(*sources, streams=8, open_parts=32, validation_fraction=0.05)


def four_starts(directory: Path, until: Sequence[int] = (100, 200, 350, 500)) -> list[Start]:
    """Starts with phases, files that come and go, and rows that are excluded."""
    _, first = write_sources(directory)
    weights = {"web": 1.0, "books": 2.0, "packed": 1.0, "notes": 1.0}
    phases = (PhaseConfig(after_step=until[0] + 20, weights=weights),)
    first = first.model_copy(update={"phases": phases})
    lists = [
        write(directory / f"exclude{number}.jsonl", _ids(ids))
        for number, ids in enumerate([range(10, 40), [*range(10, 40), *range(1010, 1030)]])
    ]
    new = "\n".join(json.dumps(row) for row in rows(20000, 50)).encode()
    new_file = write(directory / "new" / "b.jsonl", new)
    changes = (
        ChangeConfig(after_step=until[1] + 5, source="web", add=str(new_file)),
        ChangeConfig(
            after_step=until[1] + 40, source="web", remove=str(directory / "web" / "2.jsonl")
        ),
    )
    second = first.model_copy(update={"exclude": (_exclude(lists[0]),)})
    third = second.model_copy(update={"changes": changes})
    fourth = third.model_copy(update={"exclude": (_exclude(lists[1]),)})
    configs = [first, second, third, fourth]
    return [Start(*start) for start in zip(until, (1, 4, 2, 8), configs, strict=True)]


def _ids(numbers: Sequence[int] | range) -> bytes:
    return b"".join(json.dumps({"id": f"id-{number}"}).encode() + b"\n" for number in numbers)


def _exclude(path: Path) -> ExcludeConfig:
    return ExcludeConfig(path=str(path))


def open_replay(run: Simulated) -> Replay:
    """What the run has read, by its directory alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megapipe.data.trace.replay.load_tokenizer", lambda place: Tokens())
        text = (run.directory / "resolved-config.toml").read_text(encoding="utf-8")
        return Replay(parse_config(text, FAMILIES), run.directory)
