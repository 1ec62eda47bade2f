"""Contradictions between keys: each is refused, and says what to change."""

from pathlib import Path

import pytest

from megapipe.config import Config, dump_config, load_config, parse_config
from megapipe.config.contradiction import divisors
from megapipe.config.parallel import parse_memory
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from tests.config.examples import write


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("--model.hidden_size=65", "model.hidden_size = 65 does not divide by model.num_heads"),
        ("--model.num_kv_heads=3", "model.num_kv_heads = 3 must divide model.num_heads = 8"),
        ("--model.head_dim=7", "model.head_dim = 7 must be even"),
        (
            "--model.position=learned --model.rope_scaling={factor=2.0}",
            "model.rope_scaling = {factor = 2.0, low_frequency_factor = 1.0, high_frequency_fa",
        ),
        (
            "--model.num_heads=12 --model.head_dim=8 --model.num_kv_heads=4 --parallel.tensor=6 "
            "--model.ffn_hidden_size=96",
            "parallel.tensor = 6 must divide model.num_kv_heads = 4 or be a multiple of it (key "
            "and value heads are then copied): use 1, 2, 4 or 12.",
        ),
        (
            "--model.ffn_hidden_size=99",
            "parallel.tensor = 2 must divide model.ffn_hidden_size = 99",
        ),
        (
            "--train.kernels=triton --train.precision=fp64",
            'train.kernels = "triton" is not for train.precision = "fp64"; use "auto"',
        ),
        (
            "--train.attention=triton --model.head_dim=320",
            'train.attention = "triton" takes heads of up to 256, and model.head_dim = 320; use "s',
        ),
        (
            "--train.kernels=triton --model.hidden_size=32768",
            'train.kernels = "triton" takes model.hidden_size up to 16,384, and it is 32,768; use',
        ),
        (
            "--checkpoint.load_from=llama --checkpoint.resume=runs/a",
            'checkpoint.load_from = "llama" and checkpoint.resume = "runs/a" are both given; keep',
        ),
        (
            "--checkpoint.load_new_tokens=mean",
            'checkpoint.load_new_tokens = "mean" has no effect without checkpoint.load_from; set',
        ),
        (
            "--checkpoint.load_from=llama --checkpoint.load_layers=[0,1]",
            "checkpoint.load_layers = [0, 1] has 2 entries, and model.num_layers = 8: give one for",
        ),
        ("--parallel.pipeline=9", "parallel.pipeline = 9 is too large: parallel.pipeline 9 *"),
        (
            "--parallel.layers_per_stage=[4,2,2]",
            "parallel.layers_per_stage = [4, 2, 2] has 3 entries, and parallel.pipeline 2 *",
        ),
        (
            "--parallel.layers_per_stage=[4,5]",
            "parallel.layers_per_stage = [4, 5] adds up to 9 layers, and model.num_layers = 8",
        ),
        ("--parallel.virtual=2", 'parallel.virtual = 2 must be 1 with parallel.schedule = "1f1b"'),
        (
            "--parallel.schedule=interleaved-1f1b",
            'parallel.virtual = 1 must be 2 or more with parallel.schedule = "interleaved-1f1b".',
        ),
        (
            "--parallel.schedule=interleaved-1f1b --parallel.pipeline=1 --parallel.virtual=2",
            'parallel.schedule = "interleaved-1f1b" needs parallel.pipeline of 2 or more',
        ),
        (
            "--parallel.stage_costs=costs.toml",
            'parallel.stage_costs = "costs.toml" has no effect with parallel.schedule = "1f1b"; '
            'remove it, or set parallel.schedule = "auto".',
        ),
        (
            "--parallel.schedule=auto --parallel.pipeline=1 --parallel.virtual=2",
            "parallel.virtual = 2 must be 1 with parallel.pipeline = 1.",
        ),
        (
            "--parallel.activation_limit=0",
            "parallel.activation_limit = 0 can't be used: it is a number of microbatches above 0",
        ),
        (
            "--parallel.activation_limit=true",
            "parallel.activation_limit = true can't be used: it is a number of microbatches above",
        ),
        (
            "--parallel.activation_limit=12GX",
            'parallel.activation_limit = "12GX" can\'t be used: it is a number of microbatches '
            'above 0, as in 4 or 2.5, or memory, as in "12 GiB".',
        ),
        (
            "--train.sequence_length=129",
            "train.sequence_length = 129 is longer than model.max_sequence_length = 128",
        ),
        (
            "--parallel.sequence_parallel=true --train.sequence_length=63",
            "train.sequence_length = 63 must be a multiple of parallel.tensor = 2 when "
            "parallel.sequence_parallel is on: use 62 or 64.",
        ),
        (
            "--train.micro_batch_size=3",
            "train.global_batch_size = 16 must be a multiple of train.micro_batch_size = 3: use "
            "15 or 18.",
        ),
        (
            "--parallel.data=3 --data.streams=6",
            "train.global_batch_size = 16 must be a multiple of parallel.data 3 * "
            "train.micro_batch_size 2 = 6: use 12 or 18.",
        ),
        (
            "--parallel.data=4 --data.streams=6",
            "data.streams = 6 must be a multiple of parallel.data = 4",
        ),
        ("--optimizer.warmup_steps=101", "optimizer.warmup_steps = 101 is longer than the run"),
        ("--optimizer.min_learning_rate=1.0", "optimizer.min_learning_rate = 1.0 is above"),
        (
            "--optimizer.schedule=constant --optimizer.decay_steps=5",
            "optimizer.decay_steps = 5 has no effect when",
        ),
        (
            "--optimizer.schedule=wsd --optimizer.warmup_steps=50 --optimizer.decay_steps=60",
            "optimizer.decay_steps = 60 does not fit: optimizer.warmup_steps 50 + decay_steps 60",
        ),
        (
            '--data.validation_fraction=0.1 --data.validation_sources=[{name="x",path="x"}]',
            "data.validation_fraction = 0.1 and data.validation_sources are both given",
        ),
        (
            '--data.sources=[{name="x",path="x"},{name="x",path="y"}]',
            'data.sources.1.name = "x" is the name of another source too; give each its own.',
        ),
        (
            '--data.validation_sources=[{name="a",path="y"}]',
            'data.validation_sources.0.name = "a" is the name of another source too',
        ),
        (
            "--data.sources.0.weight=0",
            "data.sources.0.weight = 0.0 and all other weights are 0; give one source more.",
        ),
        (
            "--data.phases=[{weights={a=1}}]",
            "data.phases.0.after_step = none and after_tokens are both missing; give one of them.",
        ),
        (
            "--data.phases=[{after_step=5,after_tokens=5,weights={a=1}}]",
            "data.phases.0.after_step = 5 and after_tokens are both given; give one of them.",
        ),
        (
            "--data.phases=[{after_step=5,weights={a=1,b=1}}]",
            'names "b", which is not the name of a source; there are a.',
        ),
        (
            "--data.phases=[{after_step=5,weights={a=0}}]",
            "are all 0; give one source more.",
        ),
        (
            '--data.changes=[{after_step=5,source="b",add="x"}]',
            'data.changes.0.source = "b" is not the name of a source; there are a.',
        ),
        (
            '--data.changes=[{after_step=5,source="a"}]',
            "data.changes.0.add = none and remove are both missing; give one of them or both.",
        ),
        (
            '--data.exclude=[{path="x"}]',
            'data.exclude.0.by = "id" needs an id_field in a source that the list is about',
        ),
        (
            '--data.exclude=[{path="x",by="sha256",sources=["b"]}]',
            'names "b", which is not the name of a source; there are a.',
        ),
        (
            "--checkpoint.every=40 --checkpoint.keep_every=100",
            "checkpoint.keep_every = 100 must be a multiple of checkpoint.every = 40, which says "
            "after which steps there are checkpoints: use 80 or 120.",
        ),
        (
            "--checkpoint.every=0 --checkpoint.keep_every=100",
            "checkpoint.keep_every = 100 has no effect with checkpoint.every = 0, which saves at "
            "the end of the run only; set checkpoint.every = 100, or remove keep_every.",
        ),
        ("--train.validation_every=5", "train.validation_every = 5 asks for a validation loss"),
    ],
)
def test_contradictions(tmp_path: Path, overrides: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path), overrides.split(), FAMILIES)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    "overrides",
    [
        "--parallel.tensor=8",  # more ranks than key/value heads: copied
        "--model.head_dim=10 --model.hidden_size=60",
        "--parallel.layers_per_stage=[3,5]",
        "--parallel.schedule=interleaved-1f1b --parallel.virtual=4",
        "--parallel.data=4",
        "--parallel.data=4 --data.streams=12",  # more or fewer than samples of a batch
        '--data.sources=[{name="a",path="x",weight=0},{name="b",path="y"}]',
        "--data.phases=[{after_step=5,weights={a=1}},{after_tokens=9000,weights={a=2}}]",
        '--data.exclude=[{path="x",by="sha256"}]',
        "--train.validation_every=5 --data.validation_fraction=0.1",
        "--train.sequence_length=63",
    ],
)
def test_what_is_allowed(tmp_path: Path, overrides: str) -> None:
    load_config(write(tmp_path), overrides.split(), FAMILIES)


def test_a_config_made_in_python_is_checked_too(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [], FAMILIES)
    wrong = config.parallel.model_copy(update={"tensor": 3})
    with pytest.raises(ConfigError, match=r"parallel.tensor = 3 must divide model.num_heads"):
        Config(**{**dict(config), "parallel": wrong})


def test_divisors() -> None:
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("12 GiB", 12 * 2**30), ("1.5GB", 1_500_000_000), ("3 KiB", 3072), ("2 TB", 2 * 10**12)],
)
def test_memory(text: str, size: int, tmp_path: Path) -> None:
    assert parse_memory(text) == size
    limit = f"--parallel.activation_limit={text}"
    config = load_config(write(tmp_path), [limit], FAMILIES)
    assert config.parallel.activation_limit == text
    assert parse_config(dump_config(config), FAMILIES) == config


@pytest.mark.parametrize(("word", "value"), [("4", 4), ("2.5", 2.5), ("none", None)])
def test_limits_in_microbatches(word: str, value: float | None, tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [f"--parallel.activation_limit={word}"], FAMILIES)
    assert config.parallel.activation_limit == value
    assert parse_config(dump_config(config), FAMILIES) == config


@pytest.mark.parametrize(
    ("value", "said"),
    [("0.5", "must be 1.0 or more"), ("1e300", "must be 10000000.0 or less")],
)
def test_waiting_has_limits(tmp_path: Path, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"train.collective_timeout_seconds = .* {said}"):
        load_config(write(tmp_path), ["--train.collective_timeout_seconds", value], FAMILIES)
