"""Runs that start from another model: bit by bit what lies there, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megapipe.config import Config, load_config
from megapipe.conversion.model_at import lend_model
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh
from megapipe.models.families import FAMILIES
from megapipe.optim.learning_rate import learning_rate
from megapipe.train.load_from import LoadFrom
from tests.config.examples import write
from tests.layouts import engine_of, mesh_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TOKENS, STEPS = 131, 20
TEXT = """\
[train]
run_dir = "run"
steps = 20
global_batch_size = 4
sequence_length = 16
precision = "fp32"

[optimizer]
learning_rate = 3e-3
warmup_steps = 2
schedule = "constant"
clip_grad_norm = 0.5

[data]
tokenizer = "tokenizer.model"
streams = 4

[[data.sources]]
path = "text/*.txt"
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model of transformers."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    shape = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def make_config(folder: Path, load_from: Path, *words: str) -> Config:
    """[model] comes from the model that is loaded."""
    given = [f"--train.run_dir={folder}/run", f"--checkpoint.load_from={load_from}", *words]
    lender = lambda path, run_dir: lend_model(path, run_dir, FAMILIES)  # noqa: E731
    return load_config(write(folder, TEXT), given, FAMILIES, lender)


def train_ranks(config: Config) -> list[float]:
    mesh = mesh_of(config)
    engine = engine_of(config, mesh)
    LoadFrom(config, FAMILIES, mesh.world.rank_group).restore(engine, str)
    tokens = synthetic_tokens(config)
    return [
        engine.train_step(tokens(step, mesh), learning_rate(step, config.optimizer, STEPS)).loss
        for step in range(STEPS)
    ]


def train_transformers(config: Config, folder: Path) -> list[float]:
    """The losses of the same tokens by transformers' own model and torch's own AdamW."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    asked, tokens = config.optimizer, synthetic_tokens(config)
    decays = {True: asked.weight_decay, False: 0.0}
    groups = [
        {
            "params": [one for one in model.parameters() if (one.ndim > 1) is matrix],
            "weight_decay": decay,
        }
        for matrix, decay in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=asked.betas, eps=asked.epsilon)
    losses = []
    for step in range(STEPS):
        batches = tokens(step, Mesh.single(CPU))
        inputs = torch.cat([batch.tokens_BS for batch in batches])
        targets = torch.cat([batch.targets_BS for batch in batches])
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), asked.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, asked, STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_hugging_face_model_trains_as_transformers_trains_it(llama: Path, tmp_path: Path) -> None:
    words = ("--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.data=1")
    config = make_config(tmp_path, llama, *words)
    losses = run_ranks(train_ranks, 4, config)[0]
    expected = train_transformers(config, llama)
    assert losses[0] == pytest.approx(expected[0], abs=1e-5)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] != pytest.approx(losses[0], abs=0.01), "something is learned"
