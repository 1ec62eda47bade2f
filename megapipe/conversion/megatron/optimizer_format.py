"""What a distributed checkpoint holds of its optimizer: format, state, steps and settings."""

import re
from collections.abc import Iterator, Mapping

import torch

from megapipe.conversion.megatron.assembly import GlobalTensor
from megapipe.conversion.megatron.plain import plain_arguments
from megapipe.conversion.megatron.records import StoredTensor
from megapipe.conversion.megatron.torch_dist import DistributedContents
from megapipe.files import shown

TYPE = "param_state_sharding_type"
CONTENT = "content_metadata"
CONTENT_TYPE = "distrib_optim_sharding_type"
"""Where Megatron says how the distributed optimizer's state is cut."""
PREFIXES = ("optimizer.", "chained_")
STATE = re.compile(r"optimizer\.state\.(\w+)\.(.+)")
"""A tensor for a whole parameter: what it is, and the parameter's name."""
MAX_GROUPS = 100
"""Groups of parameters, and optimizers, that are looked at."""
MAX_STEPS = 2**53


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


def optimizer_groups(found: DistributedContents) -> list[dict[str, object]]:
    """The settings of each of the optimizer's groups of parameters, in plain values."""
    return [plain_arguments(group) for group in _groups(found)]


def optimizer_steps(found: DistributedContents) -> int | None:
    """How many steps the optimizer has taken; None where there is no such number, or there are two.

    torch's optimizers have it in their state, those of Apex and Transformer Engine in each group.
    """
    states = [state for one in _optimizers(found) if isinstance(state := one.get("state"), dict)]
    said = [state["common_step"] for state in states if "common_step" in state]
    said += [group["step"] for group in _groups(found) if group.get("step") is not None]
    numbers = {_number(found, value) for value in said}
    return numbers.pop() if len(numbers) == 1 else None


def _optimizers(found: DistributedContents) -> Iterator[Mapping[object, object]]:
    """What all ranks share of each optimizer, and of the one inside it, if it wraps one."""
    fields = found.common.get("optimizer")
    if not isinstance(fields, dict):
        return
    several = [fields[number] for number in range(MAX_GROUPS) if number in fields]
    for one in several or [fields]:
        for part in (one, one.get("optimizer")) if isinstance(one, dict) else ():
            if isinstance(part, dict):
                yield part


def _groups(found: DistributedContents) -> list[Mapping[object, object]]:
    lists = [one.get("param_groups") for one in _optimizers(found)]
    groups = [group for one in lists if isinstance(one, list) for group in one[:MAX_GROUPS]]
    return [group for group in groups[:MAX_GROUPS] if isinstance(group, dict)]


def _number(found: DistributedContents, value: object) -> int | None:
    """A number of steps, which may be a tensor of one element."""
    if isinstance(value, StoredTensor) and value.shape in ((), (1,)) and found.archive is not None:
        scalar = torch.empty(value.shape, dtype=torch.float64)
        found.archive.tensor(value).copy_to(scalar)
        value = scalar.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value <= MAX_STEPS and value == int(value) else None


def _named(fields: object, key: str) -> list[object]:
    """What a dict has under `key`, or each of the dicts in it, of which there is one for each of
    several optimizers."""
    if not isinstance(fields, dict):
        return []
    inner = [value for value in fields.values() if isinstance(value, dict)]
    return [one[key] for one in (fields, *inner) if key in one]
