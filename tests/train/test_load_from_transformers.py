"""A model of transformers' trains here as it does there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megapipe.config import Config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh
from megapipe.models.families import FAMILIES
from megapipe.optim.learning_rate import learning_rate
from megapipe.train.load_from import LoadFrom
from tests.layouts import CPU, engine_of, mesh_of
from tests.ranks import run_ranks
from tests.train.loading import STEPS, make_config, save_llama


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


def test_a_hugging_face_model_trains_as_transformers_trains_it(tmp_path: Path) -> None:
    words = ("--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.data=1")
    llama = save_llama(tmp_path / "llama")
    config = make_config(tmp_path, llama, *words)
    losses = run_ranks(train_ranks, 4, config)[0]
    expected = train_transformers(config, llama)
    assert losses[0] == pytest.approx(expected[0], abs=1e-5)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] != pytest.approx(losses[0], abs=0.01), "the weights move"
