"""StarCoder2 of Hugging Face: layer norms and biases with rotary positions and grouped queries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megapipe.layout.architecture import ForeignTensor, Stack
from megapipe.layout.foreign_config import MOST_LAYERS, ForeignConfig
from megapipe.layout.parameters import ParameterSpec
from megapipe.models.gpt.architectures.common import GPTArchitecture, check_fits, renamed
from megapipe.models.gpt.architectures.hugging_face import (
    read_common,
    read_dropout,
    read_heads,
    read_rope,
    write_shape,
)
from megapipe.models.gpt.config import GPTConfig

LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class StarCoder2Architecture(GPTArchitecture):
    """Starcoder2ForCausalLM."""

    name: str = "Starcoder2ForCausalLM"
    model_type: str = "starcoder2"
    stack: Stack = "hugging_face"
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    prefix: str = "model."

    def read_config(self, values: Mapping[str, object]) -> GPTConfig:
        config = ForeignConfig(values)
        read_common(config, self.name, self.model_type)
        config.require("hidden_act", "gelu_pytorch_tanh", *ACTIVATIONS)
        config.require("mlp_type", "default", "default")
        config.require("norm_type", "layer_norm", "layer_norm")
        bias = config.take("use_bias", bool, True)
        dropout = read_dropout(config, "residual_dropout", "embedding_dropout", 0.0)
        keys = {
            "num_layers": config.count("num_hidden_layers", 30, most=MOST_LAYERS),
            "vocab_size": config.count("vocab_size", 49152),
            "max_sequence_length": config.count("max_position_embeddings", 4096),
            **read_heads(config, 2),
            "ffn_hidden_size": config.count("intermediate_size", 12288),
            "norm": "layernorm",
            "norm_epsilon": config.positive("norm_epsilon", 1e-5),
            "activation": ACTIVATIONS.get(config.take("hidden_act", str, "gelu_pytorch_tanh")),
            **read_rope(config),
            "tie_embeddings": config.take("tie_word_embeddings", bool, True),
            "bias": bias,
            "qkv_bias": bias,
            "sliding_window": config.optional_count("sliding_window"),
            "dropout": dropout,
            "attention_dropout": config.rate("attention_dropout", 0.0),
            "init_std": config.positive("initializer_range", 0.018042),
        }
        return GPTConfig.model_validate(config.finish(keys))

    def config_of(self, model: GPTConfig) -> dict[str, object]:
        needed = {
            "norm": "layernorm",
            "activation": "gelu" if model.activation == "gelu" else "gelu_tanh",
            "position": "rope",
            "qkv_bias": model.bias,
            "qk_norm": False,
        }
        check_fits(model, self.name, needed)
        return {
            **write_shape(model, self.name, self.model_type),
            "hidden_act": "gelu" if model.activation == "gelu" else "gelu_pytorch_tanh",
            "norm_epsilon": model.norm_epsilon,
            "sliding_window": model.sliding_window,
            "use_bias": model.bias,
            "residual_dropout": model.dropout,
            "embedding_dropout": model.dropout,
        }

    def tensors_of(
        self, model: GPTConfig, parameters: Mapping[str, ParameterSpec]
    ) -> Iterator[ForeignTensor]:
        yield from renamed(parameters, "embedding", "model.embed_tokens")
        for layer in range(model.num_layers):
            for ours, theirs in LAYER_NAMES.items():
                yield from renamed(
                    parameters, f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}"
                )
        yield from renamed(parameters, "final_norm", "model.norm")
        yield from renamed(parameters, "output", "lm_head")


STARCODER2 = StarCoder2Architecture()
