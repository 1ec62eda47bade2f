"""Reads pickles to plain values and inert records, and makes nothing else.

It does not build on Python's own unpickler and imports no module that a pickle names. An opcode is
a line in `OPCODES`; what Python's picklers write in protocols 2 to 5 is there, the rest is refused
by number. Where Python would call a function, `records.make` looks for it in a short table, and a
record is made if it isn't there.
"""

import struct
from collections.abc import Callable

from megapipe.amounts import format_bytes
from megapipe.conversion.megatron.interpreter import Interpreter
from megapipe.errors import CheckpointError
from megapipe.files import shown

MAX_PICKLE_BYTES = 32 * 2**20
MAX_INTEGER_BYTES = 255
MAX_MESSAGE = 500


def unpickle(data: bytes, path: str, end_at: str | None = None) -> object:
    """What the pickle `data` holds. `path` is the file, for messages.

    Tensors are `StoredTensor`s; an object of a class that isn't plain data is an `InertRecord`.
    With `end_at`, reading ends at that key, and the dict of the items before it is returned.
    Raises CheckpointError for what is damaged, too large, or no pickle of protocols 2 to 5.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: its pickle has {format_bytes(len(data))}, more than the "
            f"{format_bytes(MAX_PICKLE_BYTES)} that are read"
        )
    machine = Interpreter(data, end_at)
    try:
        return _run(machine)
    except CheckpointError as error:
        text = shown(str(error))[:MAX_MESSAGE]
        place = f"byte {machine.position} of its pickle"
        raise CheckpointError(f"{path}: {text} ({place})") from None


def _run(machine: Interpreter) -> object:
    """The value that the program leaves."""
    if machine.take(1) != PROTO or machine.number(1) not in PROTOCOLS:
        raise CheckpointError("it is no pickle of protocols 2 to 5")
    data = machine.data
    while (opcode := data[machine.position : machine.position + 1]) != STOP:
        machine.position += 1
        action = OPCODES.get(opcode)
        if action is None:
            kind = f"has opcode 0x{opcode.hex()}, which is not read" if opcode else "is cut off"
            raise CheckpointError(f"it {kind}")
        action(machine)
        if machine.ended:
            return machine.rest()
    if machine.position != len(data) - 1:
        raise CheckpointError("it goes on after its end")
    return machine.pop()


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


PROTO, STOP = b"\x80", b"."
PROTOCOLS = range(2, 6)

OPCODES: dict[bytes, Callable[[Interpreter], object]] = {
    b"\x95": lambda m: m.take(8),  # FRAME: its length
    b"(": Interpreter.mark,
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.pop_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push_new(m.number(1)),
    b"M": lambda m: m.push_new(m.number(2)),
    b"J": lambda m: m.push_new(_signed(m.take(4))),
    b"\x8a": lambda m: m.push_new(_signed(m.sized(1, MAX_INTEGER_BYTES))),
    b"\x8b": lambda m: m.push_new(_signed(m.sized(4, MAX_INTEGER_BYTES))),
    b"G": lambda m: m.push_new(struct.unpack(">d", m.take(8))[0]),
    b"\x8c": lambda m: m.text(1),
    b"X": lambda m: m.text(4),
    b"\x8d": lambda m: m.text(8),
    b"C": lambda m: m.push_new(m.sized(1, MAX_PICKLE_BYTES)),
    b"B": lambda m: m.push_new(m.sized(4, MAX_PICKLE_BYTES)),
    b"\x8e": lambda m: m.push_new(m.sized(8, MAX_PICKLE_BYTES)),
    b"\x96": lambda m: m.push_new(m.sized(8, MAX_PICKLE_BYTES)),  # a bytearray
    b"]": lambda m: m.push_new([]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push_new(tuple(m.pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"}": lambda m: m.push_new({}),
    b"s": Interpreter.set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"\x8f": lambda m: m.push_new(set()),
    b"\x90": Interpreter.add_items,
    b"\x91": Interpreter.frozen_set,
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": Interpreter.stack_named,
    b"R": Interpreter.call,
    b"\x81": Interpreter.call,  # NEWOBJ
    b"\x92": Interpreter.call_with_keywords,  # NEWOBJ_EX
    b"b": Interpreter.build,
    b"Q": Interpreter.persistent,
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
}
"""What each opcode of protocols 2 to 5 does. Those that name objects of a registry of the process
or buffers outside of the file (EXT1, EXT2, EXT4, NEXT_BUFFER) are not among them."""
