"""An optimizer with groups of its own: each role gets its group's state and setting."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from megapipe.config import load_config
from megapipe.layout.estimates import rank_states
from megapipe.models.families import FAMILIES
from megapipe.optim import (
    RULES,
    FlatParameters,
    OptimizerConfig,
    ParameterGroup,
    StateTensor,
    StepInputs,
    UpdateRule,
)
from megapipe.parameter_role import Role
from tests.config.examples import write
from tests.layouts import layout_of
from tests.optim.stepping import SHAPES, build, gradient, step


class SplitConfig(OptimizerConfig):
    name: Literal["split"] = "split"


def groups(config: SplitConfig) -> tuple[ParameterGroup, ...]:
    """Matrices keep a running sum in bfloat16, all others nothing."""
    rest = tuple(role for role in Role if role != Role.MATRIX)
    return (
        ParameterGroup(rest, 0.0, ()),
        ParameterGroup((Role.MATRIX,), 0.5, (StateTensor("sum", "bfloat16"),)),
    )


def update(
    config: SplitConfig, group: ParameterGroup, flat: FlatParameters, step: StepInputs
) -> None:
    """Moves by the number of the step; decay shows the group."""
    if "sum" in flat.state:
        flat.state["sum"].add_(flat.gradients)
    flat.master.add_(flat.gradients.sign(), alpha=step.number + group.weight_decay)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> SplitConfig:
    monkeypatch.setitem(RULES, "split", UpdateRule(SplitConfig, groups, update))
    return SplitConfig()


def test_each_group_has_its_state_and_setting(split: SplitConfig) -> None:
    module, optimizer = build(split, torch.float32, torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for number in range(2):
        step(module, optimizer, number, 0.1)
    kept = {(kind, shard.name): values for kind, shard, values in optimizer.state()}
    assert set(kept) == {("weights", name) for name in SHAPES} | {("sum", "matrix")}
    total = torch.zeros(SHAPES["matrix"], dtype=torch.bfloat16)
    for number in range(2):
        total += gradient("matrix", number).float()
    assert kept["sum", "matrix"].dtype == torch.bfloat16
    assert torch.equal(kept["sum", "matrix"], total)
    for name, parameter in module.named_parameters():
        decay = 0.5 if name == "matrix" else 0.0
        moves = [gradient(name, n).sign().float() * (n + 1 + decay) for n in range(2)]
        torch.testing.assert_close(parameter.data, before[name] + moves[0] + moves[1])


def test_plans_count_each_role_with_its_state(split: SplitConfig, tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["--train.precision=bf16"], FAMILIES)
    layout = layout_of(config.model_copy(update={"optimizer": split}))
    matrices = sum(s.size for s in layout.parameters.values() if s.role == Role.MATRIX)
    held = rank_states(layout)
    assert sum(states.optimizer for states in held) == 2 * matrices // config.parallel.tensor
    adamw = rank_states(layout_of(load_config(write(tmp_path), [], FAMILIES)))
    assert [states.weights for states in held] == [states.weights for states in adamw]


def test_the_steps_are_saved_and_taken_back(split: SplitConfig) -> None:
    module, optimizer = build(split)
    for number in range(3):
        step(module, optimizer, number, 0.1)
    assert optimizer.scalars() == {"optimizer_steps": 3}
    _, other = build(split)
    other.load_scalars({"tokens": 5, **optimizer.scalars()})
    assert other.steps == 3
