"""Logical streams: an endless, blended run of documents whose position is exact and small."""

from typing import Any

import numpy as np

from megapipe.data.blend import Blend
from megapipe.data.blocks import Address, BlockReader, Row, permutation
from megapipe.data.formats import Unreadable
from megapipe.data.packing import Tokens
from megapipe.data.rows import Account, BadRowError, BadRows
from megapipe.data.sources import Keeps
from megapipe.data.tokenizer import Tokenizer

PIECE = 1 << 15
"""Characters that are tokenised at once. Sentencepiece encodes 4.4 MB/s in pieces of this size and
1.9 MB/s in pieces of a million; and no more than this is tokenised again on resume."""


class SourceStream:
    """One stream's part of one source: document after document, through the epochs.

    Its position is the next token to be read: the address of the block, the row in the block's
    shuffled order, where in the text the piece begins, the token in the piece.
    """

    def __init__(
        self,
        blocks: BlockReader,
        stream: int,
        *,
        tokenizer: Tokenizer,
        keeps: Keeps,
        bad_rows: BadRows,
    ) -> None:
        self.account = Account()
        self._blocks = blocks
        self._stream = stream
        self._tokenizer = tokenizer
        self._keeps = keeps
        self._bad_rows = bad_rows
        self._address: Address | None = None
        self._row = self._piece = self._token = 0
        self._block: list[Row] | None = None
        self._text: str | None = None
        self._tokens: Tokens | None = None
        self._piece_end = 0

    @property
    def epoch(self) -> int:
        return 0 if self._address is None else self._address.epoch

    def read(self, limit: int) -> tuple[Tokens, bool, bool]:
        """Up to `limit` tokens of one document; whether they begin it, and whether they end it."""
        begins = self._piece == 0 and self._token == 0
        if self._text is None:
            self._open_document()
        tokens = self._piece_tokens()
        while self._token == len(tokens):  # a piece may have no tokens of its own
            self._next_piece()
            tokens = self._piece_tokens()
        part = tokens[self._token : self._token + limit]
        self._token += len(part)
        if self._token < len(tokens):
            return part, begins, False
        ends = self._ends_document()
        self._next_piece()
        return part, begins, ends

    def state(self) -> dict[str, Any]:
        return {
            "address": None if self._address is None else list(self._address),
            "row": self._row,
            "piece": self._piece,
            "token": self._token,
            "account": self.account.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        address = state["address"]
        self._address = None if address is None else Address(*address)
        self._row, self._piece, self._token = state["row"], state["piece"], state["token"]
        self.account = Account(**state["account"])
        self._block = self._text = self._tokens = None

    def _open_document(self) -> None:
        """Goes to the next usable row from the current one on."""
        while True:
            if self._block is None:
                self._load_block()
            assert self._block is not None
            assert self._address is not None
            if self._row >= len(self._block):
                self._next_block()
                continue
            text = self._usable_text(self._block[self._row])
            if text is not None:
                self._text = text
                return
            self._row += 1

    def _usable_text(self, row: Row) -> str | None:
        """The row's text if there is any; accounts for it if not.

        That is done in the first pass only: a bad row is bad in each.
        """
        source, first = self._blocks.source, self.epoch == 0
        damage = isinstance(row.raw, Unreadable)  # told by who trains and by who validates
        if not damage and not self._keeps(row.file, row.number):
            return None
        try:
            text = source.text(row.file, row.raw)
        except BadRowError as error:
            if first:
                self.account.add_bad(row.raw, error.reason)
                name = source.files[row.file].name
                self._bad_rows.add(source.key, name, row.number + 1, error)
            return None
        self.account.empty_rows += first and text == ""
        return text or None

    def _load_block(self) -> None:
        """Opens the block of the position; at the very start, the stream's first."""
        if self._address is None:
            self._next_block()
            return
        block = self._blocks.read(self._address.number, self._address)
        assert block is not None, self._address
        self._shuffle(block.rows)

    def _next_block(self) -> None:
        near = self._address
        number = self._stream if near is None else near.number + self._blocks.streams
        while (block := self._blocks.read(number, near)) is None:
            number += self._blocks.streams
        self._address, self._row = block.address, 0
        self._shuffle(block.rows)

    def _shuffle(self, rows: list[Row]) -> None:
        assert self._address is not None
        blocks = self._blocks
        order = permutation(len(rows), "rows", blocks.seed, blocks.source.key, self._address.number)
        self._block = [rows[index] for index in order]

    def _piece_tokens(self) -> Tokens:
        """The tokens of the current piece; the last one of a document ends with its end token."""
        if self._tokens is None:
            assert self._text is not None
            self._piece_end = _piece_end(self._text, self._piece)
            tokens = self._tokenizer.encode_part(self._text, self._piece, self._piece_end)
            if self._ends_document():
                tokens.append(self._tokenizer.end_of_document)
            self._tokens = np.array(tokens, dtype=np.int32)
        return self._tokens

    def _ends_document(self) -> bool:
        return self._text is not None and self._piece_end == len(self._text)

    def _next_piece(self) -> None:
        self._piece, self._token, self._tokens = self._piece_end, 0, None
        if self._ends_document():
            self._text, self._row, self._piece = None, self._row + 1, 0


def _piece_end(text: str, start: int) -> int:
    """Pieces end behind a line end where there is one: tokens then hardly depend on the cut."""
    end = min(start + PIECE, len(text))
    if end == len(text):
        return end
    newline = text.rfind("\n", start, end)
    return end if newline < 0 else newline + 1


class DocumentStream:
    """One logical stream: its parts of all sources, blended document by document."""

    def __init__(self, sources: list[SourceStream], blend: Blend) -> None:
        self._sources = sources
        self._blend = blend
        self._current: int | None = None

    @property
    def epochs(self) -> list[int]:
        return [source.epoch for source in self._sources]

    def read(self, limit: int) -> tuple[Tokens, bool]:
        """The next tokens, at most `limit`, all of one document; whether they begin it."""
        if self._current is None:
            self._current = self._blend.choose()
        source = self._current
        tokens, begins, ends = self._sources[source].read(limit)
        self._blend.add(source, len(tokens))
        if ends:
            self._current = None
        return tokens, begins

    def state(self) -> dict[str, Any]:
        sources = [
            source.state() | {"taken": taken}
            for source, taken in zip(self._sources, self._blend.taken, strict=True)
        ]
        return {"current": self._current, "sources": sources}

    def load(self, state: dict[str, Any]) -> None:
        self._current = state["current"]
        self._blend.taken = [source["taken"] for source in state["sources"]]
        for source, part in zip(self._sources, state["sources"], strict=True):
            source.load(part)
