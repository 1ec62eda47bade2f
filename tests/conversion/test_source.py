"""Tensors of another stack as our parameters: which ones there have to be, and what is read."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe.conversion.source import ForeignWeights, PlainTensorInfo
from megapipe.errors import ConversionError
from megapipe.layout.architecture import Architecture
from megapipe.models.gpt.architectures.gpt2 import GPT2
from megapipe.models.gpt.architectures.llama import LLAMA, PHI3
from megapipe.models.gpt.architectures.megatron import MEGATRON
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import parameter_table

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_heads": 2,
    "ffn_hidden_size": 12,
    "vocab_size": 11,
    "max_sequence_length": 16,
}
MODELS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "llama": (LLAMA, {"num_kv_heads": 1}),
    "tied": (LLAMA, {"tie_embeddings": True}),
    "phi3": (PHI3, {"num_kv_heads": 1}),
    "megatron": (MEGATRON, {"qkv_bias": True}),
    "gpt2": (
        GPT2,
        {
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "position": "learned",
            "tie_embeddings": True,
            "bias": True,
            "qkv_bias": True,
        },
    ),
}
COPY, ORIGINAL = "lm_head.weight", "model.embed_tokens.weight"


class Held:
    """Tensors in memory."""

    place = "/models/some"

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held = held

    @property
    def tensors(self) -> dict[str, PlainTensorInfo]:
        return {
            name: PlainTensorInfo(tuple(one.shape), one.dtype) for name, one in self.held.items()
        }

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self.held[name][tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def made(case: str) -> tuple[Architecture, GPTConfig, dict[str, Tensor]]:
    """An architecture, a model, and random tensors for it."""
    architecture, keys = MODELS[case]
    model = GPTConfig.model_validate({**SHAPE, **keys})
    return (
        architecture,
        model,
        {one.name: torch.randn(one.shape) for one in architecture.tensors(model)},
    )


def weights(case: str, held: dict[str, Tensor]) -> ForeignWeights:
    architecture, model, _ = made(case)
    return ForeignWeights(Held(held), architecture, model, parameter_table(model))


def refusal(case: str, held: dict[str, Tensor]) -> str:
    with pytest.raises(ConversionError) as caught:
        weights(case, held)
    assert str(caught.value).startswith("/models/some: its tensors don't fit its config:\n")
    return str(caught.value)


@pytest.mark.parametrize("case", MODELS)
def test_every_parameter_is_read(case: str) -> None:
    architecture, model, held = made(case)
    source = weights(case, held)
    assert set(source.names) == {spec.name for spec in parameter_table(model)}
    for tensor in architecture.tensors(model):
        values = held[tensor.name].t() if tensor.transposed else held[tensor.name]
        for piece in tensor.pieces:
            rows = values[piece.row : piece.row + piece.rows]
            found = source.read(piece.parameter)
            assert torch.equal(found[piece.start : piece.start + piece.rows], rows)
            assert found.shape == source.shape(piece.parameter)
    name = "layers.1.attention.k.weight"
    part = source.read(name, (1, 2), (3, 5), torch.bfloat16)
    assert torch.equal(part, source.read(name)[1:4, 2:7].bfloat16())


def test_a_tensor_of_many_pieces_that_is_missing() -> None:
    _, _, held = made("megatron")
    name = "decoder.layers.1.self_attention.linear_qkv.bias"
    del held[name]
    parameters = ", ".join(f"layers.1.attention.{one}.bias" for one in "qkv")
    assert f"{name} is missing ({parameters} here)" in refusal("megatron", held)


def test_names_without_the_prefix() -> None:
    _, _, held = made("gpt2")
    bare = {name.removeprefix("transformer."): values for name, values in held.items()}
    name = "layers.0.attention.q.weight"
    assert torch.equal(weights("gpt2", bare).read(name), weights("gpt2", held).read(name))


def test_what_is_stored_and_is_no_weight() -> None:
    _, _, held = made("gpt2")
    held["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    held["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    weights("gpt2", held)


def test_a_tied_tensor_may_be_there_twice() -> None:
    _, _, held = made("tied")
    weights("tied", {**held, COPY: held[ORIGINAL].clone()})


@pytest.mark.parametrize(
    "copy",
    [
        lambda one: one + torch.eye(*one.shape),
        lambda one: one.bfloat16(),
        lambda one: one[:-1],
        lambda one: torch.tensor(1.0),
        lambda one: torch.zeros(2, 2, 2),
        lambda one: torch.zeros(0, 0),
    ],
)
def test_a_tied_tensor_that_is_there_twice_and_differs(copy: Any) -> None:
    _, _, held = made("tied")
    said = refusal("tied", {**held, COPY: copy(held[ORIGINAL])})
    assert f"{COPY} differs from {ORIGINAL}, and the config ties them" in said


@pytest.mark.parametrize("shape", [(), (8,), (11, 9), (0, 8), (2, 2, 2)], ids=str)
def test_an_original_of_another_shape(shape: tuple[int, ...]) -> None:
    _, _, held = made("tied")
    said = refusal("tied", {**held, ORIGINAL: torch.zeros(shape), COPY: torch.zeros(shape)})
    assert f"{ORIGINAL} has shape {list(shape)}; by the config it is [11, 8]" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({ORIGINAL: None}, f"{ORIGINAL} is missing"),
        ({"model.norm.weight": torch.zeros(8, 1)}, "has shape [8, 1]; by the config it is [8]"),
        ({"model.norm.weight": torch.zeros(8, dtype=torch.int32)}, "is stored as torch.int32"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(12, 8)}, "is no tensor of LlamaFor"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}, "is no tensor of LlamaFor"),
        ({"score.weight": torch.zeros(2, 8)}, "score.weight is no tensor of LlamaForCausalLM"),
        ({"\x1b[2J\n" + "n" * 10**6: torch.zeros(1)}, "\\x1b[2J\\nnnn"),
    ],
    ids=range(8),
)
def test_what_does_not_fit(change: dict[str, Tensor | None], said: str) -> None:
    _, _, held = made("llama")
    new = {name: one for name, one in {**held, **change}.items() if one is not None}
    message = refusal("llama", new)
    assert message.count("\n") == 1
    assert said in message
    assert len(message) < 400


def test_many_that_do_not_fit_are_not_all_listed() -> None:
    message = refusal("llama", {f"t{number}": torch.zeros(1) for number in range(50)})
    assert message.count("\n") == 11
    assert message.endswith("and 61 more")
