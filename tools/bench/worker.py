"""One process of a contender: builds its model, then takes one step for each line it reads.

`python -m megapipe.tools.bench.worker SPEC`, where SPEC is JSON: contender ("megapipe" or
"transformers"), rank, store (a file for the rendezvous), config (TOML). It answers with a line of
JSON when it is ready and after each step; `{"profile": true}` makes that step a profiled one.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapipe.config import Config, parse_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.layout.layout import resolve
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import gpt_model
from megapipe.models.gpt.parameters import gpt_parameter_count
from megapipe.optim.rules.adamw import AdamWConfig
from megapipe.precision import keep_sums_wide
from megapipe.tools.bench.breakdown import profile_step
from megapipe.tools.bench.serving import answer, join
from megapipe.train.engine import Engine

Step = Callable[[int], float]
"""Takes the step of that number and returns its loss."""


def main(spec: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    keep_sums_wide()
    config = parse_config(spec["config"], FAMILIES)
    make = {"megapipe": _megapipe, "transformers": _transformers}[spec["contender"]]
    step = make(config, spec)
    device = torch.device(config.train.device)
    answer(ready=True)
    for number, line in enumerate(sys.stdin):
        if json.loads(line).get("profile"):
            answer(breakdown=profile_step(partial(step, number), device))
            continue
        loss = whole_step(step, number, device)
        answer(loss=loss, peak_bytes=peak_memory(device))


def whole_step(step: Step, number: int, device: torch.device) -> float:
    """The step, its end included. A step returns when its loss is known, while the GPU is still at
    work on the optimizer, in which the next contender's time would begin."""
    loss = step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return loss


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch reserved on a GPU, or that this process had resident (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


def _megapipe(config: Config, spec: dict[str, Any]) -> Step:
    layout = resolve(config, None, FAMILIES[config.model.family])
    join(spec, layout.axes.world_size)
    mesh = build_mesh(layout.axes, torch.device(config.train.device))
    engine = Engine(layout, mesh)
    tokens = synthetic_tokens(config)

    def step(number: int) -> float:
        return engine.train_step(tokens(number, mesh), config.optimizer.learning_rate).loss

    return step


def _transformers(config: Config, spec: dict[str, Any]) -> Step:
    """The loop that its users write: accumulate, clip, fused AdamW; the loss on plain logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, train, optimizer = gpt_model(config), config.train, config.optimizer
    assert isinstance(optimizer, AdamWConfig)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_sequence_length,
            tie_word_embeddings=model.tie_embeddings,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # a key of all their configs
        )
    )
    parameters = sum(p.numel() for p in theirs.parameters())
    assert parameters == gpt_parameter_count(model), "another model"
    device = torch.device(config.train.device)
    theirs.to(device)  # type: ignore[arg-type]  # their wrapper hides the signature
    adamw = torch.optim.AdamW(
        theirs.parameters(),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    tokens = synthetic_tokens(config)
    mesh = Mesh.single(device)
    count = train.global_batch_size // train.micro_batch_size

    def step(number: int) -> float:
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for batch in tokens(number, mesh):
            assert batch.targets_BS is not None
            with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                logits = theirs(input_ids=batch.tokens_BS, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets_BS.flatten()
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), optimizer.clip_grad_norm)
        adamw.step()
        return total

    return step


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
