import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megapipe.data.packing import Packer, Read, RowOrigin, Within

Documents = list[list[int]]


class ListReader:
    """Documents in memory, each ended by token 0; `at` is the position."""

    def __init__(self, documents: Documents, chunk: int) -> None:
        self.documents = [[*document, 0] for document in documents]
        self.chunk = chunk
        self.at = (0, 0)

    def read(self, limit: int) -> Read:
        document, token = self.at
        tokens = self.documents[document % len(self.documents)]
        part = tokens[token : token + min(limit, self.chunk)]
        ended = token + len(part) == len(tokens)
        self.at = (document + 1, 0) if ended else (document, token + len(part))
        origin = RowOrigin("source", "file", 0, document, 0)
        within = Within(0, token)
        tokens = np.array(part, dtype=np.int32)
        return Read(tokens, token == 0, ended, 2 * len(part), origin, within)


documents = st.lists(st.lists(st.integers(1, 1000), max_size=30), min_size=1, max_size=8)


def flat(documents: Documents, count: int) -> list[int]:
    once = [token for document in documents for token in [*document, 0]]
    return (once * (count // len(once) + 1))[:count]


@given(documents, st.integers(1, 40), st.integers(1, 50), st.integers(1, 6))
def test_no_token_is_lost_and_each_is_a_target_once(
    documents: Documents, length: int, chunk: int, count: int
) -> None:
    packer = Packer(ListReader(documents, chunk), length)
    sequences = [packer.next() for _ in range(count)]
    stream = flat(documents, count * length + 1)
    for index, sequence in enumerate(sequences):
        assert sequence.tokens.tolist() == stream[index * length : (index + 1) * length + 1]
        assert sequence.tokens.dtype == sequence.documents.dtype == np.int32


@given(documents, st.integers(1, 40), st.integers(1, 50))
def test_document_numbers_rise_behind_every_end_token(
    documents: Documents, length: int, chunk: int
) -> None:
    packer = Packer(ListReader(documents, chunk), length)
    for _ in range(5):
        sequence = packer.next()
        inputs = sequence.tokens[:-1]
        expected = [int((inputs[:position] == 0).sum()) for position in range(length)]
        assert sequence.documents.tolist() == expected


@given(documents, st.integers(1, 40), st.integers(0, 5))
def test_position_and_last_token_are_the_whole_state(
    documents: Documents, length: int, before: int
) -> None:
    reader = ListReader(documents, 7)
    packer = Packer(reader, length)
    for _ in range(before):
        packer.next()
    again = ListReader(documents, 11)
    again.at = reader.at
    restored = Packer(again, length)
    restored.last = packer.last
    for _ in range(4):
        one, other = packer.next(), restored.next()
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.documents, other.documents)


@given(documents, st.integers(1, 40), st.integers(1, 50), st.integers(1, 6))
def test_stretches_say_where_each_token_comes_from_once(
    documents: Documents, length: int, chunk: int, count: int
) -> None:
    """All but the overlap with the sequence before; each document begins in one stretch."""
    packer = Packer(ListReader(documents, chunk), length)
    found: dict[int, list[int]] = {}
    begun: list[int] = []
    for number in range(count):
        sequence = packer.next()
        place = 1 if number else 0
        for stretch in sequence.stretches:
            assert stretch.start == place
            assert stretch.text_bytes == 2 * stretch.length
            place += stretch.length
            own = found.setdefault(stretch.origin.address, [])
            own += sequence.tokens[stretch.start : place].tolist()
            begun += [stretch.origin.address] * stretch.begins
        assert place == length + 1
    assert begun == list(range(len(found)))
    for address, tokens in found.items():
        assert [*documents[address % len(documents)], 0][: len(tokens)] == tokens
