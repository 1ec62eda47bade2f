"""What `megapipe convert` and `megapipe export` have in common: options, and the call."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser
from megapipe.tools.progress import bytes_bar

GIGABYTE = 10**9
LEAST_FILE_SIZE = 1e-6


def add_conversion_options(parser: Parser) -> None:
    """The options of a conversion."""
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="what the result is to the other stack, such as LlamaForCausalLM (default: what it "
        "was there, or the first that can hold it)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="round all weights to it (default: what the run computed with, weights alone as they "
        "are stored)",
    )
    parser.add_argument(
        "--proof-layers",
        type=int,
        metavar="N",
        help="prove with the first N layers alone, where the model does not fit into memory",
    )
    parser.add_argument(
        "--proof-tokens", type=int, metavar="N", help="tokens in each sequence of the proof"
    )
    parser.add_argument(
        "--no-proof", dest="proof", action="store_false", help="convert without the proof"
    )
    parser.add_argument(
        "--no-tokenizer",
        dest="with_tokenizer",
        action="store_false",
        help="convert the weights alone",
    )
    parser.add_argument(
        "--allow-tokenizer-drift",
        action="store_true",
        help="write a tokenizer although it gives some text other ids",
    )
    parser.add_argument(
        "--file-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="upper bound of a file of weights (default: 5)",
    )


def run_conversion(
    options: argparse.Namespace,
    source: Path,
    target: Path,
    *,
    arguments: Mapping[str, object] | None = None,
    tokenizer: Path | None = None,
    grid: tuple[int, int, int] = (1, 1, 1),
) -> None:
    """Convert as the options say; `arguments` and `tokenizer` are of models from Megatron, `grid`
    of models for it. Raises UsageError for values that make no sense."""
    for name in ("proof_layers", "proof_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
        if value is not None and not options.proof:
            raise UsageError(
                f"--{name.replace('_', '-')} is for the proof, which --no-proof leaves out: give "
                "one of the two."
            )
    if min(grid) < 1:
        raise UsageError("--tensor, --pipeline and --virtual must be 1 or more.")
    if not LEAST_FILE_SIZE <= options.file_size < float("inf"):
        raise UsageError(
            f"--file-size {options.file_size} must be a number of GB, {LEAST_FILE_SIZE} or more."
        )

    import torch

    from megapipe.conversion.convert import Conversion, ProofOptions, convert
    from megapipe.conversion.hugging_face.export import ExportOptions
    from megapipe.conversion.megatron.writer import RankGrid

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    asked = Conversion(
        source,
        target,
        ExportOptions(
            architecture=options.to,
            dtype=dtypes.get(options.dtype),
            tokenizer=options.with_tokenizer,
            allow_tokenizer_drift=options.allow_tokenizer_drift,
            file_bytes=int(options.file_size * GIGABYTE),
        ),
        ProofOptions(options.proof, options.proof_layers, options.proof_tokens),
        arguments or {},
        tokenizer,
        RankGrid(*grid),
    )
    convert(asked, FAMILIES, print, bytes_bar)
