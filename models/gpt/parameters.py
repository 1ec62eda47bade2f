"""The parameters of the GPT family: names, shapes, split, initial values and roles.

The one place that knows. The model file builds from this table, checkpoints and weight conversion
use its names, plans count with it. No torch: a trillion parameters are counted in milliseconds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megapipe.layout.parameters import FIRST, LAST, Init, ParameterSpec, Place, Split, shard_of
from megapipe.models.gpt.config import GPTConfig
from megapipe.parameter_role import Role

VOCABULARY_MULTIPLE = 64
"""Each rank's rows are padded to a multiple of this: GPU matmuls want it (GPT-2's 50,257 rows
become 50,304). Padding rows are zero, get no gradient, and are in no checkpoint."""

_ZEROS, _ONES = Init("zeros"), Init("ones")
_VOCABULARY = Split(0, pad_to=VOCABULARY_MULTIPLE)


def parameter_table(model: GPTConfig) -> list[ParameterSpec]:
    """All parameters in the order in which the model applies them."""
    return [
        *_before_layers(model),
        *(spec for layer in range(model.num_layers) for spec in layer_table(model, layer)),
        *_after_layers(model),
    ]


def _before_layers(model: GPTConfig) -> list[ParameterSpec]:
    weights = Init("normal", model.init_std)
    vocabulary = (model.vocab_size, model.hidden_size)
    places: tuple[Place, ...] = (FIRST, LAST) if model.tie_embeddings else (FIRST,)
    table = [
        ParameterSpec("embedding.weight", vocabulary, places, weights, Role.EMBEDDING, _VOCABULARY)
    ]
    if model.position == "learned":
        positions = (model.max_sequence_length, model.hidden_size)
        table.append(
            ParameterSpec(
                "position_embedding.weight",
                positions,
                (FIRST,),
                weights,
                Role.EMBEDDING,
                partial="sequence",
            )
        )
    return table


def _after_layers(model: GPTConfig) -> list[ParameterSpec]:
    table = list(_norm(model, "final_norm", LAST))
    if not model.tie_embeddings:
        weights = Init("normal", model.init_std)
        vocabulary = (model.vocab_size, model.hidden_size)
        table.append(
            ParameterSpec("output.weight", vocabulary, (LAST,), weights, Role.OUTPUT, _VOCABULARY)
        )
    return table


def layer_table(model: GPTConfig, layer: int) -> list[ParameterSpec]:
    """The parameters of one block."""
    prefix = f"layers.{layer}"
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim
    weights = Init("normal", model.init_std)
    # GPT-2's rule: what writes into the residual stream starts smaller, as 2 * num_layers add up.
    into_residual = Init("normal", model.init_std / math.sqrt(2 * model.num_layers))

    def column(
        name: str, out: int, bias: bool, units: int | None = None
    ) -> Iterator[ParameterSpec]:
        split, places = Split(0, units), (layer,)
        yield ParameterSpec(f"{name}.weight", (out, hidden), places, weights, Role.MATRIX, split)
        if bias:
            yield ParameterSpec(f"{name}.bias", (out,), places, _ZEROS, Role.BIAS, split)

    def row(name: str, into: int, units: int | None = None) -> Iterator[ParameterSpec]:
        shape, split = (hidden, into), Split(1, units)
        yield ParameterSpec(f"{name}.weight", shape, (layer,), into_residual, Role.MATRIX, split)
        if model.bias:  # added after the ranks' products are summed, so it is whole on each
            yield ParameterSpec(
                f"{name}.bias", (hidden,), (layer,), _ZEROS, Role.BIAS, partial="sequence"
            )

    attention, mlp = f"{prefix}.attention", f"{prefix}.mlp"
    table = [*_norm(model, f"{prefix}.attention_norm", layer)]
    table += column(f"{attention}.q", heads * width, model.qkv_bias, heads)
    table += column(f"{attention}.k", kv_heads * width, model.qkv_bias, kv_heads)
    table += column(f"{attention}.v", kv_heads * width, model.qkv_bias, kv_heads)
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            table.append(
                ParameterSpec(
                    f"{attention}.{name}.weight",
                    (width,),
                    (layer,),
                    _ONES,
                    Role.NORM,
                    partial="always",  # each rank sees its heads only
                )
            )
    table += row(f"{attention}.output", heads * width, heads)
    table += _norm(model, f"{prefix}.mlp_norm", layer)
    if model.activation == "swiglu":
        table += column(f"{mlp}.gate", ffn, model.bias)
    table += column(f"{mlp}.up", ffn, model.bias)
    table += row(f"{mlp}.down", ffn)
    return table


def _norm(model: GPTConfig, name: str, place: Place) -> Iterator[ParameterSpec]:
    shape, places = (model.hidden_size,), (place,)
    # Each rank normalises its part of the sequence.
    yield ParameterSpec(f"{name}.weight", shape, places, _ONES, Role.NORM, partial="sequence")
    if model.norm == "layernorm":
        yield ParameterSpec(f"{name}.bias", shape, places, _ZEROS, Role.NORM, partial="sequence")


def gpt_parameter_count(model: GPTConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once, padding not at all."""
    return sum(spec.size for spec in parameter_table(model))


# --- What a rank holds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalSizes:
    """Sizes of what a tensor rank computes with, the same on all of them.

    heads, kv_heads: query heads, and heads of key and value; ffn: width inside a feed-forward
    block; vocabulary: rows of it, with the padding; matrices: elements of one block's matrices.
    """

    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    matrices: int


def local_sizes(model: GPTConfig, tensor: int) -> LocalSizes:
    """The sizes of the shards that each of `tensor` ranks holds."""
    table = [*_before_layers(model), *layer_table(model, 0)]
    shards = {
        spec.name: shard_of(spec, tensor_rank=0, tensor_size=tensor, sequence_parallel=False)
        for spec in table
    }
    return LocalSizes(
        heads=shards["layers.0.attention.q.weight"].rows // model.head_dim,
        kv_heads=shards["layers.0.attention.k.weight"].rows // model.head_dim,
        ffn=shards["layers.0.mlp.up.weight"].rows,
        vocabulary=shards["embedding.weight"].rows,
        matrices=sum(one.local_size for one in shards.values() if one.spec.role == Role.MATRIX),
    )
