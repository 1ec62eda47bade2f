"""`megapipe generate CHECKPOINT --prompt TEXT`: continue a text, on one process."""

import argparse
import math
import sys
from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.tools.arguments import Parser, path_argument, text_argument

MAX_SEED = 2**63 - 1


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation as it comes."""
    options, _ = _parser().parse(argv)
    _check(options)

    import torch

    from megapipe.models.gpt.generation import continue_text

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda, and torch {torch.__version__} finds no GPU here.")
    for part in continue_text(
        options.checkpoint,
        options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        device=options.device,
        warn=_warn,
    ):
        print(part, end="", flush=True)
    print()
    return 0


def _warn(text: str) -> None:
    print(f"megapipe: {text}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser("generate", "Continue a text with a trained model, on one process.")
    parser.add_argument(
        "checkpoint",
        type=path_argument,
        metavar="CHECKPOINT",
        help="a checkpoint, a run directory, or a Hugging Face directory with its tokenizer",
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
