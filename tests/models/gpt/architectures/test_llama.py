"""What only configs of Llama and its kin have: activations, biases, windows by layer."""

from typing import Any

import pytest

from tests.models.gpt.architectures.published import PUBLISHED
from tests.models.gpt.architectures.test_hugging_face import read, refusal

LLAMA, QWEN = PUBLISHED["Llama-3.1-8B"], PUBLISHED["Qwen2-0.5B"]
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("Llama-3.1-8B", {"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        ("Llama-3.1-8B", {"attention_bias": True}, "mlp_bias = false is not supported"),
        ("Llama-3.1-8B", {"mlp_bias": True}, "mlp_bias = true is not supported"),
        (
            "Llama-3.1-8B",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5 is not supported",
        ),
        ("Llama-3.1-8B", {"pretraining_tp": 2}, "pretraining_tp = 2 is not supported"),
        ("Llama-3.1-8B", {"rope_interleaved": True}, "rope_interleaved = true is not supported"),
        ("Llama-3.1-8B", {"sliding_window": 4096}, "sliding_window = 4096 is a key"),
        ("Llama-3.1-8B", {"layer_types": [SLIDING] * 32}, "layer_types = ["),
        ("Llama-3.1-8B", {"attention_dropout": 1.0}, "attention_dropout = 1.0 is not from 0"),
        ("Llama-3.1-8B", {"rms_norm_eps": 0}, "rms_norm_eps = 0.0 is not above 0"),
        ("Llama-3.1-8B", {"rms_norm_eps": 10**400}, "rms_norm_eps = inf is not a finite number"),
        ("Llama-3.1-8B", {"num_attention_heads": 31}, "hidden_size = 4096 is no multiple of"),
        ("Qwen3-0.6B", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("Phi-3-mini-4k-instruct", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
        ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope = true is a key"),
    ],
    ids=str,
)
def test_what_is_refused(name: str, change: dict[str, Any], said: str) -> None:
    message = refusal(PUBLISHED[name], **change)
    assert message.count("\n") == 1, message
    assert said in message


def test_biases_of_both_kinds() -> None:
    model = read({**LLAMA.config, "attention_bias": True, "mlp_bias": True})
    assert model.bias
    assert model.qkv_bias


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"layer_types": [FULL] * 24}, None),
        ({"use_sliding_window": True}, None),  # max_window_layers has all of them
        ({"use_sliding_window": True, "max_window_layers": 0}, 131072),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, None),
        (
            {
                "use_sliding_window": True,
                "max_window_layers": 0,
                "sliding_window": 64,
                "layer_types": [SLIDING] * 24,
            },
            64,
        ),
    ],
    ids=str,
)
def test_windows(change: dict[str, Any], window: int | None) -> None:
    assert read({**QWEN.config, **change}).sliding_window == window


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": [FULL] * 23}, "is not a list of 24 entries"),
        ({"layer_types": "full"}, "is not a list of 24 entries"),
        ({"layer_types": [FULL] * 23 + [SLIDING]}, f'layer_types = "{SLIDING}" is not'),
        ({"layer_types": [{}] * 24}, "layer_types = {} is not"),
        (
            {"use_sliding_window": True, "max_window_layers": 12},
            "max_window_layers = 12 is not supported",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "layer_types": [FULL] * 24},
            f'layer_types = "{FULL}" is not supported (supported: "{SLIDING}")',
        ),
        ({"max_window_layers": -1}, "max_window_layers = -1 is not a whole number from 0"),
        ({"num_hidden_layers": 2000, "layer_types": [FULL]}, "is not a list of 2,000 entries"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_windows_that_differ_by_layer(change: dict[str, Any], said: str) -> None:
    assert said in refusal(QWEN, **change)
