"""The GPT family as the object that megapipe is handed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megapipe.config import Config, ModelConfig
from megapipe.layout.axes import Axes
from megapipe.layout.family import ModelFamily, PlaceCosts
from megapipe.layout.parameters import ParameterSpec, Place
from megapipe.models.costs import place_costs
from megapipe.models.parameters import padded_vocab_size, parameter_table
from megapipe.models.presets import PRESETS


class GPTFamily:
    """Decoder-only transformers: GPT-2/3, Llama, Mistral, Qwen."""

    name: str = "gpt"
    presets: Mapping[str, Mapping[str, object]] = PRESETS

    def parameters(self, model: ModelConfig) -> Sequence[ParameterSpec]:
        return parameter_table(model)

    def costs(self, config: Config, axes: Axes, place: Place) -> PlaceCosts:
        return place_costs(config, axes, place)

    def notes(self, model: ModelConfig, axes: Axes) -> Iterator[str]:
        tensor = axes.size("tensor")
        padded = padded_vocab_size(model.vocab_size, tensor)
        if padded > model.vocab_size:
            yield (
                f"Vocabulary: {model.vocab_size:,} and {padded - model.vocab_size:,} rows of "
                f"padding inside ({padded // tensor:,} per tensor rank)"
            )
        if tensor > model.num_kv_heads:
            yield (
                f"Key/value heads: {model.num_kv_heads}, each on {tensor // model.num_kv_heads} of "
                f"{tensor} tensor ranks"
            )

    def build_stage(self, build: Any) -> Any:
        from megapipe.models.gpt import GPTStage

        return GPTStage(build.model, build)


FAMILY: ModelFamily = GPTFamily()
