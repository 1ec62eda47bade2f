"""Small checkpoints of the same structure as Megatron's, made with torch alone."""

import argparse
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

HIDDEN, FFN, VOCABULARY, LENGTH = 8, 12, 16, 10
Weights = dict[str, Tensor]
Arguments = dict[str, Any]

ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class Backend(Enum):
    """A class that readers must not need."""

    AUTO = 5


def weights(layers: int = 4, gated: bool = True, tied: bool = False, seed: int = 0) -> Weights:
    """The global tensors of a small model under the names of distributed checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    wide = FFN * (2 if gated else 1)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {
            f"decoder.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
                "self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
                "self_attention.linear_qkv.bias": (3 * HIDDEN,),
                "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
                "self_attention.linear_proj.bias": (HIDDEN,),
                "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
                "mlp.linear_fc1.weight": (wide, HIDDEN),
                "mlp.linear_fc2.weight": (HIDDEN, FFN),
            }.items()
        }
    shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    if not tied:
        shapes["output_layer.weight"] = (VOCABULARY, HIDDEN)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def arguments(tensor: int = 1, pipeline: int = 1, **others: Any) -> argparse.Namespace:
    """What Megatron keeps of its command line."""
    fields = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "num_layers": 4,
        "params_dtype": torch.bfloat16,
        "attention_backend": Backend.AUTO,
        "adam_betas": (0.9, 0.95),
        "untie_embeddings_and_output_weights": True,
    }
    return argparse.Namespace(**(fields | others))


LLAMA: Arguments = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "ffn_hidden_size": FFN,
    "padded_vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Arguments of the model of `llama_weights`."""


def llama_weights(seed: int = 0) -> Weights:
    """`weights` without biases."""
    return {n: tensor for n, tensor in weights(seed=seed).items() if not n.endswith(".bias")}


# --- A directory for each rank -------------------------------------------------------------------


def save_ranks(
    directory: Path,
    whole: Weights,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    **others: Any,
) -> Path:
    """`iter_0000010` as Megatron-LM's --ckpt-format torch writes it."""
    layers = len({name.split(".")[2] for name in whole if ".layers." in name})
    each = layers // (pipeline * virtual)
    for rank in range(tensor):
        for stage in range(pipeline):
            content: dict[str, Any] = {
                "args": arguments(tensor, pipeline, num_layers=layers, **others),
                "checkpoint_version": 3.0,
                "iteration": 10,
            }
            for chunk in range(virtual):
                first = (chunk * pipeline + stage) * each
                ends = first == 0, first + each == layers
                part = _chunk(whole, range(first, first + each), ends)
                held = OrderedDict((name, _shard(name, t, rank, tensor)) for name, t in part)
                held["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
                content["model" if virtual == 1 else f"model{chunk}"] = held
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (directory / name).mkdir(parents=True)
            torch.save(content, directory / name / "model_optim_rng.pt")
    return directory


def _chunk(whole: Weights, layers: range, ends: tuple[bool, bool]) -> Iterator[tuple[str, Tensor]]:
    """What a part of the pipeline holds, under the names of megatron-core's own layers."""
    for name, tensor in whole.items():
        words = name.split(".")
        if words[1] == "layers":
            if int(words[2]) not in layers:
                continue
            words[2] = str(int(words[2]) - layers.start)
            own = ".".join(words)
            own = own.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            yield own.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."), tensor
        elif ends[0 if words[0] == "embedding" else 1]:
            yield name, tensor
    if ends == (False, True) and "output_layer.weight" not in whole:
        yield "output_layer.weight", whole["embedding.word_embeddings.weight"]


def _shard(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    if name.endswith("linear_fc1.weight") and len(tensor) == 2 * FFN:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    if name.endswith((*ROWS, "linear_fc1.weight")):
        return tensor.chunk(ranks)[rank]  # a view: torch.save keeps the storage of the whole tensor
    if name.endswith(COLUMNS):
        return tensor.chunk(ranks, dim=1)[rank].contiguous()
    return tensor


# --- A distributed checkpoint --------------------------------------------------------------------


def save_distributed(
    directory: Path,
    whole: Weights,
    tensor: int = 1,
    common_in_file: bool = True,
    change: Callable[[Metadata], object] = id,
    optimizer: object = None,
    **others: Any,
) -> Path:
    """`iter_0000010` as megatron-core's "torch_dist" writes it: layers stacked, cut over `tensor`
    ranks, each with a file of its own. `change` is made to the metadata before they are saved;
    `optimizer` is what is the same of it on all ranks, `others` are arguments."""
    directory.mkdir(parents=True)
    files = [io.BytesIO() for _ in range(tensor)]
    metadata = Metadata({}, None, {})
    for name, stacked in _stacked(whole).items():
        _add_tensor(metadata, files, name, stacked)
    common: dict[str, object] = {"args": arguments(tensor, **others), "iteration": 10}
    if optimizer is not None:
        common["optimizer"] = optimizer
    if common_in_file:
        torch.save(common, directory / "common.pt")
    else:
        _add_object(metadata, files[0], "common_state/shard_0_1", common)
    _add_object(metadata, files[-1], "rng_state/shard_0_1", {"random": b"123"})
    for rank, file in enumerate(files):
        (directory / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backend))
    return directory


def _stacked(whole: Weights) -> Weights:
    """Tensors of layers, one for all of them: `decoder.layers.mlp.linear_fc2.weight`."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in whole.items():
        layers.setdefault(re.sub(r"(\.layers)\.\d+\.", r"\1.", name), []).append(tensor)
    return {
        name: torch.stack(tensors) if ".layers." in name else tensors[0]
        for name, tensors in layers.items()
    }


def _add_tensor(metadata: Metadata, files: list[io.BytesIO], name: str, tensor: Tensor) -> None:
    stacked = ".layers." in name
    dim = stacked + (1 if name.endswith(COLUMNS) else 0)
    cut = name.endswith((*ROWS, *COLUMNS, "linear_fc1.weight"))
    chunks = []
    for layer in range(len(tensor)) if stacked else [0]:
        part = tensor[layer : layer + 1] if stacked else tensor
        begin = 0
        for rank, shard in enumerate(part.chunk(len(files), dim) if cut else [part]):
            start = [0] * tensor.dim()
            start[0] = layer
            start[dim if cut else 0] += begin
            begin += shard.shape[dim] if cut else 0
            info = _written(files[rank], shard.contiguous().clone(), f"__{rank}_0.distcp")
            metadata.storage_data[MetadataIndex(name, start)] = info
            chunks.append(ChunkStorageMetadata(torch.Size(start), shard.shape))
    properties = TensorProperties(dtype=tensor.dtype)
    metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)


def _add_object(metadata: Metadata, file: io.BytesIO, name: str, value: object) -> None:
    rank = 0 if name.startswith("common") else -1
    number = rank if rank == 0 else len(_files_of(metadata)) - 1
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _written(file, [value], f"__{number}_0.distcp")


def _files_of(metadata: Metadata) -> set[str]:
    return {info.relative_path for info in metadata.storage_data.values()}


def _written(file: io.BytesIO, value: object, name: str) -> _StorageInfo:
    offset = file.tell()
    one = io.BytesIO()
    torch.save(value, one)
    file.write(one.getvalue())
    return _StorageInfo(name, offset, file.tell() - offset)
