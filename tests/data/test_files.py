"""Which files a pattern names: as glob has it, but each once and nothing passed over."""

import glob
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.files import (
    Found,
    file_format,
    files_below,
    find_files,
    fingerprint,
    fixed_part,
    glob_matches,
)
from megapipe.errors import DataError
from megapipe.files import shown
from tests.data.samples import write


def names(found: Found, root: Path) -> list[str]:
    return [str(file.path.relative_to(root)) for file in found.files]


NAMES = st.sampled_from(["a", "b.txt", ".c.txt", "[d].txt", "e?", "a.txt"])
PARTS = st.sampled_from(["a", "*", "**", "*.txt", "?.txt", "[ab]*", "[[]d].txt", ".*", ".", "e[?]"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=3)), st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_match_what_glob_matches(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]], pattern: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts in paths:
        path = root.joinpath(*parts)
        if not path.exists() and all(
            parent.is_dir() or not parent.exists() for parent in path.parents
        ):
            write(path, b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for start in (root, Path()):
            text = os.path.join(start, *pattern)
            expected = sorted(
                {Path(p) for p in glob.glob(text, recursive=True) if os.path.isfile(p)}
            )
            found = paths_or_error(text)
            if isinstance(found, str):
                assert "is a directory" in found or ("matches no file" in found and not expected)
            else:
                assert found == expected
                visible = [path for path in paths if not any(map(hidden, path))]
                for path in {os.path.join(start, *parts) for parts in visible}:
                    matches = glob_matches(text, path)
                    assert matches == (Path(path) in expected) or not Path(path).is_file()


def test_a_pattern_matches_paths_that_are_written_in_another_way() -> None:
    for pattern in ("./a/*.txt", "a//*.txt", "a/./*.txt", "b/../a/*.txt", "**/*.txt"):
        assert glob_matches(pattern, "a/b.txt")
        assert not glob_matches(pattern, "/a/b.txt")
        assert not glob_matches(pattern, "a/b.text")


def hidden(name: str) -> bool:
    return name.startswith(".")


def paths_or_error(pattern: str) -> list[Path] | str:
    try:
        return [file.path for file in find_files(pattern, "k").files]
    except DataError as error:
        return str(error)


def test_each_real_file_is_found_once_and_loops_end(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / "data" / "sub" / f"s{part}.txt", b"x" * part)
    data = tmp_path / "data"
    (data / "current").symlink_to(".")
    (data / "sub" / "up").symlink_to("..")
    (data / "sub" / "latest.txt").symlink_to("s1.txt")
    os.link(data / "sub" / "s2.txt", data / "sub" / "z.txt")
    found = find_files(f"{data}/**/*.txt", "k")
    assert names(found, data) == ["sub/latest.txt", "sub/s0.txt", "sub/s2.txt"]
    assert [path.name for path in found.repeats] == ["s1.txt", "z.txt"]
    assert str(found) == "3 files, 3 bytes"
    assert names(files_below(data, "FILES"), data) == names(found, data)


def test_files_of_a_disk_that_gives_an_inode_number_twice_are_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/3.txt"):
        write(tmp_path / name, b"x")
    look = os.stat

    def same_number(path: os.PathLike[str] | str, **flags: bool) -> os.stat_result:
        found = look(path, **flags)
        return os.stat_result((found.st_mode, 7, 7, *found[3:]))

    monkeypatch.setattr(os, "stat", same_number)
    found = find_files(f"{tmp_path}/**/*.txt", "k")
    assert names(found, tmp_path) == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert not found.repeats


def test_a_linked_directory_of_files_is_read(tmp_path: Path) -> None:
    write(tmp_path / "store" / "a.txt", b"x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "web").symlink_to("../store")
    assert names(find_files(f"{tmp_path}/data/**/*.txt", "k"), tmp_path) == ["data/web/a.txt"]


def test_of_two_names_of_a_directory_the_first_is_gone_into(tmp_path: Path) -> None:
    write(tmp_path / "new" / "a.txt", b"x")
    (tmp_path / "old").symlink_to("new")
    assert names(find_files(f"{tmp_path}/**/*.txt", "k"), tmp_path) == ["new/a.txt"]


def test_tables_under_a_compression_have_no_format() -> None:
    """pyarrow can't read them; text under one has its own."""
    forms = {name: file_format(Path(name)) for name in ("a.parquet", "a.parquet.gz", "a.txt.gz")}
    assert forms == {"a.parquet": "parquet", "a.parquet.gz": None, "a.txt.gz": "text"}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling link": (lambda path: path.symlink_to("../gone"), r"a link to \.\./gone, which leads"),
    "link to itself": (lambda path: path.symlink_to(path.name), "which leads to no file"),
    "pipe": (os.mkfifo, "is a pipe and not a file"),
    "socket": (make_socket, "is a socket and not a file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is a device and not a file"),
    "directory": (
        lambda path: path.mkdir(),
        r'is a directory; name the files in it, as in ".*/\*"',
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    write(Path("a.txt"), b"x")
    make, said = ODD[kind]
    make(Path("odd.txt"))
    with pytest.raises(DataError, match=rf'k = "\*\.txt": odd\.txt .*{said}'):
        find_files("*.txt", "k")
    if kind != "directory":
        with pytest.raises(DataError, match=r"odd\.txt"):
            find_files("odd.txt", "k")


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "*/**/*.txt"])
def test_a_link_to_a_directory_that_is_gone_is_an_error(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "there" / "a.txt", b"x")
    (tmp_path / "web").symlink_to("/nonexistent")
    with pytest.raises(DataError, match=r"web is a link to /nonexistent, which leads to no file"):
        find_files(f"{tmp_path}/{pattern}", "k")
    with pytest.raises(DataError, match=r"web is a link to /nonexistent, which leads to no file"):
        files_below(tmp_path, "FILES")


def test_a_directory_whose_entries_may_not_be_looked_at_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "listed" / "sub" / "a.txt", b"x")
    look = os.stat

    def refuse(path: os.PathLike[str] | str, **flags: bool) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/listed/"):
            raise PermissionError(13, "Permission denied", path)
        return look(path, **flags)

    monkeypatch.setattr(os, "stat", refuse)  # tests may run as root, who may look at all
    with pytest.raises(DataError, match=r"listed/sub can't be read: Permission denied"):
        find_files(f"{tmp_path}/**/*.txt", "k")


def test_a_directory_beside_a_file_that_the_pattern_does_not_go_into_is_an_error(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a" / "train.parquet", b"x")
    write(tmp_path / "b" / "train.parquet" / "part-0.parquet", b"x")
    with pytest.raises(DataError, match=r"b/train\.parquet is a directory; name the files in it"):
        find_files(f"{tmp_path}/**/train.parquet", "k")


def test_an_empty_path_is_an_error() -> None:
    with pytest.raises(DataError, match=r'k = "" is empty'):
        find_files("", "k")


def test_a_link_that_may_not_be_followed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").symlink_to("b")

    def refuse(path: object, **flags: bool) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DataError, match=r"a\.txt can't be read: Permission denied"):
        find_files(f"{tmp_path}/*.txt", "k")


def test_directories_that_a_pattern_goes_into_are_no_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet" / "part-0.parquet", b"x")
    write(tmp_path / "b" / "c.txt", b"x")
    write(tmp_path / "d.txt", b"x")
    assert names(find_files(f"{tmp_path}/**/*.parquet", "k"), tmp_path) == [
        "a.parquet/part-0.parquet"
    ]
    assert names(find_files(f"{tmp_path}/[bd]*", "k"), tmp_path) == ["d.txt"]


@pytest.mark.parametrize("pattern", ["locked/*.txt", "**/*.txt", "*/a.txt"])
def test_a_directory_that_may_not_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    write(tmp_path / "locked" / "a.txt", b"x")
    write(tmp_path / "open" / "a.txt", b"x")
    listdir, locked = os.listdir, str(tmp_path / ("locked" if "*/a" not in pattern else ""))

    def refuse(path: str) -> list[str]:
        if path.rstrip("/") == locked.rstrip("/"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # tests may run as root, who may list all
    with pytest.raises(DataError, match=r"k = .*: the directory .* can't be listed: Permission"):
        find_files(f"{tmp_path}/{pattern}", "k")


@pytest.mark.parametrize(
    "pattern",
    [
        "x" * 300 + ".txt",
        "x/" * 3000 + "a.txt",
        "x/*/" * 3000 + "a.txt",
        "**/" * 3000 + "a",
        "x" * 300 + "/*",
    ],
)
def test_names_that_are_too_long(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=r"k = .*(File name too long|matches no file)"):
        find_files(f"{tmp_path}/{pattern}", "k")


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'k = "a\\x00b" has a NUL'):
        find_files("a\0b", "k")


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        with pytest.raises(
            DataError, match=r"matches no file \(looked from a directory that is gone"
        ):
            find_files("*.txt", "k")
    finally:
        monkeypatch.undo()


def test_names_are_shown_on_one_line_whatever_they_are() -> None:
    assert shown("data/é漢 [x] %20.txt") == "data/é漢 [x] %20.txt"
    assert (
        shown(b"caf\xe9\n\x1b[1m.txt".decode("utf-8", "surrogateescape")) == r"caf\xe9\n\x1b[1m.txt"
    )


def test_a_glob_that_a_bracket_in_a_name_keeps_from_matching(tmp_path: Path) -> None:
    write(tmp_path / "[en] web" / "a.txt", b"text")
    with pytest.raises(DataError, match=r"a \[ that is part of a name is written \[\[\]\.$"):
        find_files(f"{tmp_path}/[en] web/*.txt", "k")
    assert len(find_files(f"{tmp_path}/[[]en] web/*.txt", "k").files) == 1


def test_a_name_with_the_characters_of_globs_is_taken_as_it_is(tmp_path: Path) -> None:
    exact = write(tmp_path / "a[1]*.txt", b"text")
    write(tmp_path / "a1.txt", b"text")
    assert [file.path for file in find_files(str(exact), "k").files] == [exact]


def test_the_fixed_part_of_a_pattern(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b[1].txt", b"x")
    assert fixed_part(f"{tmp_path}/a/b[1].txt") == tmp_path / "a", "a file is no pattern"
    assert fixed_part(f"{tmp_path}/a/*.txt") == tmp_path / "a"
    assert fixed_part(f"{tmp_path}/**/*.txt") == tmp_path
    assert fixed_part(f"{tmp_path}/a[12]/b/*.txt") == tmp_path
    assert fixed_part("gone/b.txt") == Path("gone")
    assert fixed_part("*.txt") == Path()


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, 100_000])
def test_a_fingerprint_changes_with_head_tail_and_samples(tmp_path: Path, size: int) -> None:
    content = bytearray(b"x" * size)
    path = write(tmp_path / "a", bytes(content))
    marks = {fingerprint(path, size)}
    places = {0, size - 1, size // 5} if size else set()
    for place in places:
        changed = content.copy()
        changed[place] ^= 1
        marks.add(fingerprint(write(path, bytes(changed)), size))
    marks.add(fingerprint(write(path, b"x" * (size + 1)), size + 1))
    assert len(marks) == 2 + len(places)
    with pytest.raises(DataError, match=r"has .* now and had"):
        fingerprint(path, size)
