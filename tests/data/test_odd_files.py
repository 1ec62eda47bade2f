"""Each odd file through the feed, `megapipe train` and `megapipe tokenizer train`."""

import codecs
import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data import formats
from megapipe.data.feed import BatchFeed
from megapipe.data.units import UNIT_BYTES
from megapipe.errors import DataError
from megapipe.tools.cli import main
from tests.corpus import write_text, write_tokenizer
from tests.data.odd_files import ODD_FILES, OddFile
from tests.data.samples import data_config, open_feed, source, texts_of
from tests.data.test_compressed import available

NAMES = [odd.name for odd in ODD_FILES]
CONFIG = """\
[model]
preset = "llama-micro"
num_layers = 1
vocab_size = 400
[train]
run_dir = "run"
steps = 4
global_batch_size = 16
micro_batch_size = 16
sequence_length = 64
precision = "fp32"
device = "cpu"
[optimizer]
learning_rate = 1e-3
[data]
tokenizer = "{tokenizer}"
streams = 1
[[data.sources]]
name = "odd"
path = "data/{path}"
{source}
[logging]
wandb = "off"
"""


def made(odd: OddFile, folder: Path) -> Path:
    data = folder / "data"
    data.mkdir()
    odd.make(data)
    return data


def first_pass(feed: BatchFeed, documents: int) -> list[str]:
    """The documents of the first pass, which has to be over when the second begins."""
    tokens: list[int] = []
    while feed.epoch < 1:
        tokens += next(feed).tokens[0, :-1].tolist()
    while len(found := texts_of(tokens)) < documents:
        tokens += next(feed).tokens[0, :-1].tolist()
    return found[:documents]


@pytest.mark.parametrize("odd", ODD_FILES, ids=NAMES)
def test_the_feed(tmp_path: Path, odd: OddFile) -> None:
    config = data_config(
        source(made(odd, tmp_path) / odd.path, "odd", **odd.source), streams=1, open_parts=1
    )
    said: list[str] = []
    if odd.error:
        with pytest.raises(DataError, match=re.escape(odd.error)) as caught:
            open_feed(config, say=said.append)
        assert len(str(caught.value).splitlines()) == 1
        return
    feed = open_feed(config, global_batch_size=1, sequence_length=16, say=said.append)
    assert Counter(first_pass(feed, len(odd.documents))) == Counter(odd.documents)
    account = feed.account
    feed.close()
    assert account.skipped == Counter(odd.bad)
    assert account.empty_rows == odd.empty
    assert account.skipped_bytes == odd.skipped_bytes
    assert account.unreadable_bytes == odd.unreadable_bytes
    assert len([line for line in said if "skipped" in line]) == len(odd.bad)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_text(folder)
    return write_tokenizer(folder)


def check_command(status: int, odd: OddFile, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert status == (1 if odd.error else 0), said
    if odd.error:
        told = [line for line in said.splitlines() if line.startswith("megapipe: ")]
        assert len(told) == 1
        assert odd.error in told[0] or "there is no usable text" in told[0]
    for reason in odd.bad if not odd.error else ():
        assert reason in said


@pytest.mark.parametrize("odd", ODD_FILES, ids=NAMES)
def test_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tokenizer: Path,
    odd: OddFile,
) -> None:
    monkeypatch.chdir(tmp_path)
    made(odd, tmp_path)
    more = "".join(f'{key} = "{value}"\n' for key, value in odd.source.items())
    text = CONFIG.format(tokenizer=tokenizer, path=odd.path, source=more)
    Path("run.toml").write_text(text, encoding="utf-8")
    status = main(["train", "run.toml"])
    said = capfd.readouterr()
    if odd.error:
        assert status == 1
        assert odd.error in said.err
        assert not list(tmp_path.glob("run/checkpoints/*"))
        return
    assert status == 0, said
    assert "Done: step 4" in said.out
    row = json.loads(Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert row["epoch"] >= 1, "the first pass is over"
    counts = {
        "skipped_rows": len(odd.bad),
        "skipped_bytes": odd.skipped_bytes,
        "unreadable_bytes": odd.unreadable_bytes,
        "empty_rows": odd.empty,
    }
    assert {name: row[name] for name in counts} == counts


@pytest.mark.parametrize("odd", ODD_FILES, ids=NAMES)
def test_training_a_tokenizer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    odd: OddFile,
) -> None:
    monkeypatch.chdir(tmp_path)
    made(odd, tmp_path)
    words = ["tokenizer", "train", f"data/{odd.path}", "--vocab-size", "290", "--out", "t.model"]
    status = main(words)
    check_command(status, odd, capsys)
    assert Path("t.model").exists() != bool(odd.error)


LINES = [b"text\n", b"two words\r\n", b"\n", b" \t\n", b"\xe9\n", b"\0\n", "漢é\n".encode()]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["file", "line", "blank-line"])
@settings(deadline=None, max_examples=12)
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=20),
    cut=st.integers(0, 30),
    unit=st.sampled_from([3, 20, UNIT_BYTES]),
)
def test_every_byte_of_text_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    suffix: str,
    lines: list[bytes],
    cut: int,
    unit: int,
) -> None:
    """Documents, what the table of docs/data.md leaves out, and skipped_bytes: all of the file."""
    folder = tmp_path_factory.mktemp("account")
    (folder / "good.txt").write_bytes(b"good")
    text = b"".join(lines) + "é".encode()
    content = compressed(text, suffix)[: -cut or None] if suffix else text
    (folder / f"odd.txt{suffix}").write_bytes(content)
    text = available(suffix, content)[0] if suffix else text
    if suffix and len(content) < 4:
        return  # not even the first bytes of its format
    config = data_config(source(f"{folder}/*.txt*", documents=kind), streams=1, open_parts=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "UNIT_BYTES", unit)
        feed = open_feed(config, global_batch_size=1, sequence_length=4)
    rows = [row for row in pieces(text, kind) if usable(row)]
    found = first_pass(feed, 1 + len(rows))
    delivered = sum(len(document.encode()) for document in found) - len(b"good")
    skipped = feed.account.skipped_bytes
    feed.close()
    assert delivered + skipped + left_out(text, kind) == len(text)


def compressed(text: bytes, suffix: str) -> bytes:
    return gzip.compress(text) if suffix == ".gz" else zstandard.compress(text)


def pieces(text: bytes, kind: str) -> list[bytes]:
    """The rows of a small file, as docs/data.md says."""
    if kind == "file":
        return [text]
    lines = re.findall(rb"[^\n]*\n|[^\n]+", text)
    if kind == "line":
        return [line for line in lines if line.strip()]
    runs = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    return [b"".join(run) for filled, run in runs if filled]


def usable(row: bytes) -> bool:
    """A document, when the bytes of a cut character at its end are taken off."""
    try:
        text = whole_characters(row)
    except UnicodeDecodeError:
        return False
    return bool(text.strip()) and text.count("\0") <= 0.01 * len(text.rstrip("\r\n"))


def whole_characters(row: bytes) -> str:
    """Without the bytes of a cut character at the end."""
    return codecs.getincrementaldecoder("utf-8")().decode(row)


def left_out(text: bytes, kind: str) -> int:
    """Bytes of blank rows and lines, and of the line ends of documents."""
    rows = pieces(text, kind)
    if kind == "file":
        try:
            whole = whole_characters(text)
        except UnicodeDecodeError:
            return 0
        return 0 if whole.strip() else len(whole.encode())
    texts = [whole_characters(row) for row in rows if usable(row)]
    ends = sum(len(text) - len(text.rstrip("\r\n")) for text in texts)
    return ends + len(text) - sum(map(len, rows))
