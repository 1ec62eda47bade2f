"""The config of a run: one TOML file, read-only sections, every problem reported at once."""

from megapipe.config.checkpoint import CheckpointConfig
from megapipe.config.config import Config
from megapipe.config.data import (
    ChangeConfig,
    DataConfig,
    ExcludeConfig,
    PhaseConfig,
    SourceConfig,
)
from megapipe.config.difference import difference, model_difference
from megapipe.config.family import ConfigFamily, Families
from megapipe.config.load import family_of, load_config, parse_config, section_types
from megapipe.config.logging import LoggingConfig
from megapipe.config.model import ModelConfig
from megapipe.config.parallel import ParallelConfig
from megapipe.config.save import dump_config, dump_model, save_config, schema
from megapipe.config.train import TrainConfig
from megapipe.optim import OptimizerConfig

__all__ = [
    "ChangeConfig",
    "CheckpointConfig",
    "Config",
    "ConfigFamily",
    "DataConfig",
    "ExcludeConfig",
    "Families",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "SourceConfig",
    "TrainConfig",
    "difference",
    "dump_config",
    "dump_model",
    "family_of",
    "load_config",
    "model_difference",
    "parse_config",
    "save_config",
    "schema",
    "section_types",
]
