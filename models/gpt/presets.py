"""Named shapes. A preset sets keys of [model]; keys written in the config win over it.

Dropout is left at 0 everywhere: pretraining on more text than one pass sees needs none.
"""

from collections.abc import Iterator
from typing import Any

Preset = dict[str, Any]

# GPT-2 (Radford et al. 2019): the released checkpoints.
_GPT2: Preset = {
    "vocab_size": 50257,
    "max_sequence_length": 1024,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "position": "learned",
    "tie_embeddings": True,
    "bias": True,
    "qkv_bias": True,
}
# GPT-3 (Brown et al. 2020, table 2.1), every layer dense. Two rows of the table contradict
# themselves (heads * head size is not the width): 1.3b is taken with 16 heads of 128, 13b with
# width 5120, as everybody does.
_GPT3: Preset = {**_GPT2, "max_sequence_length": 2048}
# Megatron-LM at scale (Narayanan et al. 2021, table 1).
_MEGATRON: Preset = {**_GPT3, "vocab_size": 51200}

_LLAMA: Preset = {
    "norm": "rmsnorm",
    "norm_epsilon": 1e-5,
    "activation": "swiglu",
    "position": "rope",
    "rope_theta": 10000.0,
    "tie_embeddings": False,
    "bias": False,
    "qkv_bias": False,
}
_LLAMA2: Preset = {**_LLAMA, "vocab_size": 32000, "max_sequence_length": 4096}
# Llama 3.1 (Grattafiori et al. 2024), with the frequency scaling of its 128k context.
_LLAMA3: Preset = {
    **_LLAMA,
    "vocab_size": 128256,
    "max_sequence_length": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_max_sequence_length": 8192,
    },
}
_QWEN2: Preset = {
    **_LLAMA,
    "norm_epsilon": 1e-6,
    "rope_theta": 1000000.0,
    "max_sequence_length": 131072,
    "qkv_bias": True,
}
_QWEN3: Preset = {
    **_LLAMA,
    "vocab_size": 151936,
    "norm_epsilon": 1e-6,
    "rope_theta": 1000000.0,
    "max_sequence_length": 40960,
    "qk_norm": True,
    "head_dim": 128,
    "num_kv_heads": 8,
}


def _shape(num_layers: int, hidden_size: int, num_heads: int, **others: Any) -> Preset:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        **others,
    }


def _micro() -> Iterator[tuple[str, Preset]]:
    """One of each family, small enough that a test trains it in a second."""
    small = {"vocab_size": 509, "max_sequence_length": 128}
    yield "gpt2-micro", _GPT2 | small | _shape(4, 64, 4)
    yield "llama-micro", _LLAMA | small | _shape(4, 64, 8, num_kv_heads=2, ffn_hidden_size=160)
    yield (
        "mistral-micro",
        _LLAMA | small | _shape(4, 64, 8, num_kv_heads=2, ffn_hidden_size=160, sliding_window=16),
    )
    yield (
        "qwen2-micro",
        _QWEN2 | small | _shape(4, 64, 8, num_kv_heads=2, ffn_hidden_size=160, tie_embeddings=True),
    )
    yield (
        "qwen3-micro",
        _QWEN3
        | small
        | _shape(4, 64, 8, num_kv_heads=2, head_dim=16, ffn_hidden_size=160, tie_embeddings=True),
    )


def _gpt() -> Iterator[tuple[str, Preset]]:
    yield "gpt2", _GPT2 | _shape(12, 768, 12)
    yield "gpt2-medium", _GPT2 | _shape(24, 1024, 16)
    yield "gpt2-large", _GPT2 | _shape(36, 1280, 20)
    yield "gpt2-xl", _GPT2 | _shape(48, 1600, 25)
    yield "gpt3-125m", _GPT3 | _shape(12, 768, 12)
    yield "gpt3-350m", _GPT3 | _shape(24, 1024, 16)
    yield "gpt3-760m", _GPT3 | _shape(24, 1536, 16)
    yield "gpt3-1.3b", _GPT3 | _shape(24, 2048, 16)
    yield "gpt3-2.7b", _GPT3 | _shape(32, 2560, 32)
    yield "gpt3-6.7b", _GPT3 | _shape(32, 4096, 32)
    yield "gpt3-13b", _GPT3 | _shape(40, 5120, 40)
    yield "gpt3-175b", _GPT3 | _shape(96, 12288, 96)
    yield "megatron-1.7b", _MEGATRON | _shape(24, 2304, 24)
    yield "megatron-3.6b", _MEGATRON | _shape(30, 3072, 32)
    yield "megatron-7.5b", _MEGATRON | _shape(36, 4096, 32)
    yield "megatron-18b", _MEGATRON | _shape(40, 6144, 48)
    yield "megatron-39b", _MEGATRON | _shape(48, 8192, 64)
    yield "megatron-76b", _MEGATRON | _shape(60, 10240, 80)
    yield "megatron-145b", _MEGATRON | _shape(80, 12288, 96)
    yield "megatron-310b", _MEGATRON | _shape(96, 16384, 128)
    yield "megatron-530b", _MEGATRON | _shape(105, 20480, 128)
    yield "megatron-1t", _MEGATRON | _shape(128, 25600, 160)


def _llama() -> Iterator[tuple[str, Preset]]:
    tiny = {"vocab_size": 8192, "max_sequence_length": 1024}
    yield "llama-tiny", _LLAMA | tiny | _shape(8, 256, 8, ffn_hidden_size=768)
    yield "llama2-7b", _LLAMA2 | _shape(32, 4096, 32, ffn_hidden_size=11008)
    yield "llama2-13b", _LLAMA2 | _shape(40, 5120, 40, ffn_hidden_size=13824)
    yield "llama2-70b", _LLAMA2 | _shape(80, 8192, 64, num_kv_heads=8, ffn_hidden_size=28672)
    # Llama 3.2: the small one shares its embedding with the output and stretches 32 times.
    stretch = {"rope_scaling": _LLAMA3["rope_scaling"] | {"factor": 32.0}, "tie_embeddings": True}
    yield (
        "llama3-1b",
        _LLAMA3 | stretch | _shape(16, 2048, 32, num_kv_heads=8, ffn_hidden_size=8192),
    )
    yield "llama3-8b", _LLAMA3 | _shape(32, 4096, 32, num_kv_heads=8, ffn_hidden_size=14336)
    yield "llama3-70b", _LLAMA3 | _shape(80, 8192, 64, num_kv_heads=8, ffn_hidden_size=28672)
    yield "llama3-405b", _LLAMA3 | _shape(126, 16384, 128, num_kv_heads=8, ffn_hidden_size=53248)
    # Mistral 7B v0.1 (Jiang et al. 2023).
    mistral = {"vocab_size": 32000, "max_sequence_length": 32768, "sliding_window": 4096}
    yield (
        "mistral-7b",
        _LLAMA | mistral | _shape(32, 4096, 32, num_kv_heads=8, ffn_hidden_size=14336),
    )


def _qwen() -> Iterator[tuple[str, Preset]]:
    small = {"vocab_size": 151936, "num_kv_heads": 2, "tie_embeddings": True}
    large = {"vocab_size": 152064}
    yield "qwen2-0.5b", _QWEN2 | small | _shape(24, 896, 14, ffn_hidden_size=4864)
    yield "qwen2-1.5b", _QWEN2 | small | _shape(28, 1536, 12, ffn_hidden_size=8960)
    yield "qwen2-7b", _QWEN2 | large | _shape(28, 3584, 28, num_kv_heads=4, ffn_hidden_size=18944)
    yield (
        "qwen2-72b",
        _QWEN2
        | large
        | _shape(80, 8192, 64, num_kv_heads=8, ffn_hidden_size=29568, norm_epsilon=1e-5),
    )
    tied = {"tie_embeddings": True}
    yield "qwen3-0.6b", _QWEN3 | tied | _shape(28, 1024, 16, ffn_hidden_size=3072)
    yield "qwen3-1.7b", _QWEN3 | tied | _shape(28, 2048, 16, ffn_hidden_size=6144)
    yield "qwen3-4b", _QWEN3 | tied | _shape(36, 2560, 32, ffn_hidden_size=9728)
    yield "qwen3-8b", _QWEN3 | _shape(36, 4096, 32, ffn_hidden_size=12288)
    yield "qwen3-14b", _QWEN3 | _shape(40, 5120, 40, ffn_hidden_size=17408)
    yield "qwen3-32b", _QWEN3 | _shape(64, 5120, 64, ffn_hidden_size=25600)


PRESETS: dict[str, Preset] = {**dict(_micro()), **dict(_gpt()), **dict(_llama()), **dict(_qwen())}
