"""`megapipe export RUN`: the newest checkpoint of a run as a Hugging Face directory."""

import argparse
from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.conversion import add_conversion_options, run_conversion

_DESCRIPTION = """\
Export the newest whole checkpoint of a run as a Hugging Face directory, which transformers loads
with nothing added: RUN/exports/step-NNNNNNNN, as a run itself writes with checkpoint.export_every.

The result is proven before it gets its name, as by `megapipe convert`."""


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the export is written, and proven unless --no-proof."""
    options = _parse(argv)
    if options.to == "GPTModel":
        raise UsageError(
            "--to GPTModel writes a Megatron checkpoint, which is no export: use "
            "`megapipe convert RUN DST --to GPTModel`."
        )

    from megapipe.checkpoint.find import find_checkpoint
    from megapipe.checkpoint.load import open_checkpoint

    checkpoint = find_checkpoint(options.run)
    open_checkpoint(checkpoint)  # or it says what is there instead
    if options.out is None and checkpoint.parent != options.run / "checkpoints":
        raise UsageError(f"{shown(options.run)} is not a run's directory. Name --out DIR as well.")
    target = options.out or options.run / "exports" / checkpoint.name
    run_conversion(options, checkpoint, target)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("export", _DESCRIPTION)
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN",
        help="a run's directory; with --out also a checkpoint",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="the directory to write instead; new"
    )
    add_conversion_options(parser)
    return parser.parse(argv)[0]
