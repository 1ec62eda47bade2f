"""An interpreter of pickles that makes plain values and inert records, and nothing else.

It does not build on Python's own unpickler and imports no module that a pickle names. An opcode is
a line in `OPCODES`; what Python's picklers write in protocols 2 to 5 is there, the rest is refused
by number. Where Python would call a function, `records.make` looks for it in a short table, and a
record is made if it isn't there.

A pickle may ask for far more memory than it has bytes. Everything that is made is charged to an
allowance before it is made, so that reading any file takes less than `MAX_PICKLE_BYTES` +
`ALLOWANCE_BYTES`.
"""

import struct
import sys
from collections.abc import Callable

from megapipe.amounts import format_bytes
from megapipe.conversion.megatron.records import (
    InertRecord,
    StorageReference,
    hashable,
    make,
    storage_from,
)
from megapipe.errors import CheckpointError
from megapipe.files import shown

MAX_PICKLE_BYTES = 32 * 2**20
ALLOWANCE_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
MAX_INTEGER_BYTES = 255
MAX_NAME_BYTES = 1000
MAX_MESSAGE = 500

SLOT_BYTES = 9
"""Of a reference in a list that grows."""
ENTRY_BYTES = 160
"""Of an item of a dict or set that grows, at the worst moment."""
RECORD_BYTES = 80


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
    interpreter = Interpreter(data, end_at)
    try:
        return interpreter.run()
    except CheckpointError as error:
        text = shown(str(error))[:MAX_MESSAGE]
        place = f"byte {interpreter.position} of its pickle"
        raise CheckpointError(f"{path}: {text} ({place})") from None


class Interpreter:
    """The machine that a pickle is a program for: a stack, marks on it, and a memo."""

    def __init__(self, data: bytes, end_at: str | None = None) -> None:
        self.data = data
        self.end_at = end_at
        self.position = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []
        self.allowance = ALLOWANCE_BYTES
        self.ended = False
        self.deepest = 0
        """The most values that were on the stack."""
        self.widest = 0
        """The most values that were taken from it at once."""

    def run(self) -> object:
        if self.take(1) != PROTO or self.take(1)[0] not in range(2, 6):
            raise CheckpointError("it is no pickle of protocols 2 to 5")
        data = self.data
        while (opcode := data[self.position : self.position + 1]) != STOP:
            self.position += 1
            action = OPCODES.get(opcode)
            if action is None:
                kind = f"has opcode 0x{opcode.hex()}, which is not read" if opcode else "is cut off"
                raise CheckpointError(f"it {kind}")
            action(self)
            if self.ended:
                return self.rest()
        if self.position != len(data) - 1:
            raise CheckpointError("it goes on after its end")
        return self.pop()

    def rest(self) -> dict[object, object]:
        """The items above the last mark."""
        values = self.pop_mark()
        self.charge(ENTRY_BYTES * (1 + len(values) // 2))
        return items_of(values)

    # --- Bytes -----------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin, end = self.position, self.position + count
        if end > len(self.data):
            raise CheckpointError(f"it ends {end - len(self.data)} bytes too early")
        self.position = end
        return self.data[begin:end]

    def number(self, size: int) -> int:
        """The next `size` bytes as an unsigned integer."""
        return int.from_bytes(self.take(size), "little")

    def sized(self, size: int, limit: int) -> bytes:
        """As many bytes as the next `size` bytes say, at most `limit`."""
        count = self.number(size)
        if count > limit:
            raise CheckpointError(f"it has a value of {count} bytes, more than {limit}")
        return self.take(count)

    def text(self, size: int) -> None:
        """Push a text whose bytes are counted in `size` bytes."""
        text = decoded(self.sized(size, MAX_TEXT_BYTES))
        if text == self.end_at:
            self.ended = True
        else:
            self.push_new(text)

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise CheckpointError("it has a name without an end")
        text = decoded(self.take(end - self.position))
        self.position += 1
        return text

    # --- Stack -----------------------------------------------------------------------------------

    def charge(self, count: int) -> None:
        """Take `count` bytes from the allowance, before as many are allocated."""
        self.allowance -= count
        if self.allowance < 0:
            raise CheckpointError(
                f"it asks for more than {format_bytes(ALLOWANCE_BYTES)} of memory"
            )

    def settle(self, charged: int, used: int) -> None:
        """Put back what was charged for a change and not used by it."""
        self.allowance += charged - used

    def push(self, value: object) -> None:
        """Push what has been charged for, or costs nothing."""
        self.stack.append(value)
        if len(self.stack) > self.deepest:
            self.deepest = len(self.stack)
            self.charge(SLOT_BYTES)

    def push_new(self, value: object) -> None:
        """Push a value that was made from no more than the bytes of its opcode."""
        self.charge(sys.getsizeof(value))
        self.push(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CheckpointError("it takes a value from where none is")
        return self.stack.pop()

    def top(self) -> object:
        value = self.pop()
        self.stack.append(value)
        return value

    def mark(self) -> None:
        self.charge(SLOT_BYTES + 32)  # a number may take 32 bytes
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[object]:
        """The values above the last mark."""
        if not self.marks:
            raise CheckpointError("it goes back to a mark that it has not set")
        begin = self.marks.pop()
        count = len(self.stack) - begin
        if count > self.widest:
            self.charge((count - self.widest) * SLOT_BYTES)
            self.widest = count
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    # --- Memo ------------------------------------------------------------------------------------

    def put(self, index: int) -> None:
        """Remember the top under `index`: picklers number from 0 without a gap."""
        if index > len(self.memo):
            raise CheckpointError(f"it remembers value {index} before value {len(self.memo)}")
        if index == len(self.memo):
            self.charge(SLOT_BYTES)
            self.memo.append(None)
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index >= len(self.memo):
            raise CheckpointError(f"it asks for value {index} of the {len(self.memo)} remembered")
        self.push(self.memo[index])

    # --- Containers ------------------------------------------------------------------------------

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push_new(tuple(reversed(values)))

    def frozen_set(self) -> None:
        values = self.pop_mark()
        self.charge(ENTRY_BYTES * (1 + len(values)))
        self.push(frozenset(map(hashable, values)))

    def append(self, values: list[object]) -> None:
        holder = self.top()
        if isinstance(holder, InertRecord) and holder.args is not None:
            holder.items = holder.items or []
            holder = holder.items
        if not isinstance(holder, list):
            raise CheckpointError(f"it appends to a {type(holder).__name__}")
        self.charge(SLOT_BYTES * len(values))
        holder.extend(values)

    def set_items(self, values: list[object]) -> None:
        holder = self.top()
        charged = 2 * ENTRY_BYTES * (1 + len(values) // 2)
        self.charge(charged)
        if isinstance(holder, InertRecord) and holder.args is not None:
            holder.items = holder.items or []
            holder.items.extend(items_of(values).items())
        elif isinstance(holder, dict):
            before = sys.getsizeof(holder)
            holder.update(items_of(values))
            self.settle(charged, sys.getsizeof(holder) - before)
        else:
            raise CheckpointError(f"it sets items of a {type(holder).__name__}")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def add_items(self) -> None:
        values = self.pop_mark()
        holder = self.top()
        if not isinstance(holder, set):
            raise CheckpointError(f"it adds to a {type(holder).__name__}")
        self.charge(ENTRY_BYTES * (1 + len(values)))
        holder.update(map(hashable, values))

    # --- Objects ---------------------------------------------------------------------------------

    def named(self, module: object, name: object) -> None:
        """Push the record of a class or function."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError("it names a class or function by something else than text")
        self.charge(RECORD_BYTES + sys.getsizeof(module) + sys.getsizeof(name))
        self.push(InertRecord(module, name))

    def stack_named(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def call(self) -> None:
        args, kind = self.pop(), self.pop()
        self.push_called(kind, args)

    def call_with_keywords(self) -> None:
        keywords, args, kind = self.pop(), self.pop(), self.pop()
        if not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise CheckpointError("it makes an object of arguments that are none")
        self.charge(sys.getsizeof(args) + SLOT_BYTES)
        self.push_called(kind, (*args, keywords))

    def push_called(self, kind: object, args: object) -> None:
        copied = (
            [len(arg) for arg in args if isinstance(arg, COPIED)] if isinstance(args, tuple) else []
        )
        charged = RECORD_BYTES + ENTRY_BYTES * (1 + sum(copied))
        self.charge(charged)
        made = make(kind, args)
        shared = any(made is arg for arg in args) if isinstance(args, tuple) else False
        self.settle(charged, 0 if shared else max(RECORD_BYTES, sys.getsizeof(made)))
        self.push(made)

    def build(self) -> None:
        """Give the top its state: kept in a record; attributes of plain data are left out."""
        state = self.pop()
        holder = self.top()
        if isinstance(holder, InertRecord) and holder.args is not None:
            holder.state = state
        elif not isinstance(holder, dict | list | set):
            raise CheckpointError(f"it changes the state of a {type(holder).__name__}")

    def persistent(self) -> None:
        storage: StorageReference = storage_from(self.pop())
        self.charge(RECORD_BYTES)
        self.push(storage)


COPIED = (list, tuple, dict, set, frozenset)
"""Arguments of which plain data may be a copy."""


def items_of(values: list[object]) -> dict[object, object]:
    """A dict of keys and values that lie one after the other."""
    if len(values) % 2:
        raise CheckpointError("it has a key without a value")
    return dict(zip(map(hashable, values[::2]), values[1::2], strict=True))


def decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise CheckpointError("it has a text that is not UTF-8") from None


def signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def nothing(machine: Interpreter) -> None:
    """Do nothing, for opcodes that only help readers of streams."""


PROTO, STOP = b"\x80", b"."

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
    b"J": lambda m: m.push_new(signed(m.take(4))),
    b"\x8a": lambda m: m.push_new(signed(m.sized(1, MAX_INTEGER_BYTES))),
    b"\x8b": lambda m: m.push_new(signed(m.sized(4, MAX_INTEGER_BYTES))),
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
