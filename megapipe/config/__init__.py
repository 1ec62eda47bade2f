"""The config of a run: one TOML file, read-only sections, every problem told at once."""

from megapipe.config.checkpoint import CheckpointConfig
from megapipe.config.config import Config
from megapipe.config.data import DataConfig, SourceConfig
from megapipe.config.difference import difference
from megapipe.config.layout import check_layout
from megapipe.config.load import load_config, parse_config, section_types
from megapipe.config.logging import LoggingConfig
from megapipe.config.model import ModelConfig, RopeScaling
from megapipe.config.parallel import ParallelConfig
from megapipe.config.save import dump_config, save_config, schema
from megapipe.config.train import TrainConfig
from megapipe.optim import OptimizerConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "SourceConfig",
    "TrainConfig",
    "check_layout",
    "difference",
    "dump_config",
    "load_config",
    "parse_config",
    "save_config",
    "schema",
    "section_types",
]
