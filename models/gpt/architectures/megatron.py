"""GPTModel of Megatron-core: its tensors as they are over all ranks, and its arguments.

Norms before attention and feed-forward have the names of Transformer Engine's fused layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megapipe.layout.architecture import ForeignTensor, Piece, Stack, stacked, whole
from megapipe.layout.foreign_config import MOST_LAYERS, ForeignConfig
from megapipe.layout.parameters import ParameterSpec
from megapipe.models.gpt.architectures.common import GPTArchitecture, check_fits, renamed
from megapipe.models.gpt.config import GPTConfig, RopeScaling

LAYER_NAMES = {
    "attention.output": "self_attention.linear_proj",
    "attention.q_norm": "self_attention.q_layernorm",
    "attention.k_norm": "self_attention.k_layernorm",
    "mlp.down": "mlp.linear_fc2",
}
NORMS = {
    "attention_norm": "self_attention.linear_qkv.layer_norm_",
    "mlp_norm": "mlp.linear_fc1.layer_norm_",
}
QKV = ("attention.q", "attention.k", "attention.v")
LLAMA3 = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
LLAMA3_LENGTH = 8192
"""What Megatron's --use-rope-scaling has for all but the factor."""
LOOKAHEAD_FREE = 0
"""The second number of Megatron's --window-size, of a model that sees no later token."""

UNCHANGED: dict[str, tuple[object, ...]] = {
    "apply_query_key_layer_scaling": (False, True),  # divides, and multiplies again
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_path": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "linear_attention_freq": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "normalization": ("LayerNorm", "RMSNorm"),
    "no_rope_freq": (None,),
    "num_experts": (None, 0, 1),
    "num_moe_experts": (None, 0, 1),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_mup": (False,),
    "window_attn_skip_freq": (None,),
}
"""Arguments that ask for another computation, and the values with which they don't. The others of
its several hundred say how to train, not what is computed."""


@dataclass(frozen=True)
class MegatronGPT(GPTArchitecture):
    """GPTModel of Megatron-core."""

    embedding: ClassVar[str] = "embedding.word_embeddings.weight"
    output: ClassVar[str] = "output_layer.weight"

    name: str = "GPTModel"
    model_type: str = "gpt"
    stack: Stack = "megatron"
    ignored: tuple[str, ...] = ("*_extra_state", "rotary_pos_emb.inv_freq")
    prefix: str = ""

    def read_config(self, values: Mapping[str, object]) -> GPTConfig:
        config = ForeignConfig(values)
        for key, usable in UNCHANGED.items():
            config.require(key, usable[0], *usable)
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        bias = config.take("add_bias_linear", bool, True)
        keys: dict[str, Any] = {
            "num_layers": config.count("num_layers", most=MOST_LAYERS),
            "hidden_size": hidden,
            "vocab_size": config.optional_count("vocab_size") or config.count("padded_vocab_size"),
            "max_sequence_length": config.optional_count("max_position_embeddings")
            or config.count("seq_length"),
            "num_heads": heads,
            "num_kv_heads": self._kv_heads(config, heads),
            "head_dim": config.optional_count("kv_channels") or max(1, hidden // heads),
            "ffn_hidden_size": config.optional_count("ffn_hidden_size") or 4 * hidden,
            "norm": config.take("normalization", str, "LayerNorm").lower(),
            "norm_epsilon": config.positive(
                "norm_epsilon", config.positive("layernorm_epsilon", 1e-5)
            ),
            "activation": self._activation(config),
            **self._positions(config),
            "tie_embeddings": not config.take("untie_embeddings_and_output_weights", bool, False),
            "bias": bias,
            "qkv_bias": bias or config.take("add_qkv_bias", bool, False),
            "qk_norm": config.take("qk_layernorm", bool, False),
            "sliding_window": self._window(config),
            "dropout": config.rate("hidden_dropout", 0.1),
            "attention_dropout": config.rate("attention_dropout", 0.1),
            "init_std": config.positive("init_method_std", 0.02),
        }
        config.ignore(list(values))
        return GPTConfig.model_validate(config.finish(keys))

    def _kv_heads(self, config: ForeignConfig, heads: int) -> int:
        grouped = config.take("group_query_attention", bool, False)
        groups = config.optional_count("num_query_groups")
        return groups if grouped and groups else heads

    def _activation(self, config: ForeignConfig) -> str:
        if config.take("swiglu", bool, False):
            return "swiglu"
        return "gelu_tanh" if config.take("openai_gelu", bool, False) else "gelu"

    def _positions(self, config: ForeignConfig) -> dict[str, Any]:
        kind = config.take("position_embedding_type", str, "learned_absolute")
        if kind == "learned_absolute":
            return {"position": "learned"}
        config.require("position_embedding_type", kind, "rope", "learned_absolute")
        scaling = None
        if config.take("use_rope_scaling", bool, False):
            factor = config.positive("rope_scaling_factor", 8.0)
            if factor < 1:
                config.problem("rope_scaling_factor", f"= {factor} must be 1 or more")
            elif factor > 1:
                scaling = RopeScaling(
                    factor=factor, **LLAMA3, original_max_sequence_length=LLAMA3_LENGTH
                )
        theta = config.positive("rotary_base", 10000.0)
        return {"position": "rope", "rope_theta": theta, "rope_scaling": scaling}

    def _window(self, config: ForeignConfig) -> int | None:
        """Tokens that each sees, itself included; Megatron's number is of those before it."""
        window = config.pair("window_size")
        if window is None or window[0] < 0:
            return None
        if window[1] != LOOKAHEAD_FREE:
            config.problem("window_size", f"= {window} lets tokens see later ones")
        return window[0] + 1

    def config_of(self, model: GPTConfig) -> dict[str, object]:
        needed: dict[str, object] = {"qkv_bias": True} if model.bias else {}
        scaling = model.rope_scaling
        if scaling is not None:
            needed["rope_scaling"] = RopeScaling(
                factor=scaling.factor, **LLAMA3, original_max_sequence_length=LLAMA3_LENGTH
            )
        check_fits(model, self.name, needed)
        window = model.sliding_window
        return {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "group_query_attention": model.num_kv_heads != model.num_heads,
            "num_query_groups": model.num_kv_heads,
            "kv_channels": model.head_dim,
            "ffn_hidden_size": model.ffn_hidden_size,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_sequence_length,
            "seq_length": model.max_sequence_length,
            "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
            "norm_epsilon": model.norm_epsilon,
            "layernorm_epsilon": model.norm_epsilon,
            "swiglu": model.activation == "swiglu",
            "openai_gelu": model.activation == "gelu_tanh",
            "position_embedding_type": "rope" if model.position == "rope" else "learned_absolute",
            "rotary_base": model.rope_theta,
            "rotary_percent": 1.0,
            "use_rope_scaling": scaling is not None,
            "rope_scaling_factor": scaling.factor if scaling is not None else 8.0,
            "untie_embeddings_and_output_weights": not model.tie_embeddings,
            "add_bias_linear": model.bias,
            "add_qkv_bias": model.qkv_bias,
            "qk_layernorm": model.qk_norm,
            "window_size": None if window is None else (window - 1, LOOKAHEAD_FREE),
            "hidden_dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "init_method_std": model.init_std,
        }

    def tensors_of(
        self, model: GPTConfig, parameters: Mapping[str, ParameterSpec]
    ) -> Iterator[ForeignTensor]:
        for tensor in renamed(parameters, "embedding", "embedding.word_embeddings"):
            yield replace(tensor, padded=True)
        yield from renamed(parameters, "position_embedding", "embedding.position_embeddings")
        for layer in range(model.num_layers):
            yield from _layer(model, parameters, f"layers.{layer}", f"decoder.layers.{layer}")
        yield from renamed(parameters, "final_norm", "decoder.final_layernorm")
        for tensor in renamed(parameters, "output", "output_layer"):
            yield replace(tensor, padded=True)


def _layer(
    model: GPTConfig, parameters: Mapping[str, ParameterSpec], ours: str, theirs: str
) -> Iterator[ForeignTensor]:
    for name, other in NORMS.items():
        for kind in ("weight", "bias"):
            spec = parameters.get(f"{ours}.{name}.{kind}")
            if spec is not None:
                yield whole(spec, f"{theirs}.{other}{kind}")
    matrices = ("mlp.gate", "mlp.up") if model.activation == "swiglu" else ("mlp.up",)
    for kind in ("weight", "bias"):
        qkv = [parameters.get(f"{ours}.{name}.{kind}") for name in QKV]
        if all(qkv):
            specs = [spec for spec in qkv if spec is not None]
            yield _by_query_group(model, specs, f"{theirs}.self_attention.linear_qkv.{kind}")
        halves = [parameters.get(f"{ours}.{name}.{kind}") for name in matrices]
        if all(halves):
            specs = [spec for spec in halves if spec is not None]
            yield stacked(specs, f"{theirs}.mlp.linear_fc1.{kind}")
    for name, other in LAYER_NAMES.items():
        yield from renamed(parameters, f"{ours}.{name}", f"{theirs}.{other}")


def _by_query_group(model: GPTConfig, specs: Sequence[ParameterSpec], name: str) -> ForeignTensor:
    """Query, key and value, whose rows alternate: of each group all of its query heads, then its
    key head, then its value head."""
    query, key, value = specs
    width = model.head_dim
    queries = model.num_heads // model.num_kv_heads * width
    pieces, row = [], 0
    for group in range(model.num_kv_heads):
        for spec, rows in ((query, queries), (key, width), (value, width)):
            pieces.append(Piece(spec.name, group * rows, rows, row))
            row += rows
    return ForeignTensor(name, (row, *query.shape[1:]), tuple(pieces))


MEGATRON = MegatronGPT()
