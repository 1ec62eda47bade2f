"""The launch scripts, with stand-ins for what they start: what runs, and how it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"]

PYTHON = f"""\
case "$1 $2" in
"-m pip" | "-m ruff" | "-m mypy" | "-m pytest")
    echo "$* [${{OMP_NUM_THREADS:-}}]" >>"$LOG"
    [[ "$*" == "${{FAILS:-nothing}}"* ]] && exit 3
    exit 0 ;;
esac
exec {sys.executable} "$@"
"""
LOGS = 'echo "$(basename "$0") $*" >>"$LOG"\n'


class Clone:
    """A copy of the scripts with an environment of stand-ins, which note their words in a log."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log"
        shutil.copytree(ROOT / "launch", root / "launch")
        shutil.copytree(ROOT / ".ci", root / ".ci")
        shutil.copy(ROOT / "pyproject.toml", root)
        self.program(".venv/bin/python", PYTHON)
        self.program(".venv/bin/megapipe", LOGS)

    def program(self, name: str, body: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}", encoding="utf-8")
        path.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        path = f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(home), "LOG": str(self.log), **variables}

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> tuple[int, str]:
        """(exit status, all output) of a script of the clone, or of `-c` words."""
        script = str(self.root / words[0]) if words[0] != "-c" else "-c"
        done = subprocess.run(
            ["bash", script, *words[1:]],
            cwd=cwd or self.root,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def logged(self) -> list[str]:
        """What was started since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-P", str(ROOT / "launch"), str(script)], check=True)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch" or script.stem == "setup"


# --- test.sh and setup.sh ------------------------------------------------------------------------


def installs(clone: Clone, extra: str = "", constraints: Path | None = None) -> str:
    file = constraints or clone.root / "launch/constraints.txt"
    words = "-m pip install --quiet --disable-pip-version-check"
    return f"{words} --constraint {file} --editable {clone.root}{extra} []"


def test_constraints_of_ones_own_or_none(clone: Clone, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("numpy<2.4")
    set_up = ("-c", "source launch/setup.sh; set_up")
    clone.run(*set_up, MEGAPIPE_CONSTRAINTS=str(own))
    clone.run(*set_up, MEGAPIPE_CONSTRAINTS="none")
    assert clone.logged() == [
        installs(clone, constraints=own),
        installs(clone, constraints=Path("/dev/null")),
    ]
    status, said = clone.run(*set_up, MEGAPIPE_CONSTRAINTS="missing.txt")
    assert status == 1
    assert "MEGAPIPE_CONSTRAINTS=missing.txt is no file that can be read" in said


def test_constraints_name_all_that_is_required_within_its_range() -> None:
    text = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8")
    pins = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    versions = {pin.name.lower(): next(iter(pin.specifier)) for pin in pins}
    assert [pin.name for pin in pins if pin.name != "triton" and "==" not in str(pin)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in map(Requirement, required):
        name = requirement.name.lower().replace("-", "_")
        pin = versions.get(requirement.name.lower()) or versions[name]
        assert requirement.specifier.contains(pin.version), (str(requirement), str(pin))


ALL_TESTS = (
    "-m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder [1]"
)


def test_test_runs_all_checks_and_installs_once(clone: Clone) -> None:
    install = installs(clone, "[test]")
    checks = ["-m ruff check . []", "-m ruff format --check . []", "-m mypy []"]
    status, said = clone.run("launch/test.sh")
    assert status == 0, said
    first, *others = clone.logged()
    assert first == install
    assert sorted(others) == sorted([*checks, ALL_TESTS])  # mypy is beside the tests
    words = ("launch/test.sh", "tests/data", "-k", "a b")
    status, said = clone.run(*words, cwd=clone.root.parent)
    assert status == 0, said
    assert sorted(clone.logged()) == sorted([*checks, "-m pytest tests/data -k a b [1]"])
    assert "== pytest: 0 s" in said
    for changed in ("pyproject.toml", "launch/constraints.txt"):
        (clone.root / changed).write_text("changed")
        clone.run("launch/test.sh")
        assert clone.logged()[0] == install, changed
        clone.run("launch/test.sh")
        assert install not in clone.logged(), changed


@pytest.mark.parametrize("fails", ["-m pip", "-m ruff check", "-m ruff format"])
def test_test_ends_at_the_first_failure(clone: Clone, fails: str) -> None:
    status, said = clone.run("launch/test.sh", FAILS=fails)
    assert status == 1, said
    assert clone.logged()[-1].startswith(fails)
    assert said.splitlines()[-1].startswith("test.sh: ")


def test_test_fails_when_types_do_not_fit_or_tests_fail(clone: Clone) -> None:
    status, said = clone.run("launch/test.sh", FAILS="-m mypy")
    assert status == 1
    assert said.splitlines()[-1].startswith("test.sh: mypy failed")
    assert ALL_TESTS in clone.logged()
    status, said = clone.run("launch/test.sh", FAILS="-m pytest")
    assert status == 1
    assert said.splitlines()[-1].startswith("test.sh: pytest failed")


def test_ci_fails_when_tests_fail(clone: Clone) -> None:
    status, said = clone.run(".ci/run", cwd=clone.root.parent, CI="true")
    assert status == 0, said
    assert ALL_TESTS in clone.logged()
    status, _ = clone.run(".ci/run", cwd=clone.root.parent, FAILS="-m pytest")
    assert status == 1


def test_an_installation_with_tests_serves_without(clone: Clone) -> None:
    clone.run("-c", "source launch/setup.sh; set_up; set_up; set_up test; set_up; set_up test")
    assert clone.logged() == [installs(clone), installs(clone, "[test]")]


def test_an_environment_is_made_by_the_first_python_that_can(clone: Clone) -> None:
    shutil.rmtree(clone.root / ".venv")
    makes = f"""{LOGS}
if [[ $1 == -m ]]; then mkdir -p "$3/bin" && cp "$PYTHON" "$3/bin/python"; fi
"""
    clone.program("python", PYTHON)
    clone.program("bin/python3", "exit 1")  # too old, or without venv
    clone.program("bin/python3.13", makes)
    words = "source launch/setup.sh; set_up"
    status, said = clone.run("-c", words, PYTHON=str(clone.root / "python"))
    assert status == 0, said
    assert f"python3.13 -m venv {clone.root}/.venv" in clone.logged()
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python"):
        clone.program(f"bin/{name}", "exit 1")
    shutil.rmtree(clone.root / ".venv")
    status, said = clone.run("launch/test.sh")
    assert status == 1
    assert "found no Python 3.11 or newer" in said
    assert clone.logged() == []


def test_a_broken_environment_is_named(clone: Clone) -> None:
    clone.program(".venv/bin/python", "exit 1")
    status, said = clone.run("launch/quickstart.sh")
    assert status == 1
    assert f"{clone.root}/.venv is no working virtual environment. Remove it" in said


# --- quickstart.sh -------------------------------------------------------------------------------


def test_quickstart(clone: Clone) -> None:
    tokenizer = "runs/quickstart/tokenizer.model"
    # Stands in for the tokenizer that is trained; what it is told of places lies in the clone.
    clone.program(
        ".venv/bin/megapipe",
        f'{LOGS}[[ $1 == tokenizer ]] && touch "{tokenizer}"\n'
        '[[ -d $TMPDIR && $(printenv | grep -cE "_(HOME|DIR)=$PWD/runs/quickstart/") -ge 8 ]]\n',
    )
    config = "launch/configs/quickstart.toml"
    first = [f"tokenizer train runs/quickstart/corpus --vocab-size 4096 --out {tokenizer}"]
    rest = [
        f"verify {config}",
        f"train {config}",
        "generate runs/quickstart --prompt def  --temperature 0.7",
    ]
    for expected in (first + rest, rest):
        status, said = clone.run("launch/quickstart.sh", cwd=clone.root.parent)
        assert status == 0, said
        started = [line for line in clone.logged() if line.startswith("megapipe ")]
        assert started == [f"megapipe {words}" for words in expected]
    texts = list((clone.root / "runs/quickstart/corpus").glob("*.txt"))
    assert len(texts) > 300
    assert sum(path.stat().st_size for path in texts) > 4_000_000
    names = {path.name for path in texts}
    assert {"json.decoder.txt", "argparse.txt"} < names
    assert not any(name.startswith("test.") for name in names)
    assert not list((clone.root / "home").iterdir()), "nothing is written outside the clone"
    assert {path.name for path in clone.root.iterdir()} >= {"runs", ".venv"}


def test_quickstart_ends_where_the_proof_fails(clone: Clone) -> None:
    clone.program(".venv/bin/megapipe", f"{LOGS}[[ $1 != verify ]]")
    status, _ = clone.run("launch/quickstart.sh")
    assert status == 1
    assert clone.logged()[-1].startswith("megapipe verify")


# --- torchrun.sh ---------------------------------------------------------------------------------

JOIN = "--no-python megapipe train a.toml --train.steps 3"


@pytest.mark.parametrize(
    ("variables", "started"),
    [
        ({}, f"torchrun --standalone --nproc-per-node gpu {JOIN}"),
        ({"NPROC_PER_NODE": "4"}, f"torchrun --standalone --nproc-per-node 4 {JOIN}"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h"},
            "torchrun --nnodes 2 --node-rank 1 --master-addr h --master-port 29500 "
            f"--nproc-per-node gpu {JOIN}",
        ),
    ],
)
def test_torchrun(clone: Clone, variables: dict[str, str], started: str) -> None:
    clone.program("bin/torchrun", f'{LOGS}echo "$OMP_NUM_THREADS"; exit 7')
    clone.program("bin/nvidia-smi", "true")
    status, said = clone.run("launch/torchrun.sh", "a.toml", "--train.steps", "3", **variables)
    assert (status, said.splitlines()[-1]) == (7, "1")
    assert ("node 1 of 2 meets the others at h:29500" in said) == ("NNODES" in variables)
    assert clone.logged() == [started]


def test_torchrun_says_what_is_missing(clone: Clone) -> None:
    assert "usage: bash launch/torchrun.sh CONFIG.toml" in clone.run("launch/torchrun.sh")[1]
    status, said = clone.run("launch/torchrun.sh", "a.toml", NNODES="2", NODE_RANK="0")
    assert status == 1
    assert "NNODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR" in said
    if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        status, said = clone.run("launch/torchrun.sh", "a.toml")
        assert status == 1
        assert "this machine has no GPU: set NPROC_PER_NODE" in said
    shutil.rmtree(clone.root / ".venv")
    assert "there is no command megapipe" in clone.run("launch/torchrun.sh", "a.toml")[1]


# --- slurm.sbatch --------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}


def slurm(clone: Clone, *, srun: str, state: str = "RUNNING") -> dict[str, str]:
    """Stand-ins for Slurm's commands; the variables of a job."""
    clone.program("bin/srun", f"{LOGS}{srun}")
    clone.program("bin/squeue", f"echo {state}")
    clone.program("bin/sleep", LOGS)
    clone.program("bin/scontrol", LOGS)
    clone.program("bin/scancel", f'{LOGS}touch "{clone.root}/cancelled"')
    return {**JOB, "SLURM_SUBMIT_DIR": str(clone.root)}


REQUEUED = ["scontrol requeue 12345", "sleep 60"]


@pytest.mark.parametrize(
    ("status", "state", "then"),
    [
        (0, "RUNNING", []),
        (1, "RUNNING", []),
        (143, "RUNNING", REQUEUED),  # time limit, preemption
        (143, "COMPLETING", []),  # scancel
    ],
)
def test_slurm_requeues_what_was_stopped(
    clone: Clone, status: int, state: str, then: list[str]
) -> None:
    srun = f'echo "threads: $OMP_NUM_THREADS"; exit {status}'
    variables = slurm(clone, srun=srun, state=state)
    words = ("a.toml", "--train.steps", "3")
    ended, said = clone.run("launch/slurm.sbatch", *words, cwd=Path("/"), **variables)
    assert ended == status, said
    assert "threads: 1\n" in said
    tasks = (
        "srun --kill-on-bad-exit=1 --cpu-bind=none --label megapipe train a.toml --train.steps 3"
    )
    assert clone.logged() == [tasks, *then]


def test_slurm_passes_on_what_only_its_shell_was_told(clone: Clone) -> None:
    wait = f'until [[ -e "{clone.root}/cancelled" ]]; do /bin/sleep 0.05; done; exit 143'
    variables = slurm(clone, srun=wait)
    script = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", "a.toml"],
        cwd=clone.root,
        env=clone.environment(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not clone.log.exists():
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 143
    assert clone.logged()[1:] == ["scancel --signal=TERM 12345.0", *REQUEUED]
    assert script.stdout is not None
    script.stdout.close()


def test_slurm_asks_for_a_config(clone: Clone) -> None:
    status, said = clone.run("launch/slurm.sbatch", **slurm(clone, srun=""))
    assert status == 1
    assert "usage: sbatch --nodes N launch/slurm.sbatch CONFIG.toml" in said
    assert clone.logged() == []


# --- gpu.sh --------------------------------------------------------------------------------------


def wheel(folder: Path, name: str) -> None:
    """An installable distribution of one empty module."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)


NEEDED = ("torch", "triton", "numpy", "pydantic", "rich", "safetensors", "tomli-w")
TESTS = ("pytest", "hypothesis", "xxhash")
BARE = f'exec "{sys.executable}" -S "$@"\n'  # a Python without its site-packages


def test_gpu_names_what_is_missing(clone: Clone) -> None:
    clone.program("bare", BARE)
    status, said = clone.run("launch/gpu.sh", PYTHON=str(clone.root / "bare"))
    assert status == 2
    assert "Not there, and not needed here: datasets wandb" in said
    assert said.splitlines()[-1].startswith(f"gpu.sh: {clone.root}/bare lacks {' '.join(NEEDED)}.")
    assert "--wheels DIR" in said


def test_gpu_installs_what_is_missing_from_wheels_alone(clone: Clone, tmp_path: Path) -> None:
    """A Python with pip and nothing else, and the bench as a stand-in that shows its words."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in (*NEEDED, *TESTS[:2]):
        wheel(wheels, name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "python")], check=True)
    package = clone.root / "megapipe"
    package.mkdir()
    (package / "__main__.py").write_text("import sys, pydantic, torch\nprint(sys.argv[1:])\n")
    words = ("--minutes", "3", "--wheels", str(wheels), "--out", str(tmp_path / "new" / "out"))
    environment = {"PYTHON": str(tmp_path / "python" / "bin" / "python"), "PIP_INDEX_URL": "none"}
    status, said = clone.run("launch/gpu.sh", *words, **environment)
    assert "pip could not install all of them" in said, "one of them has no wheel"
    assert status == 2
    wheel(wheels, TESTS[2])
    status, said = clone.run("launch/gpu.sh", *words, **environment)
    assert status == 0, said
    bench = ["bench", "gpu", "--minutes", "3", "--out", str(tmp_path / "new" / "out")]
    assert said.splitlines()[-1] == str(bench)
    status, said = clone.run(
        "launch/gpu.sh", "--toy", OUT="here", PYTHON=f"{clone.root}/.venv-gpu/bin/python"
    )
    assert status == 0, said
    assert said.splitlines()[-1] == str(
        ["bench", "gpu", "--toy", "--out", str(clone.root / "here")]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fast",), "--fast is not an option. usage: bash launch/gpu.sh"),
        (("--minutes",), "--minutes needs a value"),
        (("--wheels", "nowhere"), "--wheels nowhere is not a directory"),
    ],
)
def test_gpu_refuses_wrong_words(clone: Clone, words: tuple[str, ...], message: str) -> None:
    status, said = clone.run("launch/gpu.sh", *words)
    assert status == 2
    assert message in said


def test_gpu_asks_for_a_python(clone: Clone) -> None:
    status, said = clone.run("launch/gpu.sh", PYTHON="no-such-python")
    assert status == 2
    assert "no-such-python is not Python 3.11 or newer. Set PYTHON" in said
