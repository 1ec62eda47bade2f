"""A whole step with the Triton kernels, in their interpreter, is that of the torch path."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megapipe.config import Config, load_config
from megapipe.mesh import build_mesh
from megapipe.models.build import build_stages
from megapipe.models.presets import PRESETS
from megapipe.train.engine import Engine
from megapipe.train.proof import synthetic_tokens
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 5
SMALL = (
    *("--model.num_layers=2", "--model.hidden_size=16", "--model.ffn_hidden_size=16"),
    *("--model.vocab_size=50", "--train.sequence_length=8", "--train.micro_batch_size=1"),
    *("--train.global_batch_size=2", "--train.precision=fp32", "--optimizer.clip_grad_norm=0.5"),
    *("--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.data=1"),
)
EVERYWHERE = {"add_weight_grad", "adamw_", "grad_norm", "attention", "cross_entropy_stats"}
SHAPES = {
    "llama": (
        ("--train.linear_cross_entropy=true", "--train.z_loss=1e-3"),
        EVERYWHERE | {"rms_norm", "swiglu", "rope_", "rope_gradient"},
    ),
    "llama_qk_norm": (
        ("--model.qk_norm=true", "--parallel.sequence_parallel=true"),
        EVERYWHERE | {"rms_norm", "norm_rope"},
    ),
    "gpt2": (
        ("--model.dropout=0.1", "--model.attention_dropout=0.1", "--data.mask_documents=true"),
        EVERYWHERE | {"layer_norm", "dropout", "gelu"},
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


def steps(given: Config) -> tuple[list[float], set[str]]:
    """Called on each rank: the losses and gradient norms of some steps, and our operators."""
    parallel = given.parallel
    mesh = build_mesh(
        pipeline=parallel.pipeline, data=1, tensor=parallel.tensor, device=torch.device("cpu")
    )
    engine, tokens = Engine(given, mesh, build_stages), synthetic_tokens(given)
    figures = []
    with Operators() as operators:
        for number in range(STEPS):
            result = engine.train_step(tokens(number, mesh), 1e-2)
            figures += [result.loss, result.grad_norm]
    return figures, operators.seen


@pytest.mark.parametrize("name", SHAPES)
def test_five_steps(name: str) -> None:
    words, expected = SHAPES[name]
    found = {}
    for backend in ("torch", "triton"):
        attention = {"torch": "sdpa", "triton": "triton"}[backend]
        keys = [*SMALL, *words, f"--train.kernels={backend}", f"--train.attention={attention}"]
        shape = name.partition("_")[0]
        given = load_config(CONFIGS / f"{shape}_shape.toml", keys, PRESETS)
        ranks = run_ranks(steps, 4, given, timeout=300)
        found[backend] = ranks[0][0], set().union(*(seen for _, seen in ranks))
    assert found["torch"][1] == set()
    assert expected <= found["triton"][1]
    assert found["triton"][0] == pytest.approx(found["torch"][0], rel=1e-4)
