"""What a stream reads of one source: an endless run of documents, whose position is exact and
small."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megapipe.config import SourceConfig
from megapipe.data.exclusions import Exclusions, is_excluded, row_id
from megapipe.data.order.parts import Place, StreamParts
from megapipe.data.order.source_order import RowPlace, SourceOrder
from megapipe.data.packing import Read, RowOrigin, Tokens, Within
from megapipe.data.pieces import piece_end, piece_tokens, usable_text
from megapipe.data.rows import Account, BadRowError, BadRows
from megapipe.data.sources import Keeps
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.units import Cumulated
from megapipe.errors import DataError

HOPELESS_EPOCHS = 64
"""Times `streams`: a stream that has gone through so many epochs without a usable row stops."""

ENDING = -1
"""The piece of a document of which only the end-of-document token is left to be given."""

UNKNOWN = -1
"""The address of a row in a file that has left, which is not read any more."""

State = dict[str, Any]


class SourceEndedError(Exception):
    """A stream has read its share of a source as often as it may."""


@dataclass
class OpenPart:
    """A part that is being read: its next row, and how many it has; None where that is not known
    before its end."""

    place: Place
    next: int
    rows: int | None

    @property
    def left(self) -> int | None:
        return None if self.rows is None else self.rows - self.next


class SourceStream:
    """One stream's part of one source: document after document, through the epochs.

    Its position: the parts that are open in turn, each with its next row; and of the document under
    way the part and row, where in its text the piece begins, and the token in the piece.
    `with_ids`: the origins of tokens have the ids of their rows.
    """

    def __init__(
        self,
        order: SourceOrder,
        stream: int,
        *,
        tokenizer: Tokenizer,
        keeps: Keeps,
        bad_rows: BadRows,
        with_ids: bool = False,
    ) -> None:
        self.account = Account()
        self.tokens = 0
        """Given so far."""
        self._order = order
        self._tokenizer = tokenizer
        self._keeps = keeps
        self._bad_rows = bad_rows
        self._with_ids = with_ids
        self._parts = StreamParts(order.joined(0), key=order.key, stream=stream)
        self._step = 0
        self._exclusions: Exclusions | None = None
        self._stream = stream
        self._open: list[OpenPart] = []
        self._turn = 0
        self._document: tuple[Place, int] | None = None
        self._piece = self._token = 0
        self._row: RowPlace | None = None
        self._origin: RowOrigin | None = None
        self._text: str | None = None
        self._tokens: Tokens | None = None
        self._piece_end = self._piece_bytes = 0
        self._state: State | None = None

    @property
    def epoch(self) -> int:
        return self._parts.epoch

    @property
    def config(self) -> SourceConfig:
        return self._order.source.config

    def begin(self, step: int, exclusions: Exclusions | None) -> None:
        """Goes on with the batch behind step `step`: files may have joined or left, and rows may
        have been excluded."""
        self._step, self._state = step, None
        self._parts.join(self._order.joined(step))
        self._exclusions = exclusions
        if self._document is not None and self._piece != ENDING:
            file, _ = self._order.unit(self._document[0])
            if self._order.has_left(file, step) or self._is_excluded():
                self._end_early()

    def open(self) -> None:
        """Goes to the next document unless one is under way. Raises SourceEndedError."""
        if self._document is None:
            self._state = None
            self._open_document()

    def read(self, limit: int) -> Read:
        """Up to `limit` tokens of the document under way."""
        self._state = None
        begins = self._piece == 0 and self._token == 0
        tokens = self._piece_tokens()
        while self._token == len(tokens):  # a piece may have no tokens of its own
            self._next_piece()
            tokens = self._piece_tokens()
        origin, start = self._where(), self._token
        within = Within(self._piece, start)
        part = tokens[start : start + limit]
        self._token += len(part)
        self.tokens += len(part)
        text_bytes = self._bytes_up_to(self._token) - self._bytes_up_to(start)
        ends = self._token == len(tokens) and self._ends_document()
        if self._token == len(tokens):
            self._next_piece()
        return Read(part, begins, ends, text_bytes, origin, within)

    def state(self) -> State:
        """JSON, from which `load` goes on; short, since there may be thousands of streams. The
        same object until something has changed."""
        if self._state is None:
            self._state = self._new_state()
        return self._state

    def _new_state(self) -> State:
        document = None
        if self._document is not None:
            place, row = self._document
            document = [*place, row, self._piece, self._token]
        state: State = {
            "epoch": self._parts.epoch,
            "taken": list(self._parts.taken),
            "since": list(self._parts.since),
            "turn": self._turn,
            "open": [[*part.place[1:], part.next, part.rows] for part in self._open],
            "document": document,
            "tokens": self.tokens,
            "epochs": self._parts.epochs,
        }
        return state | ({"account": self.account.state()} if self.account != Account() else {})

    def load(self, state: State, step: int, exclusions: Exclusions | None) -> None:
        """Goes on from a state that was taken behind step `step`, with the exclusions of before."""
        self._exclusions = exclusions
        self._step, self._state = max(0, step - 1), None
        self._parts.join(self._order.joined(self._step))
        self._parts.epoch = state["epoch"]
        self._parts.taken, self._parts.since = list(state["taken"]), list(state["since"])
        epoch = state["epoch"]
        self._turn = state["turn"]
        self._open = [OpenPart(Place(epoch, *part[:2]), *part[2:]) for part in state["open"]]
        self._close_document()
        if state["document"] is not None:
            *place, row, self._piece, self._token = state["document"]
            self._document = Place(*place), row
        self.tokens = state["tokens"]
        self.account = Account(**state.get("account", {}))

    # --- Rows ------------------------------------------------------------------------------------

    def _open_document(self) -> None:
        """Goes to the next usable row."""
        hopeless = self._parts.epoch + HOPELESS_EPOCHS * self._order.streams
        while True:
            place, number = self._next_turn()
            if self._parts.epoch > hopeless:
                raise DataError(
                    f"{self._order.source.key}.path: no usable row is left in any of its files."
                )
            row = self._order.row(place, number, self._step)
            if row is None:  # the end of a part whose rows could not be counted
                self._open = [part for part in self._open if part.place != place]
                continue
            text = self._usable_text(row, first=place.epoch == self._parts.since[place.cohort])
            if text is not None:
                self._document, self._row, self._text = (place, number), row, text
                return

    def _next_turn(self) -> tuple[Place, int]:
        """The part whose turn it is and the number of its next row. Raises SourceEndedError."""
        while not (part := self._next_part()):
            most = self._order.max_epochs
            if most is not None and self._parts.epoch + 1 >= most:
                raise SourceEndedError
            self._parts.begin_epoch()
            self._turn = 0
        number, part.next = part.next, part.next + 1
        if part.left != 0:
            self._open.append(part)
        return part.place, number

    def _next_part(self) -> OpenPart | None:
        """Takes a part that has another row out of those that are open, or opens one; None at the
        end of the epoch."""
        while True:
            left = self._parts.left
            chosen = self._draw(left)
            if chosen is not None:
                part = self._open.pop(chosen)
                if not self._order.is_gone(part.place, self._step):
                    return part
                continue
            place = self._parts.next()
            if place is None:
                return None
            rows = self._order.rows(place, self._step)
            if rows != 0:
                return OpenPart(place, 0, rows)

    def _draw(self, left: int) -> int | None:
        """Which open part is next; None for a new one, of which `left` are there.

        It is drawn as if any row of those left in the epoch could be next, with the mean of the
        open parts' rows for each new one. As soon as the window is full, open parts take turns.
        """
        opened = len(self._open)
        if opened == 0 or (self._order.in_turns and left and opened < self._order.window):
            return None
        if self._order.in_turns or (left and opened >= self._order.window):
            return 0
        new = left * sum(part.rows or 0 for part in self._open)
        weights = Cumulated([new, *(opened * (part.left or 0) for part in self._open)])
        drawn = self._order.draw_turn(self._stream, self._parts.epoch, self._turn, weights.total)
        self._turn += 1
        chosen, _ = weights.find(drawn)
        return chosen - 1 if chosen else None

    def _usable_text(self, place: RowPlace, *, first: bool) -> str | None:
        """The row's text if there is any; accounts for it if not.

        That is done in the first pass only: a bad row is bad in each.
        """
        source = self._order.source
        file, unit, raw = place
        met = Account()
        try:
            text = usable_text(
                source,
                file,
                unit,
                raw,
                keeps=self._keeps,
                exclusions=self._exclusions,
                account=met,
            )
        except BadRowError as error:
            if first:
                assert file.rows is not None
                self.account.add_bad(raw.value, error.reason)
                where = file.rows.place(unit, raw.address)
                self._bad_rows.add(source.key, file.rows.name, where, error)
            return None
        self.account.empty_rows += first and met.empty_rows
        self.account.excluded_rows += met.excluded_rows
        return text

    def _is_excluded(self) -> bool:
        """Whether the document under way is one of those that must not be read any more."""
        if self._exclusions is None:
            return False
        text = self._text = self._text or self._reopened_text()
        assert self._row is not None
        assert self._row.file.rows is not None
        config = self._order.source.config
        return is_excluded(self._exclusions, self._row.file.rows, self._row.raw, config, text)

    # --- Text ------------------------------------------------------------------------------------

    def _piece_tokens(self) -> Tokens:
        """The tokens of the current piece; the last one of a document ends with its end token."""
        if self._tokens is None:
            self._piece_bytes = 0
            if self._piece != ENDING:
                text = self._text = self._text or self._reopened_text()
                self._piece_end = piece_end(text, self._piece)
                tokens = piece_tokens(self._tokenizer, text, self._piece, self._piece_end)
                self._piece_bytes = len(text[self._piece : self._piece_end].encode())
            else:
                tokens = [self._tokenizer.end_of_document]
            self._tokens = np.array(tokens, dtype=np.int32)
        return self._tokens

    def _reopened_text(self) -> str:
        """The text of the document under way, read once more."""
        assert self._document is not None
        self._row = self._order.row(*self._document, self._step)
        text = None
        if self._row is not None and self._row.file.rows is not None:
            text = self._order.source.text(self._row.file.rows, self._row.raw.value)
        if not text:
            raise DataError(
                f"{self._order.source.key}.path: the text of the document under way is gone. Its "
                "file has changed; restore it."
            )
        return text

    def _bytes_up_to(self, token: int) -> int:
        """Bytes of the piece's text that its first tokens stand for, in proportion."""
        assert self._tokens is not None
        return self._piece_bytes * token // len(self._tokens)

    def _ends_document(self) -> bool:
        return self._piece == ENDING or (
            self._text is not None and self._piece_end == len(self._text)
        )

    def _next_piece(self) -> None:
        if self._ends_document():
            self._close_document()
        else:
            self._piece, self._token, self._tokens = self._piece_end, 0, None

    def _close_document(self) -> None:
        self._document = self._row = self._origin = self._text = self._tokens = None
        self._piece = self._token = 0

    def _end_early(self) -> None:
        """Only the end-of-document token is left of the document under way."""
        self._piece, self._token, self._tokens, self._text = ENDING, 0, None, None

    def _where(self) -> RowOrigin:
        """Where the document under way is from."""
        if self._origin is None:
            assert self._document is not None
            place, _ = self._document
            file, unit = self._order.unit(place)
            row, source = self._row, self._order.source
            address = row.raw.address if row else UNKNOWN
            id_ = None
            if self._with_ids and row and row.file.rows:
                id_ = row_id(row.file.rows, row.raw, source.config)
            self._origin = RowOrigin(source.name, file.key, unit.start, address, place.epoch, id_)
        return self._origin
