"""Small models of transformers in the architectures that are converted, with large logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 259
LENGTH = 96
"""Of sequences: beyond the sliding windows and the original lengths of rotary positions."""
WINDOW = 16
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-untied": lambda: transformers.GPT2Config(**GPT2, n_inner=96, tie_word_embeddings=False),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama3": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "llama-biases": lambda: transformers.LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True, head_dim=24
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE, sliding_window=WINDOW),
    "starcoder2-bare": lambda: transformers.Starcoder2Config(
        **SHAPE, use_bias=False, tie_word_embeddings=False
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, sliding_window=WINDOW),
}


def make_model(case: str) -> Any:
    """A model of a case whose largest logit is about 10, biases and norms at random too."""
    torch.manual_seed(sum(map(ord, case)))
    model = transformers.AutoModelForCausalLM.from_config(
        CASES[case](), attn_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        scale = 10 / float(model(tokens()).logits.abs().max())
        for name, parameter in model.named_parameters():
            if name.startswith(("model.norm.", "transformer.ln_f.")):
                parameter.mul_(scale)
    return model


def tokens() -> Tensor:
    """[2, LENGTH] random ones."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)


def save_model(case: str, folder: Path) -> Path:
    """The directory of a case's model, as transformers writes it."""
    make_model(case).save_pretrained(folder)
    return folder


def greedy(model: Any) -> list[int]:
    """The likeliest continuation of a few tokens."""
    ids = tokens()[:1, :8]
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    return found[0].tolist()
