"""Small sentencepiece models of all kinds."""

import io
import logging
from pathlib import Path
from typing import Any

from megapipe.conversion.tokenizer_lines import REAL
from megapipe.data.tokenizer_training import SETTINGS

LLAMA2 = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}
SYMBOLS = {"user_defined_symbols": ["<mask>", "<|im_start|>", "=="]}
KINDS: dict[str, dict[str, Any]] = {
    "ours": SETTINGS,
    "ours with symbols": SETTINGS | SYMBOLS | {"control_symbols": ["<sep>"], "pad_id": 3},
    "bpe": {"model_type": "bpe"},
    "bpe with bytes and symbols": {"model_type": "bpe", "byte_fallback": True} | SYMBOLS,
    "bpe with all spaces": {"model_type": "bpe", "remove_extra_whitespaces": False},
    "bpe, identity": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "llama 2": LLAMA2,
    "llama 2 with symbols": LLAMA2 | SYMBOLS,
    "llama 2 without bytes": LLAMA2 | {"byte_fallback": False},
    "t5": {"model_type": "unigram"},
    "t5 with bytes": {"model_type": "unigram", "byte_fallback": True},
    "unigram, identity": LLAMA2 | {"model_type": "unigram"},
}


def trained(**settings: Any) -> bytes:
    """A model of about 1,000 pieces, trained on a module's source and sentences of many
    languages."""
    import sentencepiece

    written = io.BytesIO()
    code = Path(logging.__file__).read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*filter(None, code[::4]), *REAL, *REAL]),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{"vocab_size": 1000} | settings,
    )
    return written.getvalue()
