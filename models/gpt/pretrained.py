"""A trained model on one process: from a checkpoint of any layout to `module(tokens) -> logits`."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import open_checkpoint
from megapipe.conversion.hugging_face.companions import check_companions
from megapipe.conversion.kind import kind_of
from megapipe.conversion.model_at import model_at
from megapipe.conversion.open import kept_tokenizer, load_weights, model_of, open_weights
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import CheckpointError, DataError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.attention import KeyValueCache
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.family import FAMILY
from megapipe.models.gpt.model import GPTStage
from megapipe.stage import whole_model


class PretrainedGPT(nn.Module):
    """A whole model for inference: `module(tokens_BS) -> logits_BSV`, without padded columns."""

    def __init__(self, model: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = model
        self.stage = cast(GPTStage, whole_model(FAMILY, model, dtype=dtype, device=device))

    @torch.no_grad()
    def forward(self, tokens_BS: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits [B, S, V]; with `caches` (one per layer) tokens continue what those hold.

        Raises DataError for tokens, or learned positions, that the model does not have.
        """
        self._check(tokens_BS, caches[0].length if caches else 0)
        return self.stage.logits(tokens_BS, caches).transpose(0, 1)

    def _check(self, tokens_BS: Tensor, offset: int) -> None:
        model = self.config
        least, most = map(int, tokens_BS.aminmax())
        if least < 0 or most >= model.vocab_size:
            raise DataError(
                f"token {least if least < 0 else most} is none of the model's, which are 0 to "
                f"{model.vocab_size - 1} (model.vocab_size)."
            )
        length = offset + tokens_BS.shape[1]
        if model.position == "learned" and length > model.max_sequence_length:
            raise DataError(
                f"{length} tokens are more than the model has positions for, "
                f"{model.max_sequence_length} (model.max_sequence_length)."
            )

    def new_caches(self) -> list[KeyValueCache]:
        """Empty key/value caches, one per layer."""
        return [KeyValueCache() for _ in range(self.config.num_layers)]


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PretrainedGPT:
    """The model of a directory of Hugging Face's, of a Megatron checkpoint, of a checkpoint of
    ours, or of the newest whole one of a run directory.

    Raises CheckpointError if there is none, a byte of it is damaged, a tensor is missing, or the
    model is of another family; ConversionError for a Hugging Face model that we don't compute.
    """
    source = open_weights(Path(path), FAMILIES)
    model = source.model
    if not isinstance(model, GPTConfig):
        raise CheckpointError(
            f'{source.place} is of model.family = "{model.family}", and only "gpt" can be loaded.'
        )
    module = PretrainedGPT(model, dtype, torch.device(device))
    load_weights(module, source)
    return module.eval()


def load_kept_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a directory of Hugging Face's, or that a checkpoint keeps, wherever the
    run's own has gone; `path` as above.

    Raises CheckpointError if it keeps none, or a byte of it is damaged; DataError or
    ConversionError for a directory of Hugging Face's with none that is read.
    """
    if kind_of(Path(path)) == "hugging_face":
        check_companions(Path(path))
        return load_tokenizer(path, key=None)
    reader = open_checkpoint(find_checkpoint(Path(path)))
    tokenizer = kept_tokenizer(reader)
    if tokenizer is None:
        raise CheckpointError(f"{reader.path} holds no tokenizer")
    return tokenizer


def check_kept_vocabulary(path: str | Path, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError if the tokenizer has ids that the model's embedding has not; reads
    no weights. `path` as above."""
    if kind_of(Path(path)) == "hugging_face":
        place, config, instead = Path(path), "config.json", "Download both again, from one place."
        size = model_at(place, FAMILIES).vocab_size
    else:
        reader = open_checkpoint(find_checkpoint(Path(path)))
        place, config, instead = reader.path, "config.toml", "Take another checkpoint of the run."
        size = model_of(reader, FAMILIES).vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{place}: its tokenizer {tokenizer.path.name} numbers tokens up to "
            f"{tokenizer.vocab_size - 1:,}, and its model has only {size:,} (vocab_size in its "
            f"{config}), so they don't belong together. {instead}"
        )
