"""What a tokenizer is, in lines for people, and how it does on a text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapipe.amounts import counted
from megapipe.data.hugging_face_tokenizer import HuggingFaceTokenizer
from megapipe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapipe.data.text_check import check_texts
from megapipe.data.tokenizer import Tokenizer, load_tokenizer, not_used_beside
from megapipe.files import shown


def describe_tokenizer(path: Path, text: str) -> Iterator[str]:
    """Lines about the tokenizer of a file or directory, and `text` in its tokens.

    Raises DataError where there is none, or one that can't be read.
    """
    tokenizer = load_tokenizer(path, key=None)
    ids = tokenizer.encode(text)
    lines = {
        "vocabulary": f"{counted(len(tokenizer.ids), 'token')}{_numbers(tokenizer)}",
        "end token": f"{tokenizer.end_of_document} ({tokenizer.end_of_document_from})",
        "sha256": tokenizer.sha256,
        "files": ", ".join(file.name for file in tokenizer.files.values()),
        "not used": ", ".join(not_used_beside(tokenizer, path)),
        **_kind(tokenizer),
        "text": repr(text),
        "tokens": " ".join(repr(_piece(tokenizer, id_)) for id_ in ids),
        "ids": " ".join(map(str, ids)),
        "measured": check_texts(tokenizer, [text]).summary(),
    }
    yield shown(tokenizer.path)
    for name, value in lines.items():
        if value or name != "not used":
            yield f"  {name:<12}{value}"


def _numbers(tokenizer: Tokenizer) -> str:
    gaps = tokenizer.vocab_size - len(tokenizer.ids)
    return f", numbered up to {tokenizer.vocab_size - 1:,} with {gaps:,} gaps" if gaps else ""


def _kind(tokenizer: Tokenizer) -> dict[str, str]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_lines(tokenizer)
    return _hugging_face_lines(tokenizer)


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
