"""What only StarCoder2's configs have."""

from typing import Any

import pytest

from tests.models.gpt.architectures.published import STARCODER2
from tests.models.gpt.architectures.test_hugging_face import read, refusal


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mlp_type", "gated", '= "gated" is not supported (supported: "default")'),
        ("norm_type", "rms_norm", '= "rms_norm" is not supported'),
        ("hidden_act", "silu", '= "silu" is not supported'),
        ("embedding_dropout", 0.0, "= 0.0 and residual_dropout = 0.1 are one number here"),
        ("sliding_window", 0, "= 0 is not a whole number from 1"),
    ],
)
def test_what_is_refused(key: str, value: Any, said: str) -> None:
    message = refusal(STARCODER2, **{key: value})
    assert message.count("\n") == 1, message
    assert f"{key} {said}" in message


def test_without_biases() -> None:
    model = read({**STARCODER2.config, "use_bias": False})
    assert not model.bias
    assert not model.qkv_bias
