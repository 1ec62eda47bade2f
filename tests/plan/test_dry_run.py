"""The report of a dry run: who is where, how much it holds, for any world size."""

from pathlib import Path

import pytest

from megapipe.config import Config, ModelConfig, load_config, parse_config
from megapipe.errors import ConfigError, ScheduleError
from megapipe.layout.parameters import Init, ParameterSpec, Split
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.family import GPTFamily
from megapipe.parameter_role import Role
from megapipe.plan import dry_run as report
from megapipe.plan.program import plan_layout
from tests.config.examples import write

AUTO, V2 = "--parallel.schedule=auto", "--parallel.virtual=2"


def load(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder), overrides, FAMILIES)


def dry_run(config: Config, world_size: int | None = None) -> str:
    return report.dry_run(config, FAMILIES[config.model.family], "run.toml", world_size)


def test_shows_each_rank_of_a_small_world(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path), 8)
    rows = [line.split() for line in shown.splitlines()]
    assert ["rank", "pipeline", "data", "tensor", "stages"] in rows
    for rank in range(8):
        where = [rank, rank // 4, rank // 2 % 2, rank % 2, rank // 4]
        assert list(map(str, where)) in rows


def test_shows_ranges_of_a_large_world(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path), 32)
    assert "  0-15   0         0-7   0-1     0\n" in shown
    assert "  16-31  1         0-7   0-1     1\n" in shown
    assert "rank = (pipeline * 8 + data) * 2 + tensor" in shown


def test_begins_with_the_resolved_config(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.data=1")
    shown = dry_run(config)
    assert shown.startswith("# run.toml, resolved\n")
    assert parse_config(shown[: shown.index("\n\nLayout:")], FAMILIES) == config


def test_without_a_world_size_it_is_the_fewest_that_work(tmp_path: Path) -> None:
    assert "Layout: 4 ranks = pipeline 2 * data 1 * tensor 2" in dry_run(load(tmp_path))
    assert "Layout: 8 ranks" in dry_run(load(tmp_path, "--parallel.data=2"))


def test_refuses_what_could_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="World sizes that work with this config: 4, 8, 16, 32"):
        dry_run(load(tmp_path), 6)


def test_microbatches_need_not_divide_by_the_pipeline(tmp_path: Path) -> None:
    odd = load(
        tmp_path,
        *("--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2"),
        *("--parallel.pipeline=4", "--train.global_batch_size=12"),
    )
    assert "interleaved-1f1b, 8 stages, 6 microbatches of 2 sequences" in dry_run(odd)


def test_tokens_and_arithmetic(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path))
    assert "Tokens: 1,024 per step, 102,400 (102 k) in 100 steps" in shown
    assert "8 microbatches of 2 sequences per replica and step" in shown


def test_rows_of_padding_are_shown(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path))
    assert "Vocabulary: 500 and 12 rows of padding inside (256 per tensor rank)" in shown
    assert "Vocabulary:" not in dry_run(load(tmp_path, "--model.vocab_size=512"))


class PaddedMixer(GPTFamily):
    """A GPT with two matrices that are padded, to a multiple of their own."""

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        mixers = [
            ParameterSpec(f"mixer{n}", (30, 1), (n,), Init("ones"), Role.MATRIX, Split(0, pad_to=8))
            for n in range(2)
        ]
        return [*super().parameters(model), *mixers]


def test_rows_of_padding_are_those_of_the_parameter_that_has_them(tmp_path: Path) -> None:
    config = load(tmp_path)
    shown = report.dry_run(config, PaddedMixer(), "run.toml")
    assert "Vocabulary: 500 and 12 rows of padding inside (256 per tensor rank)" in shown
    assert "mixer0: 30 and 2 rows of padding inside (16 per tensor rank)" in shown
    assert shown.count("rows of padding") == 2


# --- With schedule auto, and with a limit --------------------------------------------------------


def test_auto_is_searched_with_estimates(tmp_path: Path) -> None:
    shown = dry_run(load(tmp_path, AUTO, V2, "--parallel.data=1"))
    assert "Schedule: auto, 4 stages, 8 microbatches" in shown
    (program,) = [line for line in shown.splitlines() if line.startswith("Program: ")]
    assert "forwards per step by simulation" in program
    assert "Costs: estimated by FLOPs. A run measures its stages and may choose another." in shown
    assert 'schedule = "auto"' in shown
    placed = "0, 3" if "stages V" in program else "0, 2"
    assert ["0", "0", "0", "0", *placed.split()] in [line.split() for line in shown.splitlines()]


def test_auto_takes_costs_from_a_file_or_the_program_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "costs.toml").write_text("forward = 1\nbackward_input = 1\nbackward_weight = 1")
    words = [AUTO, f"--parallel.stage_costs={tmp_path}/costs.toml", "--parallel.data=1"]
    config = load(tmp_path, *words, f"--train.run_dir={tmp_path}")
    shown = dry_run(config)
    assert "25.000 s per step by simulation" in shown  # 8 microbatches and a stage more
    assert f"Costs: from {tmp_path}/costs.toml." in shown
    plan_layout(config, None, FAMILIES["gpt"], tmp_path)  # puts it where a run would have it
    assert f"\nProgram: that of {tmp_path}/schedule.csv\n" in dry_run(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.activation_limit=1"], '"1f1b" has activations of 2 microbatches live'),
        (["--parallel.activation_limit=100 KB"], "below what any schedule needs"),
        ([AUTO, "--parallel.activation_limit=0.2"], "below what any schedule needs"),
    ],
)
def test_refuses_what_exceeds_the_limit(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=message):
        dry_run(load(tmp_path, "--parallel.data=1", *words))
