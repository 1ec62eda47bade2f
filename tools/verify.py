"""`megapipe verify CONFIG.toml`: prove that the layout computes what one process computes."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megapipe.config import Config, load_config
from megapipe.models.presets import PRESETS
from megapipe.tools.arguments import Parser, UsageError
from megapipe.tools.shrink import shrink

if TYPE_CHECKING:
    from megapipe.tools.rendezvous import Rendezvous
    from megapipe.train.proof import Verdict

TOLERANCE = 1e-9
KINDS = {
    "initial weight": "initial weights",
    "loss": "losses",
    "gradient norm": "gradient norms",
    "gradient": "gradients",
    "weight": "updated weights",
}


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when losses, gradients and weights agree to 1e-9 in float64, else 1."""
    parser = Parser(
        "verify",
        "Prove, in float64 on this machine's CPU, that the layout of a config computes what one\n"
        "process computes: losses, every gradient, every updated weight.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="the config of the run")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    arguments, overrides = parser.parse(argv)
    if arguments.steps < 1:
        raise UsageError(f"--steps {arguments.steps} must be 1 or more.")
    config = load_config(arguments.config, overrides, PRESETS)
    small, changes = shrink(config)
    print(f"Proving the layout of {arguments.config} against one process, in float64 on the CPU.")
    if changes:
        print("Reduced, with every feature kept:")
        print("".join(f"  {change}\n" for change in changes), end="")
    sys.stdout.flush()

    from megapipe.tools.launcher import launch_local

    parallel = small.parallel
    assert parallel.data is not None
    ranks = parallel.tensor * parallel.pipeline * parallel.data
    return launch_local(partial(_verify_rank, small, arguments.steps), ranks)


def _verify_rank(config: Config, steps: int, rendezvous: "Rendezvous") -> int:
    import torch

    from megapipe.mesh import build_mesh
    from megapipe.models.build import build_stages
    from megapipe.tools.rendezvous import init_process_group
    from megapipe.train.proof import prove, synthetic_tokens

    device = torch.device("cpu")
    init_process_group(rendezvous, device)
    parallel = config.parallel
    assert parallel.data is not None
    mesh = build_mesh(
        pipeline=parallel.pipeline, data=parallel.data, tensor=parallel.tensor, device=device
    )
    verdict = prove(config, mesh, build_stages, synthetic_tokens(config), steps)
    if verdict is None:
        return 0
    _print_verdict(verdict)
    first = verdict.first_beyond(TOLERANCE)
    if first is None:
        print(f"PASSED: the layout equals one process over {steps} steps, to {TOLERANCE:g}.")
        return 0
    print(
        f"FAILED in step {first.step + 1}: {first.kind} {first.name} on {first.where}, "
        f"stage {first.stage}, differs by {first.absolute:.3g} ({first.error:.3g} relative)."
    )
    return 1


def _print_verdict(verdict: "Verdict") -> None:
    """Losses side by side, then the largest error of each kind and the tensor that has it."""
    from rich.console import Console
    from rich.table import Table

    losses = Table("step", "loss in the layout", "in one process", "relative error")
    for step, (loss, expected) in enumerate(verdict.losses, 1):
        losses.add_row(
            f"{step}", f"{loss:.15f}", f"{expected:.15f}", f"{abs(loss / expected - 1):.1e}"
        )
    errors = Table("compared", "tensors", "largest error", "in tensor", "on")
    for kind, title in KINDS.items():
        rows = [row for row in verdict.differences if row.kind == kind]
        worst = max(rows, key=lambda row: row.error)
        names = {row.name for row in rows}
        errors.add_row(title, f"{len(names)}", f"{worst.error:.1e}", worst.name, worst.where)
    console = Console(width=max(100, Console().width))
    console.print(losses)
    console.print(errors)
