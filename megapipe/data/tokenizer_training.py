"""Training of a sentencepiece tokenizer on text files."""

import io
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapipe.amounts import counted, format_bytes
from megapipe.data.sentencepiece_tokenizer import META_SPACE, SentencePieceTokenizer
from megapipe.data.sources import repeated_files
from megapipe.data.text_check import check_texts, name_characters
from megapipe.data.tokenizer_corpus import SENTENCE_BYTES, Corpus, open_all
from megapipe.errors import DataError
from megapipe.files import replace_durably, shown

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9999,
}
"""With these, text comes back byte by byte, U+2581 apart, and ids are the same after export to
Hugging Face. Line ends are not part of pieces: they are the byte piece <0x0A>, as in Llama 2."""


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer as it was written, and the text that it was trained on."""

    tokenizer: SentencePieceTokenizer
    corpus: Corpus
    seconds: float
    replaced: bool
    """Its file had been there before."""


def train_tokenizer(
    places: Sequence[Path],
    out: Path,
    *,
    vocab_size: int,
    sample_bytes: int,
    text_field: str,
    say: Callable[[str], None],
) -> TrainedTokenizer:
    """Train on files, globs and directories, on about `sample_bytes` of their text, and write
    `out`; nothing is written where anything fails. The same text gives the same bytes.

    `say` gets a line for each row that is left out and each file that is named twice. Raises
    DataError for files that can't be read, text that can't be trained on, a file that can't be
    written.
    """
    replaced = out.exists()
    corpus = Corpus(open_all(places, text_field), say=say)
    for note in repeated_files(corpus.sources, name=lambda source: source.config.path):
        say(note)
    started = time.perf_counter()
    content = train_model(corpus, vocab_size, sample_bytes)
    tokenizer = SentencePieceTokenizer(out, content)
    _write(out, content)
    return TrainedTokenizer(tokenizer, corpus, time.perf_counter() - started, replaced)


def training_report(trained: TrainedTokenizer) -> Iterator[str]:
    """Lines for people: what was trained on what, and how well it does."""
    tokenizer, corpus = trained.tokenizer, trained.corpus
    tokens = counted(tokenizer.vocab_size, "token")
    yield f"{shown(tokenizer.path)}: {tokens}, trained in {trained.seconds:.1f} s"
    if trained.replaced:
        yield "  replaced    the tokenizer that had this name"
    files = sum(len(source.files) for source in corpus.sources)
    yield f"  text        {counted(files, 'file')}, {_size(corpus)}"
    if left_out := corpus.left_out():
        yield f"  left out    {left_out}"
    yield f"  end token   {tokenizer.end_of_document}"
    yield f"  measured    {check_texts(tokenizer, corpus.sample).summary()}"
    if corpus.meta_spaces:
        yield (
            f"  changed     {name_characters(Counter({META_SPACE: corpus.meta_spaces}))} in the "
            "text: sentencepiece writes it for a space, and it becomes one"
        )


def _size(corpus: Corpus) -> str:
    stored, text = corpus.stored_bytes, corpus.total_bytes
    if text == stored:
        return format_bytes(stored)
    return (
        f"{format_bytes(stored)}; about {format_bytes(text)} if files unfold to 4 times their size"
    )


def _write(out: Path, content: bytes) -> None:
    """In one step, so that there is never half a file of that name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(out, [content])
    except OSError as error:
        raise DataError(f"--out {out} can't be written: {error.strerror}.") from error


def train_model(corpus: Corpus, vocab_size: int, sample_bytes: int) -> bytes:
    import sentencepiece

    if corpus.total_bytes == 0:
        raise DataError("FILES: all files are empty; there is no text to train on.")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus.sentences(sample_bytes),
            model_writer=written,
            vocab_size=vocab_size,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=1,  # more gain nothing for BPE
            minloglevel=2,
            **SETTINGS,
        )
    except RuntimeError as error:
        if corpus.failure is None and not corpus.texts:
            left_out = f" Left out: {corpus.left_out()}." if corpus.left_out() else ""
            raise DataError(
                f"FILES: there is no usable text in any of the files.{left_out}"
            ) from None
        if corpus.failure is None:
            raise DataError(_trainer_message(str(error), vocab_size)) from None
    if corpus.failure is not None:
        raise corpus.failure
    return written.getvalue()


def _trainer_message(error: str, vocab_size: int) -> str:
    if match := re.search(r"too high.*<= (\d+)", error):
        return (
            f"--vocab-size {vocab_size} is more than this text gives; set at most {match[1]}, "
            "or train on more text."
        )
    if match := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", error):
        return (
            f"--vocab-size {vocab_size} is too small: bytes, special tokens and the characters of "
            f"this text take {match[1]}; set more."
        )
    return f"sentencepiece can't train on this text: {error}"
