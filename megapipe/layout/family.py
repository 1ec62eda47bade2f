"""What a model family brings: all that the engine and its plans ask about a model.

A family is one object, handed in where a layout is resolved. It imports torch only to build a
stage, so that a trillion parameters are planned in milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megapipe.config import Config, ConfigFamily, ModelConfig
from megapipe.layout.architecture import Architecture
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import ParameterSpec, Place

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PlaceCosts:
    """What a place of the model costs: a layer, or what lies before the first or after the last.

    All but `activation_bytes` is of one token, and of all tensor ranks together.

    flops: forward and backward: what the mathematics needs, recompute not counted.
    forward, backward_input, backward_weight: the work of each action as FLOPs, with what is
    computed again and with what moves memory only.
    balance: what the place weighs where layers are cut into stages of equal cost.
    activation_bytes: what one microbatch leaves on a tensor rank from forward to backward.
    """

    flops: float
    forward: float
    backward_input: float
    backward_weight: float
    balance: float
    activation_bytes: int


class StageModule(Protocol):
    """A stage of the model: one of torch's modules with what the executor needs."""

    @property
    def weight_grads(self) -> Any:
        """The `store` of the stage's `StageBuild`. Its linear layers put their weight gradients
        there, and schedules that compute these later find them there."""

    def __call__(self, inputs: "Tensor | None", batch: Any) -> "Tensor":
        """The hidden states after the stage, from those of the stage before (None on the first) and
        a `megapipe.microbatch.MicroBatch`; on the last stage the sum of its token losses."""

    def logits(self, tokens_BS: "Tensor") -> "Tensor":
        """What the model says of the token after each, [S, B, vocabulary], where the stage is the
        whole model on one rank: for inference, and for proofs of conversions."""


class ModelFamily(ConfigFamily, Protocol):
    """A kind of model. Its functions are pure; `model` is a section of its class `config`."""

    @property
    def architectures(self) -> Sequence[Architecture]:
        """What other stacks call models of this family, and how they store them. Of several that
        can hold a model, the first is the one that it is exported as."""

    def parameters(self, model: ModelConfig) -> Sequence[ParameterSpec]:
        """The table of all parameters, in the order in which the model applies them."""

    def costs(self, config: Config, axes: Axes, place: Place) -> PlaceCosts:
        """The costs at a place; layers may differ."""

    def build_stage(self, build: Any) -> StageModule:
        """A stage from its `megapipe.stage.StageBuild`."""
