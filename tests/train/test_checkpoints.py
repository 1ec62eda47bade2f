"""From which checkpoint of its run directory a run goes on, and what stops it instead."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megapipe.config import load_config
from megapipe.errors import CheckpointError
from megapipe.mesh import Mesh
from megapipe.models.presets import PRESETS
from megapipe.train.checkpoints import Checkpoints
from tests.checkpoint.samples import save_sample
from tests.config.examples import write


def link_directory(checkpoint: Path, elsewhere: Path) -> None:
    """To a checkpoint that is damaged there."""
    checkpoint.rename(elsewhere)
    (elsewhere / "manifest.json").write_text("torn")
    checkpoint.symlink_to(elsewhere)


def link_file(checkpoint: Path, elsewhere: Path) -> None:
    file = checkpoint / "manifest.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("link", [link_directory, link_file])
def test_a_linked_checkpoint_that_can_not_be_used_is_not_passed_over(
    tmp_path: Path, link: Any
) -> None:
    """Nor does another one take its place: its user has moved it."""
    root = tmp_path / "run" / "checkpoints"
    save_sample(root, 3)
    link(save_sample(root, 5), tmp_path / "elsewhere")
    config = load_config(write(tmp_path), [f"--train.run_dir={tmp_path}/run"], PRESETS)
    engine: Any = SimpleNamespace()  # which has nothing to load
    checkpoints = Checkpoints(config, Mesh.single(torch.device("cpu")), engine, {}, print)
    with pytest.raises(CheckpointError, match="step-00000005 is linked from elsewhere and can't"):
        checkpoints.restore()
