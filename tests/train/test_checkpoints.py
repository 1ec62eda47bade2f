"""Restoring by several ranks: what one of them can't read ends the start of all.

tests/test_backends.py saves and goes on bit by bit.
"""

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megapipe.checkpoint.load import CheckpointReader
from megapipe.config import Config, dump_config, load_config
from megapipe.distributed.mesh import build_mesh
from megapipe.errors import CheckpointError
from megapipe.models.build import build_stages
from megapipe.models.presets import PRESETS
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine
from tests.ranks import run_ranks

SHAPE = Path(__file__).parents[1] / "configs" / "llama_shape.toml"


def restore_where_a_rank_can_not_read(config: Config) -> str:
    mesh = build_mesh(pipeline=2, data=1, tensor=1, device=torch.device("cpu"))
    files = {"config.toml": dump_config(config).encode()}
    checkpoints = Checkpoints(config, mesh, Engine(config, mesh, build_stages), files, say=str)
    checkpoints.save(Progress(1, 10), {})

    def fail(reader: CheckpointReader, *tensor: object) -> NoReturn:
        raise CheckpointError("shard-00001 can't be read (Input/output error)")

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(CheckpointReader, "read", fail)
        try:
            checkpoints.restore()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "restored"


def test_a_rank_that_can_not_read_its_part_ends_the_start_on_all(tmp_path: Path) -> None:
    words = ("--parallel.pipeline=2", "--parallel.data=1", f"--train.run_dir={tmp_path}")
    config = load_config(SHAPE, words, PRESETS)
    said = "CheckpointError: shard-00001 can't be read (Input/output error)"
    assert run_ranks(restore_where_a_rank_can_not_read, 2, config) == [said] * 2
