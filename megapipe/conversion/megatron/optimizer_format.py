"""What kind of optimizer state a distributed checkpoint holds."""

import re
from collections.abc import Mapping

from megapipe.conversion.megatron.assembly import GlobalTensor
from megapipe.conversion.megatron.torch_dist import DistributedContents
from megapipe.files import shown

TYPE = "param_state_sharding_type"
CONTENT = "content_metadata"
CONTENT_TYPE = "distrib_optim_sharding_type"
"""Where Megatron says how the distributed optimizer's state is cut."""
PREFIXES = ("optimizer.", "chained_")
STATE = re.compile(r"optimizer\.state\.(\w+)\.(.+)")
"""A tensor for a whole parameter: what it is, and the parameter's name."""


def optimizer_format(found: DistributedContents) -> str | None:
    """Megatron's name of the format of the optimizer's state, or one in words where it has none;
    None where there is no state."""
    names = [*found.tensors, *found.objects, *found.unread]
    names = [name for name in names if name.startswith(PREFIXES)]
    if not names:
        return None
    kinds = [
        *_named(found.common.get("optimizer"), TYPE),
        *_named(found.common.get(CONTENT), CONTENT_TYPE),
    ]
    for name in names:
        if f".{TYPE}/" in name:
            kinds.append(found.object(name))
            break
    for kind in kinds:
        if isinstance(kind, str):
            return shown(kind)[:99]
    if any(name.startswith("optimizer.distributed.") for name in names):
        return "an unnamed format of the distributed optimizer"
    return "a tensor for each parameter, without the distributed optimizer"


def optimizer_state(
    found: DistributedContents, weights: Mapping[str, GlobalTensor]
) -> dict[str, dict[str, GlobalTensor]]:
    """The optimizer's state by kind and weight; empty unless its format has, for each weight, one
    tensor of the same shape ("fully_reshardable", or without the distributed optimizer)."""
    state: dict[str, dict[str, GlobalTensor]] = {}
    for name, tensor in found.tensors.items():
        match = STATE.fullmatch(name)
        if match is not None:
            state.setdefault(match[1], {})[match[2]] = tensor
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    same = all({n: t.shape for n, t in kind.items()} == shapes for kind in state.values())
    return state if same else {}


def _named(fields: object, key: str) -> list[object]:
    """What a dict has under `key`, or each of the dicts in it, of which there is one for each of
    several optimizers."""
    if not isinstance(fields, dict):
        return []
    inner = [value for value in fields.values() if isinstance(value, dict)]
    return [one[key] for one in (fields, *inner) if key in one]
