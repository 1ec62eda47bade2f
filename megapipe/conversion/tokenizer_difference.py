"""Whether two tokenizers give text the same ids, wherever and in whichever format they lie."""

from megapipe.conversion.tokenizer import OtherIds
from megapipe.conversion.tokenizer_lines import HARD, REAL
from megapipe.data.tokenizer import Tokenizer

MAX_TOKENS = 4000
"""How many tokens are compared by their own text, evenly spaced over the vocabulary."""
TOKENS_A_LINE = 8


def tokenizer_difference(here: Tokenizer, there: Tokenizer) -> str | None:
    """How two tokenizers differ: in size, in the end of documents, or on the first of a few dozen
    lines of difficult text and of lines of their tokens. None where they don't."""
    if here.sha256 == there.sha256:
        return None
    if here.vocab_size != there.vocab_size:
        return f"{here.vocab_size:,} tokens here, {there.vocab_size:,} there"
    ends = here.end_of_document, there.end_of_document
    if ends[0] != ends[1]:
        return f"documents end with token {ends[0]} here, {ends[1]} there"
    lines = [*HARD, *REAL, *_lines_of_tokens(there)]
    pairs = zip(lines, here.encode_batch(lines), there.encode_batch(lines), strict=True)
    for line, ours, theirs in pairs:
        if ours != theirs:
            return str(OtherIds(line, ours, theirs, ("", "")))
    return None


def _lines_of_tokens(tokenizer: Tokenizer) -> list[str]:
    """The text of tokens, each by itself."""
    chosen = tokenizer.ids[:: len(tokenizer.ids) // MAX_TOKENS + 1]
    texts = [tokenizer.decode([id_]) for id_ in chosen]
    return [" ".join(texts[at : at + TOKENS_A_LINE]) for at in range(0, len(texts), TOKENS_A_LINE)]
