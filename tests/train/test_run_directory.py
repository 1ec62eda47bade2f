"""May a config go on in a run directory: what is refused, what is told, what resume means."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megapipe.checkpoint.steps import MANIFEST_NAME, step_name
from megapipe.config import Config, dump_config, load_config, parse_config
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError, MegapipeError
from megapipe.models.families import FAMILIES
from megapipe.train.run_directory import RunLock, StartPlan, plan_start, write_config
from tests.checkpoint.samples import save_sample_weights
from tests.config.convolution import BOTH
from tests.config.examples import TEXT, write
from tests.ranks import run_ranks

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*overrides: str) -> Config:
        words = [f"--train.run_dir={tmp_path}/run", *overrides]
        return load_config(write(tmp_path), words, FAMILIES)

    return make


def test_one_run_at_a_time(make: Make) -> None:
    run_dir = Path(make().train.run_dir)
    said: list[str] = []

    def lock() -> RunLock:
        return RunLock(run_dir, said.append)

    with lock() as first:
        assert not run_dir.exists(), "nothing is written before it is taken"
        run_dir.mkdir()
        (run_dir / "run.lock").write_text("process 1234567 on " + 20 * "a-node-with-a-name ")
        first.take()
        first.take()  # a second time changes nothing
        holder = rf"another run is writing to train\.run_dir = .*\(process {os.getpid()} on \S+\)\."
        with lock() as second, pytest.raises(MegapipeError, match=holder):
            second.take()
    with lock() as third:  # the first has let go, and the refused one held nothing
        third.take()
    assert not said


def add_checkpoint(root: Path, step: int, config: Config | None = None) -> Path:
    folder = root / step_name(step)
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text("{}")
    if config is not None:
        (folder / "config.toml").write_text(dump_config(config))
    return folder


def lock_and_write(config: Config) -> None:
    with RunLock(Path(config.train.run_dir), print) as lock:
        lock.take()
        write_config(config)


def begin(config: Config, *steps: int) -> Path:
    """A run directory as this config leaves it; returns that of the checkpoints."""
    lock_and_write(config)
    root = Path(config.train.run_dir) / "checkpoints"
    for step in steps:
        add_checkpoint(root, step, config)
    return root


def test_a_new_run(make: Make, tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert plan_start(make(f"--checkpoint.resume={resume}"), FAMILIES) == StartPlan(resume, [])
    assert not (tmp_path / "run").exists(), "a plan writes nothing"


def test_a_model_is_loaded_into_a_run_without_checkpoints_only(make: Make, tmp_path: Path) -> None:
    words = (f"--checkpoint.load_from={tmp_path}/llama",)
    assert plan_start(make(*words), FAMILIES) == StartPlan("auto", [], loads=True)
    begin(make(*words), 5)
    plan = plan_start(make(*words), FAMILIES)
    assert not plan.loads
    (note,) = plan.notes
    assert note.startswith(
        f'checkpoint.load_from = "{tmp_path}/llama" was for the first start; the'
    )


def test_the_config_is_written_and_comes_back(make: Make) -> None:
    config = make("--train.run_dir", f"{make().train.run_dir}/deep/er")
    lock_and_write(config)
    file = Path(config.train.run_dir) / "resolved-config.toml"
    assert parse_config(file.read_text(), FAMILIES) == config
    assert load_config(file, [], FAMILIES) == config
    assert file.read_text().startswith("# Written by megapipe at every start.")


def test_a_config_that_the_user_keeps_there_stays(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    own = tmp_path / "run" / "config.toml"
    own.write_text("# why these numbers\n")
    begin(make(), 5)
    assert plan_start(make(), FAMILIES) == StartPlan("auto", [])
    assert own.read_text() == "# why these numbers\n"


def test_a_file_of_the_users_under_our_name_is_not_replaced(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    own = tmp_path / "run" / "resolved-config.toml"
    own.write_text("# mine\n" + dump_config(make()))
    with pytest.raises(MegapipeError, match=r"resolved-config.toml was not written by megapipe"):
        plan_start(make(), FAMILIES)


@pytest.mark.parametrize("left", [b"", b"# Writ", b"\0" * 500])
def test_a_resolved_config_that_a_crash_has_damaged(make: Make, left: bytes) -> None:
    """The config of the newest checkpoint takes its place."""
    root = begin(make(), 5)
    file = root.parent / "resolved-config.toml"
    for damaged in (left, file.read_bytes()[:400]):
        file.write_bytes(damaged)
        plan = plan_start(make("--train.steps=200"), FAMILIES)
        assert len(plan.notes) == 2
        assert "is empty or damaged, as after a crash" in plan.notes[0]
        assert plan.notes[1] == "Changed since the last start:\n  train.steps: 100 -> 200"
        with pytest.raises(CheckpointError, match=r"model\.num_layers: 8 -> 6"):
            plan_start(make("--model.num_layers=6"), FAMILIES)


def test_a_resolved_config_of_another_version(make: Make) -> None:
    root = begin(make(), 5)
    file = root.parent / "resolved-config.toml"
    file.write_text(file.read_text() + "\n[future]\nkey = 1\n")
    (note,) = plan_start(make(), FAMILIES).notes
    assert "resolved-config.toml can't be used: " in note
    assert "future" in note
    assert "damaged" not in note


def test_what_looks_like_a_checkpoint_and_is_none_stops_the_start(make: Make) -> None:
    root = begin(make(), 5)
    (root / "step-00000010").symlink_to(root / "gone")
    with pytest.raises(CheckpointError, match="which is not there"):
        plan_start(make(), FAMILIES)
    other = make(f"--train.run_dir={root.parent}-other", f"--checkpoint.resume={root.parent}")
    with pytest.raises(CheckpointError, match="which is not there"):
        plan_start(other, FAMILIES)


def test_a_directory_that_can_not_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for config in (make(), make(f"--train.run_dir={tmp_path}/run/below")):
        plan_start(config, FAMILIES)
        with pytest.raises(MegapipeError, match=r"train\.run_dir = .*run.* can't be made"):
            lock_and_write(config)


def test_going_on(make: Make) -> None:
    begin(make(), 5, 10)
    assert plan_start(make(), FAMILIES) == StartPlan("auto", [])


def test_another_model_is_refused_with_the_difference(make: Make) -> None:
    begin(make(), 5)
    with pytest.raises(CheckpointError) as caught:
        plan_start(make("--model.num_layers=6", "--model.tie_embeddings=true"), FAMILIES)
    said = str(caught.value)
    assert "model.num_layers: 8 -> 6" in said
    assert "model.tie_embeddings: false -> true" in said
    assert "choose another train.run_dir" in said


def test_a_model_of_another_family_is_refused(make: Make, tmp_path: Path) -> None:
    begin(make(), 5)
    text = '[model]\nfamily = "convolution"\npreset = "wide"\n' + TEXT[TEXT.index("[parallel]") :]
    other = load_config(write(tmp_path, text), [f"--train.run_dir={tmp_path}/run"], BOTH)
    with pytest.raises(CheckpointError, match=r'model\.family: "gpt" -> "convolution"\n'):
        plan_start(other, BOTH)
    lock_and_write(other)
    with pytest.raises(CheckpointError, match=r'model\.family: "convolution" -> "gpt"\n'):
        plan_start(make(), BOTH)


def test_another_model_may_begin_where_nothing_was_saved(make: Make) -> None:
    begin(make())
    assert plan_start(make("--model.num_layers=6"), FAMILIES) == StartPlan("auto", [])


def test_other_changes_are_told_in_one_line(make: Make) -> None:
    begin(make(), 5)
    plan = plan_start(make("--parallel.pipeline=4", "--train.steps=200"), FAMILIES)
    assert plan == StartPlan(
        "auto",
        ["Changed since the last start:\n  parallel.pipeline: 2 -> 4\n  train.steps: 100 -> 200"],
    )


def test_starting_anew_over_checkpoints_is_refused(make: Make) -> None:
    begin(make(), 5, 10)
    with pytest.raises(CheckpointError, match=r'resume = "never".*step-00000010.*another'):
        plan_start(make("--checkpoint.resume=never"), FAMILIES)


def test_a_checkpoint_elsewhere_begins_a_run_that_then_goes_on(make: Make, tmp_path: Path) -> None:
    other = add_checkpoint(tmp_path / "other" / "checkpoints", 7, make())
    config = make(f"--checkpoint.resume={other}")
    assert plan_start(config, FAMILIES) == StartPlan(str(other), [])
    root = begin(config, 9)
    plan = plan_start(config, FAMILIES)
    assert plan.resume == "auto", "the same command again goes on"
    assert plan.notes == [
        f"Begun from {other}; going on from the newest checkpoint of {root.parent}."
    ]
    second = add_checkpoint(tmp_path / "other" / "checkpoints", 8, make())
    with pytest.raises(CheckpointError, match="holds checkpoints of its own"):
        plan_start(make(f"--checkpoint.resume={second}"), FAMILIES)


def test_weights_alone_are_not_resumed(make: Make, tmp_path: Path) -> None:
    path = save_sample_weights(tmp_path / "merged", {})
    with pytest.raises(CheckpointError) as caught:
        plan_start(make(f"--checkpoint.resume={path}"), FAMILIES)
    assert str(caught.value) == (
        f'checkpoint.resume = "{path}" holds weights alone: no step, no optimizer state and no '
        f'position in the data to go on from. Use checkpoint.load_from = "{path}" instead, which '
        "starts a new run from its weights."
    )


def test_a_checkpoint_elsewhere_of_another_model(make: Make, tmp_path: Path) -> None:
    """It is named itself, or by a run directory whose resolved config is gone."""
    run = tmp_path / "other"
    other = add_checkpoint(run / "checkpoints", 7, make("--model.num_layers=6"))
    for place in (other, run):
        with pytest.raises(CheckpointError, match=r"model\.num_layers: 6 -> 8"):
            plan_start(make(f"--checkpoint.resume={place}"), FAMILIES)


def test_going_back_within_a_run_is_refused(make: Make) -> None:
    root = begin(make(), 5, 10)
    assert (
        plan_start(make(f"--checkpoint.resume={root / step_name(10)}"), FAMILIES).resume == "auto"
    )
    with pytest.raises(CheckpointError, match="which the next start would go on from"):
        plan_start(make(f"--checkpoint.resume={root / step_name(5)}"), FAMILIES)


def test_all_ranks_get_one_answer(make: Make, tmp_path: Path) -> None:
    begin(make(), 5)
    (tmp_path / "run" / "resolved-config.toml").write_text("[model]")
    answers = run_ranks(_refused_on_a_rank, 2, make())
    assert len(set(answers)) == 1
    assert "resolved-config.toml was not written by megapipe" in answers[0]


def test_what_the_system_refuses_reaches_all_ranks(make: Make, tmp_path: Path) -> None:
    begin(make(), 5)
    (tmp_path / "run" / "resolved-config.toml").unlink()
    (tmp_path / "run" / "resolved-config.toml").mkdir()
    answers = run_ranks(_refused_on_a_rank, 2, make())
    assert len(set(answers)) == 1
    assert "resolved-config.toml can't be read: Is a directory" in answers[0]


def _refused_on_a_rank(config: Config) -> str:
    ranks = RankGroup.of(dist.group.WORLD)
    with pytest.raises(MegapipeError) as caught:
        plan_start(config if ranks.rank == 0 else None, FAMILIES, ranks)  # only rank 0 looks
    return str(caught.value)
