"""[logging]: what is told to whom besides <train.run_dir>/metrics.jsonl, always written."""

from typing import Literal

from pydantic import Field, PositiveInt

from megapipe.config.section import Section


class LoggingConfig(Section):
    """Console, Weights & Biases, TensorBoard."""

    wandb: Literal["online", "offline", "off"] = Field(
        default="offline",
        description="Weights & Biases; offline writes <train.run_dir>/wandb for a later "
        "`wandb sync`, without account or network.",
    )
    wandb_project: str = Field(default="megapipe", min_length=1, description="The W&B project.")
    wandb_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the run in W&B. Default: the last part of train.run_dir.",
    )
    tensorboard: bool = Field(
        default=False,
        description="Also write <train.run_dir>/tensorboard (pip install 'megapipe[tensorboard]').",
    )
    every: PositiveInt = Field(default=1, description="Steps per line on the console.")
