"""Llama 2 and 3, Mistral, Qwen 2 and 3, and Phi-3, of Hugging Face: one network, other switches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megapipe.layout.architecture import ForeignTensor, Stack, stacked
from megapipe.layout.foreign_config import MOST_LAYERS, ForeignConfig
from megapipe.layout.parameters import ParameterSpec
from megapipe.models.gpt.architectures.common import GPTArchitecture, check_fits, renamed
from megapipe.models.gpt.architectures.hugging_face import (
    read_common,
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
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
FUSED = {
    "attention.q": ("attention.k", "attention.v", "self_attn.qkv_proj"),
    "mlp.gate": ("mlp.up", "mlp.gate_up_proj"),
}
"""Phi-3's: what is behind a parameter in the same tensor, and the tensor's name."""


@dataclass(frozen=True)
class LlamaLike(GPTArchitecture):
    """One of the architectures.

    sequence, epsilon, kv_heads, head_dim: the defaults of max_position_embeddings, rms_norm_eps,
    num_key_value_heads and head_dim (None: as many as heads, hidden size / heads).
    window: which keys say it: none of them, `sliding_window` (with its default), or with
    `use_sliding_window` and the first layer that has it.
    qkv_bias, qk_norm: as in [model]. biases: whether keys switch all of the biases on.
    fused: query, key and value in one tensor, gate and up in another.
    """

    name: str
    model_type: str
    sequence: int
    epsilon: float = 1e-6
    kv_heads: int | None = None
    head_dim: int | None = None
    window: Literal["none", "key", "switched"] = "none"
    default_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    biases: Literal["none", "attention", "all"] = "none"
    fused: bool = False
    stack: Stack = "hugging_face"
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    prefix: str = "model."

    def read_config(self, values: Mapping[str, object]) -> GPTConfig:
        config = ForeignConfig(values)
        read_common(config, self.name, self.model_type)
        config.require("is_llama_config", True, True)
        config.require("hidden_act", "silu", "silu")
        bias = self._read_biases(config)
        keys: dict[str, Any] = {
            "num_layers": config.count("num_hidden_layers", most=MOST_LAYERS),
            "vocab_size": config.count("vocab_size"),
            "max_sequence_length": config.count("max_position_embeddings", self.sequence),
            **read_heads(config, self.kv_heads, self.head_dim),
            "ffn_hidden_size": config.count("intermediate_size"),
            "norm": "rmsnorm",
            "norm_epsilon": config.positive("rms_norm_eps", self.epsilon),
            "activation": "swiglu",
            **read_rope(config),
            "tie_embeddings": config.take("tie_word_embeddings", bool, False),
            "bias": bias,
            "qkv_bias": self.qkv_bias or bias,
            "qk_norm": self.qk_norm,
            "attention_dropout": config.rate("attention_dropout", 0.0),
            "init_std": config.positive("initializer_range", 0.02),
        }
        keys["sliding_window"] = self._read_window(config, keys["num_layers"])
        config.require("pretraining_tp", 1, 1)
        for key in ("resid_pdrop", "embd_pdrop") if self.fused else ():
            config.require(key, 0.0, 0.0, 0)
        config.ignore(["original_max_position_embeddings"] if self.fused else [])
        return GPTConfig.model_validate(config.finish(keys))

    def _read_biases(self, config: ForeignConfig) -> bool:
        if self.biases == "none":
            return False
        attention = config.take("attention_bias", bool, False)
        if self.biases == "attention":
            config.require("attention_bias", False, False)
            return False
        config.require("mlp_bias", False, attention)  # ours are of both, or of neither
        return attention

    def _read_window(self, config: ForeignConfig, layers: int) -> int | None:
        if self.window == "none":
            return None
        window = config.optional_count("sliding_window", self.default_window)
        if self.window == "key":
            return window
        switched = config.take("use_sliding_window", bool, False)
        first = config.count("max_window_layers", 28, least=0)
        if not switched or first >= layers:
            window = None
        elif window is not None:
            config.require("max_window_layers", 28, 0, layers)
        kind = "full_attention" if window is None else "sliding_attention"
        config.require_each("layer_types", layers, kind)
        return window

    def config_of(self, model: GPTConfig) -> dict[str, object]:
        needed: dict[str, object] = {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "position": "rope",
            "bias": model.bias if self.biases == "all" else False,
            "qk_norm": self.qk_norm,
        }
        needed["qkv_bias"] = model.bias if self.biases == "all" else self.qkv_bias
        if self.window == "none":
            needed["sliding_window"] = None
        check_fits(model, self.name, needed)
        config: dict[str, object] = {
            **write_shape(model, self.name, self.model_type),
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            **self._window_keys(model),
        }
        if self.biases != "none":
            config["attention_bias"] = model.bias
        if self.biases == "all":
            config["mlp_bias"] = model.bias
        return config

    def _window_keys(self, model: GPTConfig) -> dict[str, object]:
        if self.window == "none":
            return {}
        keys: dict[str, object] = {"sliding_window": model.sliding_window}
        if self.window == "switched":
            has_window = model.sliding_window is not None
            first = 0 if has_window else model.num_layers
            keys |= {"use_sliding_window": has_window, "max_window_layers": first}
        return keys

    def tensors_of(
        self, model: GPTConfig, parameters: Mapping[str, ParameterSpec]
    ) -> Iterator[ForeignTensor]:
        yield from renamed(parameters, "embedding", "model.embed_tokens")
        for layer in range(model.num_layers):
            ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
            fused: set[str] = set()
            for name, other in LAYER_NAMES.items():
                if self.fused and name in FUSED:
                    *behind, tensor = FUSED[name]
                    group = [name, *behind]
                    specs = [parameters[f"{ours}.{one}.weight"] for one in group]
                    yield stacked(specs, f"{theirs}.{tensor}.weight")
                    fused |= set(group)
                if name not in fused:
                    yield from renamed(parameters, f"{ours}.{name}", f"{theirs}.{other}")
        yield from renamed(parameters, "final_norm", "model.norm")
        yield from renamed(parameters, "output", "lm_head")


LLAMA = LlamaLike("LlamaForCausalLM", "llama", sequence=2048, biases="all")
MISTRAL = LlamaLike(
    "MistralForCausalLM",
    "mistral",
    sequence=4096 * 32,
    kv_heads=8,
    window="key",
    default_window=4096,
)
QWEN2 = LlamaLike(
    "Qwen2ForCausalLM",
    "qwen2",
    sequence=32768,
    kv_heads=32,
    window="switched",
    default_window=4096,
    qkv_bias=True,
)
QWEN3 = LlamaLike(
    "Qwen3ForCausalLM",
    "qwen3",
    sequence=32768,
    kv_heads=32,
    head_dim=128,
    window="switched",
    default_window=4096,
    qk_norm=True,
    biases="attention",
)
PHI3 = LlamaLike("Phi3ForCausalLM", "phi3", sequence=4096, epsilon=1e-5, window="key", fused=True)
