"""[checkpoint]: when to save, how many to keep, where to go on from."""

from pydantic import Field, NonNegativeInt, PositiveInt

from megapipe.config.paths import PathText
from megapipe.section import Section


class CheckpointConfig(Section):
    """Checkpoints lie in <train.run_dir>/checkpoints and load in any layout."""

    every: NonNegativeInt = Field(
        default=1000, description="Steps between checkpoints; 0 saves at the end only."
    )
    keep: PositiveInt = Field(default=3, description="How many of the newest checkpoints to keep.")
    keep_every: NonNegativeInt = Field(
        default=0,
        description="Checkpoints of steps that are a multiple of this are kept for ever, and don't "
        "count towards checkpoint.keep; a multiple of checkpoint.every. 0 keeps none for ever.",
    )
    export_every: NonNegativeInt = Field(
        default=0,
        description="Steps between exports to <train.run_dir>/exports as Hugging Face directories, "
        "which are never removed; a checkpoint is saved with each. 0 exports nothing.",
    )
    resume: PathText = Field(
        default="auto",
        min_length=1,
        description="auto: go on from the newest whole checkpoint of train.run_dir, or start anew; "
        "never: start anew, where train.run_dir holds no checkpoint; or the path of a checkpoint, "
        "or of a run directory for its newest, to begin another run_dir from (the same command "
        "again then goes on from its own).",
    )
