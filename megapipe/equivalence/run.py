"""`megapipe verify`: check a small version of a config's layout on the CPUs of this machine."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megapipe.config import Config
from megapipe.distributed.rendezvous import Rendezvous
from megapipe.equivalence.shrink import shrink
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout
from megapipe.plan.program import plan_layout
from megapipe.scratch import scratch_directory


def verify(config: Config, family: ModelFamily, name: str, steps: int) -> int:
    """Compare a layout with one process, tensor by tensor, and print the report.

    Returns the exit status: 0 when losses, gradients and weights agree. Raises ConfigError or
    ScheduleError where the config's layout can't be.
    """
    small, changes = shrink(config, family)
    with scratch_directory() as folder:
        layout, found = plan_layout(small, None, family, folder)
        _introduce(name, [*changes, *found])
        # Torch comes with it, before the ranks are forked, so that none of them imports it again.
        from megapipe.distributed.launcher import launch_local

        check = partial(_check_rank, layout, steps, folder)
        return launch_local(check, layout.axes.world_size, layout.axes.describe)


def _introduce(name: str, changes: Sequence[str]) -> None:
    print(f"Proving the layout of {name} against one process, in float64 on the CPU.")
    if changes:
        print("Changed for the check, with every feature kept:")
        print("".join(f"  {change}\n" for change in changes), end="")
    sys.stdout.flush()


def _check_rank(layout: Layout, steps: int, folder: Path, rendezvous: Rendezvous) -> int:
    """One rank's part; rank 0 prints the report. `folder`, which all ranks see, holds what they
    exchange."""
    import torch

    from megapipe.data.synthetic import synthetic_tokens
    from megapipe.distributed.mesh import build_mesh
    from megapipe.distributed.rendezvous import init_process_group
    from megapipe.equivalence.check import check_equivalence
    from megapipe.equivalence.report import print_report

    device = torch.device("cpu")
    init_process_group(rendezvous, device)
    mesh = build_mesh(layout.axes, device)
    tokens = synthetic_tokens(layout.config)
    verdict = check_equivalence(layout, mesh, tokens, steps, folder)
    return 0 if verdict is None else print_report(verdict, steps)
