"""FLOPs against the papers' closed forms and against a count by hand."""

import pytest

from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.flops import attended_keys, gpt_flops_per_token
from megapipe.models.gpt.presets import PRESETS


def model(preset: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate({**PRESETS[preset], **changes})


def test_gpt_against_the_formula_of_the_megatron_paper() -> None:
    """Narayanan et al. 2021, equation 3, without recompute (3 / 4 of it) and attention halved."""
    shape, sequence = model("megatron-145b"), 2048
    layers, hidden, vocabulary = shape.num_layers, shape.hidden_size, shape.vocab_size
    paper = (
        72
        * layers
        * hidden**2
        * (1 + sequence / (6 * hidden) / 2 + vocabulary / (12 * layers * hidden))
    )
    assert gpt_flops_per_token(shape, sequence) == pytest.approx(paper, rel=1e-12)


def test_llama_by_hand() -> None:
    shape = model("llama3-8b")
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    matrices = 32 * (attention + 3 * 4096 * 14336) + 128256 * 4096
    by_hand = 6 * matrices + 12 * 32 * 4096 * (8192 / 2)
    assert gpt_flops_per_token(shape, 8192) == pytest.approx(by_hand, rel=1e-12)


def test_embeddings_norms_and_biases_do_not_count() -> None:
    shape = model("gpt2-micro")
    plain = model("gpt2-micro", bias=False, qkv_bias=False, position="rope", norm="rmsnorm")
    untied = model("gpt2-micro", tie_embeddings=False)
    assert gpt_flops_per_token(shape, 64) == gpt_flops_per_token(plain, 64)
    assert gpt_flops_per_token(shape, 64) == gpt_flops_per_token(untied, 64)


@pytest.mark.parametrize("window", [1, 7, 16, 64, 100])
def test_window_is_half_a_triangle_and_a_band(window: int) -> None:
    sequence = 64
    shape = model("mistral-micro", sliding_window=window)
    pairs = sum(min(query + 1, window) for query in range(sequence)) / sequence
    # The convention of half a square leaves half the diagonal out.
    assert attended_keys(shape, sequence) == pytest.approx(pairs, abs=0.5)
    assert attended_keys(shape, sequence) <= pairs


def test_a_window_of_the_whole_sequence_is_no_window() -> None:
    wide, none = model("mistral-micro", sliding_window=64), model("mistral-micro")
    none = none.model_copy(update={"sliding_window": None})
    assert gpt_flops_per_token(wide, 64) == gpt_flops_per_token(none, 64)
    narrow = model("mistral-micro", sliding_window=8)
    assert gpt_flops_per_token(narrow, 64) < gpt_flops_per_token(none, 64)
