"""What only GPT-2's configs have."""

from typing import Any

import pytest

from megapipe.models.gpt.architectures.gpt2 import GPT2 as ARCHITECTURE
from tests.models.gpt.architectures.published import GPT2
from tests.models.gpt.architectures.test_hugging_face import read, refusal


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scale_attn_by_inverse_layer_idx", True, "= true is not supported"),
        ("scale_attn_weights", False, "= false is not supported"),
        ("activation_function", "relu", '= "relu" is not supported'),
        ("embd_pdrop", 0.0, "= 0.0 and resid_pdrop = 0.1 are one number here"),
        ("n_head", 7, "n_embd = 768 is no multiple of n_head = 7"),
        ("n_inner", 0, "= 0 is not a whole number from 1"),
        ("rope_theta", 10000.0, "= 10000.0 is a key that is not known here"),
    ],
)
def test_what_is_refused(key: str, value: Any, said: str) -> None:
    message = refusal(GPT2, **{key: value})
    assert message.count("\n") == 1, message
    assert key in message
    assert said in message


@pytest.mark.parametrize(
    ("name", "ours"), [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu",) * 2]
)
def test_activations(name: str, ours: str) -> None:
    assert read({**GPT2.config, "activation_function": name}).activation == ours


def test_dropout_that_is_written_as_a_whole_number() -> None:
    model = read({**GPT2.config, "resid_pdrop": 0, "embd_pdrop": 0.0, "attn_pdrop": 0})
    assert (model.dropout, model.attention_dropout) == (0, 0)


def test_the_longest_sequence_has_its_old_name_too() -> None:
    written = ARCHITECTURE.write_config(read(GPT2.config))
    assert (written["n_ctx"], written["n_positions"]) == (1024, 1024)
