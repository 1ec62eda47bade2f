"""The dry run: who is where, how much it holds, for configs that ship and for any world size."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapipe.config import Config, load_config, parse_config
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.parameters import gpt_parameter_count
from megapipe.models.memory import rank_states, state_bytes
from megapipe.models.partition import layers_per_stage, stages
from megapipe.optim import parameter_groups
from megapipe.plan.dry_run import dry_run
from megapipe.tools.cli import main
from tests.config.examples import write

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
# Processes that the comments in each file speak of.
WORLD_SIZES = {
    "quickstart": 4,
    "gpt2-124m": 1,
    "llama3-8b-2nodes": 16,
    "llama3-70b": 512,
    "gpt3-175b": 1536,
    "megatron-1t": 3072,
}


def load(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write(tmp_path), overrides, FAMILIES)


def test_every_config_that_ships_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_configs_that_ship(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / f"{name}.toml")
    world_size = WORLD_SIZES[name]
    assert main(["train", path, "--dry-run", "--world-size", str(world_size)]) == 0
    shown = capsys.readouterr().out
    assert f"Layout: {world_size:,} rank" in shown
    config = load_config(path, [], FAMILIES)
    assert f"Parameters: {gpt_parameter_count(config.model):,} (" in shown
    assert len(shown.splitlines()) < 160
    assert max(len(line) for line in shown.splitlines()) <= 110
    # Every rank of the run fits into a GPU of 80 GB with room for activations.
    assert max(states.total for states in rank_states(config, stages(config))) < 40 * 2**30


def test_shows_each_rank_of_a_small_world(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path), "run.toml", 8)
    rows = [line.split() for line in shown.splitlines()]
    assert ["rank", "pipeline", "data", "tensor", "stages"] in rows
    for rank in range(8):
        where = [rank, rank // 4, rank // 2 % 2, rank % 2, rank // 4]
        assert list(map(str, where)) in rows


def test_shows_ranges_of_a_large_world(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path), "run.toml", 32)
    assert "  0-15   0         0-7   0-1     0\n" in shown
    assert "  16-31  1         0-7   0-1     1\n" in shown
    assert "rank = (pipeline * 8 + data) * 2 + tensor" in shown


def test_begins_with_the_resolved_config(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.data=1")
    shown = dry_run(config, "run.toml")
    assert shown.startswith("# run.toml, resolved\n")
    assert parse_config(shown[: shown.index("\n\nLayout:")], FAMILIES) == config


def test_without_a_world_size_it_is_the_fewest_that_work(tmp_path: Path) -> None:
    assert "Layout: 4 ranks = pipeline 2 * data 1 * tensor 2" in dry_run(load(tmp_path), "x")
    assert "Layout: 8 ranks" in dry_run(load(tmp_path, "--parallel.data=2"), "x")


def test_refuses_what_could_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="World sizes that work with this config: 4, 8, 16, 32"):
        dry_run(load(tmp_path), "x", 6)


def test_microbatches_need_not_divide_by_the_pipeline(tmp_path: Path) -> None:
    odd = load(
        tmp_path,
        *("--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2"),
        *("--parallel.pipeline=4", "--train.global_batch_size=12"),
    )
    assert "interleaved-1f1b, 8 stages, 6 microbatches of 2 sequences" in dry_run(odd, "x")


def test_tokens_and_arithmetic(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path), "x")
    assert "Tokens: 1,024 per step, 102,400 (102 k) in 100 steps" in shown
    assert "8 microbatches of 2 sequences per replica and step" in shown


def test_states_follow_precision(tmp_path: Path) -> None:
    for precision, bytes_each in (("bf16", 18), ("fp32", 16), ("fp64", 32)):
        config = load(tmp_path, f"--train.precision={precision}")
        for group in parameter_groups(config.optimizer):
            assert state_bytes(precision, group).total == bytes_each
        halves = rank_states(config, stages(config))
        assert len(halves) == 2
        assert all(states.total % bytes_each == 0 for states in halves)


def test_interleaved_stages_add_up_on_their_rank(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        *("--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2", "--train.precision=fp32"),
        "--parallel.layers_per_stage=[1,2,3,2]",
    )
    placed = stages(config)
    assert [(stage.rank, stage.layers) for stage in placed] == [
        (0, range(1)),
        (1, range(1, 3)),
        (0, range(3, 6)),
        (1, range(6, 8)),
    ]
    plain = load(tmp_path, "--parallel.tensor=2", "--train.precision=fp32")
    together = sum(states.total for states in rank_states(config, placed))
    assert together == sum(states.total for states in rank_states(plain, stages(plain)))


def test_the_output_layer_weighs_in_the_balance(tmp_path: Path) -> None:
    heavy = load(tmp_path, "--model.vocab_size=100000")
    first, last = layers_per_stage(heavy)
    assert first + last == 8
    assert last == 1
    assert layers_per_stage(load(tmp_path, "--parallel.layers_per_stage=[2,6]")) == [2, 6]


def test_imports_no_torch() -> None:
    program = (
        "import sys; from megapipe.tools.cli import main; "
        f"status = main(['train', {str(CONFIGS / 'megatron-1t.toml')!r}, '--dry-run']); "
        "sys.exit(status or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
