"""Tables of other stacks' tensors: those that there are have no faults, and faults are found."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from megapipe.errors import ConversionError
from megapipe.layout.architecture import (
    Architecture,
    ForeignTensor,
    Piece,
    stacked,
    whole,
)
from megapipe.models.gpt.architectures import ARCHITECTURES
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import parameter_table
from tests.layout.tables import table_problems

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_heads": 4,
    "num_kv_heads": 4,
    "vocab_size": 61,
    "max_sequence_length": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "grouped queries": {"num_kv_heads": 2},
    "one group": {"num_kv_heads": 1, "num_layers": 1},
    "wide heads": {"head_dim": 10, "ffn_hidden_size": 7},
    "a token": {"vocab_size": 1},
}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"bias": True, "qkv_bias": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "position": "learned",
        "bias": True,
        "qkv_bias": True,
    },
    "starcoder2": {"norm": "layernorm", "activation": "gelu", "bias": True, "qkv_bias": True},
    "starcoder2, bare": {"norm": "layernorm", "activation": "gelu_tanh"},
}


def models(architecture: Architecture) -> Iterator[tuple[str, GPTConfig]]:
    """All combinations that the architecture can hold."""
    for feature, switches in FEATURES.items():
        for variant, sizes in VARIANTS.items():
            model = GPTConfig.model_validate({**SHAPE, **switches, **sizes})
            try:
                architecture.write_config(model)
            except ConversionError:
                continue
            yield f"{feature}, {variant}", model


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_tables_have_no_problems(architecture: Architecture) -> None:
    names = []
    for name, model in models(architecture):
        names.append(name)
        table = architecture.tensors(model)
        assert list(table_problems(table, parameter_table(model))) == [], name
        stored = [tensor.name for tensor in table]
        assert len(set(stored)) == len(stored)
        assert not set(architecture.copies(model)) & set(stored)
        assert set(architecture.copies(model).values()) <= set(stored)
    assert len(names) >= 2
    assert any("untied" in name for name in names)
    assert any(name.endswith(", tied") for name in names)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_kind_of_model_has_an_architecture(feature: str) -> None:
    model = GPTConfig.model_validate({**SHAPE, **FEATURES[feature]})
    found = [one.name for one in ARCHITECTURES if any(model == other for _, other in models(one))]
    assert found


# --- Faults that are planted ---------------------------------------------------------------------

MODEL = GPTConfig.model_validate({**SHAPE, "num_layers": 1, "num_kv_heads": 2})
PARAMETERS = parameter_table(MODEL)
BY_NAME = {spec.name: spec for spec in PARAMETERS}
Q, K = "layers.0.attention.q.weight", "layers.0.attention.k.weight"


def plain() -> list[ForeignTensor]:
    """A tensor for each parameter."""
    return [whole(spec, spec.name) for spec in PARAMETERS]


def changed(name: str, *pieces: Piece, shape: tuple[int, ...] | None = None) -> list[ForeignTensor]:
    """The plain table in which one tensor has other pieces."""
    return [
        replace(one, pieces=pieces, shape=shape or one.shape) if one.name == name else one
        for one in plain()
    ]


def problems(table: Sequence[ForeignTensor]) -> list[str]:
    return list(table_problems(table, PARAMETERS))


def test_a_plain_table() -> None:
    assert problems(plain()) == []


def test_pieces_in_any_order() -> None:
    assert problems(changed(Q, Piece(Q, 10, 14, 0), Piece(Q, 0, 10, 14))) == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (plain()[1:], [f"{PARAMETERS[0].name}: rows from 0 on are held nowhere"]),
        (changed(Q, Piece(Q, 0, 23, 0)), [f"{Q}: rows from 23 on are held nowhere"]),
        (changed(Q, Piece(Q, 1, 23, 0)), [f"{Q}: row 0 is held nowhere"]),
        (
            changed(Q, Piece(Q, 0, 10, 0), Piece(Q, 12, 12, 10)),
            [f"{Q}: row 10 is held nowhere"],
        ),
        (
            changed(Q, Piece(Q, 0, 12, 0), Piece(Q, 10, 14, 12), shape=(26, 24)),
            [f"{Q}: row 10 is held twice"],
        ),
        (
            changed(Q, Piece(Q, 0, 12, 0), Piece(Q, 12, 12, 11)),
            [f"{Q}: two pieces hold its row 11"],
        ),
        (
            changed(Q, Piece(Q, 0, 24, 1)),
            [f"{Q}: its pieces end at row 25, it at 24"],
        ),
        (
            changed(Q, Piece(Q, 0, 25, 0), shape=(25, 24)),
            [f"{Q}: rows from 25 on are held nowhere"],
        ),
        (
            changed(Q, Piece(Q, 0, 24, 0), shape=(24, 23)),
            [f"{Q} has rows of another width than {Q}"],
        ),
        (
            changed(Q, Piece("some", 0, 24, 0)),
            [f"{Q} holds some, which the model has not", f"{Q}: rows from 0 on are held nowhere"],
        ),
        ([*plain(), whole(BY_NAME[K], "again")], [f"{K}: row 0 is held twice"]),
    ],
    ids=range(11),
)
def test_faults(table: list[ForeignTensor], said: list[str]) -> None:
    assert problems(table) == said


def test_whole_and_stacked() -> None:
    up = BY_NAME["layers.0.mlp.up.weight"]
    assert whole(up, "x") == ForeignTensor("x", up.shape, (Piece(up.name, 0, up.shape[0], 0),))
    turned = whole(up, "x", transposed=True)
    assert (turned.shape, turned.turned_shape) == (up.shape[::-1], up.shape)
    both = stacked([BY_NAME[Q], BY_NAME[K]], "qk")
    assert both.shape == (36, 24)
    assert both.pieces == (Piece(Q, 0, 24, 0), Piece(K, 0, 12, 24))
    assert both.size == 36 * 24
    turned = stacked([BY_NAME[Q], BY_NAME[K]], "qk", transposed=True)
    assert (turned.shape, turned.turned_shape) == ((24, 36), (36, 24))
