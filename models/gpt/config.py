"""[model] of the GPT family: its keys, what contradicts them, and a narrow model for checks."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from megapipe.config import Config, ModelConfig
from megapipe.config.contradiction import Problem, choices, divisors
from megapipe.config.model import family_key
from megapipe.kernel_limits import MAX_KERNEL_HEAD_DIM, MAX_KERNEL_HIDDEN
from megapipe.section import Section, or_none_word

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]

NARROW_HEAD = 8
"""Width of a head in the model of equivalence checks."""


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


class GPTConfig(ModelConfig):
    """One decoder-only transformer; GPT-2/3, Llama, Mistral and Qwen are settings of it."""

    MAY_CHANGE: ClassVar[frozenset[str]] = ModelConfig.MAY_CHANGE | {
        "dropout",
        "attention_dropout",
        "init_std",
    }

    family: Literal["gpt"] = family_key("gpt")
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
        default="rope",
        description="Positions: a learned table with a row for each of max_sequence_length, or "
        "rotary embedding.",
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

    def problems(self) -> Iterator[Problem]:
        """What contradicts itself in the shape."""
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_heads:
            yield Problem(
                "model.hidden_size",
                f"does not divide by model.num_heads = {self.num_heads}; change one of them, "
                "or set model.head_dim",
            )
        if self.num_heads % self.num_kv_heads:
            yield Problem(
                "model.num_kv_heads",
                f"must divide model.num_heads = {self.num_heads}: "
                f"use {choices(divisors(self.num_heads))}",
            )
        if self.position == "rope" and self.head_dim % 2:
            yield Problem(
                "model.head_dim", 'must be even when model.position = "rope", which turns pairs'
            )
        if self.position != "rope" and self.rope_scaling is not None:
            yield Problem(
                "model.rope_scaling",
                f'has no effect when model.position = "{self.position}"; remove it, '
                'or set model.position = "rope"',
            )

    def tensor_problems(self, tensor: int) -> Iterator[Problem]:
        """Why `tensor` ranks can't share heads and feed-forward blocks."""
        usable = choices([size for size in divisors(self.num_heads) if self._splits(size)])
        if self.num_heads % tensor:
            yield Problem(
                "parallel.tensor", f"must divide model.num_heads = {self.num_heads}: use {usable}"
            )
        elif not self._shares_kv_heads(tensor):
            yield Problem(
                "parallel.tensor",
                f"must divide model.num_kv_heads = {self.num_kv_heads} or be a multiple of it "
                f"(key and value heads are then copied): use {usable}",
            )
        elif self.ffn_hidden_size % tensor:
            yield Problem(
                "parallel.tensor",
                f"must divide model.ffn_hidden_size = {self.ffn_hidden_size}: "
                f"use {usable}, or change model.ffn_hidden_size",
            )

    def _shares_kv_heads(self, tensor: int) -> bool:
        return self.num_kv_heads % tensor == 0 or tensor % self.num_kv_heads == 0

    def _splits(self, tensor: int) -> bool:
        return self._shares_kv_heads(tensor) and self.ffn_hidden_size % tensor == 0

    def kernel_problems(self, *, kernels: bool, attention: bool) -> Iterator[Problem]:
        """The sizes of rows and heads against those that Triton's kernels take."""
        if kernels and self.hidden_size > MAX_KERNEL_HIDDEN:
            yield Problem(
                "train.kernels",
                f"takes model.hidden_size up to {MAX_KERNEL_HIDDEN:,}, and it is "
                f'{self.hidden_size:,}; use "torch"',
            )
        if attention and self.head_dim > MAX_KERNEL_HEAD_DIM:
            yield Problem(
                "train.attention",
                f"takes heads of up to {MAX_KERNEL_HEAD_DIM}, and model.head_dim = "
                f'{self.head_dim}; use "sdpa"',
            )

    def masks_attention(self, sequence_length: int) -> bool:
        """Whether attention has dropout, or a window that is shorter than the sequence."""
        window = self.sliding_window or sequence_length
        return self.attention_dropout > 0 or window < sequence_length

    def stage_ends(self, *, first: bool, last: bool) -> list[str]:
        """The embedding, and the output layer that may share its weight."""
        output = "output (tied)" if self.tie_embeddings else "output"
        return ["embedding"] * first + [output] * last

    def layout_notes(self, tensor: int) -> Iterator[str]:
        """Key and value heads that lie on several ranks."""
        if tensor > self.num_kv_heads:
            yield (
                f"Key/value heads: {self.num_kv_heads}, each on {tensor // self.num_kv_heads} of "
                f"{tensor} tensor ranks"
            )

    def narrowed(
        self, *, tensor: int, small_tensor: int, sequence: int, small_sequence: int
    ) -> Self:
        """Every switch is kept, and with them whether key/value heads are fewer than heads, or than
        tensor ranks, and whether a window is shorter than the sequence."""
        ratio = self.num_heads // self.num_kv_heads
        if self.num_kv_heads < tensor:  # each head on several ranks: keep it so
            kv_heads = max(1, small_tensor * self.num_kv_heads // tensor)
            heads = small_tensor * (1 if kv_heads < small_tensor else min(ratio, 2))
        else:
            kv_heads = small_tensor
            heads = small_tensor * min(ratio, 2)
        head_dim = min(self.head_dim, NARROW_HEAD)
        hidden = max(2, heads) * head_dim
        if self.hidden_size != self.num_heads * self.head_dim:
            hidden += head_dim
        window = self.sliding_window
        if window is not None:
            window = small_sequence // 4 if window < sequence else small_sequence
        return self.model_copy(
            update={
                "hidden_size": hidden,
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": head_dim,
                "ffn_hidden_size": min(self.ffn_hidden_size, small_tensor * 12),
                "sliding_window": window,
            }
        )


def gpt_model(config: Config) -> GPTConfig:
    """The section [model] of a config of this family."""
    assert isinstance(config.model, GPTConfig), config.model.family
    return config.model
