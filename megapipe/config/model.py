"""[model]: the shape of the network. With train.seed it fixes the initial weights."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megapipe.section import Section, or_none_word

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class RopeScaling(Section):
    """Llama 3's stretch of rotary frequencies for contexts longer than those first trained on."""

    factor: float = Field(gt=1.0, description="How many times longer the context becomes.")
    low_frequency_factor: PositiveFloat = Field(
        default=1.0,
        description="Wavelengths above original_max_sequence_length / this are stretched in full.",
    )
    high_frequency_factor: PositiveFloat = Field(
        default=4.0,
        description="Wavelengths below original_max_sequence_length / this are left alone.",
    )
    original_max_sequence_length: PositiveInt = Field(
        default=8192, description="The context length before stretching, in tokens."
    )


def _heads(earlier: dict[str, Any]) -> int:
    return int(earlier["num_heads"])


def _head_dim(earlier: dict[str, Any]) -> int:
    # At least 1, so that a hidden size that is too small is reported as what it is.
    return max(1, int(earlier["hidden_size"]) // int(earlier["num_heads"]))


def _four_times_hidden(earlier: dict[str, Any]) -> int:
    return 4 * int(earlier["hidden_size"])


class ModelConfig(Section):
    """One decoder-only transformer; GPT-2/3, Llama, Mistral and Qwen are settings of it."""

    preset: str | None = Field(
        default=None,
        description="A named shape to start from; keys written beside it win over the preset.",
    )
    num_layers: PositiveInt = Field(description="Transformer blocks.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    num_heads: PositiveInt = Field(description="Query heads of each attention.")
    num_kv_heads: PositiveInt = Field(
        default_factory=_heads,
        description="Key and value heads (grouped-query attention). Default: num_heads.",
    )
    head_dim: PositiveInt = Field(
        default_factory=_head_dim, description="Width of a head. Default: hidden_size / num_heads."
    )
    ffn_hidden_size: PositiveInt = Field(
        default_factory=_four_times_hidden,
        description="Width inside the feed-forward block. Default: 4 * hidden_size.",
    )
    vocab_size: PositiveInt = Field(
        description="Tokens in the vocabulary, at least as many as the tokenizer has. "
        "Padding for the layout is added inside and never seen outside."
    )
    max_sequence_length: PositiveInt = Field(
        description="The longest sequence the model is made for, in tokens; "
        "with learned positions, the rows of their table."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        default="rmsnorm", description="Normalisation before attention, feed-forward and output."
    )
    norm_epsilon: PositiveFloat = Field(
        default=1e-5, description="Added to the variance inside the norm."
    )
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = Field(
        default="swiglu",
        description="Feed-forward activation; gelu_tanh is GPT-2's approximation, "
        "swiglu has a gate (three matrices instead of two).",
    )
    position: Literal["learned", "rope"] = Field(
        default="rope", description="Positions: a learned table, or rotary embedding."
    )
    rope_theta: PositiveFloat = Field(default=10000.0, description="Base of rotary frequencies.")
    rope_scaling: Annotated[RopeScaling | None, or_none_word(RopeScaling)] = Field(
        default=None, description='Llama 3\'s frequency scaling; "none" for none.'
    )
    tie_embeddings: bool = Field(
        default=False, description="The output layer shares the weight of the token embedding."
    )
    bias: bool = Field(
        default=False, description="Biases in attention's output and in the feed-forward block."
    )
    qkv_bias: bool = Field(default=False, description="Biases in query, key and value.")
    qk_norm: bool = Field(
        default=False, description="RMS norm over each head's query and key (Qwen 3)."
    )
    sliding_window: Annotated[PositiveInt | None, or_none_word(int)] = Field(
        default=None,
        description='Each token sees this many tokens, itself included; "none" for all before it.',
    )
    dropout: Dropout = Field(
        default=0.0, description="Dropout after the embedding and on both residual branches."
    )
    attention_dropout: Dropout = Field(
        default=0.0, description="Dropout on attention probabilities."
    )
    init_std: PositiveFloat = Field(
        default=0.02,
        description="Standard deviation of initial weights; the two matrices that write into the "
        "residual stream have it divided by sqrt(2 * num_layers).",
    )
