"""A tokenizer of Hugging Face's `tokenizers` library: tokenizer.json, under whatever name."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapipe.data.sentencepiece_tokenizer import META_SPACE
from megapipe.data.text_ends import changes_ends, puts_space_before_words, without_ends
from megapipe.errors import DataError
from megapipe.files import reason

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BY_TOKEN = ("tokenizer_config.json", "special_tokens_map.json")
BY_NUMBER = ("generation_config.json", "config.json")
KEPT = ("added_tokens.json", "chat_template.jinja", "chat_template.json")
"""Copied with a tokenizer, and not read."""


class HuggingFaceTokenizer:
    """One .json file of the `tokenizers` library, and what stands beside it about its end token.

    Files beside a tokenizer.json have Hugging Face's usual names; beside NAME.json only
    NAME_config.json counts, since the others may belong to another tokenizer.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        text = _decode(path, content)
        self.engine = _engine(path, text)
        tree = _json_object(path, text)
        _check_exact(path, tree, self.engine)
        ids = set(self.engine.get_vocab(with_added_tokens=True).values())
        if not ids:
            raise DataError(f"{path} has no tokens.")
        self.ids: Sequence[int] = sorted(ids)
        self.vocab_size: int = self.ids[-1] + 1
        self.end_of_document, self.end_of_document_from, named_by = self._find_end_of_document()
        kept = {name: file for name, file in _companions(path).items() if file.is_file()}
        if named_by != "config.json":
            kept.pop("config.json", None)  # of a model, and here only for its end token
        self.files: Mapping[str, Path] = {"tokenizer.json": path} | kept
        self.sha256 = hashlib.sha256(content + f"\n{self.end_of_document}".encode()).hexdigest()
        self._unknown_id = _unknown_id(tree["model"], self.engine)
        self._changes_ends = changes_ends(tree)
        self._spaces_words = puts_space_before_words(tree)
        self._text = text if self._changes_ends else ""  # 10 MB where there are 100,000 tokens
        self._inner: dict[tuple[bool, bool, bool], Any] = {}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_part(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end]; nothing is added or stripped at a cut."""
        begin_cut, end_cut = start > 0, end < len(text)
        if not self._changes_ends or not (begin_cut or end_cut):
            return self.encode(text[start:end])
        ids: list[int] = []
        if begin_cut and self._spaces_words and not text[start - 1].isspace():
            word_end = _word_end(text, start, end)  # its beginning is in the part before
            ids += self._encode_inside(text[start:word_end], True, word_end < len(text), words=True)
            start = word_end
        return ids + self._encode_inside(text[start:end], begin_cut, end_cut)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode(list(ids), skip_special_tokens=False)

    def unknown(self, text: str) -> str:
        """The characters, spaces aside, that no token stands for, or only the unknown one."""
        encoding = self.engine.encode(text, add_special_tokens=False)
        # The space put before a word counts as a part of its first character.
        nothing = (self._unknown_id, self.engine.token_to_id(META_SPACE))
        known = bytearray(len(text))
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ not in nothing:
                known[start:end] = b"\1" * (end - start)
        return "".join(
            character
            for character, found in zip(text, known, strict=True)
            if not found and not character.isspace() and character != META_SPACE
        )

    def _encode_inside(self, part: str, begin: bool, end: bool, words: bool = False) -> list[int]:
        key = (begin, end, words)
        if key not in self._inner:
            tree = without_ends(json.loads(self._text), begin=begin, end=end, words=words)
            self._inner[key] = _engine(self.path, json.dumps(tree))
        (encoding,) = self._inner[key].encode_batch_fast([part], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _find_end_of_document(self) -> tuple[int, str, str]:
        """The id, where it comes from in words, and by which of the files beside, if by one.

        eos_token by name, then eos_token_id, then a token whose name says it; null says nothing.
        """
        beside = _companions(self.path)
        for name in BY_TOKEN:
            token = _read(beside, name).get("eos_token")
            if token is not None:
                id_ = self._id_of(token, beside[name])
                return id_, f"{self._named(id_)}, eos_token of {beside[name]}", name
        for name in BY_NUMBER:
            number = _read(beside, name).get("eos_token_id")
            if number is not None:
                id_ = self._checked_id(number, beside[name])
                first = "first " if isinstance(number, list) and len(number) > 1 else ""
                return id_, f"{self._named(id_)}, {first}eos_token_id of {beside[name]}", name
        for token in END_OF_DOCUMENT_NAMES:
            if (found := self.engine.token_to_id(token)) is not None:
                return found, f"{self._named(found)}, by its name", ""
        raise DataError(
            f'{self.path} names no end-of-document token; write {{"eos_token": "..."}} into '
            f"{_config_beside(self.path)}, with one of its tokens."
        )

    def _named(self, id_: int) -> str:
        return repr(self.engine.id_to_token(id_))

    def _id_of(self, token: object, where: Path) -> int:
        content = token.get("content") if isinstance(token, dict) else token
        id_ = self.engine.token_to_id(content) if isinstance(content, str) else None
        if id_ is None:
            known = [
                one for one in END_OF_DOCUMENT_NAMES if self.engine.token_to_id(one) is not None
            ]
            such_as = f", such as {known[0]!r}" if known else ""
            raise DataError(
                f'{where}: "eos_token" is {content!r}, which is not a token of {self.path}; write '
                f"one that is{such_as}, or add it to that file."
            )
        return id_

    def _checked_id(self, value: object, where: Path) -> int:
        number = value[0] if isinstance(value, list) and value else value
        # (True is an int to Python.)
        if isinstance(number, int) and not isinstance(number, bool) and number in self.ids:
            return number
        raise DataError(
            f'{where}: "eos_token_id" is {value!r}, and {self.path} has no token of that number '
            f"(its {len(self.ids):,} tokens end with {self.ids[-1]:,}); correct it."
        )


def _engine(path: Path, text: str) -> Any:
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer of the tokenizers library ({error}).") from None
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine


def _check_exact(path: Path, tree: Mapping[str, Any], engine: Any) -> None:
    """Raises DataError where the library would not do what the file says, each time anew."""
    if tree["model"].get("dropout"):
        raise DataError(
            f'{path} tokenises at random ("dropout" of its "model" is {tree["model"]["dropout"]}), '
            "and a run would not be the same again; set it to null."
        )
    for token in tree.get("added_tokens") or []:
        content, number = token["content"], token["id"]
        if (given := engine.token_to_id(content)) != number:
            raise DataError(
                f"{path} gives its added token {content!r} the number {number}, and the tokenizers "
                f"library makes that {given}: added tokens follow the vocabulary without a gap. "
                f"Give it the number {given}."
            )


def _unknown_id(model: Mapping[str, Any], engine: Any) -> int | None:
    if model.get("type") == "Unigram" or "unk_id" in model:
        number: int | None = model.get("unk_id")
        return number
    token = model.get("unk_token")
    found: int | None = engine.token_to_id(token) if isinstance(token, str) else None
    return found


def _word_end(text: str, start: int, end: int) -> int:
    while start < end and not text[start].isspace():
        start += 1
    return start


def _config_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_config.json")  # tokenizer_config.json of tokenizer.json


def _companions(path: Path) -> dict[str, Path]:
    """Files about the tokenizer that are there, by the names they have beside a tokenizer.json.

    A link that leads nowhere is among them: reading it is an error, and its end token is not
    replaced by another in silence.
    """
    beside = {"tokenizer_config.json": _config_beside(path)}
    if path.name == "tokenizer.json":
        beside |= {name: path.with_name(name) for name in (*BY_TOKEN, *BY_NUMBER, *KEPT)}
    return {name: file for name, file in beside.items() if os.path.lexists(file)}


def _read(beside: Mapping[str, Path], name: str) -> Mapping[str, Any]:
    """The JSON object of a file beside the tokenizer, empty where there is none."""
    if name not in beside:
        return {}
    path = beside[name]
    if not path.is_file():
        leads = f"a link to {os.readlink(path)}, which" if path.is_symlink() else "there and"
        raise DataError(f"{path} is {leads} is not a file; repair or remove it.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {reason(error)}") from error
    return _json_object(path, _decode(path, content))


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object.")
    return value
