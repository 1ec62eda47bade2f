"""A sentencepiece model, read: its pieces and what it does to text."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megapipe.errors import ConversionError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, numbered as in the file."""

KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
TABLES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


@dataclass(frozen=True)
class ModelPiece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model that decide about its ids.

    kind: "bpe" or "unigram". charsmap: its table of replaced characters, empty where it has none.
    """

    content: bytes
    kind: str
    pieces: tuple[ModelPiece, ...]
    byte_fallback: bool
    charsmap: bytes
    adds_space: bool
    squeezes: bool
    escapes_spaces: bool

    @cached_property
    def unknown(self) -> int:
        return next(id_ for id_, piece in enumerate(self.pieces) if piece.kind == UNKNOWN)

    def texts(self, *kinds: int) -> list[str]:
        """The texts of all pieces of these kinds, by id."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]

    @cached_property
    def bare(self) -> Any:
        """Its SentencePieceProcessor without any treatment of spaces."""
        import sentencepiece

        proto = _parse(self.content)
        spec = proto.normalizer_spec
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def replaced(self, text: str) -> str:
        """What the table makes of a text; spaces stay as they are."""
        normalized: str = self.bare.normalize(text)
        return normalized


def read_model(content: bytes) -> SentencePieceModel:
    """The model of a file that sentencepiece has loaded before.

    Raises ConversionError, naming what it is, for a model that the `tokenizers` library can't do.
    """
    proto = _parse(content)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    kind = KINDS.get(trainer.model_type, str(trainer.model_type))
    model = SentencePieceModel(
        content=content,
        kind=kind,
        pieces=tuple(ModelPiece(piece.piece, piece.score, piece.type) for piece in proto.pieces),
        byte_fallback=trainer.byte_fallback,
        charsmap=spec.precompiled_charsmap,
        adds_space=spec.add_dummy_prefix,
        squeezes=spec.remove_extra_whitespaces,
        escapes_spaces=spec.escape_whitespaces,
    )
    if kind not in ("bpe", "unigram"):
        raise ConversionError(
            f'it is a {kind} model (model_type), and only "bpe" and "unigram" can be exported'
        )
    if trainer.treat_whitespace_as_suffix:
        raise ConversionError("it writes spaces behind words (treat_whitespace_as_suffix)")
    if spec.precompiled_charsmap and spec.name not in TABLES:
        raise ConversionError(
            f"its normaliser is {spec.name!r}, with rules of its own; those of "
            f"{', '.join(TABLES)} and identity can be exported"
        )
    if proto.denormalizer_spec.precompiled_charsmap:
        raise ConversionError("it replaces characters when it decodes (denormalizer_spec)")
    _check_distinct(model)
    _check_table(model.charsmap)
    return model


def _check_distinct(model: SentencePieceModel) -> None:
    seen: set[str] = set()
    for piece in model.pieces:
        if piece.text in seen:
            raise ConversionError(f"it has two pieces with the text {piece.text!r}")
        seen.add(piece.text)


def _check_table(charsmap: bytes) -> None:
    """The texts behind the trie are read as UTF-8."""
    try:
        charsmap[4 + int.from_bytes(charsmap[:4], "little") :].decode()
    except UnicodeDecodeError:
        raise ConversionError(
            "its table of replaced characters is damaged (precompiled_charsmap)"
        ) from None


def _parse(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    return messages.ModelProto.FromString(content)
