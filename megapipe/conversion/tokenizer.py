"""A tokenizer as a Hugging Face directory, proven to give the same ids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megapipe.conversion.sentencepiece.model import SentencePieceModel, read_model
from megapipe.conversion.sentencepiece.tree import tokenizer_tree
from megapipe.conversion.tokenizer_lines import proof_lines
from megapipe.data.hugging_face_tokenizer import BY_TOKEN, KEPT, HuggingFaceTokenizer
from megapipe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import ConversionError
from megapipe.files import reason, shown, write_reason

LINES = 1000
"""The number of lines of text on which an exported tokenizer has to give the same ids."""

EXAMPLES = 3
ALLOW_DRIFT = "--allow-tokenizer-drift"
"""The option of a conversion for that."""
ENGINE, CONFIG = "tokenizer.json", "tokenizer_config.json"
COPIED = (ENGINE, *BY_TOKEN, *KEPT)
FAST = "PreTrainedTokenizerFast"
"""The class that does what tokenizer.json says, in all versions of transformers."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer cuts text into words. AutoTokenizer of transformers 5 gives any model of
the type "qwen2" that tokenizer, with vocabulary and merges out of tokenizer.json and no more."""


@dataclass(frozen=True)
class OtherIds:
    """A line of text of which two tokenizers make other ids, or other text out of the ids."""

    line: str
    ours: list[int]
    exported: list[int]
    decoded: tuple[str, str]

    def __str__(self) -> str:
        if self.ours == self.exported:
            here, there = map(_short, self.decoded)
            return f"{_short(self.line)}: its ids are decoded to {here} here and {there} there"
        pairs = enumerate(zip_longest(self.ours, self.exported))
        first = next(place for place, (ours, exported) in pairs if ours != exported)
        here, there = (f"{ids[first : first + 5]}" for ids in (self.ours, self.exported))
        return f"{_short(self.line)}: ids from number {first} on {here} here, {there} there"


@dataclass(frozen=True)
class TokenizerReport:
    """What an export has written, and how it compares with the tokenizer on `lines` lines.

    files: names in the directory. differing: lines that are tokenised otherwise; `examples` are the
    first of them. notes: sentences on what was written otherwise than it was.
    """

    files: tuple[str, ...]
    lines: int
    differing: int
    examples: tuple[OtherIds, ...]
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        return self.differing / self.lines

    def __str__(self) -> str:
        if not self.differing:
            result = f"same ids on {self.lines:,} lines of text"
        else:
            result = f"OTHER ids on {self.rate:.1%} of {self.lines:,} lines of text, as allowed"
        examples = (f"  {example}" for example in self.examples)
        return "\n".join([f"Tokenizer: {result}", *examples, *self.notes])


class TokenizerDriftError(ConversionError):
    """A tokenizer that would give other ids once it is exported.

    `problem` is what is wrong with it, without what to do.
    """

    def __init__(self, problem: str, advice: str, examples: Sequence[str] = ()) -> None:
        self.problem, self._examples = problem, examples
        super().__init__(self.advised(advice))

    def advised(self, advice: str) -> str:
        """The text of the error with another advice."""
        lines = ["The first lines:", *self._examples] if self._examples else []
        return "\n".join([f"{self.problem} {advice}", *lines])


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    allow_drift: bool,
    max_length: int,
    model_type: str | None = None,
) -> TokenizerReport:
    """Write what transformers' AutoTokenizer loads into `folder`, which is there.

    max_length: tokens of the longest text that the model takes. model_type: what the config.json
    beside it will say, where there is one. Raises ConversionError for a tokenizer that can't be
    exported, and, unless `allow_drift`, TokenizerDriftError where the exported one gives other ids
    or decodes otherwise; then nothing is written.
    """
    notes: list[str] = []
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            files = _from_sentencepiece(tokenizer, max_length)
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            files = _copies(tokenizer, max_length, notes)
        else:
            raise ConversionError(
                f"{type(tokenizer).__name__} is a kind of tokenizer that can't be exported"
            )
        report = _compare(tokenizer, files, notes)
    except ConversionError as error:
        raise ConversionError(f"tokenizer {shown(tokenizer.path)}: {error}") from error
    if not allow_drift:
        _check_drift(f"tokenizer {shown(tokenizer.path)}", report, files, model_type)
    for name, content in files.items():
        _write(folder / name, content)
    return report


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConversionError(f"{shown(path)} can't be written: {write_reason(error)}") from error


# --- The files -----------------------------------------------------------------------------------


def _from_sentencepiece(tokenizer: SentencePieceTokenizer, max_length: int) -> dict[str, bytes]:
    """tokenizer.json with its config, and the model itself, for programs that read that."""
    content = tokenizer.processor.serialized_model_proto()
    model = read_model(content)
    config = {
        "tokenizer_class": FAST,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        # Said in tokenizer.json too, which llama.cpp's converter does not read.
        "add_prefix_space": model.adds_space,
        **_special_tokens(tokenizer, model),
    }
    return {
        ENGINE: json.dumps(tokenizer_tree(model), ensure_ascii=False).encode(),
        CONFIG: _json(config),
        "tokenizer.model": content,
    }


def _special_tokens(tokenizer: SentencePieceTokenizer, model: SentencePieceModel) -> dict[str, str]:
    processor = tokenizer.processor
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": tokenizer.end_of_document,
        "unk_token": model.unknown,
        "pad_token": processor.pad_id(),
    }
    return {name: model.pieces[id_].text for name, id_ in ids.items() if id_ >= 0}


def _copies(tokenizer: HuggingFaceTokenizer, max_length: int, notes: list[str]) -> dict[str, bytes]:
    """The files of the tokenizer; its config says what the model was trained with."""
    files = {name: _read(path) for name, path in tokenizer.files.items() if name in COPIED}
    config = json.loads(files.get(CONFIG, b"{}").decode("utf-8-sig"))
    if (code := config.pop("auto_map", None)) is not None:
        notes.append(f"{CONFIG}: left out auto_map = {json.dumps(code)}, which names code to run")
    named = config.get("tokenizer_class")
    if named not in (None, FAST):
        notes.append(
            f"{CONFIG}: tokenizer_class = {json.dumps(named)} is written as {FAST}, "
            f"which does what {ENGINE} says"
        )
    config["tokenizer_class"] = FAST
    config["model_max_length"] = max_length
    config.setdefault("clean_up_tokenization_spaces", False)
    if config.get("eos_token") is None:
        config["eos_token"] = tokenizer.engine.id_to_token(tokenizer.end_of_document)
    return files | {CONFIG: _json(config)}


def _check_drift(
    place: str, report: TokenizerReport, files: Mapping[str, bytes], model_type: str | None
) -> None:
    if model_type == "qwen2" and _is_not_of_qwen2(json.loads(files[ENGINE].decode("utf-8-sig"))):
        raise TokenizerDriftError(
            f"{place}: transformers takes the tokenizer of any Qwen2 model for Qwen2's own, which "
            "cuts text into other words than this one.",
            f"Export to another architecture (such as --to Qwen3ForCausalLM or --to "
            f"LlamaForCausalLM), or with {ALLOW_DRIFT}.",
        )
    if report.differing:
        raise TokenizerDriftError(
            f"{place}: exported, it tokenises {report.differing} of {report.lines:,} lines of text "
            f"otherwise ({report.rate:.1%}), and the model would be given other tokens than in "
            "training.",
            f"To export it all the same: {ALLOW_DRIFT}.",
            [f"  {example}" for example in report.examples],
        )


def _is_not_of_qwen2(tree: Mapping[str, Any]) -> bool:
    cuts = (tree.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    same_words = cuts[0].get("pattern") == {"Regex": QWEN2_WORDS}
    return (
        tree["model"]["type"] != "BPE"
        or tree.get("normalizer") != {"type": "NFC"}
        or not same_words
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{shown(path)} can't be read: {reason(error)}") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


# --- The proof -----------------------------------------------------------------------------------


def _compare(tokenizer: Tokenizer, files: Mapping[str, bytes], notes: list[str]) -> TokenizerReport:
    engine = _engine(files[ENGINE])
    pieces = sorted(engine.get_vocab(with_added_tokens=True))
    lines = proof_lines(pieces, LINES)
    differences = list(_differences(tokenizer, engine, lines))
    return TokenizerReport(
        files=tuple(files),
        lines=len(lines),
        differing=len(differences),
        examples=tuple(differences[:EXAMPLES]),
        notes=tuple(notes),
    )


def _engine(content: bytes) -> Any:
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(content.decode("utf-8-sig"))
    except Exception as error:  # the library raises plain Exception
        raise ConversionError(f"the tokenizers library can't read it exported ({error})") from None
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine


def _differences(tokenizer: Tokenizer, engine: Any, lines: list[str]) -> Iterator[OtherIds]:
    """Lines whose ids differ, or whose ids become another text. What stands for an unknown
    character is not compared: it is lost here and there."""
    encodings = engine.encode_batch(lines, add_special_tokens=False)
    for line, ours, encoding in zip(lines, tokenizer.encode_batch(lines), encodings, strict=True):
        decoded = "", ""
        if ours == encoding.ids:
            decoded = tokenizer.decode(ours), engine.decode(ours, skip_special_tokens=False)
        if ours != encoding.ids or (decoded[0] != decoded[1] and not tokenizer.unknown(line)):
            yield OtherIds(line, ours, encoding.ids, decoded)


def _short(value: str, longest: int = 80) -> str:
    text = ascii(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
