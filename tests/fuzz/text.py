"""Random text, names and damage: what files of a corpus are made of."""

import gzip
import io
import json
from random import Random

WORDS = (
    "the", "of", "and", "model", "data", "token", "Straße", "größer", "naïve", "façade", "日本語",
    "模型", "数据", "привет", "мир", "ελληνικά", "שלום", "مرحبا", "🙂", "👩\u200d👧", "e\u0301",
    "x=1", "foo()", "12345", "3.14", "<s>", "</s>", "<|endoftext|>", "\\n", "%", "[x]", "{y}",
)  # fmt: skip

ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "shift_jis", "cp1251")

NAMES = (
    "plain", "with space", "part[0]", "what?", "star*", "50%25", "a::b", "~", "$HOME", "${HOME}",
    "-dash", ".hidden", "naïve", "nai\u0308ve", "日本", "🙂", "new\nline", "quote'", 'quote"',
    "back\\slash", "semi;colon", "hash#", "comma,", "tab\there", "UPPER", "x" * 240, "\udcff\udcfe",
    "caf\udce9", "{a,b}", "!not", "CON", "trailing.", "step-00000001", "#", "%s%n", "null",
)  # fmt: skip
"""File names that someone has, or that a program takes for something else than a name."""


def sentence(random: Random, words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def document(random: Random, number: int, size: int) -> str:
    """About `size` characters in lines, each of them unique: the account tells them apart."""
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines.append(f"{number}.{len(lines)} {sentence(random, random.randint(1, 12))}")
    return "\n".join(lines)


def json_line(random: Random, text: str, field: str = "text") -> str:
    """A row of a .jsonl file, with other fields around it at times."""
    row: dict[str, object] = {field: text}
    if random.random() < 0.2:
        row = {"id": random.randint(0, 9), **row, "meta": {"a": [1, None]}}
    return json.dumps(row, ensure_ascii=random.random() < 0.5)


def bad_json_line(random: Random) -> bytes:
    """A line of a .jsonl file that is no usable row."""
    return random.choice(
        [
            b'{"text": "cut',
            b'{"other": "no field"}',
            b'{"text": null}',
            b'{"text": 5}',
            b'{"text": ["list"]}',
            b"[]",
            b"5",
            b'"text"',
            b"nonsense",
            b'{"text": "\xff\xfe"}',
            b'{"text": "\\ud800"}',
            b"[" * 5000,
        ]
    )


def compress(data: bytes, suffix: str, random: Random) -> bytes:
    """gzip or zstd, in one member or in several."""
    import zstandard

    cuts = sorted(random.randint(0, len(data)) for _ in range(random.choice((0, 0, 1, 3))))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if suffix == ".gz":
        return b"".join(gzip.compress(part, mtime=0) for part in parts)
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def damage(data: bytes, random: Random) -> bytes:
    """Cut, zeroed, flipped or with something behind it."""
    at = random.randint(0, len(data))
    match random.randint(0, 5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(len(data) - at)
        case 2:
            return data + bytes(random.choice((1, 100, 1000)))
        case 3:
            return data + b"trailing garbage"
        case 4:
            return b""
    flipped = bytearray(data)
    if flipped:
        flipped[at % len(data)] ^= 1 << random.randint(0, 7)
    return bytes(flipped)


def table(rows: list[object], form: str, random: Random, column: str = "text") -> bytes:
    """A Parquet or Arrow file with one column of text, in groups of a few rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.string() if all(isinstance(row, str | None) for row in rows) else None
    content = pa.table({"id": list(range(len(rows))), column: pa.array(rows, type=kind)})
    sink = io.BytesIO()
    group = random.choice((1, 7, 1000))
    if form == "parquet":
        codec = random.choice(("snappy", "zstd", "none"))
        pq.write_table(content, sink, row_group_size=group, compression=codec)
        return sink.getvalue()
    opener = random.choice((pa.ipc.new_stream, pa.ipc.new_file))
    with opener(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=group)
    return sink.getvalue()
