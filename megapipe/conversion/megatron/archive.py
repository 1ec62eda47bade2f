"""The zip files that torch.save writes: where their members lie, and the pickle inside.

A small reader of our own: it looks only at members that are stored as they are, as torch writes
them, bounds what it reads before it reads it, and gives ranges of the file instead of bytes.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megapipe.amounts import counted
from megapipe.checkpoint.storage import open_regular, read_into
from megapipe.conversion.megatron.records import StoredTensor
from megapipe.conversion.megatron.unpickler import MAX_PICKLE_BYTES, unpickle
from megapipe.conversion.strided import ITEM_BYTES, StridedTensor
from megapipe.errors import CheckpointError
from megapipe.files import shown

MAX_DIRECTORY_BYTES = 8 * 2**20
MAX_COMMENT = 2**16
END = struct.Struct("<4s4H2LH")
END_64_LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
ENCRYPTED = 1
FULL_16, FULL_32 = 2**16 - 1, 2**32 - 1
"""In a field whose value follows as a wider number."""


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes [offset, offset + size) of a file."""

    path: Path
    offset: int
    size: int

    def read(self, begin: int, count: int) -> bytes:
        """`count` bytes from byte `begin` of the span."""
        if begin < 0 or count < 0 or begin + count > self.size:
            raise CheckpointError(
                f"{self.path}: byte {begin + count} lies outside of what it holds"
            )
        data = bytearray(count)
        with open_regular(self.path) as descriptor:
            read_into(descriptor, memoryview(data), self.offset + begin, self.path)
        return bytes(data)

    def within(self, begin: int, count: int) -> "ByteSpan":
        return ByteSpan(self.path, self.offset + begin, count)


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """What torch.save has written to a span: `content` with `StoredTensor`s for its tensors."""

    span: ByteSpan
    content: object
    headers: dict[str, tuple[int, int]]
    """Of each member: where in the span its local header lies, and how many bytes it has."""

    def tensor(self, stored: StoredTensor) -> StridedTensor:
        """Where in the file the values of a tensor lie. Nothing of them is read.

        Raises CheckpointError where its storage is missing or too short.
        """
        storage = stored.storage
        path = self.span.path
        if stored.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: tensors of {shown(stored.dtype)[:99]} can't be read")
        header = self.headers.get(f"data/{storage.key}")
        if header is None:
            raise CheckpointError(f"{path} has no storage {shown(storage.key)[:99]}")
        size = header[1]
        if storage.elements * ITEM_BYTES[storage.dtype] != size:
            raise CheckpointError(
                f"{path}: storage {shown(storage.key)[:99]} has {counted(size, 'byte')}, which "
                f"aren't {counted(storage.elements, 'element')} of {storage.dtype}"
            )
        tensor = StridedTensor(
            path,
            self.span.offset + _content_offset(self.span, *header),
            stored.dtype,
            stored.shape,
            stored.strides,
        ).moved(stored.offset)
        if math.prod(stored.shape) * tensor.item_bytes > tensor.reach:
            raise CheckpointError(f"{path}: a tensor of {list(stored.shape)} overlaps itself")
        if stored.offset * tensor.item_bytes + tensor.reach > size:
            raise CheckpointError(
                f"{path}: a tensor of shape {list(stored.shape)} lies outside of its storage of "
                f"{counted(size, 'byte')}"
            )
        return tensor


def open_archive(span: ByteSpan) -> TorchArchive:
    """Read the directory of the zip file at `span` and its pickle; tensors stay on the disk.

    Raises CheckpointError for what torch.save does not write in its zip format.
    """
    members = dict(_members(span))
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{span.path}: it is a zip file, but not one of torch.save's")
    inside = {
        name.removeprefix(f"{roots[0]}/"): header
        for name, header in members.items()
        if name.startswith(f"{roots[0]}/")
    }
    if "byteorder" in inside and _content(span, inside["byteorder"], 16) != b"little":
        raise CheckpointError(f"{span.path} was written on a machine with another order of bytes")
    content = unpickle(_content(span, inside["data.pkl"], MAX_PICKLE_BYTES), str(span.path))
    return TorchArchive(span, content, inside)


def whole_file(path: Path) -> ByteSpan:
    """All bytes of a regular file."""
    with open_regular(path) as descriptor:
        return ByteSpan(path, 0, os.fstat(descriptor).st_size)


def _members(span: ByteSpan) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and place of the local header and bytes, of each member that the directory lists."""
    begin, size, count = _directory(span)
    if size > min(MAX_DIRECTORY_BYTES, span.size) or count * ENTRY.size > size:
        raise CheckpointError(f"{span.path}: its zip directory can't have {counted(size, 'byte')}")
    data = span.read(begin, size)
    seen: set[str] = set()
    position = 0
    for _ in range(count):
        if position + ENTRY.size > size:
            raise CheckpointError(f"{span.path}: its zip directory ends too early")
        fields = ENTRY.unpack_from(data, position)
        position += ENTRY.size
        name_end = position + fields[10]
        extra_end = name_end + fields[11]
        name = _member_name(span, data[position:name_end])
        wide = _wide_numbers(data[name_end:extra_end])
        position = extra_end + fields[12]  # the comment's length
        if fields[0] != b"PK\1\2" or position > size or name in seen:
            raise CheckpointError(f"{span.path}: its zip directory is damaged at {shown(name)!r}")
        seen.add(name)
        flags, method, packed, unpacked, header = fields[3], fields[4], *fields[8:10], fields[16]
        unpacked, packed, header = (
            next(wide, -1) if number == FULL_32 else number for number in (unpacked, packed, header)
        )
        if flags & ENCRYPTED or method != 0 or packed != unpacked:
            raise CheckpointError(
                f"{span.path}: member {name!r} is compressed or encrypted, as torch.save never "
                "writes it"
            )
        if min(unpacked, header) < 0 or header + LOCAL.size + unpacked > begin:
            raise CheckpointError(f"{span.path}: member {name!r} lies outside of it")
        yield name, (header, unpacked)


def _member_name(span: ByteSpan, raw: bytes) -> str:
    name = raw.decode("utf-8", "replace")
    if not name.isprintable() or ".." in name.split("/") or name.startswith("/") or "\\" in name:
        raise CheckpointError(f"{span.path}: no member of a zip file may be named {name[:99]!a}")
    return name


def _wide_numbers(extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of extra field 1, in the order of the fields that they stand for."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            content = extra[position : position + size]
            for (number,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8]):
                yield number
        position += size


def _directory(span: ByteSpan) -> tuple[int, int, int]:
    """Begin, bytes and entries of the directory, from the record at the end of the zip file."""
    tail = span.read(
        max(0, span.size - END.size - MAX_COMMENT), min(span.size, END.size + MAX_COMMENT)
    )
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + END.size > len(tail):
        raise CheckpointError(
            f"{span.path} is no zip file of torch.save: cut off, or older than torch 1.6"
        )
    _, disk, first_disk, _, count, size, begin, _ = END.unpack_from(tail, found)
    end = span.size - len(tail) + found
    if FULL_16 in (count, disk, first_disk) or FULL_32 in (size, begin):
        locator = END_64_LOCATOR.unpack(span.read(end - END_64_LOCATOR.size, END_64_LOCATOR.size))
        if locator[0] != b"PK\6\7":
            raise CheckpointError(f"{span.path}: its zip directory is damaged")
        end = locator[2]
        record = END_64.unpack(span.read(end, END_64.size))
        if record[0] != b"PK\6\6":
            raise CheckpointError(f"{span.path}: its zip directory is damaged")
        count, size, begin = record[7:10]
    if begin + size > end:
        raise CheckpointError(f"{span.path}: its zip directory lies outside of it")
    return begin, size, count


def _content_offset(span: ByteSpan, header: int, size: int) -> int:
    """Where in the span the bytes of a member begin, behind its local header."""
    fields = LOCAL.unpack(span.read(header, LOCAL.size))
    begin: int = header + LOCAL.size + fields[9] + fields[10]
    if fields[0] != b"PK\3\4" or begin + size > span.size:
        raise CheckpointError(f"{span.path}: the zip header at byte {header} is damaged")
    return begin


def _content(span: ByteSpan, header: tuple[int, int], limit: int) -> bytes:
    """All bytes of a member, at most `limit`."""
    if header[1] > limit:
        raise CheckpointError(f"{span.path}: a member of {counted(header[1], 'byte')} is too large")
    return span.read(_content_offset(span, *header), header[1])
