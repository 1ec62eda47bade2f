"""The sizes at which a model calls the kernels."""

from megapipe.kernels.examples.example import LayerShape
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import local_sizes
from megapipe.models.gpt.presets import PRESETS

TOKENS, LONGEST = 8192, 8192
"""Of a microbatch, in as few sequences as the model takes."""


def shape_of(preset: str, tensor: int, sequence_length: int | None = None) -> LayerShape | None:
    """None where that many ranks can't share the model. Without a length, the longest sequence that
    the model takes, up to `LONGEST`."""
    model = GPTConfig(**PRESETS[preset])
    if any(model.tensor_problems(tensor)):
        return None
    local = local_sizes(model, tensor)
    sequence = sequence_length or min(LONGEST, model.max_sequence_length)
    return LayerShape(
        model=preset,
        tensor=tensor,
        batch=max(1, TOKENS // sequence),
        sequence=sequence,
        sequence_part=sequence // tensor,
        hidden=model.hidden_size,
        heads=local.heads,
        kv_heads=local.kv_heads,
        head_dim=model.head_dim,
        ffn=local.ffn,
        vocab=local.vocabulary,
        shard=local.matrices,
    )
