"""Small tokenizers of every kind, made here."""

import io
import json
from pathlib import Path
from typing import Any

TEXT = "the quick brown fox jumps over the lazy dog and runs away"


def byte_level(
    special: tuple[str, ...] = ("</s>",), text: str = TEXT, size: int = 300, **settings: Any
) -> Any:
    """A byte-level BPE of the `tokenizers` library, as GPT-2's is. Special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(
        **({"add_prefix_space": False} | settings)  # type: ignore[arg-type]
    )
    engine.decoder = decoders.ByteLevel()
    return trained(engine, special, text, size, pre_tokenizers.ByteLevel.alphabet())


def trained(
    engine: Any,
    special: tuple[str, ...] = ("</s>",),
    text: str = TEXT,
    size: int = 300,
    alphabet: tuple[str, ...] | list[str] = (),
) -> Any:
    """The engine, trained as a BPE on the words of a text."""
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    engine.train_from_iterator([text] * 20, trainer)
    return engine


def sentencepiece_model(path: Path, text: str = TEXT, size: int = 300, **settings: Any) -> Path:
    """A BPE model with sentencepiece's defaults, apart from byte fallback and `settings`."""
    import sentencepiece

    wanted = {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | settings
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50), model_writer=written, vocab_size=size, **wanted
    )
    path.write_bytes(written.getvalue())
    return path


def save(path: Path, engine: Any, **beside: object) -> Path:
    """The engine as a .json file, and JSON files beside it, named without .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    engine.save(str(path))
    for name, value in beside.items():
        (path.parent / f"{name}.json").write_text(json.dumps(value))
    return path
