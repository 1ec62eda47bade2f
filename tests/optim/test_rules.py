"""What holds for every optimizer there is; a new file in megapipe/optim/rules is found here."""

from pathlib import Path

import pytest
import torch

from megapipe.config import Config, dump_config, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.data_parallel.optimizer import WEIGHTS
from megapipe.layout.estimates import rank_states
from megapipe.models.families import FAMILIES
from megapipe.optim import RULES, parameter_groups
from megapipe.parameter_role import Role
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine
from tests.layouts import engine_of, layout_of
from tests.optim.stepping import build, step
from tests.test_layouts import CONFIGS, check

every_rule = pytest.mark.parametrize("name", RULES)


def config(name: str, *words: str) -> Config:
    words = ("--parallel.data=1", f"--optimizer.name={name}", *words)
    return load_config(CONFIGS / "llama_shape.toml", words, FAMILIES)


@every_rule
def test_each_role_is_in_one_group_and_state_has_names(name: str) -> None:
    groups = parameter_groups(RULES[name].config())
    assert sorted(role for group in groups for role in group.roles) == sorted(Role)
    for group in groups:
        kept = [one.name for one in group.state]
        assert len(set(kept)) == len(kept)
        assert all(one.isidentifier() and one != WEIGHTS for one in kept)


@every_rule
def test_a_file_is_named_as_its_optimizer(name: str) -> None:
    assert RULES[name].config.__module__ == f"megapipe.optim.rules.{name}"


@every_rule
def test_narrow_weights_are_the_rounded_masters(name: str) -> None:
    given = RULES[name].config(weight_decay=0.3)
    module, optimizer = build(given, torch.bfloat16, torch.float32)
    exact, reference = build(given, torch.float32, torch.float32)
    for key, parameter in exact.named_parameters():
        parameter.data.copy_(dict(module.named_parameters())[key].float())
    for number in range(5):
        step(module, optimizer, number, 1e-4)  # too small a step for bfloat16 to show each
        step(exact, reference, number, 1e-4)
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, dict(exact.named_parameters())[key].bfloat16())


@every_rule
def test_padding_stays_zero(name: str) -> None:
    module, optimizer = build(RULES[name].config(weight_decay=0.3))
    for number in range(3):
        step(module, optimizer, number, 0.1)
    for buffer in optimizer.buffers:
        padding = torch.ones_like(buffer.master)
        for slot in buffer.slots:
            slot.view(padding).zero_()
        assert padding.any()
        assert not (buffer.master * padding).any()
        assert not (buffer.gradients * padding).any()


@every_rule
def test_gradients_are_scaled(name: str) -> None:
    """Twice the gradients times half the scale are the same step, to the last bit."""
    made = [build(RULES[name].config()) for _ in range(2)]
    for factor, (module, optimizer) in zip((1.0, 2.0), made, strict=True):
        for number in range(3):
            for buffer in optimizer.buffers:
                buffer.gradients.zero_()
            for parameter in module.parameters():
                parameter.main_grad.fill_(factor * (0.3 + number))
            optimizer.step(0.1, 0.5 / factor)
    for one, other in zip(*(module.parameters() for module, _ in made), strict=True):
        assert torch.equal(one, other)


@every_rule
def test_a_layout_equals_one_process(name: str) -> None:
    """Training goes over tensor ranks, pipeline ranks and replicas alike."""
    layout = ("--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.data=1")
    check(config(name, *layout))


@every_rule
def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    given = config(name, f"--train.run_dir={tmp_path}")
    tokens = synthetic_tokens(given)

    def start() -> tuple[Engine, Checkpoints]:
        engine = engine_of(given)
        files = {"config.toml": dump_config(given).encode()}
        return engine, Checkpoints(engine, "auto", files, say=str)

    engine, checkpoints = start()
    for number in range(2):
        engine.train_step(tokens(number, engine.mesh), 0.01)
    checkpoints.save(Progress(2, 2 * 256), {})
    resumed, others = start()
    assert others.restore()[0] == Progress(2, 2 * 256)
    for one in (engine, resumed):
        one.train_step(tokens(2, one.mesh), 0.01)
    assert resumed.optimizer.steps == 3
    pairs = zip(engine.optimizer.state(), resumed.optimizer.state(), strict=True)
    for (kind, shard, ours), (_, _, theirs) in pairs:
        assert torch.equal(ours, theirs), (kind, shard.name)


@every_rule
def test_plans_count_what_it_keeps(name: str) -> None:
    given = config(name, "--train.precision=bf16")
    (states,) = rank_states(layout_of(given))
    engine = engine_of(given)
    held = {"weights": 0, "state": 0}
    for kind, _, values in engine.optimizer.state():
        held["weights" if kind == WEIGHTS else "state"] += values.nbytes
    assert (states.master, states.optimizer) == (held["weights"], held["state"])
