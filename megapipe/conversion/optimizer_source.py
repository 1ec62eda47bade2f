"""What an optimizer keeps of each parameter, under our names, whatever it is stored as."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from megapipe.checkpoint.load import CheckpointReader
from megapipe.conversion.megatron.directory import MegatronCheckpoint
from megapipe.conversion.model_at import Families
from megapipe.conversion.open import open_megatron_weights
from megapipe.data_parallel.optimizer import WEIGHTS
from megapipe.errors import CheckpointError
from megapipe.files import shown

ADAMW = "adamw"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps, under our names and Megatron's."""
MASTERS = ("param", "fp32_param")
"""What Megatron calls master weights: of the distributed optimizer, and of one of each rank."""


class OptimizerSource(Protocol):
    """The state of an optimizer for a whole model, read by rectangles of our parameters."""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""

    @property
    def name(self) -> str:
        """Its optimizer.name."""

    @property
    def kinds(self) -> AbstractSet[str]:
        """What it keeps of each parameter."""

    @property
    def scalars(self) -> Mapping[str, Any]:
        """What it keeps besides, by the names of our checkpoints."""

    @property
    def settings(self) -> Mapping[str, object]:
        """Keys of [optimizer] as they were there, those that are known."""

    def read(self, kind: str, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Rectangle [start, start + shape) of what it keeps of a parameter, on the CPU."""


class CheckpointOptimizer:
    """The state of the optimizer in a checkpoint of ours."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.place = shown(reader.path)
        self.settings: Mapping[str, object] = reader.config["optimizer"]
        self.name = str(self.settings["name"])
        self.kinds = {name.partition("/")[0] for name in reader.manifest.tensors} - {WEIGHTS}
        self.scalars = reader.state

    def read(self, kind: str, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._reader.read(f"{kind}/{name}", start, shape)


class MegatronOptimizer:
    """The state of AdamW in a checkpoint of Megatron's, through the table of the weights.

    Raises CheckpointError where `check_megatron_optimizer` does. `allow` is as in `ForeignWeights`.
    """

    name = ADAMW
    kinds = frozenset(MOMENTS)

    def __init__(
        self, checkpoint: MegatronCheckpoint, families: Families, allow: Sequence[str]
    ) -> None:
        check_megatron_optimizer(checkpoint)
        self.place = checkpoint.place
        self.scalars = {"optimizer_steps": checkpoint.steps}
        self.settings = _settings(checkpoint.groups)
        self._moments = {
            kind: open_megatron_weights(
                replace(checkpoint, tensors=checkpoint.state[kind]), families, {}, allow
            )
            for kind in MOMENTS
        }

    def read(self, kind: str, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._moments[kind].read(name, start, shape)


def with_master_weights(checkpoint: MegatronCheckpoint) -> MegatronCheckpoint:
    """The same checkpoint, its weights as the optimizer keeps them where that is read: with all
    their digits."""
    for kind in MASTERS:
        if kind in checkpoint.state:
            return replace(checkpoint, tensors=checkpoint.state[kind])
    return checkpoint


def check_megatron_optimizer(checkpoint: MegatronCheckpoint) -> None:
    """Raises CheckpointError where the optimizer's state can't be taken, with its format."""
    kind = checkpoint.optimizer
    problem = None
    if kind is None:
        problem = "it holds none"
    elif not checkpoint.state:
        problem = (
            f'its format is "{kind}", and "fully_reshardable" is read, and one tensor for each '
            "parameter. Load and save it with Megatron-LM and --ckpt-format torch_dist "
            "--dist-ckpt-optim-fully-reshardable"
        )
    elif (held := checkpoint.state.keys() - MASTERS) != set(MOMENTS):
        kept = " and ".join(sorted(held)) or "nothing"
        problem = f"it keeps {kept} of each parameter, and AdamW {' and '.join(MOMENTS)}"
    elif any(group.get("decoupled_weight_decay") is False for group in checkpoint.groups):
        problem = "its Adam adds the weight decay to the gradients, which AdamW does not"
    elif checkpoint.steps is None:
        problem = "it doesn't say how many steps its optimizer has taken"
    if problem is not None:
        raise CheckpointError(
            f"{checkpoint.place}: the optimizer's state can't be taken from it: {problem}. "
            'Or leave "optimizer" out of checkpoint.load_state.'
        )


def _settings(groups: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Keys of our [optimizer] for the settings of Megatron's groups of parameters, of which some
    have no weight decay, as norms and biases have none here."""
    found: dict[str, object] = {}
    decays = [
        decay
        for group in groups
        if group.get("wd_mult") != 0 and isinstance(decay := group.get("weight_decay"), int | float)
    ]
    if decays:
        found["weight_decay"] = float(max(decays))
    for key, ours in (("betas", "betas"), ("eps", "epsilon")):
        values = [group[key] for group in groups if key in group]
        if values:
            found[ours] = values[0]
    return found
