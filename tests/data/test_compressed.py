"""All bytes in front of damage are delivered; members, frames and padding are passed over."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.compressed import Damage, Decompressed, codec
from megapipe.data.contents import check_content
from megapipe.errors import DataError
from tests.data.samples import write

TEXT = b"".join(b"%d %d of the text\n" % (n, n * n * 7919) for n in range(40_000))
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"abcd"


def read(path: Path) -> tuple[bytes, Damage | None]:
    with path.open("rb") as file:
        raw = Decompressed(file, codec(path.suffix))
        return io.BufferedReader(raw, 1 << 17).read(), raw.damage


def compress(suffix: str, content: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def available(suffix: str, content: bytes) -> tuple[bytes, int]:
    """What a decoder gives that is fed byte by byte, and how many bytes it takes."""
    decoder = (
        zlib.decompressobj(31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj()
    )
    found = []
    try:
        for byte in content:
            found.append(decoder.decompress(bytes([byte])))
    except (zlib.error, zstandard.ZstdError):
        pass
    return b"".join(found), len(found)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_damage_loses_nothing_in_front_of_it(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    content = bytearray(compress(suffix, TEXT))
    place = data.draw(st.integers(20, len(content) - 1))
    cut = data.draw(st.booleans())
    if cut:
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damage") / f"a{suffix}"
    path.write_bytes(content)
    found, damage = read(path)
    text, taken = available(suffix, bytes(content))
    assert found == text
    assert damage is not None
    # Without any text the whole member is lost, and not only what follows the damage.
    assert damage.offset == (taken if text or cut else 0)
    assert damage.offset + damage.lost == len(content)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bytes_behind_the_last_member_are_told(tmp_path: Path, suffix: str) -> None:
    whole = compress(suffix, TEXT)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole + b"garbage")
    found, damage = read(path)
    assert found == TEXT
    assert damage is not None
    assert (damage.offset, damage.lost) == (len(whole), 7)
    assert str(damage).startswith(f"7 bytes from byte {len(whole):,} on can't be decompressed (")
    path.write_bytes(whole[:-3])
    found, damage = read(path)
    assert found == TEXT
    assert str(damage) == f"it is cut off at byte {len(whole) - 3:,}"


@pytest.mark.parametrize("padding", [0, 1, 512, 10_000])
def test_members_and_zeros_behind_them(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes((gzip.compress(b"one\n") + bytes(padding)) * 3)
    assert read(path) == (b"one\n" * 3, None)


def test_frames_and_frames_to_skip(tmp_path: Path) -> None:
    one, none = zstandard.compress(b"one\n"), zstandard.compress(b"")
    path = tmp_path / "a.zst"
    path.write_bytes(SKIPPABLE + one + none + SKIPPABLE * 2 + one + SKIPPABLE)
    assert read(path) == (b"one\n" * 2, None)


def test_the_longest_window_of_zstd_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=31, hash_log=12, chain_log=12, enable_ldm=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(TEXT) + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << 31
    path = tmp_path / "a.zst"
    path.write_bytes(content)
    assert read(path) == (TEXT, None)


def test_memory_that_does_not_suffice_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapipe.data.compressed.MAX_WINDOW", 1 << 12)
    compressor = zstandard.ZstdCompressor().compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(compressor.compress(TEXT) + compressor.flush())
    with pytest.raises(DataError, match=r"a\.zst: windows above 0 MiB are not supported"):
        read(path)
    with pytest.raises(DataError, match=r"a\.zst: windows above"):
        check_content(path, "text", path.stat().st_size)  # as at the start, by the head alone


def test_an_empty_file_has_no_text(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"")
        assert read(path) == (b"", None)
        assert read(write(path, b"")) == (b"", None)
