"""`megapipe verify` behind its command line: one rank's part of the proof, and the report."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from megapipe.config import Config
from megapipe.distributed.mesh import build_mesh
from megapipe.distributed.rendezvous import Rendezvous, init_process_group
from megapipe.models.build import build_stages
from megapipe.train.proof import Verdict, prove, relative_error, synthetic_tokens

TOLERANCE = 1e-9
KINDS = {
    "initial weight": "initial weights",
    "loss": "losses",
    "gradient": "gradients",
    "gradient norm": "gradient norms",
    "weight": "updated weights",
}


def prove_rank(config: Config, steps: int, folder: Path, rendezvous: Rendezvous) -> int:
    """Prove with the other ranks; rank 0 prints the report. Returns the exit status.

    `folder`, which all ranks see, holds what they exchange.
    """
    device = torch.device("cpu")
    init_process_group(rendezvous, device)
    parallel = config.parallel
    assert parallel.data is not None
    mesh = build_mesh(
        pipeline=parallel.pipeline, data=parallel.data, tensor=parallel.tensor, device=device
    )
    tokens = synthetic_tokens(config)
    verdict = prove(config, mesh, build_stages, tokens, steps, folder)
    return 0 if verdict is None else print_report(verdict, steps)


def print_report(verdict: Verdict, steps: int) -> int:
    """Tables, then one sentence that is the verdict; the exit status."""
    _print_tables(verdict)
    first = verdict.first_beyond(TOLERANCE)
    if first is None:
        over = "one step" if steps == 1 else f"{steps} steps"
        print(f"PASSED: the layout equals one process over {over}, to {TOLERANCE:g}.")
        return 0
    print(
        f"FAILED in step {first.step + 1}: {first.kind} {first.name} on {first.where}, "
        f"stage {first.stage}, differs by {first.absolute:.3g} ({first.error:.3g} relative)."
    )
    return 1


def _print_tables(verdict: Verdict) -> None:
    """Losses side by side, then the largest error of each kind and the tensor that has it."""
    losses = Table("step", "loss in the layout", "in one process", "relative error")
    for step, (loss, expected) in enumerate(verdict.losses, 1):
        losses.add_row(
            f"{step}", f"{loss:.15f}", f"{expected:.15f}", f"{relative_error(loss, expected):.1e}"
        )
    tensor = Column("in tensor", no_wrap=True, overflow="fold")
    errors = Table("compared", "tensors", "largest error", tensor, "on")
    for kind, title in KINDS.items():
        rows = [row for row in verdict.differences if row.kind == kind]
        worst = max(rows, key=lambda row: row.error)
        names = {row.name for row in rows}
        errors.add_row(title, f"{len(names)}", f"{worst.error:.1e}", worst.name, worst.where)
    console = Console(width=max(100, Console().width))
    console.print(losses)
    console.print(errors)
