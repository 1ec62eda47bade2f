"""Packing: a stream of documents becomes sequences, with no token lost and none twice.

Legend: S = sequence length.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class RowOrigin(NamedTuple):
    """The row that tokens come from: its source, the key of its file, the beginning of its unit
    there, its address, the pass over the source, and its id where that is asked for."""

    source: str
    file: str
    unit: int
    address: int
    epoch: int
    id: str | None = None


class Within(NamedTuple):
    """Where in a document tokens begin: the character at which the piece begins that is tokenised
    at once, -1 where a document was cut short, and how many tokens of the piece come before."""

    character: int
    token: int


class Read(NamedTuple):
    """Tokens of one document; `begins` and `ends` say which of its borders are among them.

    `text_bytes` of text went into them.
    """

    tokens: Tokens
    begins: bool
    ends: bool
    text_bytes: int
    origin: RowOrigin
    within: Within


class Reader(Protocol):
    """Gives the next tokens of a stream: at least one, at most `limit`, of one document. A
    document's last token is the end-of-document one."""

    def read(self, limit: int) -> Read: ...


class Stretch(NamedTuple):
    """Tokens [start, start + length) of a sequence, which come from one row; `begins` and `ends`
    say which borders of the document are among them."""

    start: int
    length: int
    begins: bool
    ends: bool
    text_bytes: int
    origin: RowOrigin
    within: Within


class Packed(NamedTuple):
    """A sequence of S + 1 tokens: inputs are the first S, targets the last S.

    `documents` [S] numbers the documents of the inputs from 0; the end-of-document token belongs
    to the document that it ends. `stretches` are the tokens but for the overlap, in order.
    """

    tokens: Tokens
    documents: Tokens
    stretches: list[Stretch]


class Packer:
    """Cuts a stream into sequences that overlap by one token, so that each is a target once.

    (The very first token of the stream is never a target.) `last` is the overlap: the final token
    of the sequence before; with the reader's own position it is the whole state.
    """

    def __init__(self, reader: Reader, sequence_length: int) -> None:
        self.last: int | None = None
        self._reader = reader
        self._size = sequence_length + 1

    def next(self) -> Packed:
        tokens = np.empty(self._size, dtype=np.int32)
        begins = np.zeros(self._size, dtype=np.int32)
        stretches: list[Stretch] = []
        filled = 0
        if self.last is not None:
            tokens[0], filled = self.last, 1
        while filled < self._size:
            part = self._reader.read(self._size - filled)
            count = len(part.tokens)
            tokens[filled : filled + count] = part.tokens
            begins[filled] = part.begins
            stretches.append(Stretch(filled, count, *part[1:]))
            filled += count
        self.last = int(tokens[-1])
        documents = np.cumsum(begins[:-1], dtype=np.int32) - begins[0]
        return Packed(tokens, documents, stretches)
