"""Megatron's arguments as plain values."""

from megapipe.conversion.megatron.records import InertRecord, StoredTensor

MAX_DEPTH = 4
MAX_VALUES = 10_000
SCALARS = (str, int, float, bool, type(None))


def plain_arguments(holder: object) -> dict[str, object]:
    """What a Namespace, or a dict of the same, holds: texts, numbers, None, lists and dicts.

    A dtype is its name ("bfloat16"), another object is shown as text: "path.of.its.Class(5)".
    Empty where `holder` is neither.
    """
    fields = holder.values() if isinstance(holder, InertRecord) else holder
    if not isinstance(fields, dict):
        return {}
    left = [MAX_VALUES]
    return {
        key: _plain(value, MAX_DEPTH, left) for key, value in fields.items() if isinstance(key, str)
    }


def _plain(value: object, depth: int, left: list[int]) -> object:
    """`value` without records, at most `depth` deep; `left` counts values over all, since a file
    may refer to one list from many places."""
    left[0] -= 1
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, InertRecord):
        return _shown(value)
    if depth == 0 or left[0] < 0 or isinstance(value, StoredTensor | bytes):
        return f"<{type(value).__name__}>"
    if isinstance(value, dict):
        return {
            str(_plain(key, 0, left)): _plain(item, depth - 1, left)
            for key, item in value.items()
            if left[0] >= 0
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth - 1, left) for item in value if left[0] >= 0]
    return f"<{type(value).__name__}>"


def _shown(record: InertRecord) -> str:
    if record.args is None:
        return record.name if record.module == "torch" else record.path
    inner = ", ".join(repr(arg) if isinstance(arg, SCALARS) else "..." for arg in record.args)
    return f"{record.path}({inner})"
