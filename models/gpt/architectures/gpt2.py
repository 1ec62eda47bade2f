"""GPT-2 of Hugging Face, whose matrices are stored as [in, out]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from megapipe.layout.architecture import ForeignTensor, Stack, stacked
from megapipe.layout.foreign_config import MOST_LAYERS, ForeignConfig
from megapipe.layout.parameters import ParameterSpec
from megapipe.models.gpt.architectures.common import GPTArchitecture, check_fits, renamed
from megapipe.models.gpt.architectures.hugging_face import read_common, read_dropout
from megapipe.models.gpt.config import GPTConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LAYER_NAMES = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
QKV = ("attention.q", "attention.k", "attention.v")
HEADS_OF_OTHERS = (
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)
"""Keys about classification, which a language model has nothing of."""


@dataclass(frozen=True)
class GPT2Architecture(GPTArchitecture):
    """GPT2LMHeadModel."""

    embedding: ClassVar[str] = "transformer.wte.weight"

    name: str = "GPT2LMHeadModel"
    model_type: str = "gpt2"
    stack: Stack = "hugging_face"
    ignored: tuple[str, ...] = ("*.attn.bias", "*.attn.masked_bias")
    prefix: str = "transformer."

    def read_config(self, values: Mapping[str, object]) -> GPTConfig:
        config = ForeignConfig(values)
        read_common(config, self.name, self.model_type)
        config.ignore(HEADS_OF_OTHERS)
        config.ignore(["n_ctx", "reorder_and_upcast_attn"])  # n_positions; a matter of rounding
        config.require("scale_attn_weights", True, True)
        config.require("scale_attn_by_inverse_layer_idx", False, False)
        config.require("activation_function", "gelu_new", *ACTIVATIONS)
        dropout = read_dropout(config, "resid_pdrop", "embd_pdrop", 0.1)
        hidden, heads = config.count("n_embd", 768), config.count("n_head", 12)
        if hidden % heads and not config.problems:
            config.problem("n_embd", f"= {hidden} is no multiple of n_head = {heads}")
        keys = {
            "num_layers": config.count("n_layer", 12, most=MOST_LAYERS),
            "hidden_size": hidden,
            "vocab_size": config.count("vocab_size", 50257),
            "max_sequence_length": config.count("n_positions", 1024),
            "num_heads": heads,
            "ffn_hidden_size": config.optional_count("n_inner") or 4 * hidden,
            "norm": "layernorm",
            "norm_epsilon": config.positive("layer_norm_epsilon", 1e-5),
            "activation": ACTIVATIONS.get(config.take("activation_function", str, "gelu_new")),
            "position": "learned",
            "tie_embeddings": config.take("tie_word_embeddings", bool, True),
            "bias": True,
            "qkv_bias": True,
            "dropout": dropout,
            "attention_dropout": config.rate("attn_pdrop", 0.1),
            "init_std": config.positive("initializer_range", 0.02),
        }
        return GPTConfig.model_validate(config.finish(keys))

    def config_of(self, model: GPTConfig) -> dict[str, object]:
        needed = {
            "norm": "layernorm",
            "activation": "gelu" if model.activation == "gelu" else "gelu_tanh",
            "position": "learned",
            "bias": True,
            "qkv_bias": True,
            "qk_norm": False,
            "sliding_window": None,
            "num_kv_heads": model.num_heads,
            "head_dim": model.hidden_size // model.num_heads,
        }
        check_fits(model, self.name, needed)
        return {
            "architectures": [self.name],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "n_positions": model.max_sequence_length,
            "n_ctx": model.max_sequence_length,  # an old name, which llama.cpp's converter reads
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "n_inner": model.ffn_hidden_size,
            "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout,
            "layer_norm_epsilon": model.norm_epsilon,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def tensors_of(
        self, model: GPTConfig, parameters: Mapping[str, ParameterSpec]
    ) -> Iterator[ForeignTensor]:
        yield from renamed(parameters, "embedding", "transformer.wte")
        yield from renamed(parameters, "position_embedding", "transformer.wpe")
        for layer in range(model.num_layers):
            ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
            for kind in ("weight", "bias"):
                specs = [parameters[f"{ours}.{name}.{kind}"] for name in QKV]
                fused = f"{theirs}.attn.c_attn.{kind}"
                yield stacked(specs, fused, transposed=kind == "weight")
            for name, other in LAYER_NAMES.items():
                yield from renamed(
                    parameters, f"{ours}.{name}", f"{theirs}.{other}", transposed=True
                )
        yield from renamed(parameters, "final_norm", "transformer.ln_f")
        yield from renamed(parameters, "output", "lm_head")


GPT2 = GPT2Architecture()
