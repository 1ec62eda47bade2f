"""Models of Hugging Face under tensor and pipeline parallelism."""

from pathlib import Path

import pytest
import tomli_w
import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.config import Config, load_config
from megapipe.conversion.open import load_weights, open_weights
from megapipe.conversion.proof import TOLERANCE
from megapipe.kernel_choice import choose_kernels
from megapipe.microbatch import MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.stage import build_stages
from tests.config.examples import TEXT, write
from tests.conversion.models import CASES, make_model, tokens
from tests.layouts import CPU, layout_of, mesh_of
from tests.ranks import run_ranks


def config_of(folder: Path) -> Config:
    """A config of tp2 pp2 whose [model] is that of a directory."""
    values = open_weights(folder, FAMILIES).model.model_dump(exclude_none=True)
    rest = TEXT[TEXT.index("[parallel]") :].replace(
        "pipeline = 2", 'pipeline = 2\nvirtual = 2\nschedule = "interleaved-1f1b"'
    )
    text = tomli_w.dumps({"model": values}) + rest + '[logging]\nwandb = "off"\n'
    return load_config(
        write(folder, text), ["--train.device=cpu", "--train.precision=fp32"], FAMILIES
    )


def pipelined_logits(cases: dict[str, tuple[Config, Path]]) -> dict[str, Tensor]:
    """The logits of each model, [S, B, vocabulary]; the last stage's ranks have them."""
    return {
        case: logits
        for case, (config, folder) in cases.items()
        if (logits := _logits(config, folder)) is not None
    }


@torch.no_grad()
def _logits(config: Config, folder: Path) -> Tensor | None:
    mesh, layout = mesh_of(config), layout_of(config)
    stages = build_stages(layout, mesh, choose_kernels(config, CPU))
    source = open_weights(folder, FAMILIES)
    for stage in stages.values():
        load_weights(stage.eval(), source)
    ids = tokens()
    batch = MicroBatch(ids, None, None, torch.zeros(len(ids), dtype=torch.long))
    x: Tensor | None = None
    for placed in layout.stages:  # one after the other, each on its rank of the pipeline
        following = layout.stages[min(placed.number + 1, len(layout.stages) - 1)]
        if placed.rank == mesh.pipeline.rank:
            stage = stages[placed.number]
            x = stage.hidden(x, batch)  # type: ignore[operator]
            if placed.last:
                local = stage.head.logits(x)  # type: ignore[operator,union-attr]
                parts = [torch.empty_like(local) for _ in range(mesh.tensor.size)]
                dist.all_gather(parts, local.contiguous(), group=mesh.tensor.group)
                return torch.cat(parts, dim=-1)[..., : config.model.vocab_size]
            if following.rank != placed.rank:
                assert x is not None
                dist.send(x.contiguous(), mesh.pipeline.ranks[following.rank])
        elif following.rank == mesh.pipeline.rank and not placed.last:
            x = torch.empty(ids.shape[1], len(ids), config.model.hidden_size)
            dist.recv(x, mesh.pipeline.ranks[placed.rank])
    return None


@pytest.mark.filterwarnings("ignore")
def test_two_tensor_and_two_pipeline_ranks(tmp_path: Path) -> None:
    cases, expected = {}, {}
    for case in CASES:
        model = make_model(case)
        model.save_pretrained(tmp_path / case)
        cases[case] = config_of(tmp_path / case), tmp_path / case
        with torch.no_grad():
            expected[case] = model(tokens()).logits
    found: dict[str, Tensor] = {}
    for answer in run_ranks(pipelined_logits, 4, cases):
        found |= answer
    for case, theirs in expected.items():
        ours = found[case].transpose(0, 1)
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), case
    assert found.keys() == CASES.keys()
