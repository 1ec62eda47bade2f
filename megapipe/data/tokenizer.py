"""Tokenizers: a sentencepiece model, or a Hugging Face tokenizer directory. No code is run."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megapipe.errors import DataError

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Text is text: "<s>" in it never becomes a special token, and no special token is ever added.
    `files` are what has to be copied to have the tokenizer elsewhere; `sha256` names its content.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def sha256(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A sentencepiece .model file, or a directory with tokenizer.json or one .model file.

    Raises DataError when there is no tokenizer there or it has no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(path)
        models = sorted(path.glob("*.model"))
        preferred = [model for model in models if model.name == "tokenizer.model"]
        if len(preferred or models) != 1:
            found = f"has {len(models)} .model files" if models else "has no tokenizer in it"
            raise DataError(
                f'data.tokenizer = "{path}" {found}; it needs a tokenizer.json or tokenizer.model.'
            )
        return SentencePieceTokenizer((preferred or models)[0])
    if not path.is_file():
        raise DataError(
            f'data.tokenizer = "{path}" does not exist; train one with '
            f"`megapipe tokenizer train FILES --vocab-size N --out {path}`."
        )
    return (
        HuggingFaceTokenizer(path.parent)
        if path.suffix == ".json"
        else (SentencePieceTokenizer(path))
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError when the tokenizer has ids that the model's embedding has not."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens ({tokenizer.files[0]}) but "
            f"model.vocab_size = {vocab_size}; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or use a smaller tokenizer."
        )


class SentencePieceTokenizer:
    """A sentencepiece model. Control symbols are never matched in text."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.files: tuple[Path, ...] = (path,)
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            if not content:
                raise RuntimeError("it is empty")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f'data.tokenizer = "{path}" is not a sentencepiece model ({error}).'
            ) from None
        self.vocab_size: int = self.processor.vocab_size()
        self.end_of_document: int = self.processor.eos_id()
        if self.end_of_document < 0:
            raise DataError(
                f'data.tokenizer = "{path}" has no end-of-sentence piece (eos_id is -1), which '
                "ends documents here; train it with one."
            )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.decode(list(ids))
        return text


class HuggingFaceTokenizer:
    """A directory with tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as Engine

        main = directory / "tokenizer.json"
        companions = (directory / name for name in COMPANIONS)
        self.files: tuple[Path, ...] = (main, *(path for path in companions if path.is_file()))
        self.sha256 = _digest(self.files)
        try:
            self.engine = Engine.from_file(str(main))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f'data.tokenizer: "{main}" is not a tokenizer of the tokenizers library ({error}).'
            ) from None
        self.engine.no_truncation()
        self.engine.no_padding()
        self.engine.encode_special_tokens = True
        self.vocab_size: int = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document: int = self._find_end_of_document(directory)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode(list(ids), skip_special_tokens=False)

    def _find_end_of_document(self, directory: Path) -> int:
        """eos_token by name, eos_token_id, or a token whose name says it."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(directory / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (id_ := self.engine.token_to_id(token)) is not None:
                return id_
        for name in ("generation_config.json", "config.json"):
            number = _read_json(directory / name).get("eos_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and 0 <= number < self.vocab_size:
                return number
        for token in END_OF_DOCUMENT_NAMES:
            if (id_ := self.engine.token_to_id(token)) is not None:
                return id_
        raise DataError(
            f'data.tokenizer = "{directory}" names no end-of-document token; put '
            '"eos_token" into its tokenizer_config.json.'
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"data.tokenizer: {path} is not JSON ({error}).") from None
    return value if isinstance(value, dict) else {}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
