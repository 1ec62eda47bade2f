"""Odd files, and what must become of each. Add a row for every new kind.

`test_odd_files.py` reads each through the feed, `megapipe train` and `megapipe tokenizer train`.
"""

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

TEXTS = tuple(f"Line {n} tells of rivers and boats." for n in range(40))
PLAIN = "\n".join(TEXTS).encode() + b"\n"
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()

Make = Callable[[Path], object]


@dataclass(frozen=True)
class OddFile:
    """`make` fills a directory; `path` is relative to it. Either it is an error that says `error`,
    or the first pass gives these documents and accounts for the rest."""

    name: str
    make: Make
    path: str = "*.*"
    source: dict[str, str] = field(default_factory=dict)
    documents: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()  # a reason for each bad row
    empty: int = 0
    skipped_bytes: int = 0
    unreadable_bytes: int = 0
    error: str = ""


def holds(name: str, content: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(content)


def table(name: str, column: Any) -> Make:
    def make(folder: Path) -> None:
        whole = pa.table({"text": column})
        if name.endswith(".parquet"):
            with (folder / name).open("wb") as file:  # pyarrow takes only names in UTF-8
                pq.write_table(whole, file, row_group_size=15)
            return
        kind = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with (folder / name).open("wb") as file, kind(file, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=15)

    return make


def all_of(*makes: Make) -> Make:
    return lambda folder: [make(folder) for make in makes]


def links(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_bytes(PLAIN)
    (folder / "sub" / "b.txt").symlink_to("a.txt")
    (folder / "again").symlink_to(".")


def tarred(folder: Path) -> None:
    (folder / "part").write_bytes(PLAIN)
    with tarfile.open(folder / "a.txt.gz", "w:gz") as archive:
        archive.add(folder / "part", "part")


def wide_zstd() -> bytes:
    """As `zstd --long=31` writes it from a pipe."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, hash_log=12, chain_log=12)
    one = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return one.compress(JSONL) + one.flush()


def cut_gzip() -> bytes:
    """All of JSONL and half of a line more, without the end of the compressed data."""
    return gzip.compress(JSONL + b'{"text": "cut in the mid')[:-8]


def cut_arrow() -> bytes:
    """The file format is read from its end, which is missing here."""
    whole, sink = pa.table({"text": TEXTS}), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()[:-10]


CUT_ARROW = cut_arrow()
WORDS = pa.DictionaryArray.from_arrays(range(len(TEXTS)), pa.array(TEXTS, pa.string_view()))
LINES = {"documents": "line"}
PARAGRAPHS = {"documents": "blank-line"}
WHOLE = (PLAIN.decode(),)
NULS = "NUL characters (binary data, or UTF-16)"
DAMAGED = "damaged"
NO_TEXT = "yields no usable row"

ODD_FILES = [
    # --- Encodings -------------------------------------------------------------------------------
    OddFile("utf-8 with a mark", holds("a.txt", b"\xef\xbb\xbf" + PLAIN), documents=WHOLE),
    OddFile("marks inside", holds("a.jsonl", (b"\xef\xbb\xbf" + JSONL) * 2), documents=TEXTS * 2),
    OddFile("utf-16", holds("a.txt", PLAIN.decode().encode("utf-16")), error="is UTF-16 text"),
    OddFile("utf-32 jsonl", holds("a.jsonl", JSONL.decode().encode("utf-32")), error="is UTF-32"),
    OddFile(
        "utf-16 in gzip",
        holds("a.txt.gz", gzip.compress(PLAIN.decode().encode("utf-16"))),
        error="is UTF-16 text",
    ),
    OddFile(
        "utf-16 without a mark",
        all_of(holds("a.txt", PLAIN), holds("b.txt", PLAIN.decode().encode("utf-16-le"))),
        documents=WHOLE,
        bad=(NULS,),
        skipped_bytes=2 * len(PLAIN),
    ),
    OddFile("zeros", holds("a.txt", bytes(5000)), error=NO_TEXT),
    OddFile(
        "zeros at the end of jsonl",
        holds("a.jsonl", JSONL + bytes(500)),
        documents=TEXTS,
        bad=(NULS,),
        skipped_bytes=500,
    ),
    OddFile(
        "latin-1",
        all_of(holds("a.txt", PLAIN), holds("b.txt", b"caf\xe9\n")),
        source=LINES,
        documents=TEXTS,
        bad=("not UTF-8",),
        skipped_bytes=5,
    ),
    OddFile("crlf", holds("a.txt", PLAIN.replace(b"\n", b"\r\n")), source=LINES, documents=TEXTS),
    OddFile(
        "cr alone",
        holds("a.txt", PLAIN.replace(b"\n", b"\r")),
        source=LINES,
        documents=("\r".join(TEXTS),),
    ),
    OddFile(
        "line separators of Unicode",
        holds("a.txt", "\u2028".join(TEXTS).encode()),
        source=PARAGRAPHS,
        documents=("\u2028".join(TEXTS),),
    ),
    # --- Archives and compression ----------------------------------------------------------------
    OddFile("tar in gzip", tarred, path="a.txt.gz", error="holds tar data inside"),
    OddFile(
        "gzip as text", holds("a.txt", gzip.compress(PLAIN)), error="is gzip data and not text"
    ),
    OddFile("text as gzip", holds("a.txt.gz", PLAIN), error="is not gzip"),
    OddFile("zip as text", holds("a.txt", b"PK\x03\x04" + bytes(30)), error="is zip data"),
    OddFile("long window", holds("a.jsonl.zst", wide_zstd()), documents=TEXTS),
    OddFile(
        "members and zeros",
        holds("a.jsonl.gz", (gzip.compress(JSONL) + bytes(512)) * 2),
        documents=TEXTS * 2,
    ),
    OddFile(
        "garbage behind gzip",
        holds("a.jsonl.gz", gzip.compress(JSONL) + b"garbage"),
        documents=TEXTS,
        bad=(DAMAGED,),
        unreadable_bytes=7,
    ),
    OddFile(
        "garbage behind zstd",
        holds("a.txt.zst", zstandard.compress(PLAIN) + b"garbage"),
        documents=WHOLE,
        bad=(DAMAGED,),
        unreadable_bytes=7,
    ),
    OddFile(
        "cut gzip",
        holds("a.jsonl.gz", cut_gzip()),
        documents=TEXTS,
        bad=("malformed JSON", DAMAGED),
        skipped_bytes=24,
    ),
    OddFile(
        "gzip cut inside a character",
        holds("a.txt.gz", gzip.compress(PLAIN + "漢".encode()[:2])[:-8]),
        documents=WHOLE,
        bad=(DAMAGED,),
        skipped_bytes=2,
    ),
    # --- JSON ------------------------------------------------------------------------------------
    OddFile(
        "json array",
        holds("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        error="is one JSON array",
    ),
    OddFile(
        "pretty json",
        holds("a.json", json.dumps({"text": "a"}, indent=1).encode()),
        error="jq -c .",
    ),
    OddFile(
        "odd json rows",
        holds("a.jsonl", b'[1]\n7\n{"text": null}\n{"txt": "a"}\n{"text": \n' + JSONL),
        documents=TEXTS,
        bad=(
            "not a JSON object",
            "not a JSON object",
            "the field 'text' is null, not text",
            "missing field 'text'",
            "malformed JSON",
        ),
        skipped_bytes=44,
    ),
    # --- Empty -----------------------------------------------------------------------------------
    OddFile(
        "empty rows",
        holds("a.jsonl", b'{"text": ""}\n{"text": " "}\n\n' * 3000 + JSONL),
        documents=TEXTS,
        empty=6000,
    ),
    OddFile(
        "empty files",
        all_of(*(holds(f"{n}.py", b"") for n in range(20)), holds("a.txt", PLAIN)),
        documents=WHOLE,
        empty=20,
    ),
    OddFile("nothing", holds("a.txt", b"\n \n"), error=NO_TEXT),
    # --- Tables ----------------------------------------------------------------------------------
    OddFile("name like a pattern", table("part[0]*?.parquet", TEXTS), documents=TEXTS),
    OddFile("arrow stream", table("x::y.stream.arrow", TEXTS), documents=TEXTS),
    OddFile("dictionary of views", table("a.arrow", WORDS), documents=TEXTS),
    OddFile(
        "arrow without its end",
        all_of(table("a.arrow", TEXTS), holds("b.arrow", CUT_ARROW)),
        documents=TEXTS,
        bad=(DAMAGED,),
        unreadable_bytes=len(CUT_ARROW),
    ),
    OddFile("string view", table("a.arrow", pa.array(TEXTS, pa.string_view())), documents=TEXTS),
    OddFile(
        "nulls and empties",
        table("a.parquet", [None, "", *TEXTS]),
        documents=TEXTS,
        bad=("the field 'text' is null, not text",),
        empty=1,
    ),
    OddFile(
        "table without rows",
        all_of(table("a.parquet", pa.array([], pa.string())), table("b.parquet", TEXTS)),
        documents=TEXTS,
        empty=1,
    ),
    OddFile(
        "a shard of numbers",
        all_of(table("a.parquet", TEXTS), table("b.parquet", range(5))),
        error="b.parquet: the column 'text' is int64, not text",
    ),
    OddFile(
        "a shard that is cut",
        all_of(table("a.parquet", TEXTS), holds("b.parquet", b"PAR1" + bytes(96))),
        documents=TEXTS,
        bad=(DAMAGED,),
        unreadable_bytes=100,
    ),
    OddFile("html as parquet", holds("a.parquet", b"<html>404</html>"), error="is not Parquet"),
    OddFile("json as arrow", holds("a.arrow", JSONL), error="is not Arrow"),
    OddFile("table with a name of other bytes", table("caf\udce9.parquet", TEXTS), documents=TEXTS),
    # --- Names, links and kinds of files ---------------------------------------------------------
    OddFile("name of other bytes", holds("caf\udce9.txt", PLAIN), documents=WHOLE),
    OddFile("name with line end", holds("new\nline %20 [x].txt", PLAIN), documents=WHOLE),
    OddFile("links and loops", links, path="**/*.txt", documents=WHOLE),
    OddFile(
        "dangling link",
        all_of(holds("a.txt", PLAIN), lambda folder: (folder / "b.txt").symlink_to("gone")),
        error="b.txt is a link to gone",
    ),
    OddFile(
        "dangling link to a directory",
        all_of(holds("a.txt", PLAIN), lambda folder: (folder / "b").symlink_to("gone")),
        path="**/*.txt",
        error="b is a link to gone",
    ),
    OddFile("pipe", lambda folder: os.mkfifo(folder / "a.txt"), error="is a pipe and not a file"),
    OddFile(
        "directory named like a file",
        all_of(holds("a.txt", PLAIN), lambda folder: (folder / "b.txt").mkdir()),
        error="b.txt is a directory",
    ),
    OddFile("unknown name", holds("a.bin", PLAIN), error="can't be told by its name"),
    OddFile("no file", holds("a.txt", PLAIN), path="b*.txt", error="matches no file"),
]
