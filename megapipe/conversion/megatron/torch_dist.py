"""Core's distributed checkpoints ("torch_dist"): global tensors cut into chunks.

    metadata.json    that it is one, and of which version
    .metadata        a pickle of torch.distributed.checkpoint: shapes, chunks, where each chunk lies
    __0_1.distcp     chunks one after the other, each a zip file of torch.save's
    common.pt        what is the same on all ranks: Megatron's arguments, the iteration

Megatron stacks what equal layers hold: `decoder.layers.mlp.linear_fc2.weight` has a first dimension
over the layers. Here each layer has tensors of its own, as if its number stood in the name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megapipe.checkpoint.storage import read_small
from megapipe.conversion.megatron.archive import ByteSpan, TorchArchive, open_archive, whole_file
from megapipe.conversion.megatron.assembly import GlobalTensor, joined, unstacked
from megapipe.conversion.megatron.metadata import METADATA, read_metadata
from megapipe.errors import CheckpointError
from megapipe.files import shown

CONFIG = "metadata.json"
COMMON = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
"""Where newer cores keep what `common.pt` was for."""
MAX_CONFIG_BYTES = 2**16
MAX_LAYERS = 2000
MAX_PARTS = 200_000
"""Of all tensors."""
STACKED = re.compile(r"(.*\blayers)\.(?!\d)(.+)")
"""A tensor over all layers: the layer's number is not in its name."""
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
"""How names begin that are of no weight of the model."""
EXTRA_STATE = "_extra_state"
"""How names end of what kernels of lower precision keep; not part of the model."""
HALVES = ("_w", "_v")
"""Endings of the gate's and the other half of a gated MLP, where they are saved as two tensors."""


@dataclass(frozen=True, slots=True)
class DistributedContents:
    """What an `iter_...` directory holds."""

    tensors: dict[str, GlobalTensor]
    common: Mapping[object, object]
    """What is the same on all ranks: Megatron's arguments, the iteration."""
    objects: Mapping[str, ByteSpan]
    """What was saved as bytes: states of random generators, of some optimizers."""
    unread: tuple[str, ...] = ()
    """Tensors of an optimizer in a format that is not read."""
    archive: TorchArchive | None = None
    """Where the tensors of `common` lie."""

    def object(self, name: str) -> object:
        """One of `objects`."""
        return _unlisted(open_archive(self.objects[name]).content)


def read_distributed(directory: Path) -> DistributedContents:
    """Read where everything lies. Raises CheckpointError."""
    _check_format(directory)
    tables, objects = read_metadata(directory)
    tensors: dict[str, GlobalTensor] = {}
    held = 0
    unread = []
    for name, tensor in tables.items():
        if name.endswith(EXTRA_STATE):
            continue
        try:
            layers = _by_layer(name, tensor)
        except CheckpointError as error:
            if name.startswith(NOT_WEIGHTS):
                unread.append(name)
                continue
            raise CheckpointError(f"{directory / METADATA}: tensor {name}: {error}") from None
        held += sum(len(layer.parts) for layer in layers.values())
        if layers.keys() & tensors.keys() or held > MAX_PARTS:
            raise CheckpointError(f"{directory / METADATA} has {name} twice, or too many parts")
        tensors |= layers
    archive = open_archive(objects.get(COMMON_OBJECT) or whole_file(directory / COMMON))
    common = _unlisted(archive.content)
    if not isinstance(common, dict):
        raise CheckpointError(f"{directory}: {COMMON} or its place among the chunks holds no dict")
    whole = _with_joined_halves(tensors)
    return DistributedContents(whole, common, objects, tuple(unread), archive)


def _unlisted(content: object) -> object:
    """An object without the list of one that Megatron puts it in."""
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def _check_format(directory: Path) -> None:
    if not (directory / CONFIG).exists():
        raise CheckpointError(
            f"{directory} has {METADATA} and no {CONFIG}: a checkpoint of torch's own "
            '("torch_dcp" or "fsdp_dtensor"), which is not read. Save it with '
            "--ckpt-format torch_dist."
        )
    try:
        config = json.loads(read_small(directory / CONFIG, MAX_CONFIG_BYTES))
        backend, version = config["sharded_backend"], config.get("sharded_backend_version", 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{directory / CONFIG} is not what Megatron writes") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(
            f"{directory / CONFIG}: format {shown(str(backend))[:99]!r} of version "
            f'{shown(str(version))[:99]} is not read, only "torch_dist" of version 1. Load and '
            "save it with Megatron and --ckpt-format torch_dist."
        )


def _by_layer(name: str, tensor: GlobalTensor) -> dict[str, GlobalTensor]:
    """The tensor of each layer, where one tensor stacks them. Raises CheckpointError where a tensor
    is not whole."""
    tensor.check_bounds()
    stacked = STACKED.fullmatch(name)
    if stacked is None or not tensor.shape:
        tensor.check()
        return {name: tensor}
    parts = sum(part.rectangle.shape[0] for part in tensor.parts)
    if tensor.shape[0] > MAX_LAYERS or parts > MAX_PARTS or 0 in tensor.shape:
        raise CheckpointError(f"layers in a tensor of shape {list(tensor.shape)} are not read")
    layers = {}
    for number, layer in enumerate(unstacked(tensor)):
        try:
            layer.check()
        except CheckpointError as error:
            raise CheckpointError(f"layer {number}: {error}") from None
        layers[f"{stacked[1]}.{number}.{stacked[2]}"] = layer
    return layers


def _with_joined_halves(tensors: dict[str, GlobalTensor]) -> dict[str, GlobalTensor]:
    """Gate and up in one tensor, where they are two."""
    first, second = HALVES
    for name in [name for name in tensors if name.endswith(first)]:
        whole = name.removesuffix(first)
        if whole + second in tensors:
            tensors[whole] = joined(tensors.pop(name), tensors.pop(whole + second))
    return tensors
