"""What the config has to know of a model family: its keys of [model], and its presets."""

from collections.abc import Mapping
from typing import Protocol

from megapipe.config.model import ModelConfig

Preset = Mapping[str, object]
"""Keys of [model] and their values."""


class ConfigFamily(Protocol):
    """A value of `model.family`."""

    @property
    def name(self) -> str:
        """The value itself, and the default of `config`'s key `family`."""

    @property
    def config(self) -> type[ModelConfig]:
        """The class of the section [model]."""

    @property
    def presets(self) -> Mapping[str, Preset]:
        """Values of `model.preset`; those of all families together have different names."""


Families = Mapping[str, ConfigFamily]
"""By name. The config and all that reads one is handed them, and knows no family itself."""
