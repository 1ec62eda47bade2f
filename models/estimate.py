"""What stages cost, by arithmetic: for plans and proofs, where nothing can be measured.

Only ratios matter to a schedule, so times are in FLOPs: matrix products alone, as in `flops`, of
one microbatch on one tensor rank. Transfers take none. Activations are what the layers of `gpt`
save for the backward pass; measured amounts are within a tenth (tests/models/test_estimate.py).
"""

from megapipe.config import Config
from megapipe.models.flops import (
    attention_flops_per_token,
    embedding_flops_per_token,
    matmul_flops_per_token,
    output_flops_per_token,
)
from megapipe.models.parameters import padded_vocab_size
from megapipe.models.partition import layers_per_stage
from megapipe.pipeline.schedule import Costs

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def estimated_costs(config: Config) -> Costs:
    """FLOPs of each stage. With recompute a backward begins with another forward."""
    model, train = config.model, config.train
    length = train.sequence_length
    matmul, attention = matmul_flops_per_token(model), attention_flops_per_token(model, length)
    # Three products for each weight: forward, input gradient, weight gradient. Attention has two
    # in the forward, four in the backward, and no weights.
    forward, backward, weight = (
        matmul / 3 + attention / 3,
        matmul / 3 + attention * 2 / 3,
        matmul / 3,
    )
    again = forward if train.recompute == "full" else 0.0
    output, embedding = output_flops_per_token(model) / 3, embedding_flops_per_token(model)
    scale = train.micro_batch_size * length / config.parallel.tensor
    layers = layers_per_stage(config)
    last = len(layers) - 1

    def costs(layer: float, first_stage: float, last_stage: float) -> list[float]:
        return [
            scale * (count * layer + (stage == 0) * first_stage + (stage == last) * last_stage)
            for stage, count in enumerate(layers)
        ]

    return Costs(
        forward=costs(forward, embedding / 3, output),
        backward_input=costs(backward + again, embedding * 2 / 3, output),
        backward_weight=costs(weight, 0.0, output),
    )


def estimated_activation_bytes(config: Config) -> list[float]:
    """Bytes that a microbatch takes at each stage, from its forward to the end of its backward."""
    model, train, tensor = config.model, config.train, config.parallel.tensor
    # Elements of one token on a rank: x the residual stream, q and kv query and key (or value).
    x = model.hidden_size / (tensor if config.parallel.sequence_parallel else 1)
    q = model.num_heads * model.head_dim / tensor
    kv = max(1.0, model.num_kv_heads / tensor) * model.head_dim
    rotated = q + kv if model.position == "rope" else 0.0
    up = 2 * model.ffn_hidden_size / tensor if model.activation == "swiglu" else 0.0
    down = model.ffn_hidden_size / tensor
    # Both norms save what comes in, the products behind them what the norms make of it; query, key
    # and value stay in one piece; attention saves its output twice, in its order and the next's.
    layer = 4 * x + (q + 2 * kv) + rotated + 2 * q + (up or down) + down
    if model.attention_dropout > 0:
        layer += 3 * model.num_heads / tensor * train.sequence_length
    if train.recompute == "full":
        layer = x
    head = 2 * x + padded_vocab_size(model.vocab_size, tensor) / tensor
    per_element = BYTES[train.precision] * train.micro_batch_size * train.sequence_length
    layers = layers_per_stage(config)
    return [
        per_element * (count * layer + (stage == len(layers) - 1) * head)
        for stage, count in enumerate(layers)
    ]
