"""Finds where the host waits for a GPU, on a machine without one.

The device is torch's `meta`, whose tensors have no values: what needs one cannot be computed there,
and what comes from the host's memory is told apart by its device. `watch_host` looks at each call
twice. Some waits never reach torch's dispatcher on this device (`.numpy()`, printing, a tensor made
of Python numbers), so functions are looked at as well; others have no function of their own (an
index given as a list), so operators are, too, those of a backward pass included.

The code takes the branches that it takes on CUDA: `is_cuda` is true of the device's tensors. Triton
kernels are not launched.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
ROOT = Path(__file__).parents[1]

READERS = {
    *("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__"),
    *("__complex__", "__index__", "__contains__", "__repr__", "__str__", "__format__"),
}
"""Methods of a tensor that need its values in the host's memory."""
MAKERS = {"tensor", "as_tensor", "asarray", "new_tensor"}
"""Functions that copy numbers of Python's to a device."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_", "copy", "_copy_from"}


class HostSyncError(AssertionError):
    """The host waits for the device."""


def on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device == DEVICE


class Functions(TorchFunctionMode):
    """Sees calls of torch's Python functions."""

    def __init__(self, read_in: str) -> None:
        super().__init__()
        self.read_in = read_in
        self.reads: list[str] = []
        self.pinned: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        here = any(map(on_device, leaves))
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return func(*args) or here
        if func is Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if name in MAKERS and (here or DEVICE in leaves or str(DEVICE) in leaves):
            raise HostSyncError(f"{name} copies numbers to the device at {caller()}")
        if name == "tolist" and here and caller().endswith(f" in {self.read_in}"):
            self.reads.append(caller())
            return [1.0] * args[0].numel()
        if name in ("__getitem__", "__setitem__") and here and lists(args[1]):
            raise HostSyncError(f"an index of Python numbers is copied to the device at {caller()}")
        if name in READERS and here:
            raise HostSyncError(f"{name} of a tensor of the device at {caller()}")
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Sees the operators that reach the dispatcher."""

    def __init__(self, pinned: Sequence[Tensor]) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(on_device, tensors)) or on_device_type(kwargs.get("device")):
            problem = self.problem(func, tensors, args, kwargs)
            if problem:
                raise HostSyncError(f"{func}: {problem} at {caller()}")
        return func(*args, **kwargs)

    def problem(
        self, func: Any, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> str | None:
        """Why an operator that takes or makes a tensor of the device makes the host wait."""
        name = func._schema.name.partition("::")[2]
        host = [x for x in tensors if not on_device(x)]
        if name in INDEXING:
            if host:
                return "an index in the host's memory is copied to the device"
            masks = (
                x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
            )
            return "the number of true elements is read" if any(masks) else None
        if name in COPIES:
            if all(any(x is pinned for pinned in self.pinned) for x in host):
                to_host = name == "_to_copy" and not on_device_type(kwargs.get("device") or DEVICE)
                blocks = bool(host) and not (
                    kwargs.get("non_blocking") or any(x is True for x in args)
                )
                return "a copy between host and device" if to_host or blocks else None
            return "a copy between host and device"
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            return "what comes out depends on values"
        if any(x.dim() > 0 for x in host):
            return "a tensor in the host's memory among those of the device"
        return None


def lists(index: object) -> bool:
    """Some part of an index is a list."""
    return isinstance(index, list) or (isinstance(index, tuple) and any(map(lists, index)))


def on_device_type(device: object) -> bool:
    return device is not None and torch.device(device) == DEVICE  # type: ignore[arg-type]


def caller() -> str:
    """The innermost place of the project (or of a test) on the stack: `file:line in function`."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and path.is_relative_to(ROOT) and ".venv" not in path.parts:
            return f"{path.resolve().relative_to(ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown place"


@contextmanager
def watch_host(read_in: str = "") -> Iterator[list[str]]:
    """Raises HostSyncError where code inside the block makes the host wait for the device.

    Only a function named `read_in` may read, by `tolist`, which gives ones. Yields the list of the
    places where it did.
    """
    functions = Functions(read_in)
    with functions, Operators(functions.pinned):
        yield functions.reads
