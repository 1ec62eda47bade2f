"""Tokens and losses by source, against a loop over targets, and two mistakes that it finds."""

import inspect

import pytest
import torch

from megapipe.microbatch import IGNORED_TARGET
from megapipe.tensor_parallel import source_losses
from megapipe.tensor_parallel.source_losses import SourceLosses

CPU = torch.device("cpu")
SOURCES = 5
"""Of which the last has no target."""


def check(kind: type[SourceLosses]) -> None:
    """Two microbatches after a `begin`, in float32 and laid out across, ignored targets among
    them."""
    generator = torch.Generator().manual_seed(1)
    sums = kind(CPU)
    for _ in range(2):
        sums.begin(SOURCES)
        tokens, losses = [0] * SOURCES, [0.0] * SOURCES
        for _ in range(2):
            each = torch.rand(3, 7, generator=generator)
            targets = torch.randint(9, (3, 7), generator=generator)
            targets[1, 2:5] = IGNORED_TARGET
            sources = torch.randint(SOURCES - 1, (3, 7), generator=generator, dtype=torch.int32)
            sums.add(each.t(), targets.t(), sources.t())
            for index in targets.ne(IGNORED_TARGET).nonzero():
                tokens[sources[*index]] += 1
                losses[sources[*index]] += float(each[*index])
    assert sums.tokens.tolist() == tokens
    assert sums.losses.tolist() == pytest.approx(losses, rel=1e-14)
    assert sums.losses.dtype == torch.float64


@pytest.mark.parametrize("elements", [1, 50, 1000])
def test_sums_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """One source at a time, two, or all."""
    monkeypatch.setattr(source_losses, "ELEMENTS", elements)
    check(SourceLosses)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(sources_N == ", "(sources_N + 1 == "),
        (") & counted_N", ")"),
        ("range(0, len(self._numbers), size)", "range(size, len(self._numbers), size)"),
    ],
)
def test_mistakes_are_found(right: str, wrong: str) -> None:
    text = inspect.getsource(source_losses)
    assert text.count(right) == 1
    planted: dict[str, type[SourceLosses]] = {}
    exec(text.replace(right, wrong), planted)
    with pytest.raises(AssertionError):
        check(planted["SourceLosses"])
