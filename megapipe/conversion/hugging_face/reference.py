"""Logits by transformers: the other side of a proof."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapipe.conversion.proof import Sequences, round_weights
from megapipe.errors import ConversionError
from megapipe.files import shown


def require_transformers() -> None:
    """Raises ConversionError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConversionError(
            "not proven: transformers, which the result is compared with, is not installed. "
            "Install it (pip install transformers), or convert without a proof: --no-proof."
        )


def transformers_logits(
    folder: Path,
    sequences: Sequences,
    layers: int | None = None,
    rounded: torch.dtype | None = None,
) -> Mapping[str, Tensor]:
    """Logits [S, vocabulary] in float32 by the implementation that transformers has of the model
    of a directory; with `layers` by the first of its layers alone. Weights are rounded to the
    dtype `rounded` first.

    Nothing is downloaded and no code of the directory is run. Raises ConversionError where
    transformers can't load it, or finds no values for a weight.
    """
    require_transformers()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **options)
            if layers is not None:
                _keep_layers(config, layers)
            loader: Any = transformers.AutoModelForCausalLM
            model, info = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # of any kind, as it is for another library to choose
            said = shown(" ".join(str(error).split())[:400])
            raise ConversionError(
                f"transformers can't load {shown(folder)}: {type(error).__name__}: {said}"
            ) from error
    if info["missing_keys"]:
        raise ConversionError(
            f"transformers finds no values for {', '.join(sorted(info['missing_keys'])[:5])} in "
            f"{shown(folder)}"
        )
    model.eval()
    if rounded is not None:
        round_weights(model, rounded)
    with torch.no_grad():
        return {
            name: model(tokens[None], use_cache=False).logits[0]
            for name, tokens in sequences.items()
        }


def _keep_layers(config: Any, layers: int) -> None:
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = kinds[: config.num_hidden_layers]
