"""What kind of optimizer state a distributed checkpoint holds."""

from megapipe.conversion.megatron.torch_dist import DistributedContents
from megapipe.files import shown

TYPE = "param_state_sharding_type"
CONTENT = "content_metadata"
CONTENT_TYPE = "distrib_optim_sharding_type"
"""Where `common.pt` says how the distributed optimizer's state is cut."""
PER_GROUP = "optimizer.distributed."
MOMENT = "optimizer.state."


def optimizer_format(found: DistributedContents) -> str | None:
    """Megatron's name of the format of the optimizer's state, or one in words where it has none;
    None where there is no state."""
    names = [*found.tensors, *found.objects]
    if not any(name.startswith(("optimizer.", "chained_")) for name in names):
        return None
    for holder, key in (("optimizer", TYPE), (CONTENT, CONTENT_TYPE)):
        fields = found.common.get(holder)
        kind = fields.get(key) if isinstance(fields, dict) else None
        if isinstance(kind, str):
            return shown(kind)[:99]
    if any(name.startswith(PER_GROUP) for name in names):
        # What names the type is itself among the objects of each group.
        whole = any(".param_state/" in name for name in names)
        return "dp_zero_gather_scatter" if whole else "dp_reshardable"
    if any(name.startswith(MOMENT) for name in names):
        return "a tensor for each parameter, without the distributed optimizer"
    return "of an unknown kind"
