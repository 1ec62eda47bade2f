"""`megapipe convert SRC DST`: bring a model in from another stack, or take one out."""

import argparse
from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.progress import bytes_bar

_DESCRIPTION = """\
Convert a model: a Hugging Face directory becomes a checkpoint of weights alone, which a run starts
from; a checkpoint, or the newest of a run, becomes a Hugging Face directory.

The result is proven before it gets its name: the other stack's own implementation and megapipe's
compute the same logits. What can't be computed here is refused."""

GIGABYTE = 10**9


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the result is written, and proven unless --no-proof."""
    options = _parse(argv)

    import torch

    from megapipe.conversion.convert import Conversion, convert

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    asked = Conversion(
        options.source,
        options.target,
        architecture=options.to,
        dtype=dtypes.get(options.dtype),
        proof=options.proof,
        proof_layers=options.proof_layers,
        proof_tokens=options.proof_tokens,
        tokenizer=options.tokenizer,
        allow_tokenizer_drift=options.allow_tokenizer_drift,
        file_bytes=int(options.file_size * GIGABYTE),
    )
    convert(asked, FAMILIES, print, bytes_bar)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("convert", _DESCRIPTION)
    parser.add_argument("source", type=path_argument, metavar="SRC", help="the model")
    parser.add_argument(
        "target", type=path_argument, metavar="DST", help="the directory to write; it must be new"
    )
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="what the result is to the other stack, such as LlamaForCausalLM (default: what it "
        "was there, or the first that can hold it)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="round all weights to it (default: as stored)",
    )
    parser.add_argument(
        "--proof-layers",
        type=int,
        metavar="N",
        help="prove with the first N layers alone, for models that fill the memory",
    )
    parser.add_argument(
        "--proof-tokens", type=int, metavar="N", help="tokens in a sequence of the proof"
    )
    parser.add_argument(
        "--no-proof", dest="proof", action="store_false", help="convert without the proof"
    )
    parser.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", help="convert the weights alone"
    )
    parser.add_argument(
        "--allow-tokenizer-drift",
        action="store_true",
        help="write a tokenizer although some text gets other ids from it",
    )
    parser.add_argument(
        "--file-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="upper bound of a file of weights (default: 5)",
    )
    options = parser.parse(argv)[0]
    for name in ("proof_layers", "proof_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    if not 0 < options.file_size < float("inf"):
        raise UsageError(f"--file-size {options.file_size} must be more than 0.")
    return options
