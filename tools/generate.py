"""`megapipe generate CHECKPOINT --prompt TEXT`: continue a text, on one process."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megapipe.errors import CheckpointError
from megapipe.tools.arguments import Parser, UsageError, path_argument, text_argument

if TYPE_CHECKING:
    from megapipe.checkpoint.load import CheckpointReader
    from megapipe.data.tokenizer import Tokenizer


def run(argv: Sequence[str]) -> int:
    """Print the prompt and its continuation as it comes."""
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
    options = parser.parse_args(list(argv))
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens} must be 1 or more.")
    if not 0 <= options.temperature < math.inf:
        raise UsageError(
            f"--temperature {options.temperature} must be a number, 0 (greedy) or more."
        )
    if options.top_k is not None and options.top_k < 1:
        raise UsageError(f"--top-k {options.top_k} must be 1 or more.")

    import torch

    from megapipe.checkpoint.load import open_checkpoint
    from megapipe.models.pretrained import find_checkpoint, load_pretrained
    from megapipe.models.sampling import sample

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda, and torch {torch.__version__} finds no GPU here.")
    path = find_checkpoint(options.checkpoint)
    tokenizer = _tokenizer(open_checkpoint(path))
    model = load_pretrained(path, device=options.device)
    prompt = tokenizer.encode(options.prompt) or [tokenizer.end_of_document]
    if len(prompt) >= model.config.max_sequence_length:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, and the model's max_sequence_length "
            f"{model.config.max_sequence_length} leaves no room to go on. Give a shorter --prompt."
        )
    tokens = list(prompt)
    shown = ""
    for token in sample(
        model,
        prompt,
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
    print()
    return 0


def _tokenizer(reader: "CheckpointReader") -> "Tokenizer":
    """The tokenizer that lies in the checkpoint, wherever the run's own has gone."""
    from megapipe.data.tokenizer import load_tokenizer

    names = [name.removeprefix("tokenizer.") for name in reader.files if "tokenizer" in name]
    if not names:
        raise CheckpointError(f"{reader.path} holds no tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        for name in reader.files:
            if name != "config.toml":
                (Path(folder) / name).write_bytes(reader.read_file(name))
        return load_tokenizer(folder)
