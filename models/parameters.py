"""The parameters of a model: names, shapes, how they are split, how they start, what they are.

The one place that knows. The model file builds from this table, checkpoints and weight conversion
use its names, plans count with it. No torch: a trillion parameters are counted in milliseconds.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from megapipe.config import ModelConfig
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.vocabulary import vocabulary_rows


@dataclass(frozen=True)
class Init:
    """How a parameter starts; `std` matters for "normal" only."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter under its global name, which says nothing of any layout.

    shape: global; linear weights are [out, in].
    tensor_dim: the dimension that tensor ranks split, or None when each holds all of it.
    role: what it is to the model, by which optimizers tell parameters apart.
    layer: the block it belongs to, or None for embedding, final norm and output.
    """

    name: str
    shape: tuple[int, ...]
    tensor_dim: int | None
    init: Init
    role: Role
    layer: int | None

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


_ZEROS, _ONES = Init("zeros"), Init("ones")


def parameter_table(model: ModelConfig) -> list[ParameterSpec]:
    """All parameters in the order in which the model applies them."""
    return [
        *_before_layers(model),
        *(spec for layer in range(model.num_layers) for spec in layer_table(model, layer)),
        *_after_layers(model),
    ]


def _before_layers(model: ModelConfig) -> list[ParameterSpec]:
    weights = Init("normal", model.init_std)
    vocabulary = (model.vocab_size, model.hidden_size)
    positions = (model.max_sequence_length, model.hidden_size)
    role = Role.EMBEDDING
    table = [ParameterSpec("embedding.weight", vocabulary, 0, weights, role, None)]
    if model.position == "learned":
        table.append(
            ParameterSpec("position_embedding.weight", positions, None, weights, role, None)
        )
    return table


def _after_layers(model: ModelConfig) -> list[ParameterSpec]:
    table = list(_norm(model, "final_norm", None))
    if not model.tie_embeddings:
        weights = Init("normal", model.init_std)
        vocabulary = (model.vocab_size, model.hidden_size)
        table.append(ParameterSpec("output.weight", vocabulary, 0, weights, Role.OUTPUT, None))
    return table


def layer_table(model: ModelConfig, layer: int) -> list[ParameterSpec]:
    """The parameters of one block."""
    prefix = f"layers.{layer}"
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    weights = Init("normal", model.init_std)
    # GPT-2's rule: what writes into the residual stream starts smaller, as 2 * num_layers add up.
    into_residual = Init("normal", model.init_std / math.sqrt(2 * model.num_layers))

    def linear(
        name: str, out: int, into: int, split: int, init: Init, bias: bool
    ) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{prefix}.{name}.weight", (out, into), split, init, Role.MATRIX, layer)
        if bias:
            # A bias is added after row-parallel sums, so it is whole on every rank there.
            part = 0 if split == 0 else None
            yield ParameterSpec(f"{prefix}.{name}.bias", (out,), part, _ZEROS, Role.BIAS, layer)

    table = [*_norm(model, f"{prefix}.attention_norm", layer)]
    table += linear("attention.q", queries, hidden, 0, weights, model.qkv_bias)
    table += linear("attention.k", keys, hidden, 0, weights, model.qkv_bias)
    table += linear("attention.v", keys, hidden, 0, weights, model.qkv_bias)
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            full_name = f"{prefix}.attention.{name}.weight"
            table.append(ParameterSpec(full_name, (model.head_dim,), None, _ONES, Role.NORM, layer))
    table += linear("attention.output", hidden, queries, 1, into_residual, model.bias)
    table += _norm(model, f"{prefix}.mlp_norm", layer)
    if model.activation == "swiglu":
        table += linear("mlp.gate", ffn, hidden, 0, weights, model.bias)
    table += linear("mlp.up", ffn, hidden, 0, weights, model.bias)
    table += linear("mlp.down", hidden, ffn, 1, into_residual, model.bias)
    return table


def _norm(model: ModelConfig, name: str, layer: int | None) -> Iterator[ParameterSpec]:
    shape = (model.hidden_size,)
    yield ParameterSpec(f"{name}.weight", shape, None, _ONES, Role.NORM, layer)
    if model.norm == "layernorm":
        yield ParameterSpec(f"{name}.bias", shape, None, _ZEROS, Role.NORM, layer)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once, padding not at all."""
    return sum(spec.size for spec in parameter_table(model))


# --- What a rank holds ---------------------------------------------------------------------------


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the vocabulary over all tensor ranks. Padding is never in losses or checkpoints."""
    return vocabulary_rows(vocab_size, tensor) * tensor


def local_kv_heads(model: ModelConfig, tensor: int) -> int:
    """Key and value heads on a rank: at least one, copied where there are more ranks than heads."""
    return max(1, model.num_kv_heads // tensor)


def local_shape(spec: ParameterSpec, model: ModelConfig, tensor: int) -> tuple[int, ...]:
    """The shape of a rank's part of a parameter, padding and copied heads included."""
    if spec.tensor_dim is None:
        return spec.shape
    if spec.layer is None:
        part = vocabulary_rows(model.vocab_size, tensor)
    elif ".attention.k." in spec.name or ".attention.v." in spec.name:
        part = local_kv_heads(model, tensor) * model.head_dim
    else:
        part = spec.shape[spec.tensor_dim] // tensor
    split = spec.tensor_dim
    return (*spec.shape[:split], part, *spec.shape[split + 1 :])


def stage_table(
    model: ModelConfig, layers: range, *, first: bool, last: bool
) -> list[ParameterSpec]:
    """The parameters of a pipeline stage that holds `layers`.

    `first` adds the embeddings, `last` the final norm and the output weight. When embeddings are
    tied, a last stage that is not the first holds a copy of `embedding.weight`.
    """
    table = _before_layers(model) if first else []
    for layer in layers:
        table += layer_table(model, layer)
    if last:
        table += _after_layers(model)
        if model.tie_embeddings and not first:
            table.append(_before_layers(model)[0])
    return table


def local_parameter_count(
    model: ModelConfig,
    layers: range,
    *,
    tensor: int,
    first: bool,
    last: bool,
    roles: Collection[Role] = tuple(Role),
) -> int:
    """Elements that one rank holds of a stage's parameters of these roles: see `stage_table` and
    `local_shape`."""
    table = stage_table(model, layers, first=first, last=last)
    return sum(math.prod(local_shape(spec, model, tensor)) for spec in table if spec.role in roles)
