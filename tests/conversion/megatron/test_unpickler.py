"""Pickles are read to plain values and records: nothing is run, and none takes all memory."""

import argparse
import io
import pickle
import random
import subprocess
import sys
from collections import OrderedDict, UserDict, deque
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megapipe.conversion.megatron.records import InertRecord
from megapipe.conversion.megatron.unpickler import MAX_PICKLE_BYTES, unpickle
from megapipe.errors import CheckpointError
from tests.conversion.megatron.hostile import harmful, program, text
from tests.conversion.megatron.samples import Backend

PLAIN = {
    "numbers": [0, 1, -1, 255, 256, 2**31, -(2**31), 2**70, -(2**70), 0.5, float("inf")],
    "texts": ["", "a", "ä\ud800", "x" * 300],
    "bytes": [b"", b"a" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "rest": (None, True, False, {1: {2: 3}}, {1, 2}, frozenset({3}), list(range(2000))),
    (1, "key"): OrderedDict(a=1, b=2),
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_are_what_they_were(protocol: int) -> None:
    assert unpickle(pickle.dumps(PLAIN, protocol), "file") == PLAIN


def test_one_object_in_two_places_stays_one() -> None:
    shared: list[object] = []
    shared.append(shared)
    found = unpickle(pickle.dumps([shared, shared]), "file")
    assert isinstance(found, list)
    assert found[0] is found[1] is found[0][0]


def test_objects_are_records() -> None:
    objects = (
        argparse.Namespace(layers=4),
        Backend.AUTO,
        torch.bfloat16,
        deque([1, 2]),
        UserDict(a=1),
    )
    found = unpickle(pickle.dumps(objects), "file")
    assert isinstance(found, tuple)
    namespace, backend, dtype, several, _ = found
    assert all(isinstance(one, InertRecord) for one in found)
    assert (namespace.path, namespace.values()) == ("argparse.Namespace", {"layers": 4})
    assert (backend.name, backend.args) == ("Backend", (5,))
    assert (dtype.path, dtype.args) == ("torch.bfloat16", None)
    assert several.items == [1, 2]


def test_what_lies_in_memory_files_stays_bytes() -> None:
    found = unpickle(pickle.dumps(io.BytesIO(pickle.dumps(1))), "file")
    assert isinstance(found, InertRecord)
    assert found.state == (pickle.dumps(1), 0, None)


def test_reading_ends_at_a_key() -> None:
    data = pickle.dumps(UserDict({"a": 1, "b": {2: 3}, "c": deque(), "d": 3}))
    assert unpickle(data, "file", end_at="c") == {"a": 1, "b": {2: 3}}


@pytest.mark.parametrize("name", harmful("x"))
def test_nothing_is_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    data = harmful(str(canary))[name]
    modules = set(sys.modules)
    with suppress(CheckpointError):
        unpickle(data, "file")
    assert not canary.exists()
    assert set(sys.modules) == modules


RUN_ALL = """
import pickle, sys
from contextlib import suppress
from tests.conversion.megatron.hostile import harmful

sys.modules["torch"] = sys.modules["torch.storage"] = None  # which takes seconds to import
for name in harmful(""):
    with suppress(Exception):
        pickle.loads(harmful(f"{sys.argv[1]}/{name.replace(' ', '-')}")[name])
"""


def test_what_would_happen_if_they_were_run(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RUN_ALL, tmp_path], check=True, capture_output=True)
    ran = {file.name.replace("-", " ") for file in tmp_path.iterdir()}
    assert harmful("").keys() - ran == {*MADE_WITHOUT_INIT, *NEED_TORCH}


MADE_WITHOUT_INIT = ("new object", "new object with keywords")
NEED_TORCH = ("torch.load", "torch's storage", "tensor")


def test_every_cut_and_every_changed_byte_is_an_error_or_a_value() -> None:
    data = pickle.dumps((PLAIN["rest"][3:6], argparse.Namespace(a=[1]), Backend.AUTO), 4)
    for end in range(len(data)):
        with pytest.raises(CheckpointError):
            unpickle(data[:end], "file")
    choose = random.Random(0)
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(choose.randint(1, 3)):
            changed[choose.randrange(2, len(data))] = choose.randrange(256)
        with suppress(CheckpointError):
            unpickle(bytes(changed), "file")


REFUSED = {
    "no pickle": (b"hello", "no pickle of protocols 2 to 5"),
    "empty": (b"", "too early"),
    "protocol 0": (pickle.dumps([1], 0), "no pickle of protocols"),
    "opcode": (program(b"i"), "opcode 0x69, which is not read"),
    "stack": (program(b"0"), "takes a value from where none is"),
    "below a mark": (program(b"N(0"), "takes a value from where none is"),
    "no mark": (program(b"e"), "mark that it has not set"),
    "memo": (program(b"h\x05"), "asks for value 5 of the 0 remembered"),
    "sparse memo": (program(b"Nq\x05"), "remembers value 5 before value 0"),
    "append": (program(b"NNa"), "appends to a NoneType"),
    "set": (program(b"NNNs"), "sets items of a NoneType"),
    "odd": (program(b"}(Nu"), "a key without a value"),
    "key": (program(b"}]Ns"), "a list in the key of a dict"),
    "deep key": (program(b"})\x85\x85Ns"), "a tuple in the key of a dict"),
    "call": (program(text("a") + b")R"), "calls a str"),
    "build": (program(b"NNb"), "changes the state of a NoneType"),
    "persistent": (program(b"NQ"), "no storage of torch's"),
    "after the end": (program(b"N") + b".", "goes on after its end"),
    "not UTF-8": (program(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
    "control characters": (program(b"c\x1b[31m\nb\nK\x00\x85Rb"), "takes a value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str) -> None:
    data, said = REFUSED[name]
    with pytest.raises(CheckpointError, match=said) as raised:
        unpickle(data, "some/file")
    assert str(raised.value).startswith("some/file: ")
    assert str(raised.value).isprintable()


def test_large_pickles_are_refused_unread() -> None:
    with pytest.raises(CheckpointError, match=r"32.0 MiB, more than the 32.0 MiB that are read"):
        unpickle(bytes(MAX_PICKLE_BYTES + 1), "file")


ALLOWANCE = 4 * 2**20
"""Much less than the real one, so that it is used up in less time."""
MEASURE = f"""
import resource
from megapipe.conversion.megatron import interpreter
from megapipe.conversion.megatron.unpickler import unpickle
from megapipe.errors import CheckpointError
from tests.conversion.megatron.hostile import greedy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

interpreter.ALLOWANCE_BYTES = {ALLOWANCE}
before = peak()
for name, data in greedy({ALLOWANCE}):
    try:
        unpickle(data, "file")
        print(name, "| was read")
    except CheckpointError as error:
        print(name, "|", error)
print(peak() - before)
"""


def test_no_pickle_takes_more_memory_than_is_allowed() -> None:
    """Besides its own bytes, here at most 4 MiB, and a quarter for what lists keep free."""
    run = [sys.executable, "-c", MEASURE]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    *said, most = lines
    assert int(most) < 1.25 * ALLOWANCE + 4 * 2**20
    assert [line for line in said if line.endswith("| was read")] == ["laughs | was read"]
    assert len(said) == 18
