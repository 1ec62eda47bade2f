"""Text from a checkpoint: its own tokenizer, its model, and what that says after a prompt."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megapipe.amounts import counted
from megapipe.checkpoint.find import find_checkpoint
from megapipe.conversion.kind import kind_of
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import DataError
from megapipe.models.gpt.pretrained import (
    check_kept_vocabulary,
    load_kept_tokenizer,
    load_pretrained,
)
from megapipe.models.gpt.sampling import sample


def continue_text(
    path: Path,
    text: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: torch.device | str,
    warn: Callable[[str], None],
) -> Iterator[str]:
    """The text and its continuation, in parts as they come, on one process.

    `path` is a checkpoint, a run's directory or one of Hugging Face's; the other arguments are
    those of `sample`. `warn` is told which characters the tokenizer does not know. Raises
    CheckpointError or ConversionError for what can't be loaded, DataError for a text that can't be
    continued.
    """
    if kind_of(path) != "hugging_face":
        path = find_checkpoint(path)
    tokenizer = load_kept_tokenizer(path)
    check_kept_vocabulary(path, tokenizer)
    model = load_pretrained(path, device=device)
    prompt = _prompt(tokenizer, text, model.config.max_sequence_length, warn)
    tokens = list(prompt)
    whole = given = ""
    for token in sample(
        model,
        prompt,
        ids=tokenizer.ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_token=tokenizer.end_of_document,
    ):
        if token != tokenizer.end_of_document:
            tokens.append(token)
        whole = tokenizer.decode(tokens)
        if not whole.endswith("\ufffd"):  # half of a character that byte tokens spell
            yield whole[len(given) :]
            given = whole
    yield whole[len(given) :]  # a character that is not whole to the end


def _prompt(
    tokenizer: Tokenizer, text: str, max_length: int, warn: Callable[[str], None]
) -> list[int]:
    """The tokens to continue: those of the text, or an end of document where there is no text."""
    tokens = tokenizer.encode(text)
    if text and not tokens:
        raise DataError(f"the tokenizer has no token for any of --prompt {text!r}.")
    unknown = tokenizer.unknown(text)
    if unknown:
        warn(
            f"the tokenizer does not know {len(unknown):,} of "
            f"{counted(len(text), 'character')} of --prompt: {unknown[:20]!r}"
        )
    tokens = tokens or [tokenizer.end_of_document]
    if len(tokens) >= max_length:
        raise DataError(
            f"the prompt has {counted(len(tokens), 'token')}, and the model's max_sequence_length "
            f"{max_length} leaves no room to go on. Give a shorter --prompt."
        )
    return tokens
