"""`auto` at a start: measured and searched once, the same program for all ranks, kept for resumes,
replaced where it can't serve, and refused where it is damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.errors import MegapipeError, ScheduleError
from megapipe.layout.layout import Layout
from megapipe.layout.world import resolve_axes
from megapipe.models.families import FAMILIES
from megapipe.pipeline.p2p import make_channels
from megapipe.pipeline.schedule import from_csv, lower, stored, to_csv, validate
from megapipe.train.auto import check_activation_bytes, settle_layout
from megapipe.train.engine import Engine
from megapipe.train.run_directory import RunLock
from tests.layouts import CPU, engine_of, layout_of
from tests.ranks import run_ranks

SHAPE = Path(__file__).parents[1] / "configs" / "llama_shape.toml"
AUTO = ("--parallel.schedule=auto", "--parallel.data=1")


def config_in(run_dir: Path, *overrides: str) -> Config:
    words = [f"--train.run_dir={run_dir}", *AUTO, *overrides]
    return load_config(SHAPE, words, FAMILIES)


def mesh_for(config: Config) -> Mesh:
    """Of as few processes as the config needs; its program need not be there yet."""
    return build_mesh(resolve_axes(config), CPU)


def settle(config: Config) -> tuple[list[str], Layout]:
    """On one rank of however many there are; what it said, and the layout with its program."""
    mesh, family = mesh_for(config), FAMILIES[config.model.family]
    said: list[str] = []
    with RunLock(Path(config.train.run_dir), said.append, mesh.world.rank_group) as lock:
        settled = settle_layout(config, family, mesh, make_channels(mesh), lock, said.append)
    return said, settled


def settle_and_read(config: Config) -> tuple[list[str], str]:
    said, settled = settle(config)
    assert settled.program.compute == layout_of(config).program.compute, "as the file has it"
    return said, to_csv(settled.program.compute)


def on_ranks(config: Config) -> tuple[list[str], str]:
    """What was said, and the program that all ranks have."""
    ranks = run_ranks(settle_and_read, resolve_axes(config).world_size, config)
    assert len({(tuple(said), program) for said, program in ranks}) == 1
    said, program = ranks[0]
    return said, program


def test_first_start_and_resume_and_another_layout(tmp_path: Path) -> None:
    config = config_in(tmp_path, "--parallel.pipeline=2")
    said, program = on_ranks(config)
    assert said[0].startswith("Program: ")
    validate(lower(from_csv(program)))
    assert (tmp_path / "schedule.csv").read_text() == program
    reason = (tmp_path / "schedule.txt").read_text()
    assert reason.splitlines()[:2] == said[:2]
    assert "Costs: measured at the start of the run." in reason
    assert "(as 1f1b has; parallel.activation_limit is not set)" in reason

    assert on_ranks(config) == (
        [
            f"Program: that of {tmp_path}/schedule.csv, from an earlier start of this run; without "
            "the file one is searched for anew"
        ],
        program,
    )

    said, other = on_ranks(config_in(tmp_path, "--parallel.pipeline=2", "--parallel.virtual=2"))
    assert said[0].startswith(
        "The program of an earlier start is kept as schedule-replaced.csv, and"
    )
    assert (
        "schedule.csv: the program has 2 stages, and parallel.pipeline * parallel.virtual = 4"
        in said[0]
    )
    assert other != program
    assert (tmp_path / "schedule.csv").read_text() == other
    assert (tmp_path / "schedule-replaced.csv").read_text() == program, "it may have been edited"


def test_what_is_measured_reaches_the_search(tmp_path: Path) -> None:
    """Tensor ranks and a limit in memory: bytes and times of both stages stand in the reason."""
    limit = "--parallel.activation_limit=1 GiB"
    on_ranks(config_in(tmp_path, "--parallel.pipeline=2", "--parallel.tensor=2", limit))
    reason = (tmp_path / "schedule.txt").read_text()
    assert "Limit of live activations: 1 GiB on each rank." in reason
    rows = [line.split() for line in reason.splitlines()]
    for stage in ("0", "1"):
        (row,) = [row for row in rows if row[:2] == [stage, stage]]
        times, (size, unit) = row[2:8], row[8:]
        assert times[1::2] == ["ms"] * 3
        assert min(map(float, times[::2])) > 0
        assert (float(size) > 0, unit) == (True, "MiB")


COSTS = "forward = [1.0, 2.0]\nbackward_input = [1.0, 2.0]\nbackward_weight = 1\nlatency = 0.1\n"


def test_costs_from_a_file_make_the_same_choice_each_time(tmp_path: Path) -> None:
    (tmp_path / "costs.toml").write_text(COSTS)
    file = f"--parallel.stage_costs={tmp_path}/costs.toml"
    programs = [
        on_ranks(config_in(tmp_path / name, "--parallel.pipeline=2", file))[1] for name in "ab"
    ]
    assert programs[0] == programs[1]
    reason = (tmp_path / "a" / "schedule.txt").read_text()
    assert f"Costs: from {tmp_path}/costs.toml (parallel.stage_costs). A tensor from" in reason
    assert "1      1     2.000 s  2.000 s         1.000 s" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0F0,", "", 1), r"schedule.csv: .*0F0.*\. Delete the file to"),
        (lambda text: text.replace("0F0", "0G0", 1), r"schedule.csv: '0G0' is not an action"),
    ],
)
def test_a_damaged_program_is_refused(
    change: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    config = config_in(tmp_path)
    settle(config)
    file = tmp_path / "schedule.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(ScheduleError, match=message):
        settle(config)


def test_a_tighter_limit_replaces_the_program(tmp_path: Path) -> None:
    on_ranks(config_in(tmp_path, "--parallel.pipeline=2"))
    said, _ = on_ranks(
        config_in(tmp_path, "--parallel.pipeline=2", "--parallel.activation_limit=1")
    )
    assert "has activations of 2 microbatches live on pipeline rank 0" in said[0]
    assert "at most 1 microbatch live" in said[1]


def test_the_program_is_read_and_proved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        function = getattr(stored, name)
        return lambda *words: done.append(name) or function(*words)

    for name in ("from_csv", "validate"):
        monkeypatch.setattr(stored, name, counted(name))
    config = config_in(tmp_path, "--parallel.activation_limit=1 GiB")
    for _ in ("first start", "resume"):
        done.clear()
        _, settled = settle(config)
        (tmp_path / "schedule.csv").rename(tmp_path / "away")
        engine = Engine(settled, Mesh.single(CPU))
        check_activation_bytes(engine)
        assert done == ["from_csv", "validate"]
        assert engine.program == lower(settled.program.compute)
        (tmp_path / "away").rename(tmp_path / "schedule.csv")


def test_the_program_of_a_run_under_way_is_left_alone(tmp_path: Path) -> None:
    settle(config_in(tmp_path))
    program = (tmp_path / "schedule.csv").read_bytes()
    with RunLock(tmp_path, print) as lock:
        lock.take()
        with pytest.raises(MegapipeError, match=r"another run is writing to train\.run_dir"):
            settle(config_in(tmp_path, "--train.global_batch_size=2"))
    assert (tmp_path / "schedule.csv").read_bytes() == program


def test_limits_that_nothing_keeps(tmp_path: Path) -> None:
    for limit, least in [("0.5", "1"), ("1 KiB", r"[\d.]+ MiB, lower train.micro_batch_size")]:
        refusal = f'= "?{limit}"? is below what any schedule needs.*least {least}'
        with pytest.raises(MegapipeError, match=refusal):
            settle(config_in(tmp_path, f"--parallel.activation_limit={limit}"))
    assert not (tmp_path / "schedule.csv").exists()


def bytes_of_a_run(config: Config) -> None:
    check_activation_bytes(engine_of(config))


def test_memory_limits_hold_for_published_schedules(tmp_path: Path) -> None:
    def start(schedule: str, limit: str) -> None:
        words = (f"--parallel.schedule={schedule}", f"--parallel.activation_limit={limit}")
        run_ranks(bytes_of_a_run, 2, config_in(tmp_path, "--parallel.pipeline=2", *words))

    start("1f1b", "1 GiB")
    with pytest.raises(ScheduleError, match=r'"gpipe" has activations of [\d.]+ MiB live on .*'):
        start("gpipe", "0.5 MB")


def test_memory_limits_hold_for_a_stored_program(tmp_path: Path) -> None:
    config = config_in(tmp_path, "--parallel.pipeline=2")
    on_ranks(config)
    parallel = config.parallel.model_copy(update={"activation_limit": "0.5 MB"})
    with pytest.raises(ScheduleError, match=r"To search for one that fits, delete .*schedule\.csv"):
        run_ranks(bytes_of_a_run, 2, config.model_copy(update={"parallel": parallel}))
