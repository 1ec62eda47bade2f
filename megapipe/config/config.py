"""The whole config, and what must hold between its sections."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from megapipe.config import checks
from megapipe.config.checkpoint import CheckpointConfig
from megapipe.config.data import DataConfig
from megapipe.config.logging import LoggingConfig
from megapipe.config.model import ModelConfig
from megapipe.config.optimizer import read_optimizer
from megapipe.config.parallel import ParallelConfig
from megapipe.config.problems import show
from megapipe.config.train import TrainConfig
from megapipe.errors import ConfigError
from megapipe.optim import OptimizerConfig
from megapipe.section import Section


class Config(Section):
    """One training run, complete: the TOML file, its preset and the command line together.

    Raises ConfigError when sections contradict each other. A copy with changes, checked again,
    is `Config(**{**dict(config), "train": changed})`; `model_copy` checks nothing.
    """

    model: SerializeAsAny[ModelConfig] = Field(description="The shape of the network.")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(),
        description="The layout over processes; it never changes the loss.",
    )
    train: TrainConfig = Field(description="How long, how much at a time, in which arithmetic.")
    optimizer: Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(read_optimizer)] = Field(
        default=read_optimizer({}), description="The update rule and its learning rate over time."
    )
    data: DataConfig = Field(description="The text, the tokenizer, the order.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="When to save, how many to keep, where to go on."
    )
    logging: LoggingConfig = Field(
        default=LoggingConfig(), description="Console, Weights & Biases, TensorBoard."
    )

    @property
    def streams(self) -> int:
        """Logical readers of the corpus."""
        return self.data.streams or self.train.global_batch_size

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        problems = list(cross_problems(sections))
        if problems:
            raise ConfigError([f"{contradiction(problem, sections)}." for problem in problems])
        return self


def contradiction(problem: checks.Problem, sections: Mapping[str, Section]) -> str:
    """`key = value` and what is wrong with it."""
    section, *keys = problem.key.split(".")
    value: Any = sections[section]
    for key in keys:
        value = value[int(key)] if isinstance(value, tuple) else getattr(value, key)
    return f"{problem.key} = {show(value)} {problem.text}"


def cross_problems(sections: Mapping[str, Section]) -> list[checks.Problem]:
    """All contradictions between the sections given (those that are valid by themselves)."""
    found: list[checks.Problem] = []
    model, parallel = sections.get("model"), sections.get("parallel")
    train, data = sections.get("train"), sections.get("data")
    optimizer, logging = sections.get("optimizer"), sections.get("logging")
    checkpoint = sections.get("checkpoint")
    if isinstance(model, ModelConfig):
        found += model.problems()
    if isinstance(parallel, ParallelConfig):
        found += checks.parallel_problems(parallel)
    if isinstance(model, ModelConfig) and isinstance(parallel, ParallelConfig):
        found += checks.layout_problems(model, parallel)
    if isinstance(model, ModelConfig) and isinstance(train, TrainConfig):
        found += checks.train_problems(model, train)
        found += checks.kernel_problems(model, train)
    if isinstance(parallel, ParallelConfig) and isinstance(train, TrainConfig):
        found += checks.batch_problems(parallel, train)
    if isinstance(train, TrainConfig) and isinstance(optimizer, OptimizerConfig):
        found += checks.optimizer_problems(train, optimizer)
    if isinstance(data, DataConfig):
        found += checks.data_problems(data)
    if isinstance(train, TrainConfig) and isinstance(data, DataConfig):
        found += checks.validation_problems(train, data)
        if isinstance(parallel, ParallelConfig):
            found += checks.stream_problems(parallel, train, data)
    if isinstance(checkpoint, CheckpointConfig):
        found += checks.checkpoint_problems(checkpoint)
        found += checks.load_problems(checkpoint)
    if isinstance(model, ModelConfig) and isinstance(checkpoint, CheckpointConfig):
        found += checks.layer_map_problems(model, checkpoint)
    if isinstance(logging, LoggingConfig):
        found += checks.wandb_problems(logging)
    if isinstance(train, TrainConfig) and isinstance(logging, LoggingConfig):
        found += checks.timeline_problems(train, logging)
    return found
