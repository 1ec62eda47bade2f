"""The sizes at which a rank of a model calls the kernels, by hand."""

from megapipe.models.gpt.kernel_shapes import shape_of


def test_the_part_of_one_rank() -> None:
    whole, part = shape_of("llama3-8b", 1), shape_of("llama3-8b", 8)
    assert whole is not None
    assert part is not None
    assert (whole.heads, whole.kv_heads, whole.ffn, whole.vocab) == (32, 8, 14336, 128256)
    assert (part.heads, part.kv_heads, part.ffn, part.vocab) == (4, 1, 1792, 16064)
    assert 16064 == 251 * 64 > 128256 / 8, "rows are padded, as in a run"
    assert (part.tokens, part.tokens_part) == (8192, 1024)
    # q and o 4096 x 4096, k and v 4096 x 1024, three matrices 4096 x 14336.
    assert whole.shard == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert part.shard * 8 == whole.shard
    assert shape_of("gpt2", 8) is None, "12 heads"
    small = shape_of("gpt2", 1)
    assert small is not None
    assert (small.batch, small.sequence, small.checked().tokens) == (8, 1024, 1024)
