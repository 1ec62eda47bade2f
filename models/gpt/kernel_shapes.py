"""The sizes at which a model calls the kernels."""

from megapipe.kernels.examples.example import LayerShape
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.presets import PRESETS

TOKENS, LONGEST = 8192, 8192
"""Of a microbatch, in as few sequences as the model takes."""


def shape_of(preset: str, tensor: int, sequence_length: int | None = None) -> LayerShape | None:
    """None where that many ranks can't share the model's heads, vocabulary aside (it is padded).
    Without a length, the longest sequence that the model takes, up to `LONGEST`."""
    model = GPTConfig(**PRESETS[preset])
    kv_heads = model.num_kv_heads
    shared = kv_heads % tensor == 0 or tensor % kv_heads == 0
    if model.num_heads % tensor or model.ffn_hidden_size % tensor or not shared:
        return None
    sequence = sequence_length or min(LONGEST, model.max_sequence_length)
    heads, kv_heads = model.num_heads // tensor, max(1, kv_heads // tensor)
    ffn = model.ffn_hidden_size // tensor
    matrices = 3 if model.activation == "swiglu" else 2
    attention = model.hidden_size * model.head_dim * 2 * (heads + kv_heads)
    return LayerShape(
        model=preset,
        tensor=tensor,
        batch=max(1, TOKENS // sequence),
        sequence=sequence,
        sequence_part=sequence // tensor,
        hidden=model.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        ffn=ffn,
        vocab=-(-model.vocab_size // tensor),
        shard=attention + matrices * model.hidden_size * ffn,
    )
