"""What a microbatch costs in a layer and at the ends of a GPT, from arithmetic alone.

Of a matrix product's three (forward, input gradient, weight gradient) each takes 2 N FLOPs for N
weights. Attention's two products have no weights: forward 4 A K, and all of 8 A K for the gradient
belongs to the input gradient (the letters are those of `flops.py`). Full recompute adds a forward
of the layers to the input gradient. Norms and activations are not counted.
"""

from megapipe.config import Config
from megapipe.kernel_choice import wanted_kernels
from megapipe.layout.axes import Axes
from megapipe.layout.family import PlaceCosts
from megapipe.layout.parameters import FIRST, LAST, Place
from megapipe.models.gpt.activations import embedding_bytes, head_bytes, layer_bytes
from megapipe.models.gpt.config import gpt_model
from megapipe.models.gpt.flops import (
    attended_keys,
    embedding_flops_per_token,
    layer_flops_per_token,
    output_flops_per_token,
)


def place_costs(config: Config, axes: Axes, place: Place) -> PlaceCosts:
    """The costs of the embedding, of a layer, or of the last norm, output layer and loss."""
    choice = wanted_kernels(config, on_gpu=config.train.device != "cpu")
    if place == FIRST:
        moved = embedding_flops_per_token(gpt_model(config))
        return _thirds(0.0, moved, embedding_bytes(config, axes, choice))
    if place == LAST:
        flops = output_flops_per_token(gpt_model(config))
        return _thirds(flops, flops, head_bytes(config, axes))
    return _layer(config, layer_bytes(config, axes, choice))


def _thirds(flops: float, work: float, activation_bytes: int) -> PlaceCosts:
    third = work / 3
    return PlaceCosts(flops, third, third, third, work, activation_bytes)


def _layer(config: Config, activation_bytes: int) -> PlaceCosts:
    model, length = gpt_model(config), config.train.sequence_length
    flops = layer_flops_per_token(model, length)
    attention = model.num_heads * model.head_dim * attended_keys(model, length)
    products = flops - 12 * attention
    forward = products / 3 + 4 * attention
    again = forward if config.train.recompute == "full" else 0.0
    return PlaceCosts(
        flops=flops,
        forward=forward,
        backward_input=products / 3 + 8 * attention + again,
        backward_weight=products / 3,
        balance=flops,
        activation_bytes=activation_bytes,
    )
