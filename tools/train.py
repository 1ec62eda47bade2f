"""`megapipe train CONFIG.toml [--section.key VALUE ...]`: pretrain a model."""

import textwrap
from collections.abc import Collection, Sequence

from megapipe.config.axes import WORLD_SIZE
from megapipe.config.model import DEFAULT_FAMILY
from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.stop_signals import interruptible
from megapipe.tools.arguments import Parser, path_argument, read_config
from megapipe.tools.field_help import field_help

_DESCRIPTION = """\
Pretrain the model of a config.

Under torchrun or srun it joins the job. Started alone, it starts the local ranks that the layout
needs. It goes on from the newest whole checkpoint of train.run_dir (checkpoint.resume)."""

_KEYS = """\
keys of the config, in its file or here as --section.key VALUE:
  A value is TOML (4, true, [2, 3], "a b"); a word that is not TOML is text. The command line wins
  over the file, the file over the preset. (required) has no default; [x] is the default.
"""


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the run is complete, or was shown (--dry-run)."""
    asked = any(word in ("--help", "-h") for word in argv)
    parser = Parser("train", _DESCRIPTION, epilog=_epilog() if asked else None, overrides=True)
    parser.usage = "megapipe train CONFIG.toml [--section.key VALUE ...] [options]"
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="the config of the run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print config, layout, parameters, memory of model states and FLOPs; start nothing, "
        "need no GPU",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: the number of processes (default: the fewest the layout needs)",
    )
    parser.add_argument(
        "--timeline",
        metavar="STEPS",
        help="short for --logging.timeline: a step (20), or a few in a row (20-22), whose pipeline "
        "timeline is drawn above its plan",
    )
    arguments, overrides = parser.parse(argv)
    if arguments.timeline is not None:
        overrides += ["--logging.timeline", arguments.timeline]
    if arguments.world_size is not None and not arguments.dry_run:
        raise UsageError(
            "--world-size belongs to --dry-run. A real run has as many processes as torchrun or "
            f"srun start, or, started alone, {WORLD_SIZE} of [parallel]."
        )
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UsageError(f"--world-size {arguments.world_size} must be 1 or more.")
    config = read_config(arguments.config, overrides)
    if arguments.dry_run:
        from megapipe.conversion.matching import load_notes
        from megapipe.plan.dry_run import dry_run

        notes = [*load_notes(config, FAMILIES)]
        if config.checkpoint.export_every > 0:
            from megapipe.conversion.exportable import check_exports  # imports numpy

            notes += check_exports(config, FAMILIES, without_tokenizer=True)
        family = FAMILIES[config.model.family]
        print(dry_run(config, family, str(arguments.config), arguments.world_size))
        if notes:
            print("\n" + "\n".join(notes))
        return 0

    with interruptible():
        from megapipe.train.start import start

    return start(config, FAMILIES, str(arguments.config), overrides)


def _epilog() -> str:
    presets = [
        _presets(f"with --model.family {name}, " * (name != DEFAULT_FAMILY), family.presets)
        for name, family in FAMILIES.items()
    ]
    return "\n\n".join([f"{_KEYS}\n{field_help(FAMILIES)}", *presets])


def _presets(condition: str, presets: Collection[str]) -> str:
    names = textwrap.fill(", ".join(presets), 98, initial_indent="  ", subsequent_indent="  ")
    return f"presets, {condition}for --model.preset:\n{names}"
