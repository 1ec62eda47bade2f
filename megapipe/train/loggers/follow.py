"""Carries metrics.jsonl to Weights & Biases while a run writes it; a process of its own.

`weights_and_biases.py` starts this file as a script (it imports nothing of megapipe) and speaks
with it over its standard streams:

    stdin     one line of JSON, the order (Order); a line of JSON for each picture (Picture); at
              the end of training one line, "done" or "failed"; no such line before the end of file
              means that training was killed
    stdout    lines for people

So W&B is as slow, hung or broken as it likes in here. A run that is killed leaves this process
behind; it hands over what metrics.jsonl holds and ends by itself.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

ORPHAN_SECONDS = 90
"""After the end of stdin this process ends, whatever hangs."""
POLL_SECONDS = 0.5


Series = dict[str, tuple[str, float]]
"""Name of a chart -> (field of metrics.jsonl, factor)."""


class Order(TypedDict):
    """What to log, and where."""

    mode: str  # online or offline
    id: str  # of the run in W&B, the same in each start
    project: str
    name: str
    run_dir: str
    metrics: int  # descriptor of metrics.jsonl: the next start may put another file in its place
    config: dict[str, Any]
    series: Series
    step: int  # training goes on after this step
    first: int  # first step that no earlier start has handed to W&B
    init_seconds: float  # for the server to answer at the start, before W&B writes offline instead
    upload_seconds: float  # for the upload to end after training


class Picture(TypedDict):
    """A PNG to show, and the step that it is about."""

    picture: str
    step: int


def main() -> int:
    """Exit status 0: what went wrong, if anything, was said."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the training; the end of stdin ends us
    order: Order = json.loads(sys.stdin.readline())
    end = End()
    set_environment(order)
    try:
        if wrong_variables():
            order["mode"] = "offline"
        with open(order["metrics"], "rb") as file:
            run, first = start_run(order)
            for step, values in rows(file, first, order["series"], end):
                run.log({**values, **images(end)}, step=step, commit=True)
            run.summary.update(
                images(end)
            )  # of the last step: a row of its own would be a step more
        finish(run, order, failed=end.word != "done")
    except Exception as error:
        print_line(f"W&B stopped: {brief(error)}. Training and metrics.jsonl go on without it.")
    return 0


class End:
    """The end of training, and pictures before it, as a thread hears them on stdin."""

    def __init__(self) -> None:
        self.word = ""
        self.pictures: deque[Picture] = deque()
        self._heard = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (line := sys.stdin.readline()).startswith("{"):
            self.pictures.append(json.loads(line))
        self.word = line.strip()
        self._heard.set()
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    def heard(self, within: float) -> bool:
        return self._heard.wait(within)


# --- metrics.jsonl -> rows of W&B ----------------------------------------------------------------


def rows(
    file: BinaryIO, first: int, series: Series, end: End
) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps from `first` on, as metrics.jsonl comes to say them, until training ends."""
    ended = False
    while True:
        for line in whole_lines(file):
            values = json.loads(line)
            if values["step"] >= first:
                yield values["step"], row(values, series)
        if ended:
            return
        ended = end.heard(POLL_SECONDS)  # then there is one more look at the file


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines up to the end of the file; one without its end is read again next time."""
    while True:
        begin = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(begin)
            return
        yield line


def row(values: dict[str, Any], series: Series) -> dict[str, float]:
    """One line under the names of the charts; what a step does not have is left out."""
    return {
        chart: number * factor
        for name, (field, factor) in series.items()
        for chart, number in charts(name, values.get(field))
    }


def charts(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The number under its name; the numbers of a table under `name/key`, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from charts(f"{name}/{key}", inner)
    elif value is not None:
        yield name, value


def images(end: End) -> dict[str, Any]:
    """Pictures that no row took along yet. W&B takes rows in ascending order only, so a picture
    stands in the row after its step, and says which step that was."""
    import wandb

    found = {}
    while end.pictures:
        picture = end.pictures.popleft()
        path = Path(picture["picture"])
        try:
            found[path.stem] = wandb.Image(str(path), caption=f"step {picture['step']}")
        except Exception as error:
            print_line(f"W&B does not show {path.name}: {brief(error)}.")
    return found


# --- W&B -----------------------------------------------------------------------------------------


def start_run(order: Order) -> tuple[Any, int]:
    """The run, and the first step that it lacks. Online falls back to offline."""
    import wandb

    if order["mode"] == "online":
        try:
            run = init(wandb, order, "online")
        except Exception as error:
            print_line(
                f"W&B online failed ({brief(error)}). This start of the run is written to "
                f"{order['run_dir']}/wandb instead. {how_to_sync(order)}"
            )
            forget(wandb, order)
        else:
            print_line(f"W&B: {run.url}")
            # A server that knows the run says what it has; one that does not lacks everything.
            return run, announced(run.step if run.resumed else 1, order)
    else:
        print_line(f"W&B, offline: {order['run_dir']}/wandb. {how_to_sync(order)}")
    return init(wandb, order, "offline"), announced(order["first"], order)


def announced(first: int, order: Order) -> int:
    if first > order["step"] + 1:
        print_line(f"W&B has this run up to step {first - 1} already and goes on from there.")
    return first


def set_environment(order: Order) -> None:
    """What W&B has no other setting for. The user's own choice wins."""
    cache = Path(order["run_dir"], "wandb", "cache").resolve()
    # The user's own were used, or reported as wrong, when the order was made.
    os.environ |= {"WANDB_MODE": order["mode"], "WANDB_PROJECT": order["project"]}
    # How to reach the service of another process of W&B's that started the training: this one ends
    # its own service where online fails.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry delays exits by 20 s
    os.environ.setdefault("WANDB_CACHE_DIR", str(cache))  # nothing is written outside run_dir
    os.environ.setdefault("WANDB_DATA_DIR", str(cache))


def wrong_variables() -> list[str]:
    """Say which variables W&B can't use, and take them away: one alone would stop it.

    Their run is written offline: an address that is wrong must not lead to another server.
    """
    import wandb

    wrong = []
    for name, value in sorted(os.environ.items()):
        if not name.startswith("WANDB_"):
            continue
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except Exception as error:
            wrong.append(name)
            del os.environ[name]
            secret = any(part in name for part in ("KEY", "TOKEN", "PASSWORD", "SECRET"))
            what = (
                name if secret or "@" in value else f"{name} = {json.dumps(value)} ({brief(error)})"
            )
            print_line(f"W&B can't use {what} and writes offline without it. Correct it.")
    return wrong


def init(wandb: Any, order: Order, mode: str) -> Any:
    chosen = wandb_settings(wandb, order, mode)
    wandb.setup(chosen)
    run = wandb.init(
        id=order["id"],
        resume="allow",
        project=order["project"],
        name=order["name"],
        dir=order["run_dir"],
        config=order["config"],
        allow_val_change=True,
        settings=chosen,
    )
    run.define_metric("data/tokens")
    run.define_metric("*", step_metric="data/tokens")
    return run


def wandb_settings(wandb: Any, order: Order, mode: str) -> Any:
    """Quick to give up, silent, and nothing sent but the metrics and the config."""
    wanted = {
        "mode": mode,
        "silent": True,
        "console": "off",
        "init_timeout": order["init_seconds"],
        "finish_timeout": order["upload_seconds"],
        "finish_timeout_raises": True,
        "program": "megapipe train",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 1.0,
    }
    known = wandb.Settings.model_fields  # some came in later versions
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def finish(run: Any, order: Order, failed: bool) -> None:
    try:
        run.finish(exit_code=int(failed))
    except TimeoutError:
        where = f"{order['run_dir']}/wandb"
        print_line(f"W&B has not got everything yet; all of it is in {where}. {how_to_sync(order)}")


def forget(wandb: Any, order: Order) -> None:
    """End W&B's service, which holds the id of the run that failed, and remove what it left."""
    wandb.teardown()
    for left in Path(order["run_dir"], "wandb").glob(f"run-*-{order['id']}"):
        shutil.rmtree(left, ignore_errors=True)


def how_to_sync(order: Order) -> str:
    return f"To upload: cd {shlex.quote(order['run_dir'])} && wandb sync"


# --- Words ---------------------------------------------------------------------------------------


def print_line(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        print(text, flush=True)


def brief(error: Exception) -> str:
    """The first line, not too long; what is wrong where W&B's settings are checked."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_input=False)
        text = "; ".join(" ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in details)
        return text.strip()[:200]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:200]


if __name__ == "__main__":
    sys.exit(main())
