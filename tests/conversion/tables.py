"""The tables of docs/architectures.md, from those of the code.

python -m tests.conversion.tables    prints them
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megapipe.layout.architecture import Architecture, ForeignTensor
from megapipe.models.gpt.architectures import ARCHITECTURES
from megapipe.models.gpt.config import GPTConfig

SHAPE = {
    "num_layers": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 512,
    "max_sequence_length": 128,
}
NEEDS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"bias": True, "qkv_bias": True},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "GPT2LMHeadModel": {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "position": "learned",
        "bias": True,
        "qkv_bias": True,
        "num_kv_heads": 4,
    },
    "Starcoder2ForCausalLM": {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "qkv_bias": True,
    },
    "GPTModel": {"bias": True, "qkv_bias": True, "qk_norm": True},
}
"""Keys of [model] with which an architecture has all of its tensors."""


def tables() -> str:
    """A section for each architecture."""
    return "\n".join(line for one in ARCHITECTURES for line in _section(one))


def _section(architecture: Architecture) -> Iterator[str]:
    model = GPTConfig.model_validate({**SHAPE, **NEEDS.get(architecture.name, {})})
    architecture.write_config(model)  # the architecture can hold it
    stack = {"hugging_face": "Hugging Face", "megatron": "Megatron-LM"}[architecture.stack]
    yield from (f"### {architecture.name} ({stack})", "")
    yield from (f"| {stack} | megapipe |", "|---|---|")
    for tensor in architecture.tensors(model):
        yield f"| `{_layer(tensor.name)}` | {_held(tensor)} |"
    yield ""


def _held(tensor: ForeignTensor) -> str:
    names = list(dict.fromkeys(f"`{_layer(piece.parameter)}`" for piece in tensor.pieces))
    text = ", ".join(names)
    if len(tensor.pieces) > len(names):
        text += ", interleaved by query group"
    elif len(names) > 1:
        text += ", concatenated"
    if tensor.transposed:
        text += "; transposed"
    return text + "; padded" * tensor.padded


def _layer(name: str) -> str:
    return name.replace(".0.", ".N.")


if __name__ == "__main__":
    print(tables())
