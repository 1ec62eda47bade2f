"""Memory of the activations that a microbatch leaves at a stage, from its forward to its backward.

Counted is what the layers of `model.py` save for the backward pass: inputs of matrix products,
norms and activations, query, key, value and output of attention, exponentials over the vocabulary.
The Triton kernels save less, and are counted where the config would choose them, train.device =
"auto" being taken for a GPU. `tests/models/gpt/test_activations.py` compares all with what autograd
holds. With torch on CPUs the output of attention is there twice, in two orders. Memory that is
freed within an action (and the layer that full recompute computes again at a time) comes on top.
"""

from megapipe.config import Config
from megapipe.kernel_choice import KernelChoice
from megapipe.layout.axes import Axes
from megapipe.layout.shapes import boundary_bytes
from megapipe.models.gpt.config import gpt_model
from megapipe.models.gpt.parameters import local_sizes
from megapipe.precision import PRECISIONS


def embedding_bytes(config: Config, axes: Axes, choice: KernelChoice) -> int:
    """Of one microbatch in the embedding, on one tensor rank."""
    if not gpt_model(config).dropout or choice.kernels != "torch":
        return 0
    element = PRECISIONS[config.train.precision].model_bytes
    return boundary_bytes(config, axes) // element  # a bool each


def head_bytes(config: Config, axes: Axes) -> int:
    """Of one microbatch in the last norm, the matrix product and the loss."""
    model, train = gpt_model(config), config.train
    element = PRECISIONS[train.precision].model_bytes
    hidden = boundary_bytes(config, axes)
    rows = train.sequence_length * train.micro_batch_size
    if train.linear_cross_entropy:  # keeps the gradient of its input, of all tensor ranks' tokens
        return hidden + rows * model.hidden_size * element
    return 2 * hidden + rows * local_sizes(model, axes.size("tensor")).vocabulary * element


def layer_bytes(config: Config, axes: Axes, choice: KernelChoice) -> int:
    """Of one microbatch in both halves of a block; S and S_local as in models/gpt/model.py."""
    model, train = gpt_model(config), config.train
    element = PRECISIONS[train.precision].model_bytes
    hidden = boundary_bytes(config, axes)
    if train.recompute == "full":
        return hidden
    rows = train.sequence_length * train.micro_batch_size
    local = local_sizes(model, axes.size("tensor"))
    queries, keys = local.heads * model.head_dim, local.kv_heads * model.head_dim
    norms = 4 * hidden  # input and output of both: the next product saves the output
    attention = queries + 2 * keys  # of which value is a part, or all three
    in_place = choice.kernels == "triton" and not model.qk_norm
    if model.qk_norm or (model.position == "rope" and not in_place):
        attention += queries + keys  # normed or turned, besides
    attention += queries  # its output, the input of the next product
    feed_forward = (3 if model.activation == "swiglu" else 2) * local.ffn
    total = norms + rows * (attention + feed_forward) * element
    if model.dropout and choice.kernels == "torch":
        total += 2 * hidden // element  # a bool each
    if model.attention_dropout and choice.attention == "torch":
        squares = rows * train.sequence_length * local.heads
        total += squares * 3 * element  # probabilities, what is kept, and their product
    return total
