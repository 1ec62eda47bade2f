"""The GPT family as the object that megapipe is handed."""

from collections.abc import Mapping, Sequence
from typing import Any

from megapipe.config import Config, ModelConfig
from megapipe.config.family import Preset
from megapipe.layout.architecture import Architecture
from megapipe.layout.axes import Axes
from megapipe.layout.family import ModelFamily, PlaceCosts, StageModule
from megapipe.layout.parameters import ParameterSpec, Place
from megapipe.models.gpt.architectures import ARCHITECTURES
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.costs import place_costs
from megapipe.models.gpt.parameters import parameter_table
from megapipe.models.gpt.presets import PRESETS


class GPTFamily:
    """Decoder-only transformers: GPT-2/3, Llama, Mistral, Qwen."""

    name: str = "gpt"
    config: type[GPTConfig] = GPTConfig
    presets: Mapping[str, Preset] = PRESETS
    architectures: Sequence[Architecture] = ARCHITECTURES

    def parameters(self, model: ModelConfig) -> Sequence[ParameterSpec]:
        assert isinstance(model, GPTConfig), model.family
        return parameter_table(model)

    def costs(self, config: Config, axes: Axes, place: Place) -> PlaceCosts:
        return place_costs(config, axes, place)

    def build_stage(self, build: Any) -> StageModule:
        from megapipe.models.gpt.model import GPTStage

        assert isinstance(build.model, GPTConfig), build.model.family
        return GPTStage(build.model, build)


FAMILY: ModelFamily = GPTFamily()
