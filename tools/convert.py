"""`megapipe convert SRC DST`: bring a model in from another stack, or take one out."""

import argparse
from collections.abc import Sequence

from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.conversion import add_conversion_options, run_conversion

_DESCRIPTION = """\
Convert a model: a Hugging Face directory becomes a checkpoint of weights alone, which a run starts
from; a checkpoint, or the newest of a run, becomes a Hugging Face directory.

The result is proven before it gets its name: the other stack's own implementation and megapipe's
compute the same logits. What can't be computed here is refused."""


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the result is written, and proven unless --no-proof."""
    options = _parse(argv)
    run_conversion(options, options.source, options.target)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("convert", _DESCRIPTION)
    parser.add_argument("source", type=path_argument, metavar="SRC", help="the model")
    parser.add_argument(
        "target", type=path_argument, metavar="DST", help="the directory to write; it must be new"
    )
    add_conversion_options(parser)
    return parser.parse(argv)[0]
