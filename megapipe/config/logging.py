"""[logging]: where metrics go besides <train.run_dir>/metrics.jsonl, which is always written."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from megapipe.pipeline.schedule.timeline import KEPT_STEPS
from megapipe.section import Section, or_none_word


def parse_steps(text: str) -> range:
    """The steps of `20` or `20-22`. Raises ValueError that ends "logging.timeline = ... "."""
    match = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", text.strip())
    if match is None:
        raise ValueError("must be a step, as in 20, or a few in a row, as in 20-22")
    first, last = int(match[1]), int(match[2] or match[1])
    if first < 1:
        raise ValueError("must begin with step 1 or later: steps are counted from 1")
    if last < first:
        raise ValueError(f"ends before it begins: write {last}-{first}")
    if last - first >= KEPT_STEPS:
        raise ValueError(
            f"is {last - first + 1} steps, and ranks remember their last {KEPT_STEPS}: write "
            f"{first}-{first + KEPT_STEPS - 1}"
        )
    return range(first, last + 1)


def project_problem(name: str) -> str | None:
    """Why W&B would refuse the name of a project, as the end of a sentence; None if it doesn't."""
    wrong = [character for character in "/\\#?%:" if character in name]
    if wrong:
        return f"has a {wrong[0]!r}, which W&B allows in no project's name"
    return "is longer than the 128 characters that W&B allows" if len(name) > 128 else None


def _step_word(value: object) -> object:
    """A single step may be written as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LoggingConfig(Section):
    """Console, Weights & Biases, TensorBoard."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto",
        description="Weights & Biases. auto does what WANDB_MODE says, and writes offline where "
        "that is not set; offline writes <train.run_dir>/wandb for a later `wandb sync`, without "
        "account or network.",
    )
    wandb_project: str | None = Field(
        default=None,
        min_length=1,
        description="The W&B project. Default: WANDB_PROJECT, or megapipe.",
    )
    wandb_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the run in W&B. Default: WANDB_NAME, or the last part of "
        "train.run_dir.",
    )
    tensorboard: bool = Field(
        default=False,
        description="Also write <train.run_dir>/tensorboard (pip install 'megapipe[tensorboard]').",
    )
    every: PositiveInt = Field(default=1, description="Steps per line on the console.")
    timeline: Annotated[
        str | None, BeforeValidator(_step_word, json_schema_input_type=int | str), or_none_word(str)
    ] = Field(
        default=None,
        min_length=1,
        description="A step (20), or a few in a row (20-22), whose pipeline timeline is written to "
        "<train.run_dir>/timeline.png, .json and .txt (pip install 'megapipe[plot]').",
    )
