"""A whole step with the Triton kernels, in their interpreter, is that of the torch path."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megapipe.config import Config, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.models.families import FAMILIES
from tests.interpreter import needs_interpreter
from tests.layouts import engine_of
from tests.ranks import run_ranks

pytestmark = needs_interpreter
CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = (
    *("--model.num_layers=2", "--model.hidden_size=16", "--model.ffn_hidden_size=16"),
    *("--model.num_heads=2", "--model.head_dim=8", "--model.vocab_size=50"),
    *("--train.sequence_length=4", "--train.micro_batch_size=1", "--train.global_batch_size=2"),
    *("--train.precision=fp32", "--optimizer.clip_grad_norm=0.5", "--parallel.data=1"),
    *("--parallel.tensor=2", "--parallel.pipeline=2"),
)
EVERYWHERE = {"add_weight_grad", "adamw_", "grad_norm", "attention", "cross_entropy_stats"}


@dataclass(frozen=True)
class Case:
    """A shape of tests/configs, changed by words, and operators that must have run."""

    shape: str
    words: tuple[str, ...]
    operators: set[str]
    steps: int = 5


CASES = {
    "llama": Case(
        "llama",
        ("--train.linear_cross_entropy=true", "--train.z_loss=1e-3"),
        {"rms_norm", "swiglu", "rope_", "rope_gradient"},
    ),
    "gpt2": Case(
        "gpt2",
        ("--model.dropout=0.1", "--model.attention_dropout=0.1", "--data.mask_documents=true"),
        {"layer_norm", "dropout", "gelu"},
    ),
    "qk_norm": Case(
        "llama",
        ("--model.qk_norm=true", "--model.num_heads=4", "--parallel.sequence_parallel=true"),
        {"rms_norm", "norm_rope"},
        steps=2,
    ),
    "recompute": Case(  # what is turned in place must not be needed as it was
        "llama",
        ("--train.recompute=full", "--parallel.schedule=zb-h1", "--model.qkv_bias=true"),
        {"rope_", "rope_gradient"},
        steps=1,
    ),
}


class Operators(TorchDispatchMode):
    """Collects the names of our own operators that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        namespace, _, name = func.name().partition("::")
        if namespace == "megapipe":
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def figures(given: Config, steps: int) -> tuple[list[float], set[str]]:
    """Called on each rank: the losses and gradient norms of some steps, and our operators."""
    engine, tokens = engine_of(given), synthetic_tokens(given)
    found = []
    with Operators() as operators:
        for number in range(steps):
            result = engine.train_step(tokens(number, engine.mesh), 1e-2)
            found += [result.loss, result.grad_norm]
    return found, operators.seen


@pytest.mark.parametrize("name", CASES)
def test_equal_steps(name: str) -> None:
    """Losses and gradient norms; learning makes them differ from step to step."""
    case, found, operators = CASES[name], {}, {}
    for backend, attention in (("torch", "sdpa"), ("triton", "triton")):
        words = [f"--train.kernels={backend}", f"--train.attention={attention}"]
        path = CONFIGS / f"{case.shape}_shape.toml"
        given = load_config(path, [*SMALL, *case.words, *words], FAMILIES)
        ranks = run_ranks(figures, 4, given, case.steps, timeout=300)
        found[backend] = ranks[0][0]
        operators[backend] = set().union(*(seen for _, seen in ranks))
    assert operators["torch"] == set()
    assert operators["triton"] >= EVERYWHERE | case.operators
    assert found["triton"] == pytest.approx(found["torch"], rel=1e-4)
    assert len(set(found["torch"])) == 2 * case.steps
