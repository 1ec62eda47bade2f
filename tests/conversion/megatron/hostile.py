"""Pickles that would run something, or take all memory, if they were read by Python's unpickler."""

import argparse
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Disguised(argparse.Namespace):
    """Looks like Megatron's arguments; when it is made, it calls something."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return eval, (self.code,), {"num_layers": 4}


def harmful(canary: str) -> dict[str, bytes]:
    """Pickles that create the file `canary` when they are run, by the way in which they do so."""
    command = f"touch {canary}"
    code = f"open({canary!r}, 'w').close()"
    system = named("posix", "system")
    called = system + text(command) + b"\x85R"
    return {
        "reduce": program(called),
        "nested": pickle.dumps({"args": [({"deep": Call(eval, code)},)]}),
        "protocol 5": pickle.dumps(Call(exec, code), protocol=5),
        "new object": program(named("subprocess", "Popen") + text(command) + b"\x85\x81"),
        "new object with keywords": program(
            named("subprocess", "Popen") + b")}" + text("args") + text(command) + b"s\x92", 4
        ),
        "by name from the stack": program(
            text("posix") + text("system") + b"\x93" + text(command) + b"\x85R", 4
        ),
        "getattr": program(
            named("builtins", "getattr")
            + named("shutil", "os")
            + text("system")
            + b"\x86R"
            + text(command)
            + b"\x85R"
        ),
        "called result": program(
            named("operator", "attrgetter") + text("system") + b"\x85R" + called + b"\x85R"
        ),
        "instance": program(b"(" + text(command) + b"iposix\nsystem\n"),
        "object": program(b"(" + system + text(command) + b"o"),
        "state": program(
            named("argparse", "Namespace") + b")\x81}" + text("__class__") + called + b"sb"
        ),
        "setstate": program(
            named("builtins", "type")
            + text("T")
            + b")}"
            + text("__setstate__")
            + system
            + b"s\x87R)\x81"
            + text(command)
            + b"b"
        ),
        "namespace": pickle.dumps(Disguised(code=code)),
        "torch.load": program(named("torch", "load") + text(canary) + b"\x85R"),
        "torch's storage": program(
            named("torch.storage", "_load_from_bytes")
            + b"B"
            + struct.pack("<I", len(program(called)))
            + program(called)
            + b"\x85R"
        ),
        "registered": program(
            named("copyreg", "add_extension")
            + text("posix")
            + text("system")
            + b"K\xf0\x87R0\x82\xf0"
            + text(command)
            + b"\x85R"
        ),
        "items": program(named("collections", "UserDict") + b")\x81(" + text("a") + called + b"u"),
        "appended": program(named("collections", "deque") + b")\x81" + called + b"a"),
        "key": program(b"}" + called + text("b") + b"s"),
        "identifier": program(called + b"Q"),
        "tensor": program(
            named("torch._utils", "_rebuild_tensor_v2") + b"(" + called + b"K\x00))\x89}tR"
        ),
    }


def greedy(allowance: int) -> Iterator[tuple[str, bytes]]:
    """Pickles that ask for more than `allowance` bytes of memory, and have far fewer."""
    many = allowance // 32
    yield "long", program(b"\x8b" + struct.pack("<i", 2**31 - 1))
    yield "negative long", program(b"\x8b" + struct.pack("<i", -1))
    yield "bytes", program(b"\x8e" + struct.pack("<Q", 2**62))
    yield "text", program(b"\x8d" + struct.pack("<Q", 2**62))
    yield "bytearray", program(b"\x96" + struct.pack("<Q", 2**40))
    length = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    yield "bytearray of a length", program(named("builtins", "bytearray") + length + b"\x85R")
    yield "memo", program(b"Nr" + struct.pack("<I", 2**32 - 1))
    yield "lists", program(b"]" * many)
    yield "dicts", program(b"}" * many)
    yield "marks", program(b"(" * many)
    yield "names", program(named("a", "b") * many)
    yield "nested tuples", program(b")" + b"\x85" * many)
    yield "one list", program(b"](" + b"N" * (4 * many) + b"e")
    yield "tuples of tuples", program(b"(" + b"N" * (many // 8) + b"tq\x00" + b"0(h\x00t" * many)
    pairs = b"](" + b"NN\x86" * (many // 16) + b"eq\x01"
    copies = b"0h\x00h\x01\x85R" * many
    yield "copies", program(named("collections", "OrderedDict") + b"q\x00" + pairs + copies)
    numbers = b"".join(b"J" + struct.pack("<i", 1000 + n) for n in range(many))
    yield "set", program(b"\x8f(" + numbers + b"\x90")
    yield "wide texts", program(text("\U0001f600" + "a" * many) * 16)
    yield "laughs", program(b"]q\x00(" + b"h\x00" * (many // 4) + b"e")
