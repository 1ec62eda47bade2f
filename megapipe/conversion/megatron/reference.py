"""Logits by Megatron-core: the other side of a proof.

Megatron-core keeps its groups of ranks in globals, and on a machine without CUDA some of torch's
functions have to be replaced for it. So it computes in a process of its own: this file, run.

Its own reader of checkpoints loads pickles. The weights therefore come through ours, and the proof
is of the tables: which tensor is which, and what the arguments mean.
"""

import contextlib
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megapipe.conversion.megatron.directory import MegatronCheckpoint, open_megatron
from megapipe.conversion.megatron.sharing import OWN_NORMS
from megapipe.conversion.proof import Sequences, round_weights
from megapipe.errors import ConversionError

PADDING = 128
"""Rows of the vocabulary are a multiple of this in the model that computes."""


def require_megatron() -> None:
    """Raises ConversionError where Megatron-core is not installed."""
    if not _is_installed():
        raise ConversionError(
            "not proven: megatron-core, which the result is compared with, is not installed. "
            "Install it (pip install megatron-core), or convert without a proof: --no-proof."
        )


def _is_installed() -> bool:
    """Other packages are called megatron too."""
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


def megatron_logits(
    path: Path,
    given: Mapping[str, object],
    defaults: Mapping[str, object],
    sequences: Sequences,
    layers: int | None = None,
    rounded: torch.dtype | None = None,
) -> Mapping[str, Tensor]:
    """Logits [S, vocabulary] in float32 by Megatron-core's GPTModel with the weights of a
    checkpoint, as `transformers_logits`.

    What it computes is said by the arguments that the checkpoint holds, and by `given`, which it
    does not hold; `defaults` are for the rest. Raises ConversionError where it can't compute that.
    """
    require_megatron()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(dict(sequences), folder / "tokens.safetensors")
        asked = {
            "checkpoint": str(path.absolute()),
            "given": dict(given),
            "defaults": dict(defaults),
            "layers": layers,
            "rounded": None if rounded is None else str(rounded).removeprefix("torch."),
        }
        (folder / "asked.json").write_text(json.dumps(asked))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "megapipe.conversion.megatron.reference", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConversionError(f"Megatron-core can't compute the model: {last}")
        return load_file(folder / "logits.safetensors")


# --- In the process of its own -------------------------------------------------------------------


def main(folder: Path) -> None:
    """Compute what `megatron_logits` has left in a folder."""
    asked = json.loads((folder / "asked.json").read_text())
    if not torch.cuda.is_available():
        _do_without_cuda()
    checkpoint = open_megatron(asked["checkpoint"])
    held = {name: value for name, value in checkpoint.arguments.items() if value is not None}
    if "layernorm_epsilon" in held:  # the newer name, where both are there the same
        held.setdefault("norm_epsilon", held["layernorm_epsilon"])
    arguments = _completed({**asked["defaults"], **held, **asked["given"]})
    layers = min(asked["layers"] or arguments["num_layers"], arguments["num_layers"])
    model = _build({**arguments, "num_layers": layers})
    _load(model, checkpoint, layers)
    if asked["rounded"] is not None:
        round_weights(model, getattr(torch, asked["rounded"]))
    sequences = load_file(folder / "tokens.safetensors")
    save_file(
        {name: _logits(model, ids, arguments["vocab_size"]) for name, ids in sequences.items()},
        folder / "logits.safetensors",
    )
    dist.destroy_process_group()


def _completed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron itself makes of its arguments before it builds a model."""
    groups = arguments["num_query_groups"]
    if not arguments["group_query_attention"]:
        groups = arguments["num_attention_heads"]
    return {**arguments, "num_query_groups": groups}


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, vocabulary: int) -> Tensor:
    device = next(model.parameters()).device
    positions = torch.arange(len(ids), device=device)[None]
    found: Tensor = model(ids[None].to(device), positions, None)
    return found[0, :, :vocabulary].float().cpu().contiguous()


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    """GPTModel on one rank, in float32 and for inference."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(0)
    gelu = functools.partial(F.gelu, approximate="tanh") if arguments["openai_gelu"] else F.gelu
    config = TransformerConfig(
        num_layers=arguments["num_layers"],
        hidden_size=arguments["hidden_size"],
        num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"],
        kv_channels=arguments["kv_channels"],
        ffn_hidden_size=arguments["ffn_hidden_size"],
        normalization=arguments["normalization"],
        layernorm_epsilon=arguments["norm_epsilon"],
        gated_linear_unit=arguments["swiglu"],
        activation_func=F.silu if arguments["swiglu"] else gelu,
        add_bias_linear=arguments["add_bias_linear"],
        add_qkv_bias=arguments["add_qkv_bias"],
        qk_layernorm=arguments["qk_layernorm"],
        window_size=arguments["window_size"] and tuple(arguments["window_size"]),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
    )
    spec = get_gpt_layer_local_spec(
        normalization=arguments["normalization"], qk_layernorm=arguments["qk_layernorm"]
    )
    rows = -(-arguments["vocab_size"] // PADDING) * PADDING
    model: nn.Module = GPTModel(
        config,
        spec,
        rows,
        arguments["max_position_embeddings"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rope_scaling=arguments["use_rope_scaling"],
        rope_scaling_factor=arguments["rope_scaling_factor"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
    )
    return model.eval()


def _load(model: nn.Module, checkpoint: MegatronCheckpoint, layers: int) -> None:
    """Fill every parameter. A missing tensor is an error; padding rows stay zero."""
    for name, parameter in model.named_parameters():
        for own, fused in OWN_NORMS.items():
            name = name.replace(own, fused)
        stored = checkpoint.tensors[name].shape
        rows = min(stored[0], parameter.shape[0])
        values = checkpoint.read(name, (0,) * len(stored), (rows, *stored[1:]))
        parameter.data.zero_()
        parameter.data[:rows] = values.to(parameter.dtype)


def _do_without_cuda() -> None:
    """Replace what Megatron-core calls of CUDA, so that it computes on the CPU."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import utils

    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **keys: None
    cuda.set_device = lambda *args: None
    cuda.nvtx.range_push = lambda *args: None
    cuda.nvtx.range_pop = lambda *args: None
    for name in ("zeros", "empty", "ones", "arange", "tensor", "full", "rand", "randn"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_class: Any = torch.Tensor
    tensor_class.cuda = lambda self, *args, **keys: self
    tracker: Any = random.CudaRNGStatesTracker
    tracker.fork = lambda self, *args, **keys: contextlib.nullcontext()

    @functools.lru_cache
    def causal_mask(length: int) -> Tensor:
        return torch.triu(torch.ones(length, length), diagonal=1).bool()

    for module in (fused_softmax, utils):
        if hasattr(module, "get_default_causal_mask"):
            module.get_default_causal_mask = causal_mask


def _on_cpu(make: Any) -> Any:
    """The same function, for which a CUDA device is the CPU."""

    def made(*args: Any, **keys: Any) -> Any:
        if str(keys.get("device", "")).startswith("cuda"):
            keys["device"] = torch.device("cpu")
        return make(*args, **keys)

    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
