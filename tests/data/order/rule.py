"""The rule of docs/data-order.md as a program of its own, which shares no code with megapipe.

It reads everything into memory and computes the tokens of one step after the other. It covers
JSONL, lines and whole files of text, Parquet, and archives that are read in their own order.
"""

import gzip
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

KIB = 1024
MASK = 2**64 - 1
UNIT = 256 * KIB


def draw(*parts: object) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


def permutation(n: int, k: int) -> list[int]:
    values = []
    for i in range(1, n + 1):
        z = (k + i * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        values.append(z ^ z >> 31)
    return sorted(range(n), key=values.__getitem__)


def shuffle(n: int, k: int) -> list[int]:
    h = max(1, math.ceil((n - 1).bit_length() / 2))
    found = []
    for number in range(n):
        while True:
            left, right = divmod(number, 2**h)
            for r in range(8):
                seed = (k + r) & MASK
                f = xxhash.xxh3_64_intdigest(right.to_bytes(8, "little"), seed) % 2**h
                left, right = right, left ^ f
            number = left * 2**h + right
            if number < n:
                break
        found.append(number)
    return found


@dataclass
class Unit:
    """`rows` are (address, raw text) pairs; `parts` before small sources are cut finer."""

    start: int
    rows: list[tuple[int, str]]
    parts: float
    own_order: bool = False


def line_units(data: bytes, jsonl: bool) -> Iterator[Unit]:
    begins = [0] + [i + 1 for i, byte in enumerate(data) if byte == 10 and i + 1 < len(data)]
    ends = begins[1:] + [len(data)]
    for start in range(0, max(1, len(data)), UNIT):
        end = min(start + UNIT, len(data))
        rows = [
            (a, text_of(data[a:b].decode(), jsonl))
            for a, b in zip(begins, ends, strict=True)
            if (start < a <= end) or (start == a == 0)
        ]
        yield Unit(start, rows, min(64, (end - start) / (32 * KIB)))


def text_of(line: str, jsonl: bool) -> str:
    line = line.rstrip("\r\n")
    return json.loads(line)["text"] if jsonl and line.strip() else line


def file_units(path: Path, size: int) -> list[Unit]:
    """`size`: R."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.ParquetFile(path)
        units, row = [], 0
        for group in range(table.num_row_groups):
            texts = table.read_row_group(group, ["text"])["text"].to_pylist()
            stored = table.metadata.row_group(group).column(0).total_uncompressed_size
            rows = [(row + i, text or "") for i, text in enumerate(texts)]
            units.append(Unit(row, rows, min(64, stored / (32 * KIB))))
            row += len(texts)
        return units
    if path.suffix == ".gz":
        (unit,) = line_units(gzip.decompress(data), jsonl=True)  # small enough to be one here
        parts = min(64, 4 * len(data) / (32 * KIB))
        own = len(data) > 1024 * KIB
        return [Unit(0, unit.rows, 1 if own else parts, own)]
    if path.suffix == ".jsonl":
        return list(line_units(data, jsonl=True))
    if path.suffix == ".txt":
        return segments(data, size)
    return list(line_units(data, jsonl=False))


def segments(data: bytes, size: int) -> list[Unit]:
    """One document a file, cut at borders that move behind the next line end."""

    def moved(border: int) -> int:
        found = data.find(b"\n", border, border + 64 * KIB)
        return found + 1 if found >= 0 else len(data)  # files of the tests have short lines

    units = []
    for start in range(0, max(1, len(data)), size):
        a, b = moved(start) if start else 0, moved(min(start + size, len(data)))
        rows = [(a, data[a:b].decode())] if a < b else []
        units.append(
            Unit(start, rows, max(1, math.ceil((min(start + size, len(data)) - start) / size)))
        )
    return units


@dataclass
class Cohort:
    """`parts`: (key of the file, unit, number of the part, parts of the unit)."""

    step: int
    parts: list[tuple[str, Unit, int, int]]

    @staticmethod
    def of(step: int, paths: Sequence[Path], root: Path, size: int, streams: int) -> "Cohort":
        files = sorted((os.path.relpath(path, root), path) for path in paths)
        units = [
            (key, unit, path.suffix == ".txt")
            for key, path in files
            for unit in file_units(path, size)
        ]
        cut = [unit for _, unit, whole_file in units if not whole_file]
        wanted = streams if all(unit.own_order for unit in cut) else 64 * streams
        total = sum(unit.parts for unit in cut)
        finer = max(1, math.ceil(wanted / total)) if total else 1
        parts = []
        for key, unit, whole_file in units:
            count = max(1, math.ceil(unit.parts * (1 if whole_file else finer)))
            parts += [(key, unit, part, count) for part in range(count)]
        return Cohort(step, parts)


@dataclass(eq=False)
class Source:
    name: str
    seed: int
    streams: int
    cohorts: list[Cohort]
    leaves: dict[str, int]
    max_epochs: int | None
    open_parts: int
    excluded: Any = None
    orders: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    units: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)

    @cache  # noqa: B019
    def places(self, stream: int, epoch: int, cohort: int) -> list[int]:
        n = len(self.cohorts[cohort].parts)
        return [q for q in range(n) if (q + epoch * n) % self.streams == stream]

    def part(self, epoch: int, cohort: int, place: int) -> tuple[str, Unit, list[int]]:
        """The key of the file, the unit, and the rows in order."""
        if (epoch, cohort) not in self.orders:
            n, base = len(self.cohorts[cohort].parts), draw("source", self.seed, self.name)
            self.orders[epoch, cohort] = shuffle(n, draw("parts", base, cohort, epoch))
        number = self.orders[epoch, cohort][place]
        key, unit, part, count = self.cohorts[cohort].parts[number]
        if (key, unit.start, epoch) not in self.units:
            order = list(range(len(unit.rows)))
            if not unit.own_order:
                chance = draw("rows", self.seed, self.name, key, unit.start, epoch)
                order = permutation(len(order), chance)
            self.units[key, unit.start, epoch] = order
        order = self.units[key, unit.start, epoch]
        return key, unit, order[part::count]


class Ended(Exception):
    pass


class Stream:
    def __init__(self, number: int, sources: list[Source], tokenizer: Any, keeps: Any) -> None:
        self.number, self.tokenizer, self.keeps = number, tokenizer, keeps
        self.sources = {source.name: source for source in sources}
        self.turns: dict[str, list[Any]] = {name: [] for name in self.sources}
        self.drawn = dict.fromkeys(self.sources, 0)
        self.epoch = dict.fromkeys(self.sources, 0)
        self.taken_parts: dict[str, dict[int, int]] = {name: {} for name in self.sources}
        self.weights: dict[str, float] = {}
        self.taken: dict[str, int] = {}
        self.ended: set[str] = set()
        self.current: Any = None  # source, key of the file, row, tokens left
        self.step = 0
        self.last: int | None = None

    def begin(self, step: int, weights: dict[str, float] | None, out: Any) -> None:
        self.step = step
        if weights is not None:
            self.weights = weights
            self.taken = dict.fromkeys(self.left(), 0)
        if self.current and out(*self.current[:3], step):
            self.current[3] = [self.tokenizer.end_of_document]

    def left(self) -> dict[str, float]:
        if not self.ended:
            return self.weights
        rest = {name: w for name, w in self.weights.items() if name not in self.ended}
        total = sum(rest.values())
        return {name: w / total for name, w in rest.items()}

    def choose(self) -> str:
        weights, total = self.left(), sum(self.taken.values())
        if total:
            return max(weights, key=lambda name: weights[name] * total - self.taken[name])
        reached = 0.0
        for name in weights:
            reached += weights[name]
            if (0.5 + self.number * 0.6180339887498949) % 1.0 < reached:
                return name
        return max(weights)

    def next_row(self, source: Source) -> tuple[str, Unit, tuple[int, str]]:
        name, opened = source.name, self.turns[source.name]
        own_order = any(unit.own_order for _, unit, _, _ in source.cohorts[0].parts)
        window = max(math.ceil(source.open_parts / source.streams), min(4, source.open_parts))
        window = min(window, math.ceil(64 / source.streams)) if own_order else window
        while True:
            cohorts, left = self.parts_left(source)
            if not opened and not left:
                if source.max_epochs is not None and self.epoch[name] + 1 >= source.max_epochs:
                    raise Ended
                self.epoch[name] += 1
                self.taken_parts[name], self.drawn[name] = {}, 0
                continue
            new = not opened or (own_order and left > 0 and len(opened) < window)
            place = 0
            if not new and not own_order and not (left and len(opened) >= window):
                weights = [left * sum(rows for *_, rows in opened)]
                weights += [len(opened) * (rows - row) for *_, row, rows in opened]
                parts = (draw("source", source.seed, name), self.number, self.epoch[name])
                drawn = draw("turn", *parts, self.drawn[name]) % sum(weights)
                self.drawn[name] += 1
                while drawn >= weights[place]:
                    drawn -= weights[place]
                    place += 1
                new, place = place == 0, place - 1
            if new:
                turn = self.new_part(source, cohorts)
            else:
                turn = opened.pop(place)
            cohort, q, row, _ = turn
            key, unit, order = source.part(self.epoch[name], cohort, q)
            gone = source.leaves.get(key, self.step + 1) <= self.step
            if row < len(order) and not gone:
                if row + 1 < len(order):
                    opened.append((cohort, q, row + 1, len(order)))
                return key, unit, unit.rows[order[row]]

    def parts_left(self, source: Source) -> tuple[list[list[int]], int]:
        """The places of each cohort that were not taken yet, and how many those are."""
        epoch, taken = self.epoch[source.name], self.taken_parts[source.name]
        joined = [n for n, cohort in enumerate(source.cohorts) if cohort.step <= self.step]
        places = [source.places(self.number, epoch, n)[taken.get(n, 0) :] for n in joined]
        return places, sum(map(len, places))

    def new_part(self, source: Source, places: list[list[int]]) -> tuple[int, int, int, int]:
        epoch, taken = self.epoch[source.name], self.taken_parts[source.name]
        cohort = 0
        if len(places) > 1:
            base = draw("source", source.seed, source.name)
            drawn = draw("cohort", base, self.number, epoch, sum(taken.values()))
            drawn %= sum(map(len, places))
            while drawn >= len(places[cohort]):
                drawn -= len(places[cohort])
                cohort += 1
        taken[cohort] = taken.get(cohort, 0) + 1
        place = places[cohort][0]
        return cohort, place, 0, len(source.part(epoch, cohort, place)[2])

    def document(self) -> None:
        while self.current is None:
            source = self.sources[self.choose()]
            try:
                key, unit, (address, text) = self.next_row(source)
            except Ended:
                self.ended.add(source.name)
                self.taken = dict.fromkeys(self.left(), 0)
                continue
            while not text.strip() or not self.keeps(
                self.step, source.name, key, unit.start, address, text
            ):
                try:
                    key, unit, (address, text) = self.next_row(source)
                except Ended:
                    break
            else:
                tokens = self.tokens(text)
                self.current = [source.name, key, (unit.start, address, text), tokens]
                continue
            self.ended.add(source.name)
            self.taken = dict.fromkeys(self.left(), 0)

    def tokens(self, text: str) -> list[int]:
        tokens, start = [], 0
        while start < len(text):
            end = min(start + 32768, len(text))
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            tokens += self.tokenizer.encode_part(text, start, end)
            start = end
        return [*tokens, self.tokenizer.end_of_document]

    def sequence(self, length: int) -> list[int]:
        found = [] if self.last is None else [self.last]
        while len(found) < length + 1:
            if self.current is None:
                self.document()
            name, tokens = self.current[0], self.current[3]
            part = tokens[: length + 1 - len(found)]
            del tokens[: len(part)]
            found += part
            if name in self.taken:
                self.taken[name] += len(part)
            if not tokens:
                self.current = None
        self.last = found[-1]
        return found


def batches(
    sources: list[Source],
    phases: list[tuple[int, dict[str, float]]],
    *,
    batch: int,
    length: int,
    tokenizer: Any,
    keeps: Any,
    out: Any,
) -> Iterator[np.ndarray[Any, Any]]:
    """The tokens [batch, length + 1] of step 0, 1, 2, ... `phases` begin behind their steps;
    `out` says whether a document under way ends because its file has left or it was excluded."""
    total = sources[0].streams
    streams = [Stream(number, sources, tokenizer, keeps) for number in range(total)]
    starts = dict(phases)
    sample = step = 0
    while True:
        weights = None
        if step in starts:
            given = starts[step]
            sum_ = sum(given.values())
            weights = {name: given[name] / sum_ for name in sorted(given) if given[name] > 0}
        for stream in streams:
            stream.begin(step, weights, out)
        rows = []
        for _ in range(batch):
            rows.append(streams[sample % total].sequence(length))
            sample += 1
        yield np.array(rows)
        step += 1
