"""What a microbatch costs at each stage, from arithmetic alone: plans without measuring.

Of a matrix product's three (forward, input gradient, weight gradient) each takes 2 N FLOPs for N
weights. Attention's two products have no weights: forward 4 A K, and all of 8 A K for the gradient
belongs to the input gradient (the letters are those of `models/flops.py`). Full recompute adds
a forward of the layers to the input gradient. Norms, activations and communication are not counted,
nor that small matrices run at a lower rate: a measured plan knows better.
"""

from typing import NamedTuple

from megapipe.config import Config
from megapipe.models.flops import (
    attended_keys,
    embedding_flops_per_token,
    layer_flops_per_token,
    output_flops_per_token,
)
from megapipe.models.gpt_config import gpt_model
from megapipe.models.partition import Stage, stages
from megapipe.pipeline.schedule import Costs


class Work(NamedTuple):
    """FLOPs of one token."""

    forward: float
    backward_input: float
    backward_weight: float


def stage_costs(config: Config) -> Costs:
    """Costs of each stage, in units of the forward of one microbatch through 1 / pipeline of the
    model: comparable between schedules, whatever their number of stages."""
    works = [stage_work(config, stage) for stage in stages(config)]
    unit = sum(work.forward for work in works) / config.parallel.pipeline
    forward, backward_input, backward_weight = zip(*works, strict=True)
    return Costs(
        forward=[flops / unit for flops in forward],
        backward_input=[flops / unit for flops in backward_input],
        backward_weight=[flops / unit for flops in backward_weight],
    )


def equal_costs(config: Config, work: Work) -> Costs:
    """The same for all stages: `work` is that of a rank, all of its chunks together."""
    return Costs(*(part / config.parallel.virtual for part in work))


def stage_work(config: Config, stage: Stage) -> Work:
    """All layers of a stage, with the embedding on the first and the output on the last."""
    model, length = gpt_model(config), config.train.sequence_length
    attention = model.num_heads * model.head_dim * attended_keys(model, length)
    products = layer_flops_per_token(model, length) - 12 * attention
    forward = products / 3 + 4 * attention
    count = len(stage.layers)
    again = forward if config.train.recompute == "full" else 0.0
    rest = 0.0
    if stage.first:
        rest += embedding_flops_per_token(model) / 3
    if stage.last:
        rest += output_flops_per_token(model) / 3
    return Work(
        forward=count * forward + rest,
        backward_input=count * (products / 3 + 8 * attention + again) + rest,
        backward_weight=count * products / 3 + rest,
    )
