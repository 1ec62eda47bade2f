"""The estimate of activation memory against what autograd holds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node

from megapipe.config import load_config
from megapipe.layout.estimates import stage_activation_bytes
from megapipe.layout.layout import Layout
from megapipe.microbatch import MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import gpt_model
from tests.config.examples import write
from tests.interpreter import needs_interpreter
from tests.layouts import layout_of, stages_of

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


def load(folder: Path, *words: str) -> Layout:
    base = ("--train.precision=fp32", "--parallel.data=1", "--model.hidden_size=128")
    device = ("--train.device=cpu",)
    return layout_of(load_config(write(folder), [*base, *device, *words], FAMILIES))


def saved_bytes(layout: Layout) -> int:
    """What the graph of one microbatch through the whole model keeps, parameters apart."""
    (stage,) = stages_of(layout).values()
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    train = layout.config.train
    size, length = train.micro_batch_size, train.sequence_length
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
    layout = load(tmp_path, "--parallel.tensor=1", "--parallel.pipeline=1", *CASES[name])
    (stage,) = layout.stages
    expected = stage_activation_bytes(layout, stage)
    model, train = gpt_model(layout.config), layout.config.train
    if model.position == "rope" and train.recompute == "none" and not model.attention_dropout:
        expected += model.num_layers * layout.boundary_bytes  # attention's output again, on a CPU
    assert saved_bytes(layout) == pytest.approx(expected, rel=0.04)


@needs_interpreter
@pytest.mark.parametrize("name", TRITON)
def test_kernels_against_autograd(name: str, tmp_path: Path) -> None:
    words = ("--train.kernels=triton", "--train.attention=triton", "--model.num_layers=1")
    words = (*words, "--parallel.tensor=1", "--parallel.pipeline=1", *CASES[name])
    layout = load(tmp_path, *words)
    (stage,) = layout.stages
    assert saved_bytes(layout) == pytest.approx(stage_activation_bytes(layout, stage), rel=0.04)


def test_a_plan_is_for_a_gpu_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    cpu, gpu = (load(tmp_path, f"--train.device={device}") for device in ("cpu", "auto"))
    one, other = (stage_activation_bytes(layout, layout.stages[0]) for layout in (cpu, gpu))
    assert one > other


def test_what_tensor_ranks_share(tmp_path: Path) -> None:
    whole, half, sequence = (
        load(tmp_path, f"--parallel.tensor={tensor}", f"--parallel.sequence_parallel={parallel}")
        for tensor, parallel in ((1, "false"), (2, "false"), (2, "true"))
    )
    first = [stage_activation_bytes(layout, layout.stages[0]) for layout in (whole, half, sequence)]
    assert first[2] == first[0] / 2
    hidden = whole.boundary_bytes
    assert half.boundary_bytes == hidden == 2 * sequence.boundary_bytes
    assert first[1] == first[0] / 2 + 4 * 4 * hidden / 2, "norms of four layers are whole"
    last = stage_activation_bytes(whole, whole.stages[1])
    assert last == first[0] + 2 * hidden + 64 * 2 * 512 * 4, "logits of a padded vocabulary"
