"""Corpora and a tokenizer whose tokens say which text they are of."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from megapipe.config import DataConfig, SourceConfig
from megapipe.data import Batch, BatchFeed


class ByteTokenizer:
    """Token = byte + 1; 0 ends a document."""

    path = Path("bytes")
    vocab_size = 257
    ids = range(vocab_size)
    end_of_document = 0
    end_of_document_from = "its value"
    files: Mapping[str, Path] = {"bytes": path}
    sha256 = "bytes"

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_part(self, text: str, start: int, end: int) -> list[int]:
        return self.encode(text[start:end])

    def unknown(self, text: str) -> str:
        return ""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id_ - 1 for id_ in ids if id_).decode()


def document(number: int) -> str:
    """A text of 5 to 60 characters that begins with its number."""
    return f"{number}:" + "abcdefgh"[number % 8] * (3 + number * 7 % 50)


def write(path: Path, content: bytes) -> Path:
    """Compressed as the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jsonl(texts: Iterable[Any]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_corpus(directory: Path, files: int, rows: int, start: int = 0) -> list[str]:
    """JSONL files of numbered documents; returns the texts."""
    for file in range(files):
        first = start + file * rows
        texts = [document(number) for number in range(first, first + rows)]
        write(directory / f"{file}.jsonl", jsonl(texts))
    return [document(number) for number in range(start, start + files * rows)]


def source(path: object, name: str = "source", **fields: Any) -> SourceConfig:
    return SourceConfig(name=name, path=str(path), **fields)


def data_config(*paths: object, **fields: Any) -> DataConfig:
    sources = tuple(
        path if isinstance(path, SourceConfig) else source(path, f"source{index}")
        for index, path in enumerate(paths)
    )
    return DataConfig(tokenizer="bytes", sources=sources, **({"streams": 4} | fields))


def open_feed(config: DataConfig, rank: int = 0, size: int = 1, **fields: Any) -> BatchFeed:
    settings: dict[str, Any] = {
        "seed": 1,
        "tokenizer": ByteTokenizer(),
        "global_batch_size": 8,
        "sequence_length": 32,
    }
    return BatchFeed(config, replica=rank, replicas=size, **(settings | fields))


def texts_of(tokens: Iterable[int]) -> list[str]:
    """The whole documents in a run of tokens, of which the last is cut off."""
    text = bytes(token - 1 if token else 255 for token in tokens)
    return [part.decode() for part in text.split(b"\xff")[:-1]]


def digest(batches: Iterable[Batch]) -> str:
    """Of one rank's or, in rank order, all ranks' parts of a global batch, samples in order."""
    parts = [batch.tokens for batch in batches]
    samples = [parts[i % len(parts)][i // len(parts)] for i in range(len(parts) * len(parts[0]))]
    return hashlib.sha256(b"".join(sample.tobytes() for sample in samples)).hexdigest()
