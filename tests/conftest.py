"""Set up before any test module is imported."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked ranks hang on a parent's thread pool

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before triton: without a GPU its kernels run interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import triton

from tests.corpus import write_config, write_text, write_tokenizer
from tests.interpreter import interpreting, make_faster
from tests.kernels.compiling import WAITING, Compiler, Compiling
from tests.ranks import GPU_POOL, POOL

numpy_is_new = np.lib.NumpyVersion(np.__version__) >= "2.4.0"
if interpreting and numpy_is_new and triton.__version__.startswith("3.6."):
    raise pytest.UsageError(
        f"The interpreter of Triton {triton.__version__} fails with numpy {np.__version__}: "
        "pip install 'numpy<2.4'"
    )
make_faster()

# A shell that starts the tests in the background has some signals ignored, and so has nohup. What
# the tests start would go on ignoring them.
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a bound on rounding errors that holds for all but a few draws in a
# thousand must not make a change look guilty. `--hypothesis-profile=default` draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    yield
    POOL.close()
    GPU_POOL.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with real text, a tokenizer trained on it, and run.toml: 8 steps of both."""
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    write_tokenizer(folder)
    write_config(folder, steps=8)
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine that no other program is given while the test runs.

    It is bound here, and nobody listens there. torch's store can, since it sets SO_REUSEADDR too.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("localhost", 0))
        yield reserved.getsockname()[1]


# --- The compiler of all kernels -----------------------------------------------------------------

COMPILER = pytest.StashKey[Compiler]()
"""Of the process that starts it."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[COMPILER] = Compiler()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Before pytest removes the temporary folders of earlier sessions, which takes a while."""
    if compiler := session.config.stash.get(COMPILER, None):
        compiler.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In pytest-xdist's controller, before a worker starts: say where the results will be."""
    node.workerinput["compiled"] = str(node.config.stash[COMPILER].folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """In the controller, when a worker has found its tests."""
    node.config.stash[COMPILER].start_for(ids)


@pytest.fixture(scope="session", autouse=True)
def _compiling_starts_early(request: pytest.FixtureRequest) -> None:
    if compiler := request.config.stash.get(COMPILER, None):
        compiler.start_for([item.nodeid for item in request.session.items])


@pytest.fixture(scope="session")
def compiling(pytestconfig: pytest.Config) -> Compiling:
    """The results of the compiler of all kernels, at work since the first test."""
    if compiler := pytestconfig.stash.get(COMPILER, None):
        return Compiling(compiler.folder)
    return Compiling(Path(pytestconfig.workerinput["compiled"]))  # type: ignore[attr-defined]


# --- Which tests run, and in which order ---------------------------------------------------------

LONGEST = (
    "tests/test_layouts.py",
    "tests/fuzz/test_fuzz.py",
    "tests/tools/test_bench_gpu.py",
    "tests/tools/test_train.py",
    "tests/golden/test_golden.py",
    "tests/kernels/test_planted_errors.py",
    "tests/models/test_adding_a_model_family.py",
    "tests/tools/test_console.py",
    "tests/layout/test_adding_an_axis.py",
    "tests/train/test_host_sync.py",
    "tests/test_kill_and_resume.py",
)
"""The files that take most time, longest first. Workers begin with them, or else one worker would
still have a whole file to do when the others have ended."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests that wait for the compiler come last, and where there are several workers the
    longest files first. Tests marked `gpu` are skipped where there is none, or where kernels are
    interpreted. All workers have to know a test by the same name."""
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            "Test names with an address differ from one process to the next: give the parameters "
            f"ids. {addresses[0]}"
        )
    first = LONGEST if hasattr(config, "workerinput") else ()
    ranks = {name: rank for rank, name in enumerate(first)} | {WAITING: len(items)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(first)))
    if not torch.cuda.is_available() or interpreting:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and compiled kernels"))
