"""Paths of a config: what is expanded, what is refused, and that a saved config means the same."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.config import Config, dump_config, load_config, parse_config
from megapipe.config.paths import escape_path, expand_path
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from tests.config.examples import TEXT, write

ENVIRONMENT = {"HOME": "/home/me", "DATA": "/mnt/data", "NAME": "a $5 ~", "EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/x", "runs/x"),
        ("~", "/home/me"),
        ("~/runs/x", "/home/me/runs/x"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("$DATA/*.txt", "/mnt/data/*.txt"),
        ("${DATA}2/x", "/mnt/data2/x"),
        ("~/$NAME", "/home/me/a $5 ~"),
        ("$$DATA/$", "$DATA/$"),
        ("price-5$.txt", "price-5$.txt"),
        ("[$]x", "[$]x"),
        ("hf://org/$DATA", "hf://org/$DATA"),
    ],
)
def test_what_is_expanded(text: str, path: str) -> None:
    assert expand_path(text, ENVIRONMENT) == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$SCRATCH/x", "names the variable SCRATCH, which is not set"),
        ("${SCRATCH}", "names the variable SCRATCH, which is not set"),
        ("$EMPTY/x", "names the variable EMPTY, which is empty"),
        ("~nobody-of-that-name/x", "names a home directory that is not known; write ./~nobody"),
        ("a\0b", "NUL"),
        ("caf\udce9", "is not UTF-8"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expand_path(text, ENVIRONMENT)


@given(st.text(st.sampled_from("a~/$ {}D"), max_size=8))
def test_a_written_path_is_read_as_the_same(text: str) -> None:
    environment = {**ENVIRONMENT, "D": "~/${x}$$", "a": "~a"}
    try:
        path = expand_path(text, environment)
    except ValueError:
        return
    assert expand_path(escape_path(path), environment) == path


KEYS = {
    "train.run_dir": lambda config: config.train.run_dir,
    "checkpoint.resume": lambda config: config.checkpoint.resume,
    "data.tokenizer": lambda config: config.data.tokenizer,
    "data.sources.0.path": lambda config: config.data.sources[0].path,
    "data.validation_sources.0.path": lambda config: config.data.validation_sources[0].path,
    "data.changes.0.add": lambda config: config.data.changes[0].add,
    "data.changes.0.remove": lambda config: config.data.changes[0].remove,
    "data.exclude.0.path": lambda config: config.data.exclude[0].path,
    "parallel.schedule_file": lambda config: config.parallel.schedule_file,
    "parallel.stage_costs": lambda config: config.parallel.stage_costs,
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "/mnt/$x")
    monkeypatch.delenv("NOWHERE", raising=False)
    change = ["--data.changes.0.after_step=5", "--data.changes.0.source=a"]
    more = {
        "data.validation_sources.0.path": ["--data.validation_sources.0.name=b"],
        "data.changes.0.add": change,
        "data.changes.0.remove": change,
        "data.exclude.0.path": ["--data.exclude.0.by=sha256"],
        "parallel.schedule_file": ["--parallel.schedule=csv"],
        "parallel.stage_costs": ["--parallel.schedule=auto"],
    }

    def load(value: str) -> Config:
        return load_config(
            write(tmp_path, TEXT), [f"--{key}={value}", *more.get(key, [])], FAMILIES
        )

    assert KEYS[key](load("~/x")) == "/home/me/x"
    config = load("$WHERE/y")
    assert KEYS[key](config) == "/mnt/$x/y"
    assert parse_config(dump_config(config), FAMILIES) == config
    with pytest.raises(ConfigError) as caught:
        load("$NOWHERE/y")
    assert f'{key} = "$NOWHERE/y" names the variable NOWHERE' in str(caught.value)


def test_a_value_that_is_not_utf_8(tmp_path: Path) -> None:
    words = ["--logging.wandb_name", "caf\udce9", "--data.sources.0.path=d\udce9/x.txt"]
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, TEXT), words, FAMILIES)
    name, path = caught.value.problems
    assert name.startswith(r"command line: --logging.wandb_name caf\xe9 is not UTF-8")
    assert path.startswith(r"command line: --data.sources.0.path d\xe9/x.txt is not UTF-8")
    assert path.endswith(
        "Rename the file or convert the text; in a glob, ? stands for such a byte."
    )


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, TEXT), [], FAMILIES)
    path = tmp_path / "run.toml"
    for content in (b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert load_config(path, [], FAMILIES) == plain


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.encode("utf-16"), r"run\.toml: is not UTF-8 text \(byte 0\): it is UTF-16"),
        (TEXT.encode("utf-16-le"), r"it holds NUL bytes"),
        (b"\0" * 100, r"it holds NUL bytes"),
        (
            "[train]\n# caf\u00e9".encode("latin-1"),
            r"not UTF-8 text \(byte 13\): .*Save it as UTF-8",
        ),
    ],
)
def test_files_in_another_encoding(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path, [], FAMILIES)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("text", "path"), [("~", "/"), ("~/", "/"), ("~/x", "/x")])
def test_a_home_that_is_the_root(text: str, path: str) -> None:
    assert expand_path(text, {"HOME": "/"}) == path
