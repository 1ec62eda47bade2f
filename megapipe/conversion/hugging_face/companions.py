"""The files beside the weights, checked before a tokenizer is made of them."""

from pathlib import Path

from megapipe.amounts import format_bytes
from megapipe.checkpoint.storage import read_small
from megapipe.conversion.hugging_face.config_file import inside
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

MAX_JSON_BYTES = 64 * 2**20
"""The largest tokenizers in use, of 260,000 tokens, have half of it."""
MAX_MODEL_BYTES = 8 * 2**20
"""Those of sentencepiece with as many tokens have half of it too."""
MAX_TABLES = 100_000
MAX_PARTS = 3_000_000
"""Tables and entries of a tokenizer.json, which has a table for each added token and a few entries
for each other one."""
EMPTY_PIECE = b"\n\0"
MAX_EMPTY_PIECES = 10_000
"""Entries of a sentencepiece model that hold nothing: 2 bytes that would take a hundred."""


def check_companions(folder: Path, otherwise: str = "") -> None:
    """Raises ConversionError where there is no tokenizer, or one of its files is a link out of its
    directory, or can't be what it seems to be and would take a lot of memory. `otherwise` is what
    else a user can do without one, behind a comma or semicolon."""
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not any(name.endswith(".model") for name in names):
        advice = "download it too"
        if "vocab.json" in names or "vocab.txt" in names:
            advice = (
                "write one of the files that it has with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        raise ConversionError(
            f"{shown(folder)} holds no tokenizer.json and no tokenizer.model: {advice}{otherwise}."
        )
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix == ".json" and "safetensors" not in path.name:
            content = _read(folder, path, MAX_JSON_BYTES)
            parts = content.count(b",") + content.count(b"[")
            if content.count(b"{") > MAX_TABLES or parts > MAX_PARTS:
                raise ConversionError(f"{shown(path)} has more entries than any tokenizer")
        elif suffix == ".model":
            content = _read(folder, path, MAX_MODEL_BYTES)
            if content.count(EMPTY_PIECE) > MAX_EMPTY_PIECES:
                raise ConversionError(f"{shown(path)} is no model of sentencepiece")
        elif suffix in (".txt", ".jinja"):
            inside(folder, path)


def _read(folder: Path, path: Path, most: int) -> bytes:
    target = inside(folder, path)
    if target.is_file() and target.stat().st_size > most:
        size = format_bytes(target.stat().st_size)
        raise ConversionError(
            f"{shown(path)} has {size}, more than any tokenizer ({format_bytes(most)} are read)"
        )
    try:
        return read_small(target, most)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
