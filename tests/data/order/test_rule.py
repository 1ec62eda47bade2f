"""The feed against the rule of docs/data-order.md, which a program of its own computes."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import ChangeConfig, DataConfig, ExcludeConfig, PhaseConfig, SourceConfig
from megapipe.data import BatchFeed, merge_states
from tests.data.order import rule
from tests.data.samples import ByteTokenizer, jsonl, open_feed, write

CASES = 60
"""In each run of the tests. 200 were run by hand: the numbers of cases are their seeds."""
STEPS = 14
LENGTH = 24
SEED = 1
FIRST = "some text"
KINDS = ("jsonl", "line", "parquet", "gz", "file")


@dataclass
class Case:
    """A random config on random files, and what the rule needs to know of it."""

    config: DataConfig
    batch: int
    sources: list[rule.Source]
    phases: list[tuple[int, dict[str, float]]]
    restart: int
    """The step behind which the run starts again, and excludes texts from there on."""
    excluded: frozenset[str]

    def keeps(self, step: int, *row: object) -> bool:
        name, key, start, address, text = row
        if step >= self.restart and text in self.excluded:
            return False
        drawn = rule.draw("validation", SEED, name, key, start, address)
        return drawn / 2**64 >= self.config.validation_fraction

    def out(self, name: str, key: str, row: tuple[int, int, str], step: int) -> bool:
        (source,) = (source for source in self.sources if source.name == name)
        left = source.leaves.get(key, step + 1) == step
        return left or (step == self.restart and row[2] in self.excluded)

    def expected(self, steps: int) -> list[np.ndarray[Any, Any]]:
        made = rule.batches(
            self.sources,
            self.phases,
            batch=self.batch,
            length=LENGTH,
            tokenizer=ByteTokenizer(),
            keeps=self.keeps,
            out=self.out,
        )
        return list(islice(made, steps))


def random_text(chance: random.Random) -> str:
    """Empty now and then."""
    if chance.random() < 0.1:
        return ""
    return "a" + "".join(chance.choice("abcdefg ") for _ in range(chance.randrange(0, 60)))


def write_file(folder: Path, kind: str, name: str, chance: random.Random) -> Path:
    texts = [FIRST] + [random_text(chance) for _ in range(chance.choice((10, 20, 60)))]
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=chance.choice((1, 7, 50)))
        return path
    if kind in ("jsonl", "gz"):
        return write(folder / f"{name}.jsonl{'.gz' if kind == 'gz' else ''}", jsonl(texts))
    suffix = "md" if kind == "line" else "txt"
    return write(folder / f"{name}.{suffix}", "".join(f"{text}\n" for text in texts).encode())


def random_case(folder: Path, chance: random.Random) -> Case:
    streams = chance.choice((1, 2, 4, 8, 16))
    validation = chance.choice((0.0, 0.0, 0.2))
    open_parts = chance.choice((1, 8, 64, 1024))
    configs, changes, sources = [], [], []
    names = chance.sample(["web", "code", "books"], chance.randrange(1, 4))
    for name in names:
        kind = chance.choice(KINDS)
        first = [
            write_file(folder / name, kind, f"a{n}", chance) for n in range(chance.randrange(1, 4))
        ]
        write(folder / name / ("z.jsonl" if kind == "gz" else first[0].name), first[0].read_bytes())
        cohorts, leaves = [first], {}
        if chance.random() < 0.4:
            step = chance.randrange(0, STEPS)
            cohorts.append([write_file(folder / f"{name}-new", kind, "b0", chance)])
            changes.append((step, name, f"{folder}/{name}-new/*", None))
        if chance.random() < 0.3 and len(first) > 1:
            step = chance.randrange(1, STEPS)
            leaves[first[0].name] = step
            changes.append((step, name, None, str(first[0])))
        ends = chance.random() < 0.3 and len(names) > 1 and name != names[0]
        configs.append(
            SourceConfig(
                name=name,
                path=f"{folder}/{name}/a*",
                weight=chance.choice((0.3, 1.0, 2.5)),
                documents="file" if kind == "file" else "line",
                max_epochs=chance.randrange(1, 3) if ends else None,
                after_max_epochs="end",
            )
        )
        size = min(
            4 << 20,
            max(
                8 << 10,
                sum(p.stat().st_size * (4 if kind == "gz" else 1) for p in first) // (4 * streams),
            ),
        )
        steps = [0, *(step for step, of, add, _ in changes if of == name and add)]
        sources.append(
            rule.Source(
                name,
                SEED,
                streams,
                [
                    rule.Cohort.of(step, paths, folder / name, size, streams)
                    for step, paths in zip(steps, cohorts, strict=True)
                ],
                leaves,
                configs[-1].max_epochs,
                open_parts,
            )
        )
    phases = {0: {config.name: config.weight for config in configs}}
    for _ in range(chance.randrange(0, 3)):
        some = {name: chance.choice((0.0, 0.5, 1.0)) for name in names} | {names[0]: 1.0}
        phases[chance.randrange(1, STEPS)] = some
    config = DataConfig(
        tokenizer="bytes",
        streams=streams,
        open_parts=open_parts,
        validation_fraction=validation,
        sources=tuple(configs),
        phases=tuple(
            PhaseConfig(after_step=step, weights=weights)
            for step, weights in phases.items()
            if step
        ),
        changes=tuple(
            ChangeConfig(after_step=step, source=name, add=add, remove=remove)
            for step, name, add, remove in changes
        ),
        max_bad_rows=0,
    )
    batch = 2 * streams if streams < 8 else streams
    excluded = random_texts(sources, chance) if chance.random() < 0.5 else frozenset()
    restart = chance.randrange(0, STEPS)
    return Case(config, batch, sources, sorted(phases.items()), restart, excluded)


def random_texts(sources: list[rule.Source], chance: random.Random) -> frozenset[str]:
    """One in five of all rows that have text; but one of each file stays."""
    units = {
        id(unit): unit for source in sources for c in source.cohorts for _, unit, *_ in c.parts
    }
    texts = sorted({text for unit in units.values() for _, text in unit.rows if text.strip()})
    return frozenset(
        text
        for text in texts
        if text != FIRST and "\n" not in text and chance.random() < 0.2  # no whole file
    )


def excluding(case: Case, folder: Path) -> DataConfig:
    """The config of the second start."""
    if not case.excluded:
        return case.config
    hashes = [{"sha256": sha256(text.encode()).hexdigest()} for text in sorted(case.excluded)]
    path = folder / "excluded.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in hashes))
    lists = (ExcludeConfig(path=str(path), by="sha256"),)
    return case.config.model_copy(update={"exclude": lists})


def fed(case: Case, folder: Path, chance: random.Random) -> Iterator[np.ndarray[Any, Any]]:
    """The feed's batches, in a random layout that changes in the middle."""
    state = None
    starts = (case.config, case.restart), (excluding(case, folder), STEPS - case.restart)
    for config, steps in starts:
        size = chance.choice([n for n in (1, 2, 4, 8) if case.config.streams % n == 0])  # type: ignore[operator]
        feeds = [
            open_feed(
                config,
                rank,
                size,
                seed=SEED,
                global_batch_size=case.batch,
                sequence_length=LENGTH,
                record=folder / "record",
            )
            for rank in range(size)
        ]
        if state is not None:
            for feed in feeds:
                feed.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            yield together(feeds)
        state = merge_states([feed.state_dict() for feed in feeds])
        for feed in feeds:
            feed.close()


def together(feeds: list[BatchFeed]) -> np.ndarray[Any, Any]:
    batches = [next(feed) for feed in feeds]
    rows = {
        sample: tokens
        for batch in batches
        for sample, tokens in zip(batch.samples, batch.tokens, strict=True)
    }
    return np.stack([rows[sample] for sample in sorted(rows)])


@pytest.mark.parametrize("number", range(CASES))
def test_the_feed_follows_the_rule(tmp_path: Path, number: int) -> None:
    chance = random.Random(number)
    case = random_case(tmp_path, chance)
    expected = case.expected(STEPS)
    for step, batch in enumerate(fed(case, tmp_path, chance)):
        assert np.array_equal(batch, expected[step]), f"step {step}"
