"""Arithmetic of a training step, as model FLOPs: what the mathematics needs, recompute not counted.

For one token, forward and backward (the backward pass of a matrix product is two products):

    FLOPs = 6 * N + 12 * L * A * K

    N   weights that take part in matrix products: all but embeddings, positions, norms and biases;
        the output layer counts, tied or not
    L   layers
    A   num_heads * head_dim, the width of attention
    K   keys that a query meets on average: half the sequence, as attention is causal:
        S / 2, or W - W^2 / (2 S) with a sliding window of W < S tokens

The term 12 * A * K is two products (query by key, probability by value) of 2 * A * K each, three
times. Padding of the vocabulary and masks between documents are not counted. Some count attention
in full, 12 * L * A * S; figures made so are higher and must not be compared with these.
"""

from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import ParameterSpec, layer_table


def attended_keys(model: GPTConfig, sequence_length: int) -> float:
    """Keys that a query meets on average: K of the module's docstring."""
    window = min(model.sliding_window or sequence_length, sequence_length)
    return window - window**2 / (2 * sequence_length)


def layer_flops_per_token(model: GPTConfig, sequence_length: int) -> float:
    """Forward and backward of one block for one token."""
    matmul = sum(spec.size for spec in layer_table(model, 0) if _is_matrix(spec))
    attention = model.num_heads * model.head_dim * attended_keys(model, sequence_length)
    return 6.0 * matmul + 12.0 * attention


def output_flops_per_token(model: GPTConfig) -> float:
    """Forward and backward of the output layer for one token."""
    return 6.0 * model.vocab_size * model.hidden_size


def embedding_flops_per_token(model: GPTConfig) -> float:
    """Stand-in for the embedding, which moves memory only: a row read, a row added to, a row sent.

    It matters for balancing stages alone and is in no count of FLOPs.
    """
    return 6.0 * model.hidden_size


def gpt_flops_per_token(model: GPTConfig, sequence_length: int) -> float:
    """Forward and backward of the whole model for one token of a sequence of that length."""
    layers = model.num_layers * layer_flops_per_token(model, sequence_length)
    return layers + output_flops_per_token(model)


def _is_matrix(spec: ParameterSpec) -> bool:
    return len(spec.shape) == 2
