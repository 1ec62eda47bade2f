"""A sentencepiece model as a tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megapipe.errors import DataError

META_SPACE = "\u2581"
"""What sentencepiece writes for a space. Where the text itself holds one, it becomes a space."""


class SentencePieceTokenizer:
    """A sentencepiece model. Control symbols are never matched in text."""

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        self.path = path
        self.files: Mapping[str, Path] = {"tokenizer.model": path}
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._content = content
        try:
            if not content:
                raise RuntimeError  # sentencepiece takes it for a model
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            empty = "" if content else " (it is empty)"
            raise DataError(
                f"{path} is not a sentencepiece model{empty}. Name a .model file, or a "
                "tokenizer.json of Hugging Face's tokenizers."
            ) from None
        self.vocab_size: int = self.processor.vocab_size()
        self.ids: Sequence[int] = range(self.vocab_size)
        self.end_of_document: int = self.processor.eos_id()
        if self.end_of_document < 0:
            raise DataError(
                f"{path} has no end-of-sentence piece (eos_id is -1), which ends documents here; "
                "train it with one."
            )
        piece = self.processor.id_to_piece(self.end_of_document)
        self.end_of_document_from = f"{piece!r}, its end-of-sentence piece"
        # Spaces that the model puts before a text ("▁0"; at the end for some models), and whether
        # it removes spaces at the ends of a text and repeated ones.
        spaced, squeezed = self.processor.normalize("0"), self.processor.normalize("0  0")
        self._adds_space = META_SPACE in spaced
        self._at_end = spaced.endswith(META_SPACE)
        self._squeezes = META_SPACE * 2 not in squeezed

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_part(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end], with neither a space too many nor one too few at a cut."""
        part = text[start:end]
        cut = end if self._at_end else start
        if cut in (0, len(text)) or not (self._adds_space or self._squeezes):
            return self.encode(part)
        if self._squeezes and (self._is_space(text[cut - 1]) or self._is_space(text[cut])):
            ids: list[int] = self._spaced.encode(part)  # stands for the spaces removed at the cut
        else:
            ids = self._joined.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.decode(list(ids))
        return text

    def unknown(self, text: str) -> str:
        """The characters that the model only has its unknown piece for."""
        ids, pieces = self.processor.encode(text), self.processor.encode(text, out_type=str)
        unknown = self.processor.unk_id()
        return "".join(
            piece for id_, piece in zip(ids, pieces, strict=True) if id_ == unknown
        ).replace(META_SPACE, "")

    def _is_space(self, character: str) -> bool:
        return META_SPACE in self._joined.normalize(f"0{character}0")

    @cached_property
    def _joined(self) -> Any:
        return self._with_added_space(False)

    @cached_property
    def _spaced(self) -> Any:
        return self._with_added_space(True)

    def _with_added_space(self, added: bool) -> Any:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2
        model = messages.ModelProto.FromString(self._content)
        model.normalizer_spec.add_dummy_prefix = added
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
