"""A trained model on one process: from a checkpoint of any layout to `module(tokens) -> logits`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.steps import check_names, committed, has_manifest
from megapipe.config import ModelConfig, family_of
from megapipe.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megapipe.distributed.mesh import Axis
from megapipe.errors import CheckpointError, ConfigError
from megapipe.kernel_choice import KernelChoice
from megapipe.layout.parameters import shard_of
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.attention import KeyValueCache
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.model import GPTStage
from megapipe.models.gpt.parameters import parameter_table
from megapipe.stage import StageBuild
from megapipe.tensor_parallel.parameter import StageParameters, sharded_parameters
from megapipe.tensor_parallel.weight_grad import WeightGradStore


class PretrainedGPT(nn.Module):
    """A whole model for inference: `module(tokens_BS) -> logits_BSV`, without padded columns."""

    def __init__(self, model: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shards = {
            spec.name: shard_of(spec, tensor_rank=0, tensor_size=1, sequence_parallel=False)
            for spec in parameter_table(model)
        }
        build = StageBuild(
            model=model,
            layers=range(model.num_layers),
            first=True,
            last=True,
            parameters=StageParameters(shards, dtype=dtype, device=device),
            tensor=Axis("tensor"),
            sequence_parallel=False,
            recompute=False,
            dtype=dtype,
            device=device,
            seed=0,
            store=WeightGradStore(),
            kernels=KernelChoice("torch", "torch", "torch"),
        )
        self.config = model
        self.stage = GPTStage(model, build).eval()

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits [B, S, V]; with `caches` (one per layer) tokens continue what those hold."""
        return self.stage.logits(tokens_BS, caches).transpose(0, 1)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty key/value caches, one per layer."""
        return [KeyValueCache() for _ in range(self.config.num_layers)]


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PretrainedGPT:
    """The model of a checkpoint directory, or of the newest whole checkpoint of a run directory.

    Raises CheckpointError if there is none, a byte of it is damaged, a tensor is missing, or the
    model is of another family.
    """
    reader = open_checkpoint(find_checkpoint(Path(path)))
    model = model_config(reader)
    if not isinstance(model, GPTConfig):
        raise CheckpointError(
            f'{reader.path} is of model.family = "{model.family}", and only "gpt" can be loaded.'
        )
    module = PretrainedGPT(model, dtype, torch.device(device))
    fill(module, reader)
    return module


def load_kept_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint keeps, wherever the run's own has gone; `path` as above.

    Raises CheckpointError if it keeps none, or a byte of it is damaged.
    """
    reader = open_checkpoint(find_checkpoint(Path(path)))
    name = next((name for name in TOKENIZER_FILES if name in reader.files), None)
    if name is None:
        raise CheckpointError(f"{reader.path} holds no tokenizer")
    for file in reader.files:
        reader.read_file(file)  # verifies it
    return load_tokenizer(reader.path / name, key=None)


def check_kept_vocabulary(path: str | Path, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError if the tokenizer has ids that the model's embedding has not; reads
    no weights. `path` as above."""
    reader = open_checkpoint(find_checkpoint(Path(path)))
    size = model_config(reader).vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{reader.path}: its tokenizer {tokenizer.path.name} numbers tokens up to "
            f"{tokenizer.vocab_size - 1:,}, and its model has only {size:,} "
            "(model.vocab_size in its config.toml), so they don't belong together. Take another "
            "checkpoint of the run."
        )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that the user means by a path: itself, or the newest whole one of a run."""
    if has_manifest(path):
        return path
    for root in (path / "checkpoints", path):
        if root.is_dir() or root.is_symlink():
            check_names(root)
        if not committed(root):
            continue
        found = newest_valid(root)
        if found.path is None:
            raise CheckpointError(
                f"{root} holds no whole checkpoint, of {len(found.skipped)}: "
                f"{found.skipped[0].problems[0]}. `megapipe inspect {root}` lists them."
            )
        return found.path
    return path  # reading it says what it is


def model_config(reader: CheckpointReader) -> ModelConfig:
    """The shape of the model that the checkpoint's run trained.

    Raises CheckpointError where there is no such family here.
    """
    values = reader.config["model"]
    try:
        return family_of(values, FAMILIES).config.model_validate(values)
    except ConfigError as error:
        raise CheckpointError(f"{reader.path}: {error}") from error


def fill(module: nn.Module, reader: CheckpointReader) -> None:
    """Read every shard of every parameter; a tensor that is missing is an error."""
    parameters = list(sharded_parameters(module))
    shards = [shard for parameter in parameters for shard in parameter.shards]
    reader.require({f"weights/{shard.name}": shard.global_shape for shard in shards})
    for parameter in parameters:
        for shard in parameter.shards:
            values = reader.read(f"weights/{shard.name}", shard.start, shard.shape)
            shard.view(parameter.data).copy_(values)
