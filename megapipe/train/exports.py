"""Exports while training: RUN/exports/step-NNNNNNNN, what others load and serve.

An export is made from the checkpoint of its step: the ranks share its files, and each reads from
the checkpoint what it writes, tensor by tensor. So no rank ever holds the whole model.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.steps import step_name
from megapipe.config import Config
from megapipe.conversion.hugging_face.export import (
    ExportOptions,
    choose_architecture,
    plan_export,
)
from megapipe.conversion.hugging_face.write import write_export
from megapipe.conversion.tokenizer import export_tokenizer
from megapipe.data.tokenizer import load_tokenizer
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import MegapipeError
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

    def check(self) -> None:
        """Raises ConversionError where exports are wanted and can't be made: before the first step.
        Collective."""
        if self._config.checkpoint.export_every:
            self._ranks.from_first(self._check)

    def _check(self) -> None:
        every, model = self._config.checkpoint.export_every, self._config.model
        place = f"checkpoint.export_every = {every}"
        architecture = choose_architecture(self._family, model, place=place)
        tokenizer = load_tokenizer(self._config.data.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            export_tokenizer(
                tokenizer,
                Path(folder),
                allow_drift=False,
                max_length=model.max_sequence_length,
                model_type=architecture.model_type,
            )

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
            return f"NOT EXPORTED at step {step}: {error}. `megapipe export` makes up for it."
        return f"Exported {shown(target)}"


def _say_nothing(line: str) -> None:
    """Say nothing of the tokenizer, which was checked at the start."""
