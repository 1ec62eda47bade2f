"""What stands for the objects of a pickle: inert values, made by no code but this.

Classes and functions that a pickle names are neither imported nor called. The few whose meaning is
plain data (an OrderedDict, a torch.Size, a tensor as a view of a storage) are made here from their
arguments, which are checked; all others become an `InertRecord`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from megapipe.errors import CheckpointError

MAX_DIMS = 16
MAX_SIZE = 2**60
MAX_NAME = 500
MAX_ARGUMENTS = 16

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
"""Dtype of the elements, by torch's name of the storage."""


@dataclass(slots=True, eq=False)
class InertRecord:
    """A class, function or object that was not made.

    `args` is None for the class or function itself, and what it would have been called with for an
    object. `state` is what the object would have been given afterwards, `items` what would have
    been put into it: values, or pairs of key and value.
    """

    module: str
    name: str
    args: tuple[object, ...] | None = None
    state: object = None
    items: list[object] | None = None

    @property
    def path(self) -> str:
        """`module.name`."""
        return f"{self.module}.{self.name}"

    def values(self) -> dict[str, object]:
        """The fields of an object whose state is a dict (also as torch's dataclasses keep it, in a
        pair with None); empty for any other."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:
            state = state[0] if isinstance(state[0], dict) else state[1]
        if not isinstance(state, dict):
            return {}
        return {key: value for key, value in state.items() if isinstance(key, str)}


@dataclass(frozen=True, slots=True)
class StorageReference:
    """The bytes of tensors: `elements` of `dtype`, in the member `key` of an archive."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage: `offset` and `strides` in elements of `dtype`."""

    storage: StorageReference
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_from(identifier: object) -> StorageReference:
    """The storage that torch's persistent identifier ("storage", class, key, device, elements)
    stands for."""
    if (
        isinstance(identifier, tuple)
        and len(identifier) == 5
        and identifier[0] == "storage"
        and isinstance(kind := identifier[1], InertRecord)
        and isinstance(key := identifier[2], str)
        and is_size(elements := identifier[4])
    ):
        if kind.module.split(".")[0] != "torch" or kind.name not in STORAGE_DTYPES:
            raise CheckpointError(f"it has a {kind.path}, whose elements can't be read")
        return StorageReference(key, STORAGE_DTYPES[kind.name], elements)
    raise CheckpointError("it refers to an object outside of it that is no storage of torch's")


def is_name(value: object) -> TypeGuard[str]:
    """Whether it is a text that may be a tensor's name, and stand in a message."""
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def is_size(value: object) -> TypeGuard[int]:
    """Whether it is a whole number from 0 to `MAX_SIZE`."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether it is a tuple of sizes, for at most `MAX_DIMS` dimensions."""
    return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(is_size, value))


def hashable(key: object) -> object:
    """`key` if it may be the key of a dict: a text, number or record, or a flat tuple of these.

    Hashing deeper or longer tuples would take as long as the file wants.
    """
    members = key if isinstance(key, tuple) and len(key) <= MAX_DIMS else (key,)
    for member in members:
        wide = isinstance(member, int) and member.bit_length() > 64
        if wide or not isinstance(member, KEY_TYPES):
            raise CheckpointError(f"it has a {type(member).__name__} in the key of a dict or set")
    return key


KEY_TYPES = (str, bytes, int, float, InertRecord, type(None))


def _pairs(pairs: object) -> dict[object, object]:
    if isinstance(pairs, dict):
        return dict(pairs)
    if isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        return {hashable(pair[0]): pair[1] for pair in pairs}
    raise _Unfit


def _sequence(values: object) -> list[object] | tuple[object, ...]:
    if isinstance(values, list | tuple):
        return values
    raise _Unfit


def _bytes(data: object = b"") -> bytes:
    if isinstance(data, bytes):
        return data
    raise _Unfit


def _encoded(text: object, encoding: object = "latin1") -> bytes:
    """What pickles of protocol 2 have for bytes: `_codecs.encode(text, "latin1")`."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin-1")
    raise _Unfit


def _tensor(
    storage: object, offset: object, shape: object, strides: object, *ignored: object
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v2; what follows says how gradients are kept."""
    if not isinstance(storage, StorageReference) or not is_size(offset):
        raise _Unfit
    if not are_sizes(shape) or not are_sizes(strides) or len(shape) != len(strides):
        raise _Unfit
    return StoredTensor(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    gradient: object,
    hooks: object,
    dtype: object,
    *ignored: object,
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: a dtype over bytes that have none."""
    tensor = _tensor(storage, offset, shape, strides)
    if not isinstance(dtype, InertRecord):
        raise _Unfit
    return StoredTensor(tensor.storage, dtype.name, tensor.offset, tensor.shape, tensor.strides)


def _parameter(data: object, *ignored: object) -> StoredTensor:
    if isinstance(data, StoredTensor):
        return data
    raise _Unfit


class _Unfit(Exception):
    """Arguments that a plain object can't be made of."""


Maker = Callable[..., object]

MAKERS: dict[str, Maker] = {
    "collections.OrderedDict": lambda pairs=(): _pairs(pairs),
    "collections.defaultdict": lambda factory=None, pairs=(): _pairs(pairs),
    "builtins.dict": lambda pairs=(): _pairs(pairs),
    "builtins.list": lambda values=(): list(_sequence(values)),
    "builtins.tuple": lambda values=(): tuple(_sequence(values)),
    "builtins.set": lambda values=(): set(map(hashable, _sequence(values))),
    "builtins.frozenset": lambda values=(): frozenset(map(hashable, _sequence(values))),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "torch.Size": lambda values=(): tuple(_sequence(values)),
    "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
"""What plain data is made of, by the path that a pickle names. Nothing else is ever called."""


def make(kind: object, args: object) -> object:
    """What calling `kind` with `args` stands for: plain data by `MAKERS`, or a record.

    Raises CheckpointError where arguments don't fit.
    """
    if not isinstance(kind, InertRecord) or not isinstance(args, tuple):
        raise CheckpointError(f"it calls a {type(kind).__name__}")
    if kind.args is not None:
        return InertRecord(kind.module, f"{kind.name[:MAX_NAME]}()", args)
    maker = MAKERS.get(kind.path.replace("__builtin__.", "builtins.", 1))
    if maker is None:
        return InertRecord(kind.module, kind.name, args)
    if len(args) > MAX_ARGUMENTS:
        raise CheckpointError(f"it has a {kind.path} of {len(args)} values")
    try:
        return maker(*args)
    except (_Unfit, TypeError, UnicodeError):
        given = ", ".join(type(value).__name__ for value in args[:8])
        raise CheckpointError(f"it has a {kind.path} of ({given}), which can't be read") from None
