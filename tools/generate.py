"""`megapipe generate CHECKPOINT --prompt TEXT`: continue a text, on one process."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megapipe.errors import UsageError
from megapipe.tools.arguments import Parser, path_argument, text_argument

if TYPE_CHECKING:
    from megapipe.data.tokenizer import Tokenizer

MAX_SEED = 2**63 - 1


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation as it comes."""
    options, _ = _parser().parse(argv)
    _check(options)

    import torch

    from megapipe.models.pretrained import (
        check_kept_vocabulary,
        find_checkpoint,
        load_kept_tokenizer,
        load_pretrained,
    )
    from megapipe.models.sampling import sample

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda, and torch {torch.__version__} finds no GPU here.")
    path = find_checkpoint(options.checkpoint)
    tokenizer = load_kept_tokenizer(path)
    check_kept_vocabulary(path, tokenizer)
    model = load_pretrained(path, device=options.device)
    prompt = _prompt(tokenizer, options.prompt, model.config.max_sequence_length)
    tokens = list(prompt)
    shown = text = ""
    for token in sample(
        model,
        prompt,
        ids=tokenizer.ids,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        stop_token=tokenizer.end_of_document,
    ):
        if token != tokenizer.end_of_document:
            tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # half of a character that byte tokens spell
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])  # a character that is not whole to the end
    return 0


def _parser() -> Parser:
    parser = Parser("generate", "Continue a text with a trained model, on one process.")
    parser.add_argument(
        "checkpoint",
        type=path_argument,
        metavar="CHECKPOINT",
        help="a checkpoint directory, or a run directory",
    )
    parser.add_argument(
        "--prompt", type=text_argument, default="", help="the text to continue (default: none)"
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to add (default: 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="spread of the choice; 0 takes the likeliest token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=int, help="choose among the K likeliest (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default: cpu)"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError for what no model can do."""
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens} must be 1 or more.")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise UsageError(
            f"--temperature {options.temperature} must be 0 (greedy) or a number above it."
        )
    if options.top_k is not None and options.top_k < 1:
        raise UsageError(f"--top-k {options.top_k} must be 1 or more.")
    if not 0 <= options.seed <= MAX_SEED:
        raise UsageError(f"--seed {options.seed} must be from 0 to {MAX_SEED}.")


def _prompt(tokenizer: "Tokenizer", text: str, max_length: int) -> list[int]:
    """The tokens to continue: those of the text, or an end of document where there is no text.

    Says on stderr what of the text the tokenizer does not know. Raises UsageError where that is
    all of it, or the model has no room left.
    """
    tokens = tokenizer.encode(text)
    if text and not tokens:
        raise UsageError(f"the tokenizer has no token for any of --prompt {text!r}.")
    unknown = tokenizer.unknown(text)
    if unknown:
        print(
            f"megapipe: the tokenizer does not know {len(unknown):,} of {len(text):,} characters "
            f"of --prompt: {unknown[:20]!r}",
            file=sys.stderr,
        )
    tokens = tokens or [tokenizer.end_of_document]
    if len(tokens) >= max_length:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, and the model's max_sequence_length "
            f"{max_length} leaves no room to go on. Give a shorter --prompt."
        )
    return tokens
