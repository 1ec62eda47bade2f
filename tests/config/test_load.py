"""Loading: what a user writes, and what is said when it is wrong."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from megapipe.config import Config, Families, dump_config, load_config, parse_config
from megapipe.config.family import Preset
from megapipe.errors import CheckpointError, ConfigError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import GPTConfig
from megapipe.pipeline.schedule import SCHEDULES
from tests.config.examples import TEXT, Family, write

PRESETS = {
    "small": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "vocab_size": 100,
        "max_sequence_length": 256,
        "sliding_window": 8,
        "rope_scaling": {"factor": 8.0, "low_frequency_factor": 2.0},
    }
}


def gpt(presets: Mapping[str, Preset]) -> Families:
    """The family with other presets."""
    return {"gpt": Family("gpt", GPTConfig, presets)}


def load(tmp_path: Path, *overrides: str, text: str = TEXT) -> Config:
    return load_config(write(tmp_path, text), overrides, gpt(PRESETS))


def problems(tmp_path: Path, *overrides: str, text: str = TEXT) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text)
    return [problem.replace(str(tmp_path) + "/", "") for problem in caught.value.problems]


def test_derives_what_follows_from_other_keys(tmp_path: Path) -> None:
    text = TEXT.replace("num_kv_heads = 4\n", "")
    model = load(tmp_path, text=text).model
    assert (model.num_kv_heads, model.head_dim, model.ffn_hidden_size) == (8, 8, 256)
    optimizer = load(tmp_path, "--optimizer.learning_rate", "1.0").optimizer
    assert optimizer.min_learning_rate == 0.1


def test_values_of_overrides_are_toml_or_else_text(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        *("--parallel.schedule", "gpipe"),
        *("--train.run_dir", "runs/y"),
        "--optimizer.learning_rate=1e-3",
        *("--optimizer.betas", "[0.8, 0.9]"),
        "--parallel.sequence_parallel=true",
        *("--parallel.layers_per_stage", "[3, 5]"),
        *("--logging.wandb_name", '"7"'),
        *("--logging.wandb_project", "2024-01-01"),
        *("--data.sources", '[{name = "b", path = "b", weight = 2}]'),
        *("--data.sources.1.path", "c"),
        *("--data.sources.1.name", "c"),
        *("--data.phases", "[{after_step = 5, weights = {c = 1}}]"),
        *("--data.changes.0.after_step", "7"),
        *("--data.changes.0.source", "b"),
        *("--data.changes.0.add", "d"),
    )
    assert config.parallel.schedule == "gpipe"
    assert config.train.run_dir == "runs/y"
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.parallel.sequence_parallel is True
    assert config.parallel.layers_per_stage == (3, 5)
    assert config.logging.wandb_name == "7"
    assert config.logging.wandb_project == "2024-01-01"
    assert [(source.path, source.weight) for source in config.data.sources] == [("b", 2), ("c", 1)]
    (phase,), (change,) = config.data.phases, config.data.changes
    assert (phase.after_step, phase.after_tokens, phase.weights) == (5, None, {"c": 1.0})
    assert (change.after_step, change.source, change.add, change.remove) == (7, "b", "d", None)


def test_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "--train.steps", "3", "--train.steps=4").train.steps == 4


def test_an_override_value_cannot_smuggle_in_other_keys(tmp_path: Path) -> None:
    config = load(tmp_path, "--train.run_dir", '"x"\nsteps = 3')
    assert config.train.run_dir == '"x"\nsteps = 3'
    assert config.train.steps == 100


def test_keys_win_over_the_preset(tmp_path: Path) -> None:
    text = TEXT.replace("num_layers = 8\n", 'preset = "small"\n').replace("vocab_size = 500\n", "")
    model = load(tmp_path, text=text).model
    assert (model.preset, model.num_layers, model.vocab_size) == ("small", 2, 100)
    assert (model.hidden_size, model.sliding_window) == (64, 8)
    changed = load(
        tmp_path,
        *("--model.sliding_window", "none", "--model.rope_scaling.factor", "4.0"),
        text=text,
    ).model
    assert changed.sliding_window is None
    assert changed.rope_scaling is not None
    assert (changed.rope_scaling.factor, changed.rope_scaling.low_frequency_factor) == (4.0, 2.0)
    assert load(tmp_path, "--model.rope_scaling=none", text=text).model.rope_scaling is None


def test_the_word_none_takes_back_what_the_file_sets(tmp_path: Path) -> None:
    text = TEXT.replace("pipeline = 2", "pipeline = 2\ndata = 2\nlayers_per_stage = [3, 5]")
    text += "[optimizer]\ndecay_steps = 5\n"
    assert load(tmp_path, text=text).parallel.layers_per_stage == (3, 5)
    taken_back = load(
        tmp_path,
        *(
            "--parallel.data=none",
            "--parallel.layers_per_stage=none",
            "--optimizer.decay_steps=none",
        ),
        text=text,
    )
    assert taken_back == load(tmp_path)


def test_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 5


def test_all_problems_at_once_with_file_line_key_and_fix(tmp_path: Path) -> None:
    text = TEXT.replace("num_layers", "num_layer").replace("tensor = 2", 'tensor = "2"')
    assert problems(tmp_path, "--train.steps=0", text=text) == [
        "run.toml:1: model.num_layers is missing; it has no default (Blocks of the network).",
        "run.toml:2: model.num_layer is not a key that exists; did you mean model.num_layers?",
        'run.toml:10: parallel.tensor = "2" must be a whole number, without quotes.',
        "command line: train.steps = 0 must be more than 0.",
    ]


def test_contradictions_are_found_beside_wrong_types(tmp_path: Path) -> None:
    found = problems(tmp_path, "--parallel.tensor=3", "--optimizer.learning_rate=fast")
    assert found[0] == (
        'command line: optimizer.learning_rate = "fast" must be a number, without quotes.'
    )
    assert found[1] == (
        "command line: parallel.tensor = 3 must divide model.num_heads = 8: use 1, 2, 4 or 8."
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "--parallel.schedule=1f1",
            'command line: parallel.schedule = "1f1" must be '
            + ", ".join(f'"{name}"' for name in SCHEDULES),
        ),
        ("--train.run_dir=5", 'command line: train.run_dir = 5 must be text, in quotes: "5".'),
        (
            "--parallel.sequence_parallel=True",
            'command line: parallel.sequence_parallel = "True" must be true or false, '
            "without quotes.",
        ),
        ("--train.steps=1.5", "command line: train.steps = 1.5 must be a whole number."),
        ("--train.steps=true", "command line: train.steps = true must be a whole number."),
        (
            "--optimizer.learning_rate=inf",
            "command line: optimizer.learning_rate = inf must be a finite number.",
        ),
        ("--model.dropout=1.0", "command line: model.dropout = 1.0 must be less than 1.0."),
        (
            "--data.sources=[]",
            "command line: data.sources = [] must have at least 1, and has 0.",
        ),
        (
            '--data.sources=[{name="x", path="x", weight=-1}]',
            "command line: data.sources.0.weight = -1 must be 0.0 or more.",
        ),
        (
            "--data.sources.0.name=a/b",
            'command line: data.sources.0.name = "a/b" must be of letters, digits, dots, dashes '
            "and underscores, and begin with a letter or a digit.",
        ),
        (
            "--data.phases=[{after_step=5, weights={}}]",
            "command line: data.phases.0.weights = {} must have at least 1, and has 0.",
        ),
        (
            "--data.open_parts=0",
            "command line: data.open_parts = 0 must be more than 0.",
        ),
        (
            "--optimizer.betas=[0.9]",
            "command line: optimizer.betas = [0.9] has too few entries.",
        ),
        (
            '--data.sources={path="x"}',
            'command line: data.sources = {path = "x"} must be a list of tables: write '
            "[[data.sources]] above each.",
        ),
        ("--model=3", "command line: model = 3 must be a table of keys."),
        (
            "--train.learning_rate=3",
            "command line: train.learning_rate is not a key that exists; "
            "did you mean optimizer.learning_rate?",
        ),
        (
            "--train.zzz=3",
            "command line: train.zzz is not a key that exists; the keys of train are run_dir, ",
        ),
        ("--paralel.tensor=2", "command line: paralel is not a section; did you mean [parallel]?"),
        (
            "--data.sources.0.pth=x",
            "command line: data.sources.0.pth is not a key that exists; "
            "did you mean data.sources.0.path?",
        ),
        (
            "--data.sources.3.path=x",
            "command line: --data.sources.3.path: data.sources has 1 entry, so the next is 1.",
        ),
        (
            "--train.steps.x=3",
            "command line: --train.steps.x: train.steps has no parts that could be set by name.",
        ),
        (
            "--model.preset=smal",
            'command line: model.preset = "smal" does not exist; did you mean "small"?',
        ),
        ("--train.steps", "command line: --train.steps needs a value, as in --train.steps VALUE."),
        ("steps", "command line: 'steps' is not an override; write --section.key VALUE."),
    ],
)
def test_what_is_said(tmp_path: Path, override: str, said: str) -> None:
    assert problems(tmp_path, override)[0].startswith(said)


def test_an_unknown_preset_is_one_problem(tmp_path: Path) -> None:
    text = '[model]\npreset = "smal"\n' + TEXT[TEXT.index("[train]") :]
    assert problems(tmp_path, text=text) == [
        'run.toml:2: model.preset = "smal" does not exist; did you mean "small"?'
    ]


def test_a_bad_value_of_a_preset_is_blamed_on_the_preset(tmp_path: Path) -> None:
    text = TEXT.replace("[model]", '[model]\npreset = "small"')
    text = text.replace("max_sequence_length = 128\n", "")
    bad = {"small": {**PRESETS["small"], "max_sequence_length": -1}}
    with pytest.raises(ConfigError, match=r'run.toml, preset "small": model.max_sequence_length'):
        load_config(write(tmp_path, text), [], gpt(bad))


# --- checkpoint.load_from ------------------------------------------------------------------------

LENT = GPTConfig(
    num_layers=3,
    hidden_size=48,
    num_heads=6,
    vocab_size=90,
    max_sequence_length=512,
    preset="theirs",
    sliding_window=64,
)
LOADING = '[checkpoint]\nload_from = "$HOME/llama"\n' + TEXT[TEXT.index("[parallel]") :]


def load_lent(
    tmp_path: Path, *overrides: str, text: str = LOADING, lent: GPTConfig | None = LENT
) -> Config:
    """The model that `checkpoint.load_from` names is `lent`; with None there is none."""

    def lender(load_from: Path, run_dir: Path | None) -> GPTConfig:
        assert load_from == Path.home() / "llama"
        assert run_dir == Path("runs/x")
        if lent is None:
            raise CheckpointError("llama: there is no such directory")
        return lent

    return load_config(write(tmp_path, text), overrides, gpt(PRESETS), lender)


def test_the_model_may_come_from_the_one_that_is_loaded(tmp_path: Path) -> None:
    model = load_lent(tmp_path).model
    assert model == LENT.model_copy(update={"preset": None})
    assert isinstance(model, GPTConfig)
    assert model.num_kv_heads == 6, "derived there"


def test_the_preset_and_the_keys_lie_over_the_model_that_is_loaded(tmp_path: Path) -> None:
    text = '[model]\npreset = "small"\nvocab_size = 120\nnum_kv_heads = 2\n' + LOADING
    model = load_lent(tmp_path, "--model.rope_theta=7.0", text=text).model
    assert isinstance(model, GPTConfig)
    assert (model.num_layers, model.vocab_size, model.rope_theta) == (2, 120, 7.0)
    assert model.head_dim == 8, "neither the preset nor the file gives it"
    assert load_lent(tmp_path, "--model.sliding_window=none").model.sliding_window is None


def test_a_config_whose_model_was_loaded_comes_back(tmp_path: Path) -> None:
    config = load_lent(tmp_path, "--model.sliding_window=none", '--checkpoint.load_allow=["a.*"]')
    text = dump_config(config)
    assert parse_config(text, gpt(PRESETS)) == config
    assert load_lent(tmp_path, text=text) == config


def test_a_model_that_can_not_be_loaded_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_lent(tmp_path, lent=None)
    (problem,) = caught.value.problems
    said = "run.toml:2: checkpoint.load_from: llama: there is no such directory."
    assert problem.endswith(said)


@pytest.mark.parametrize("path", ["$UNSET_VARIABLE/llama", ""])
def test_a_path_of_a_model_that_is_none_is_one_problem(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_lent(tmp_path, text=LOADING.replace("$HOME/llama", path))
    (problem,) = caught.value.problems
    assert f'run.toml:2: checkpoint.load_from = "{path}" ' in problem


def test_a_contradiction_with_the_model_that_is_loaded_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_lent(tmp_path, "--train.sequence_length=1024", "--model.num_kv_heads=4")
    blamed = [problem.split(": ")[0].rpartition("/")[2] for problem in caught.value.problems]
    assert blamed == ["command line", "command line"]
    with pytest.raises(ConfigError) as caught:
        load_lent(tmp_path, lent=LENT.model_copy(update={"num_kv_heads": 5}))
    (problem, *_) = caught.value.problems
    assert f'run.toml, checkpoint.load_from "{Path.home()}/llama": model.num_kv_heads' in problem


def test_a_missing_section_names_what_it_needs(tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("[data]")]
    assert [problem.split(";")[0] for problem in problems(tmp_path, text=text)] == [
        "run.toml: data.tokenizer is missing",
        "run.toml: data.sources is missing",
    ]


def test_syntax_errors_name_the_line(tmp_path: Path) -> None:
    (said,) = problems(tmp_path, text=TEXT.replace("steps = 100", "steps = 100 sequences"))
    assert said.startswith("run.toml:15: is not valid TOML: ")
    assert said.endswith("    steps = 100 sequences")


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"runn.toml: there is no such file. Did you mean .*run"):
        load_config(tmp_path / "runn.toml", [], FAMILIES)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path, [], FAMILIES)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "bytes.toml", [], FAMILIES)


ODD = "no\nbreak\r\x1b[31m\u2028"


@pytest.mark.parametrize(
    "override",
    [
        f"--train.validation_every={ODD}",
        f"--model.preset={ODD}",
        f"--train.{ODD}=1",
        f"--{ODD}.steps=1",
        f"--train.steps.{ODD}=1",
        f"--{ODD}",
        ODD,
        f"--train.run_dir=${{{ODD}}}",
        f"--logging.timeline={ODD}",
        f"--data.sources.0={ODD}",
        '--optimizer.betas=["no\\nbreak", {"no\\nbreak" = 1}]',
    ],
)
def test_each_problem_is_one_line(tmp_path: Path, override: str) -> None:
    said = problems(tmp_path, override)
    assert r"no\nbreak" in said[0]
    for problem in said:
        assert problem.isprintable(), problem


def test_a_file_whose_name_has_line_ends_is_told_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    with pytest.raises(ConfigError, match=r"no\\nbreak.*x\\ny\.toml: there is no such") as missing:
        load_config(folder / "x\ny.toml", [], FAMILIES)
    assert str(missing.value).isprintable()
    folder.mkdir()
    (folder / "x\ny.toml").write_text("[train]\nsteps = 1x")
    with pytest.raises(ConfigError, match=r"x\\ny\.toml:2: is not valid TOML") as syntax:
        load_config(folder / "x\ny.toml", [], FAMILIES)
    assert str(syntax.value).count("\n") == 1, "the line with the fault follows"
    with pytest.raises(ConfigError, match=r"Did you mean .*x\\ny\.toml\?") as near:
        load_config(folder / "x\nz.toml", [], FAMILIES)
    assert str(near.value).isprintable()


DIGITS, BRACKETS = "9" * 5000, "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("value", "said"),
    [(DIGITS, "a number has more than 4,300 digits"), (BRACKETS, "brackets are nested too deep")],
)
def test_values_that_python_can_not_read(tmp_path: Path, value: str, said: str) -> None:
    text = TEXT.replace("steps = 100", f"steps = {value}")
    assert text != TEXT
    assert problems(tmp_path, text=text) == [f"run.toml: can't be read: {said}."]
    (problem,) = problems(tmp_path, f"--train.steps={value}")
    assert "train.steps" in problem


def test_an_index_of_thousands_of_digits(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, f"--data.sources.{DIGITS}.path=x")
    assert "data.sources has no parts that could be set by name" in problem
