"""The bytes in a .gz or .zst file, up to its end or to the place where it is damaged.

`gzip` of the standard library, and a buffered reader on it, lose up to 128 KiB of good text in
front of an error; zstandard's stream reader ends without an error where a file is cut off.
"""

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from megapipe.amounts import counted
from megapipe.data.files import shown
from megapipe.errors import DataError

MAX_WINDOW = 1 << 31
"""As of zstd --long=31. Where a file asks for it, a decoder holds this much of the last text."""

PIECE = 4096
"""Bytes of input at once: they bound what a hostile file can unfold to (128 MiB for .zst)."""


@dataclass(frozen=True)
class Damage:
    """Why a file's bytes from `offset` on, `lost` of them, can't be decompressed."""

    offset: int
    lost: int
    reason: str

    def __str__(self) -> str:
        if not self.lost:
            return f"{self.reason} at byte {self.offset:,}"
        lost = f"{counted(self.lost, 'byte')} from byte {self.offset:,} on can't be decompressed"
        return f"{lost} ({self.reason})"


@dataclass(frozen=True)
class Codec:
    """One compression: its name, what a decoder of one member or frame is, and what it raises."""

    name: str
    decoder: Callable[[], Any]
    error: type[Exception]
    zero_padded: bool = False  # zeros may stand behind a member, as tapes leave them


def codec(suffix: str) -> Codec:
    """Of ".gz" or ".zst"."""
    if suffix == ".gz":
        return Codec("gzip", lambda: zlib.decompressobj(wbits=31), zlib.error, zero_padded=True)
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return Codec("zstd", decompressor.decompressobj, zstandard.ZstdError)


class Decompressed(io.RawIOBase):
    """All members or frames of a file, one after the other.

    Reading ends without an error at damage, behind the last byte that can be had; `damage` then
    says where and why. `produced` counts the bytes that were had. Raises DataError where a frame's
    window is too long or does not fit.

    It begins with the frame at byte `start` of the file. Where a frame begins at byte `stop` or
    behind it, `boundary` is how many decompressed bytes come before that frame. It is known once
    a byte behind it has been read.
    """

    def __init__(
        self, file: BinaryIO, codec: Codec, start: int = 0, stop: int | None = None
    ) -> None:
        super().__init__()
        self.damage: Damage | None = None
        self.boundary: int | None = None
        self.produced = 0
        self._stop = stop
        file.seek(start)
        self._file = file
        self._codec = codec
        self._decoder: Any = None
        self._member = 0  # where the member that is being read begins
        self._member_has_text = False
        self._position = start  # behind the input that decoders have taken
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self.damage is None:
            data = self._input or self._file.read(PIECE)
            self._input = b""
            if not data:
                if self._decoder is not None:
                    self.damage = Damage(self._position, 0, "it is cut off")
                break
            self._output = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        """What `data`, the next input, gives; keeps what lies behind the end of a member."""
        if self._decoder is None:
            begins = data.lstrip(b"\0") if self._codec.zero_padded else data
            self._position += len(data) - len(begins)
            if not begins:
                return b""
            data, self._member, self._member_has_text = begins, self._position, False
            if self.boundary is None and self._stop is not None and self._member >= self._stop:
                self.boundary = self.produced
            self._decoder = self._codec.decoder()
        try:
            output: bytes = self._decoder.decompress(data)
        except self._codec.error as error:
            if "memory" in str(error):  # not the file's fault: it must not count as damaged
                raise DataError(self._too_large(str(error))) from error
            return self._salvage(data)
        self._member_has_text |= bool(output)
        self.produced += len(output)
        if self._decoder.eof:
            self._input, self._decoder = self._decoder.unused_data, None
        self._position += len(data) - len(self._input)
        return output

    def _too_large(self, reason: str) -> str:
        what = "there is not enough memory to decompress it"
        if "requires too much memory" in reason:
            what = f"windows above {MAX_WINDOW >> 20:,} MiB are not supported"
        return (
            f"{shown(self._file.name)}: {what} ({reason}). Compress it anew with zstd --long=27 or "
            "less; if it is damaged, take it out of this source."
        )

    def _salvage(self, data: bytes) -> bytes:
        """What `data` gives up to the byte at which decoding fails.

        A decoder that fails keeps what it has decoded in that call. So the member is decoded again
        up to here, and from here on byte by byte.
        """
        decoder = self._codec.decoder()
        self._file.seek(self._member)
        for start in range(self._member, self._position, PIECE):
            decoder.decompress(self._file.read(min(PIECE, self._position - start)))
        good: list[bytes] = []
        try:
            for byte in data:
                good.append(decoder.decompress(bytes([byte])))
        except self._codec.error as error:
            began = self._member_has_text or any(good)
            offset = self._position + len(good) if began else self._member
            end = os.fstat(self._file.fileno()).st_size if self._stop is None else self._stop
            self.damage = Damage(offset, end - offset, str(error).rpartition(": ")[2])
        assert self.damage is not None, "decoding does not depend on how its input is cut"
        return b"".join(good)
