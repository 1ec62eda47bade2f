"""Exports while training: RUN/exports/step-NNNNNNNN, what others load and serve.

An export is made from the checkpoint of its step: the ranks share its files, and each reads from
the checkpoint what it writes, tensor by tensor. So no rank ever holds the whole model.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.steps import clear_leftovers, committed, step_name
from megapipe.checkpoint.storage import checkpoint_errors
from megapipe.config import Config
from megapipe.conversion.hugging_face.export import ExportOptions, plan_export
from megapipe.conversion.hugging_face.write import write_export
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError, MegapipeError
from megapipe.files import shown
from megapipe.layout.family import ModelFamily

EXPORTS = "exports"
"""The folder of a run directory in which exports lie."""


class Exports:
    """The exports of one run, at the steps that checkpoint.export_every names."""

    def __init__(
        self, config: Config, family: ModelFamily, ranks: RankGroup, say: Callable[[str], None]
    ) -> None:
        self._config, self._family, self._ranks, self._say = config, family, ranks, say
        self._root = Path(config.train.run_dir) / EXPORTS
        self._checkpoints = Path(config.train.run_dir) / "checkpoints"

    def catch_up(self, step: int) -> None:
        """Remove what killed starts of this run left half-written, and make the export of the step
        from which the run goes on, where an earlier start was killed between the checkpoint and
        that. Collective; this process must hold the run's lock."""
        if self._config.checkpoint.export_every == 0:
            return
        self.clear()
        missed = self.missed(step)
        if missed is not None:
            self._say(self.write(missed, step))

    def clear(self) -> None:
        """Remove what killed starts of this run left half-written. Collective; this process must
        hold the run's lock. What can't be removed is said, and stays."""
        clear = checkpoint_errors()(lambda: clear_leftovers(self._root))
        try:
            self._ranks.from_first(clear, f"cannot clear up {shown(self._root)}")
        except CheckpointError as error:  # on all ranks alike
            self._say(f"Warning: {error}")

    def missed(self, step: int) -> Path | None:
        """The run's checkpoint of a step whose export is due and was never made; else None.
        Collective."""

        def look() -> str | None:
            every = self._config.checkpoint.export_every
            if every == 0 or step % every or (self._root / step_name(step)).exists():
                return None
            found = committed(self._checkpoints).get(step)
            return str(found) if found else None

        checkpoint = self._ranks.from_first(look)
        return Path(checkpoint) if checkpoint else None

    def write(self, checkpoint: Path, step: int) -> str:
        """Export the checkpoint of a step; returns what to say of it. Collective.

        What can't be written (a full disk) is said, and training goes on. An export that is there
        already, of a run that came by before it was resumed, is kept.
        """
        target = self._root / step_name(step)
        there = self._ranks.from_first(target.exists)
        if there:
            return f"{shown(target)} is there already, and is kept"
        families: Mapping[str, ModelFamily] = {self._family.name: self._family}
        try:
            planned, _ = self._ranks.in_agreement(
                lambda: plan_export(
                    open_checkpoint(checkpoint), families, ExportOptions(), _say_nothing
                ),
                what=f"cannot export {shown(checkpoint)}",
            )
            write_export(planned.export, target, ranks=self._ranks)
        except MegapipeError as error:  # on all ranks alike
            command = shlex.join(["megapipe", "convert", str(checkpoint), str(target)])
            reason = str(error).removesuffix(".")
            return f"NOT EXPORTED at step {step}: {reason}. To make up for it: `{command}`"
        return f"Exported {shown(target)}"


def _say_nothing(line: str) -> None:
    """Say nothing of the tokenizer, which was checked at the start."""
