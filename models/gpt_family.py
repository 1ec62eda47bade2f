"""The GPT family as the object that megapipe is handed."""

from collections.abc import Mapping

from megapipe.config.family import Preset
from megapipe.model_family import ModelFamily
from megapipe.models.gpt_config import GPTConfig
from megapipe.models.presets import PRESETS


class GPTFamily:
    """Decoder-only transformers: GPT-2/3, Llama, Mistral, Qwen."""

    name: str = "gpt"
    config: type[GPTConfig] = GPTConfig
    presets: Mapping[str, Preset] = PRESETS


FAMILY: ModelFamily = GPTFamily()
