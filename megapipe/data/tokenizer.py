"""Tokenizers: a sentencepiece model, or a file of the `tokenizers` library. No code is run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megapipe.data.hugging_face_tokenizer import HuggingFaceTokenizer
from megapipe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapipe.errors import DataError
from megapipe.files import reason, shown

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Under one of these names a copy of the tokenizer lies in each checkpoint."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    Text is text: "<s>" in it never becomes a special token, and no special token is ever added.
    `ids` are those that tokens have, in ascending order; the last is vocab_size - 1.
    `files` are what has to be copied, and under which names, to have the tokenizer elsewhere;
    `sha256` names what it makes of text, wherever it lies.
    """

    @property
    def path(self) -> Path: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def end_of_document_from(self) -> str: ...
    @property
    def files(self) -> Mapping[str, Path]: ...
    @property
    def sha256(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_part(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end] as a part of `text`: what is put before a text or stripped at its
        ends is so at the ends of `text` only."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...
    def unknown(self, text: str) -> str:
        """The characters of `text` that are lost: without a token, or with the unknown one."""
        ...


def load_tokenizer(path: str | Path, key: str | None = "data.tokenizer") -> Tokenizer:
    """The tokenizer in exactly the file that is named, or in a directory.

    A file is of the `tokenizers` library where its name ends with .json, a sentencepiece model
    where it ends with .model, and otherwise what its content looks like. In a directory it is
    tokenizer.json, else tokenizer.model, else the only .model file.

    Raises DataError, naming `key` unless that is None, when there is no tokenizer there, it is
    damaged, or it has no end-of-document token.
    """
    try:
        file = _find(Path(path))
        content = _read(file)
        if _is_json(file, content):
            return HuggingFaceTokenizer(file, content)
        return SentencePieceTokenizer(file, content)
    except DataError as error:
        raise DataError(f"{key}: {error}" if key else str(error)) from error


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, load_from: str | None = None) -> None:
    """Raises DataError when the tokenizer has ids that the model's embedding has not; `load_from`
    is where the model comes from, if it is not a new one."""
    if tokenizer.vocab_size <= vocab_size:
        return
    gaps = tokenizer.vocab_size - len(tokenizer.ids)
    numbered = f", numbered up to {tokenizer.vocab_size - 1}" if gaps else ""
    fix = (
        f"set model.vocab_size to at least {tokenizer.vocab_size}, or use a smaller tokenizer."
        if load_from is None
        else f"use the tokenizer of the model that checkpoint.load_from names"
        f"{_as_in(load_from, vocab_size)}, or give the model new tokens: set model.vocab_size to "
        f'at least {tokenizer.vocab_size} and checkpoint.load_new_tokens = "mean".'
    )
    raise DataError(
        f"data.tokenizer has {len(tokenizer.ids)} tokens{numbered} ({tokenizer.path}) but "
        f"model.vocab_size = {vocab_size}; {fix}"
    )


def _as_in(path: str, vocab_size: int) -> str:
    """How the tokenizer of a model is named that lies in its directory, if it does."""
    try:
        fits = load_tokenizer(path, key=None).vocab_size <= vocab_size
    except DataError:
        return ""
    return f' (data.tokenizer = "{shown(path)}")' if fits else ""


def not_used_beside(tokenizer: Tokenizer, path: str | Path) -> list[str]:
    """Names of the other tokenizers in the directory `path` from which `tokenizer` was taken."""
    if not Path(path).is_dir():
        return []
    others = [Path(path, "tokenizer.json"), *_models(Path(path))]
    return [other.name for other in others if other != tokenizer.path and other.is_file()]


def _find(path: Path) -> Path:
    """The one file that a path means."""
    try:
        os.lstat(path)
        return _find_in(path) if path.is_dir() else path
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{shown(path)} does not exist; train a tokenizer with `megapipe tokenizer train FILES "
            f"--vocab-size N --out {shown(path.with_suffix('.model'))}`, or name "
            "a checkpoint, which keeps the tokenizer of its run."
        ) from None
    except OSError as error:
        raise DataError(f"{shown(path)} can't be read: {reason(error)}") from error
    except ValueError as error:  # a NUL in it
        raise DataError(f"{str(path)!r} is not a path ({error}).") from None


def _find_in(directory: Path) -> Path:
    main, models = directory / "tokenizer.json", _models(directory)
    if os.path.lexists(main):
        return main
    named = [model for model in models if model.name == "tokenizer.model"] or models
    if len(named) == 1:
        return named[0]
    if models:
        names = ", ".join(model.name for model in models)
        raise DataError(
            f"{shown(directory)} has {len(models)} .model files ({names}); name the one to use."
        )
    others = sorted(one.name for one in directory.iterdir() if one.suffix.lower() == ".json")
    advice = (
        f"name the file if one of {', '.join(others[:5])} is one"
        if others
        else "name another, or the file itself"
    )
    raise DataError(
        f"the directory {shown(directory)} has no tokenizer in it, neither a tokenizer.json nor "
        f"a .model file; {advice}."
    )


def _models(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix.lower() == ".model")


def _read(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{shown(path)} is a link to {shown(os.readlink(path))}, which does not exist."
        )
    if not path.is_file():
        raise DataError(f"{shown(path)} is not a file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)} can't be read: {reason(error)}") from error


def _is_json(path: Path, content: bytes) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".json", ".model"):
        return suffix == ".json"
    return content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"{")
