"""The machine that a pickle is a program for, without the opcodes: bytes, a stack, a memo.

A pickle may ask for far more memory than it has bytes. Everything that is made is charged to an
allowance before it is made, so that running any pickle takes no more than `ALLOWANCE_BYTES`.
"""

import sys

from megapipe.amounts import format_bytes
from megapipe.conversion.megatron.records import InertRecord, hashable, make, storage_from
from megapipe.errors import CheckpointError

ALLOWANCE_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
MAX_NAME_BYTES = 1000

SLOT_BYTES = 9
"""Of a reference in a list that grows."""
ENTRY_BYTES = 160
"""Of an item of a dict or set that grows, at the worst moment."""
RECORD_BYTES = 80


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
        """The text up to the end of the line."""
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

    def rest(self) -> dict[object, object]:
        """The items above the last mark."""
        values = self.pop_mark()
        self.charge(ENTRY_BYTES * (1 + len(values) // 2))
        return items_of(values)

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
        if len(module) + len(name) > MAX_NAME_BYTES:
            raise CheckpointError("it names a class or function by a very long text")
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
        """Push what a call stands for."""
        given = args if isinstance(args, tuple) else ()
        copied = sum(len(arg) for arg in given if isinstance(arg, COPIED))
        charged = RECORD_BYTES + ENTRY_BYTES * (1 + copied)
        self.charge(charged)
        made = make(kind, args)
        own = 0 if any(made is arg for arg in given) else max(RECORD_BYTES, sys.getsizeof(made))
        # Some of it stays charged, so that copies that are thrown away come to an end too.
        self.settle(charged, own + SLOT_BYTES * copied)
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
        storage = storage_from(self.pop())
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
