"""The proof of a conversion: another implementation and ours say the same of the same tokens."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapipe.amounts import counted
from megapipe.config import ModelConfig
from megapipe.conversion.open import load_weights
from megapipe.conversion.source import WeightSource
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import ConversionError
from megapipe.layout.family import ModelFamily
from megapipe.stage import whole_model

TOLERANCE = 1e-5
"""Of the largest logit: what float32 leaves of differences in the order of additions."""
PROOF_TOKENS = 256
"""The length of a sequence, unless another is asked for or the model is made for less."""
RANDOM_SEED = 20
REAL_TEXT = """\
The quick brown fox jumps over the lazy dog. In 1969 three flew to the Moon; two walked on it.
Die Würde des Menschen ist unantastbar. Être, ou ne pas être : telle est la question.
Всё смешалось в доме. 山高水长。吾輩は猫である。 مرحبا بالعالم 🙂

def greet(name: str) -> None:
    print(f"Hello, {name}!")  # 3.14159 * (2 ** 10) == 3216.99
"""
"""For the tokens of a real text: words, numbers, code, several scripts."""

Sequences = Mapping[str, Tensor]
"""Token ids [S] by what they are, for messages."""


@dataclass(frozen=True)
class Proof:
    """What a comparison of logits has found.

    `difference` is the largest between two logits and `largest` the largest logit; `place` says
    where the difference is, in words.
    """

    difference: float
    largest: float
    place: str
    tokens: int
    layers: int | None

    @property
    def holds(self) -> bool:
        """Whether the two agree to rounding."""
        return self.difference <= TOLERANCE * self.largest

    def __str__(self) -> str:
        part = "" if self.layers is None else f" (first {self.layers} layers)"
        return (
            f"largest difference {self.difference:.3g} over {self.tokens:,} tokens{part}, "
            f"{self.difference / self.largest:.1e} of the largest logit {self.largest:.3g}: "
            f"{self.place}"
        )


def check_proof(model: ModelConfig, layers: int | None, length: int | None) -> None:
    """Raises ConversionError where a model can't be proven with its first `layers` (None: all) and
    sequences of `length` tokens."""
    if layers is not None and layers > model.num_layers:
        raise ConversionError(
            f"--proof-layers {layers}: the model has {counted(model.num_layers, 'layer')}. Leave "
            "it out to prove with all."
        )
    if length is not None and length > model.max_sequence_length:
        raise ConversionError(
            f"--proof-tokens {length}: the model is made for {model.max_sequence_length:,} tokens "
            "at most."
        )


def proof_sequences(
    model: ModelConfig, tokenizer: Tokenizer | None, length: int | None
) -> dict[str, Tensor]:
    """Random tokens over the whole vocabulary, and those of a real text where there is a
    tokenizer."""
    length = min(length or PROOF_TOKENS, model.max_sequence_length)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    sequences = {
        "random tokens": torch.randint(0, model.vocab_size, (length,), generator=generator)
    }
    if tokenizer is not None:
        ids = tokenizer.encode(REAL_TEXT)
        ids = (ids * (length // max(1, len(ids)) + 1))[:length]
        if ids:
            sequences["real text"] = torch.tensor(ids)
    return sequences


def our_logits(
    family: ModelFamily,
    source: WeightSource,
    sequences: Sequences,
    layers: int | None = None,
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Logits [S, vocabulary] of each sequence in float32, computed here; with `layers` by the
    first of the model's layers alone, so that the others are not read. Weights are rounded to the
    dtype `rounded` first."""
    model = source.model
    if layers is not None:
        model = model.model_copy(update={"num_layers": min(layers, model.num_layers)})
    module = whole_model(family, model, dtype=torch.float32, device=torch.device("cpu"))
    load_weights(module, source)
    if rounded is not None:
        round_weights(module, rounded)
    with torch.no_grad():
        return {
            name: module.logits(tokens[None])[:, 0]  # type: ignore[operator]
            for name, tokens in sequences.items()
        }


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the values of all parameters to what `dtype` can hold."""
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data.to(dtype))


def compare_logits(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], layers: int | None
) -> Proof:
    """Compare two implementations' logits of the same sequences. What is not a number differs by
    infinity."""
    found = [_compare(name, ours[name], theirs[name], layers) for name in ours]
    worst = max(found, key=lambda proof: proof.difference)
    return Proof(
        worst.difference,
        max(proof.largest for proof in found),
        worst.place,
        sum(proof.tokens for proof in found),
        layers,
    )


def _compare(name: str, ours: Tensor, theirs: Tensor, layers: int | None) -> Proof:
    if ours.shape != theirs.shape:
        raise ConversionError(
            f"the two implementations have {list(theirs.shape)} and {list(ours.shape)} logits"
        )
    difference = (ours - theirs).abs().nan_to_num(nan=torch.inf)
    worst = int(difference.argmax())
    position, token = divmod(worst, ours.shape[1])
    place = (
        f"{name}, position {position}, token {token}: {theirs[position, token]:.6g} there, "
        f"{ours[position, token]:.6g} here"
    )
    largest = float(theirs.abs().max())
    return Proof(float(difference.max()), largest, place, len(ours), layers)


TheirLogits = Callable[[Sequences, int | None], Mapping[str, Tensor]]
"""Another implementation: logits [S, vocabulary] of each sequence, by the first layers or all."""


def prove(
    family: ModelFamily,
    source: WeightSource,
    theirs: TheirLogits,
    sequences: Sequences,
    *,
    layers: int | None = None,
    rounded: torch.dtype | None = None,
) -> Proof:
    """Compare `theirs` with ours, of the arguments of `our_logits`; raises ConversionError with
    what was found where the two don't agree."""
    if layers is not None and layers >= source.model.num_layers:
        layers = None  # which is all of them
    reference = theirs(sequences, layers)
    ours = our_logits(family, source, sequences, layers, rounded)
    proof = compare_logits(ours, reference, layers)
    if proof.largest == 0 or not math.isfinite(proof.largest):
        raise ConversionError(
            f"not proven: the largest logit of the other implementation is {proof.largest}, so "
            "that logits show nothing. See whether the source is whole; to convert it all the "
            "same: --no-proof."
        )
    if not proof.holds:
        raise ConversionError(f"the conversion is wrong, and nothing was written: {proof}")
    return proof
