"""What a model brings: one object that is handed to the engine, the planner and the commands."""

from typing import Protocol

from megapipe.config.family import ConfigFamily


class ModelFamily(ConfigFamily, Protocol):
    """Everything that is peculiar to a family of models. Importing it must not import torch."""
