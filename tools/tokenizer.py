"""`megapipe tokenizer train FILES...` and `megapipe tokenizer inspect FILE|DIR`."""

import argparse
import io
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapipe.checkpoint.storage import format_bytes
from megapipe.data.sentencepiece_tokenizer import META_SPACE
from megapipe.data.sources import repeated_files
from megapipe.data.text_check import check_texts, name_characters
from megapipe.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    not_used_beside,
)
from megapipe.errors import DataError
from megapipe.files import replace_durably, shown
from megapipe.tools.arguments import Parser, check_output, path_argument, text_argument
from megapipe.tools.tokenizer_corpus import SENTENCE_BYTES, Corpus, open_all

MAX_VOCABULARY = 10_000_000
SAMPLE_TEXT = 'def greet(name):\n    print(f"Hello, {name}!")\n'

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


def run(argv: Sequence[str]) -> int:
    """Train a tokenizer or describe one. Raises DataError for what can't be read or trained."""
    arguments, _ = _parser().parse(argv)
    if arguments.action == "train":
        return _train(arguments)
    return _inspect(arguments)


def _parser() -> Parser:
    parser = Parser("tokenizer", "Train a sentencepiece tokenizer, or look into one.")
    actions = parser.add_subparsers(dest="action", metavar="train|inspect", required=True)
    train = actions.add_parser(
        "train",
        command="tokenizer train",
        help="train a byte-pair tokenizer on text files",
        description="Train a sentencepiece BPE tokenizer that knows every byte: tokens decode to\n"
        "the same text, except that the character U+2581, which sentencepiece writes for a space,\n"
        "becomes one. The same files give the same model.",
    )
    train.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help="paths, globs or directories of txt, md, py, jsonl (also .gz, .zst), parquet, arrow",
    )
    train.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, special ones included"
    )
    train.add_argument("--out", type=path_argument, required=True, help="the .model file to write")
    train.add_argument(
        "--sample-bytes",
        type=int,
        default=64 << 20,
        help="train on about this much text, taken evenly from all files (default 64 MiB)",
    )
    train.add_argument("--text-field", default="text", help="field of jsonl and tables")
    inspect = actions.add_parser(
        "inspect",
        command="tokenizer inspect",
        help="describe a tokenizer and show it at work",
        description="Describe a tokenizer and show it at work.",
    )
    inspect.add_argument(
        "path", type=path_argument, help="a .model or .json file, or a directory with one"
    )
    inspect.add_argument(
        "--text", type=text_argument, default=SAMPLE_TEXT, help="the text to tokenise"
    )
    return parser


def _train(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    _check(arguments)
    replaced = out.exists()
    corpus = Corpus(open_all(arguments.files, arguments.text_field), say=print)
    for note in repeated_files(corpus.sources, name=lambda source: source.config.path):
        print(note)
    started = time.perf_counter()
    content = _train_model(corpus, arguments.vocab_size, arguments.sample_bytes)
    tokenizer = SentencePieceTokenizer(out, content)
    _write(out, content)
    seconds = time.perf_counter() - started
    files = sum(len(source.files) for source in corpus.sources)
    print(f"{shown(out)}: {tokenizer.vocab_size:,} tokens, trained in {seconds:.1f} s")
    if replaced:
        print("  replaced    the tokenizer that had this name")
    print(f"  text        {files:,} file{'s'[: files != 1]}, {_size(corpus)}")
    if left_out := corpus.left_out():
        print(f"  left out    {left_out}")
    print(f"  end token   {tokenizer.end_of_document}")
    print(f"  {_measure(tokenizer, corpus.sample)}")
    if corpus.meta_spaces:
        print(
            f"  changed     {name_characters(Counter({META_SPACE: corpus.meta_spaces}))} in the "
            "text: sentencepiece writes it for a space, and it becomes one"
        )
    return 0


def _size(corpus: Corpus) -> str:
    stored, text = corpus.stored_bytes, corpus.total_bytes
    if text == stored:
        return format_bytes(stored)
    return (
        f"{format_bytes(stored)}; about {format_bytes(text)} if files unfold to 4 times their size"
    )


def _check(arguments: argparse.Namespace) -> None:
    """Raises DataError for what would fail only after the training."""
    if arguments.out.suffix != ".model":
        raise DataError(
            f"--out {shown(arguments.out)} has to end with .model, by which a config knows its "
            "kind."
        )
    if arguments.sample_bytes <= 0:
        raise DataError(f"--sample-bytes {arguments.sample_bytes} has to be above 0.")
    if not 0 < arguments.vocab_size <= MAX_VOCABULARY:
        raise DataError(
            f"--vocab-size {arguments.vocab_size} has to be from 1 to {MAX_VOCABULARY:,}."
        )
    check_output("--out", arguments.out)


def _write(out: Path, content: bytes) -> None:
    """In one step, so that there is never half a file of that name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(out, [content])
    except OSError as error:
        raise DataError(f"--out {out} can't be written: {error.strerror}.") from error


def _train_model(corpus: Corpus, vocab_size: int, sample_bytes: int) -> bytes:
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


def _measure(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Bytes per token, what is unknown, and whether texts come back as they were."""
    check = check_texts(tokenizer, texts)
    return f"measured    {check.bytes_per_token:.2f} bytes per token; {check.verdict()}"


def _inspect(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.path, key=None)
    lines = {
        "vocabulary": f"{len(tokenizer.ids):,} tokens{_numbers(tokenizer)}",
        "end token": f"{tokenizer.end_of_document} ({tokenizer.end_of_document_from})",
        "sha256": tokenizer.sha256,
        "files": ", ".join(path.name for path in tokenizer.files.values()),
    }
    if others := not_used_beside(tokenizer, arguments.path):
        lines["not used"] = ", ".join(others)
    lines |= (
        _sentencepiece_lines(tokenizer)
        if isinstance(tokenizer, SentencePieceTokenizer)
        else _hugging_face_lines(tokenizer)
    )
    print(shown(tokenizer.path))
    for name, value in lines.items():
        print(f"  {name:<12}{value}")
    ids = tokenizer.encode(arguments.text)
    print(f"  {'text':<12}{arguments.text!r}")
    print(f"  {'tokens':<12}{' '.join(repr(_piece(tokenizer, id_)) for id_ in ids)}")
    print(f"  {'ids':<12}{' '.join(map(str, ids))}")
    print(f"  {_measure(tokenizer, [arguments.text])}")
    return 0


def _numbers(tokenizer: Tokenizer) -> str:
    gaps = tokenizer.vocab_size - len(tokenizer.ids)
    return f", numbered up to {tokenizer.vocab_size - 1:,} with {gaps:,} gaps" if gaps else ""


def _sentencepiece_lines(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto.FromString(tokenizer.path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    processor = tokenizer.processor
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    settings = {
        "normaliser": normalizer.name,
        "dummy prefix": normalizer.add_dummy_prefix,
        "removes extra spaces": normalizer.remove_extra_whitespaces,
        "byte fallback": trainer.byte_fallback,
        "splits digits": trainer.split_digits,
    }
    safe = (
        kind == "bpe"
        and normalizer.name == "identity"
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and trainer.byte_fallback
    )
    return {
        "type": f"sentencepiece {kind}",
        "special ids": f"unknown {processor.unk_id()}, begin {processor.bos_id()}, "
        f"end {processor.eos_id()}, padding {processor.pad_id()} (-1: none)",
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "export": "ids stay the same in Hugging Face form"
        if safe
        else "ids may change in Hugging Face form (needs BPE, identity normaliser, byte fallback, "
        "no dummy prefix, no removal of spaces)",
    }


def _hugging_face_lines(tokenizer: Tokenizer) -> dict[str, str]:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    engine = tokenizer.engine
    special = sorted(
        (id_, token.content)
        for id_, token in engine.get_added_tokens_decoder().items()
        if token.special
    )
    parts = {
        "normaliser": engine.normalizer,
        "pre-tokeniser": engine.pre_tokenizer,
        "decoder": engine.decoder,
    }
    named = (f"{name} {type(part).__name__ if part else 'none'}" for name, part in parts.items())
    return {
        "type": f"tokenizers {type(engine.model).__name__}",
        "special ids": ", ".join(f"{content} {id_}" for id_, content in special[:8]) or "none",
        "settings": ", ".join(named),
    }


def _piece(tokenizer: Tokenizer, id_: int) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        piece: str = tokenizer.processor.id_to_piece(id_)
        return piece
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer.engine.id_to_token(id_) or ""
