"""What a command finds around it: environment, standard streams, limits, and signals."""

import signal
from random import Random
from typing import Any

Environment = dict[str, str | None]

ENVIRONMENTS: tuple[Environment, ...] = (
    {"HOME": None},
    {"HOME": "/nonexistent"},
    {"HOME": "/dev/null"},
    {"HOME": ""},
    {"TMPDIR": "/nonexistent"},
    {"LANG": None},
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "xx_YY.UTF-8"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "cp1252:replace"},
    {"COLUMNS": "1"},
    {"COLUMNS": "abc"},
    {"COLUMNS": "0"},
    {"TERM": "dumb"},
    {"TERM": None, "NO_COLOR": "1"},
    {"WANDB_MODE": "disabled"},
    {"WANDB_MODE": "nonsense"},
    {"WANDB_PROJECT": "a/b\tc"},
    {"WANDB_DIR": "/nonexistent"},
    {"HF_HOME": "/nonexistent"},
    {"HF_HUB_OFFLINE": "1"},
    {"http_proxy": "http://192.0.2.1:3128", "https_proxy": "http://192.0.2.1:3128"},
    {"RANK": "x"},
    {"RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"},
    {"RANK": "-1", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29513"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
    {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"},
    {"OMP_NUM_THREADS": "abc"},
    {"OMP_NUM_THREADS": "0"},
    {"CUDA_VISIBLE_DEVICES": "7"},
    {"TRITON_INTERPRET": "1"},
    {"PYTHONUNBUFFERED": "1"},
    {"TZ": "nonsense"},
)

SIGNALS = (
    signal.SIGINT,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGQUIT,
    signal.SIGALRM,
    signal.SIGPIPE,
    signal.SIGXCPU,
    signal.SIGWINCH,
    signal.SIGKILL,
)


def surroundings(random: Random, odd: float, *, quick: bool) -> dict[str, Any]:
    """Arguments of `Command`. Each part is unusual with chance `odd`.

    With `quick` nearly all are forked, and no signal comes at a moment that a clock chooses.
    """
    found: dict[str, Any] = {"warm": random.random() < (0.95 if quick else 0.55)}
    if random.random() < odd:
        found["environment"] = random.choice(ENVIRONMENTS)
    if random.random() < odd:
        found["streams"] = (
            random.choice(("null", "closed")),
            random.choice(("file", "file", "closed", "full", "broken")),
            random.choice(("file", "file", "file", "closed", "full", "broken")),
        )
    elif random.random() < 0.1:
        found["streams"] = ("terminal", "terminal", random.choice(("file", "terminal")))
    if random.random() < odd / 3:
        found["folder_gone"] = True
    if random.random() < odd / 3:
        found["umask"] = random.choice((0, 0o077, 0o777, 0o277))
    if random.random() < odd / 3:
        found["limits"] = random.choice(
            ({"RLIMIT_NOFILE": 64}, {"RLIMIT_FSIZE": 8192}, {"RLIMIT_FSIZE": 100_000})
        )
    if random.random() < odd / 2:
        found["ignored"] = random.choice(((1,), (2,), (1, 2, 15), (13,)))
    if not quick and random.random() < 0.3:
        longest = 1.0 if found["warm"] else 5.0
        moments = [random.uniform(0, longest) for _ in range(random.choice((1, 1, 1, 2)))]
        found["signals"] = tuple((int(random.choice(SIGNALS)), moment) for moment in moments)
    return found
