"""`megapipe convert SRC DST`: bring a model in from another stack, or take one out."""

import argparse
import json
from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.conversion import add_conversion_options, run_conversion

_DESCRIPTION = """\
Convert a model. A Hugging Face directory or a checkpoint of Megatron-LM becomes a checkpoint of
weights alone, which a run can start from. A checkpoint of megapipe, or the newest of a run,
becomes a Hugging Face directory, or with --to GPTModel a Megatron-LM checkpoint.

The result is proven before it gets its name: the other stack's own implementation and megapipe's
compute the same logits. What can't be computed here is refused."""


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the result is written, and proven unless --no-proof."""
    options = _parse(argv)
    run_conversion(
        options,
        options.source,
        options.target,
        arguments=dict(map(_argument, options.argument)),
        tokenizer=options.tokenizer,
        grid=(options.tensor, options.pipeline, options.virtual),
    )
    return 0


def _argument(text: str) -> tuple[str, object]:
    """NAME=VALUE, with a value of JSON or a word. Raises UsageError where it is something else."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--argument {shown(text)} must be NAME=VALUE, as in swiglu=true.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("convert", _DESCRIPTION)
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="SRC",
        help="a Hugging Face directory, a Megatron or a megapipe checkpoint, or a run directory",
    )
    parser.add_argument(
        "target", type=path_argument, metavar="DST", help="the directory to write; it must be new"
    )
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of Megatron's that its checkpoint does not hold, as in swiglu=true",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="PATH",
        help="the tokenizer, where SRC has none, as a checkpoint of Megatron",
    )
    for axis, what in (
        ("tensor", "tensor-parallel ranks"),
        ("pipeline", "pipeline stages"),
        ("virtual", "parts of each stage"),
    ):
        parser.add_argument(
            f"--{axis}", type=int, default=1, metavar="N", help=f"with --to GPTModel: {what}"
        )
    add_conversion_options(parser)
    return parser.parse(argv)[0]
