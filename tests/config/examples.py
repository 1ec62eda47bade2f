"""A small valid config as text, to be changed by tests; a family as the config knows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megapipe.config import ModelConfig
from megapipe.config.family import Preset

TEXT = """\
[model]
num_layers = 8
hidden_size = 64
num_heads = 8
num_kv_heads = 4
vocab_size = 500
max_sequence_length = 128

[parallel]
tensor = 2
pipeline = 2

[train]
run_dir = "runs/x"
steps = 100
global_batch_size = 16
micro_batch_size = 2
sequence_length = 64

[data]
tokenizer = "t.model"

[[data.sources]]
name = "a"
path = "a/*.txt"
"""


@dataclass(frozen=True)
class Family:
    """A model family as far as the config knows it."""

    name: str
    config: type[ModelConfig]
    presets: Mapping[str, Preset]


def preset_text(preset: str) -> str:
    """The same config of another shape."""
    return f'[model]\npreset = "{preset}"\n\n' + TEXT[TEXT.index("[parallel]") :]


def write(directory: Path, text: str = TEXT) -> Path:
    """The text as a file named run.toml."""
    path = directory / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path
