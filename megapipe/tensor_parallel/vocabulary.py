"""How a vocabulary is cut over tensor ranks."""

VOCABULARY_MULTIPLE = 64
"""Each rank's rows are padded to a multiple of this: GPU matmuls want it (GPT-2's 50,257 rows
become 50,304). Padding rows are zero, get no gradient, and are in no checkpoint."""


def vocabulary_rows(vocab_size: int, tensor_size: int) -> int:
    """Rows of the padded vocabulary on each tensor rank."""
    rows = -(-vocab_size // tensor_size)
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
