"""The report of an equivalence check: tables, and one sentence that is the verdict."""

from rich.console import Console
from rich.table import Column, Table

from megapipe.equivalence.check import Difference, Verdict, relative_error

TOLERANCE = 1e-9
KINDS = {
    "initial weight": "initial weights",
    "loss": "losses",
    "source loss": "losses by source",
    "gradient": "gradients",
    "gradient norm": "gradient norms",
    "weight": "updated weights",
}


def print_report(verdict: Verdict, steps: int) -> int:
    """Tables, then one sentence that is the verdict; the exit status."""
    _print_tables(verdict)
    first = verdict.first_beyond(TOLERANCE)
    if first is None:
        over = "one step" if steps == 1 else f"{steps} steps"
        print(f"PASSED: the layout equals one process over {over}, to {TOLERANCE:g}.")
        return 0
    print(
        f"FAILED in step {first.step + 1}: {_subject(first)} differs by {first.absolute:.3g} "
        f"({first.error:.3g} relative)."
    )
    return 1


def _subject(difference: Difference) -> str:
    """`the loss`, or `weight layers.0.norm.weight on rank 1 (...), stage 1,`."""
    if difference.stage is None:
        return f"the {difference.name}"
    where = f"{difference.where}, stage {difference.stage},"
    return f"{difference.kind} {difference.name} on {where}"


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
