"""What a model family brings: all that the engine and its plans ask about a model.

A family is one object, handed in where a layout is resolved. It imports torch only to build a
stage, so that a trillion parameters are planned in milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megapipe.config import Config, ConfigFamily, ModelConfig
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import ParameterSpec, Place


@dataclass(frozen=True)
class PlaceCosts:
    """What one microbatch costs at a place of the model: in a layer, or at one of its ends.

    flops: of one token, forward and backward: what the mathematics needs, recompute not counted.
    forward, backward_input, backward_weight: the work of each action for one token, as FLOPs, with
    what is computed again and with what moves memory only.
    balance: what the place weighs where layers are cut into stages of equal cost.
    activation_bytes: what one microbatch leaves on a tensor rank from forward to backward.
    """

    flops: float
    forward: float
    backward_input: float
    backward_weight: float
    balance: float
    activation_bytes: int


class ModelFamily(ConfigFamily, Protocol):
    """A kind of model. Its functions are pure; `model` is a section of its class `config`."""

    def parameters(self, model: ModelConfig) -> Sequence[ParameterSpec]:
        """The table of all parameters, in the order in which the model applies them."""

    def costs(self, config: Config, axes: Axes, place: Place) -> PlaceCosts:
        """The costs at a place; layers may differ."""

    def build_stage(self, build: Any) -> Any:
        """The module (torch's) of a stage from its `megapipe.stage.StageBuild`: it maps the hidden
        states of the stage before and a microbatch to hidden states, or on the last stage to the
        sum of the microbatch's token losses."""
