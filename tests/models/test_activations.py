"""The estimate of activation memory against what autograd holds, and peaks over a timeline."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node

from megapipe.config import Config, load_config
from megapipe.distributed.mesh import Mesh
from megapipe.layout.program import boundary_bytes
from megapipe.microbatch import MicroBatch
from megapipe.models.build import build_stages
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.activations import peak_bytes, stage_bytes
from megapipe.models.partition import stages
from megapipe.pipeline.schedule import build_program, from_csv, simulate
from tests.config.examples import write
from tests.interpreter import needs_interpreter

GPT2 = ("position=learned", "norm=layernorm", "activation=gelu", "bias=true", "qkv_bias=true")
CASES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "gpt2": tuple(f"--model.{setting}" for setting in GPT2),
    "grouped queries": ("--model.num_kv_heads=1",),
    "query and key norm": ("--model.qk_norm=true",),
    "the same, learned positions": ("--model.qk_norm=true", "--model.position=learned"),
    "dropout": ("--model.dropout=0.1",),
    "attention dropout": ("--model.attention_dropout=0.1",),
    "swiglu, wide": ("--model.activation=swiglu", "--model.ffn_hidden_size=512"),
    "recompute": ("--train.recompute=full",),
    "linear cross-entropy": ("--train.linear_cross_entropy=true",),
}
TRITON = ("llama", "gpt2", "query and key norm", "dropout", "attention dropout")


def load(folder: Path, *words: str) -> Config:
    base = ("--train.precision=fp32", "--parallel.data=1", "--model.hidden_size=128")
    device = ("--train.device=cpu",)
    return load_config(write(folder), [*base, *device, *words], FAMILIES)


def saved_bytes(config: Config) -> int:
    """What the graph of one microbatch through the whole model keeps, parameters apart."""
    (stage,) = build_stages(config, Mesh.single(torch.device("cpu"))).values()
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    size, length = config.train.micro_batch_size, config.train.sequence_length
    tokens = torch.zeros(size, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage(None, MicroBatch(tokens, tokens, None, torch.arange(size)))
    for node in nodes(loss):
        if isinstance(kept := getattr(node, "hidden_grad", None), Tensor):  # saved by hand
            pack(kept)
    return sum(storage.nbytes() for storage in held.values())


def nodes(output: Tensor) -> set[Node]:
    """Of the graph that ends in it."""
    found, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name: str, tmp_path: Path) -> None:
    """Within 4%: one number for each row of a norm or of attention, and angles, are not counted."""
    config = load(tmp_path, "--parallel.tensor=1", "--parallel.pipeline=1", *CASES[name])
    (stage,) = stages(config)
    expected = stage_bytes(config, stage)
    model, train = config.model, config.train
    if model.position == "rope" and train.recompute == "none" and not model.attention_dropout:
        expected += model.num_layers * boundary_bytes(config)  # attention's output again, on a CPU
    assert saved_bytes(config) == pytest.approx(expected, rel=0.04)


@needs_interpreter
@pytest.mark.parametrize("name", TRITON)
def test_kernels_against_autograd(name: str, tmp_path: Path) -> None:
    words = ("--train.kernels=triton", "--train.attention=triton", "--model.num_layers=1")
    words = (*words, "--parallel.tensor=1", "--parallel.pipeline=1", *CASES[name])
    config = load(tmp_path, *words)
    (stage,) = stages(config)
    assert saved_bytes(config) == pytest.approx(stage_bytes(config, stage), rel=0.04)


def test_a_plan_is_for_a_gpu_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    cpu, gpu = (load(tmp_path, f"--train.device={device}") for device in ("cpu", "auto"))
    one, other = (stage_bytes(config, stages(config)[0]) for config in (cpu, gpu))
    assert one > other


def test_what_tensor_ranks_share(tmp_path: Path) -> None:
    whole, half, sequence = (
        load(tmp_path, f"--parallel.tensor={tensor}", f"--parallel.sequence_parallel={parallel}")
        for tensor, parallel in ((1, "false"), (2, "false"), (2, "true"))
    )
    first = [stage_bytes(config, stages(config)[0]) for config in (whole, half, sequence)]
    assert first[2] == first[0] / 2
    hidden = boundary_bytes(whole)
    assert boundary_bytes(half) == hidden == 2 * boundary_bytes(sequence)
    assert first[1] == first[0] / 2 + 4 * 4 * hidden / 2, "norms of four layers are whole"
    last = stage_bytes(whole, stages(whole)[1])
    assert last == first[0] + 2 * hidden + 64 * 2 * 512 * 4, "logits of a padded vocabulary"


def test_peaks() -> None:
    timeline = simulate(from_csv("0F0,0F1,1F0,1I0,1F1,1W0,0I0,1B1,0B1,0W0\n"))
    assert peak_bytes(timeline, [10, 3]) == [26]
    assert timeline.peak_pending == [1]
    for name, virtual in (("1f1b", 1), ("zb-h2", 1), ("zb-v", 2), ("dualpipe-v", 2)):
        program = build_program(name, pipeline=4, virtual=virtual, microbatches=9)
        timeline = simulate(program)
        assert peak_bytes(timeline, [1] * 4 * virtual) == timeline.peak_live
