"""Small directories of Hugging Face's, whole or wrong, without transformers."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megapipe.models.gpt.architectures.llama import LLAMA

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}
INDEX = "model.safetensors.index.json"


def tensors(**keys: Any) -> dict[str, Tensor]:
    """All tensors of the model of CONFIG with some keys changed."""
    generator = torch.Generator().manual_seed(1)
    table = LLAMA.tensors(LLAMA.read_config({**CONFIG, **keys}))
    return {one.name: torch.randn(one.shape, generator=generator) for one in table}


def write_model(folder: Path, held: Mapping[str, Tensor] | None = None, **keys: Any) -> Path:
    """A directory with CONFIG and the tensors of its model, or with `held`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))
    save_file(dict(tensors(**keys) if held is None else held), folder / "model.safetensors")
    return folder


def write_split(folder: Path) -> Path:
    """The same in two files with an index."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    held = tensors()
    names = sorted(held)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def container(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with that header, or with that text as one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(*shape: int, begin: int = 0, dtype: str = "F32", **changed: Any) -> dict[str, Any]:
    """The header's entry of a tensor of 4-byte values."""
    offsets = [begin, begin + 4 * prod(shape)]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets, **changed}
