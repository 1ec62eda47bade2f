"""Equal texts are found wherever they were written from, a partition at a time."""

import random
from collections import Counter
from pathlib import Path

import pytest
import xxhash

from megapipe.data.audit import duplicates
from megapipe.data.audit.duplicates import HashWriter, find_duplicates
from megapipe.errors import DataError

TRAINED = (True, False, True)


def test_repeats_are_those_of_a_plain_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HELD", 50)
    draw = random.Random(0)
    writers = [HashWriter(tmp_path, name) for name in ("1", "2")]
    texts: Counter[tuple[int, int]] = Counter()
    for _ in range(2000):
        text, tag = draw.randrange(900), draw.randrange(3)
        texts[text, tag] += 1
        draw.choice(writers).add(xxhash.xxh3_128_digest(str(text).encode()), tag)
    for writer in writers:
        writer.flush()
    assert len({path.name[:2] for path in tmp_path.iterdir()}) == duplicates.PARTITIONS
    for tag, found in enumerate(find_duplicates(tmp_path, TRAINED)):
        own = {text: count for (text, of), count in texts.items() if of == tag}
        assert found.repeats == sum(own.values()) - len(own)
        others = {text for text, of in texts if TRAINED[of] and of != tag}
        assert found.elsewhere == sum(count for text, count in own.items() if text in others)


def test_no_text_has_no_repeats(tmp_path: Path) -> None:
    assert [one.repeats for one in find_duplicates(tmp_path, TRAINED)] == [0, 0, 0]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    writer = HashWriter(tmp_path / "gone", "1")
    writer.add(bytes(16), 0)
    with pytest.raises(DataError, match="set TMPDIR"):
        writer.flush()
