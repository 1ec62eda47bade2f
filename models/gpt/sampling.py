"""Continue a text token by token, with a key/value cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megapipe.errors import CheckpointError
from megapipe.models.gpt.pretrained import PretrainedGPT


def sample(
    model: PretrainedGPT,
    tokens: list[int],
    *,
    ids: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue `tokens`, ending after `stop_token`.

    Only `ids` are yielded, those that the tokenizer has (`Tokenizer.ids`): a model's vocabulary
    is often larger. temperature 0 takes the likeliest token. The text, prompt included, never
    grows beyond the model's max_sequence_length. A pure function of its arguments. Raises
    CheckpointError where the model's logits are not numbers.
    """
    assert tokens, "at least one token to continue"
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches()
    device = next(model.parameters()).device
    fed = torch.tensor([tokens], device=device)
    known_K = torch.tensor(ids)
    room = model.config.max_sequence_length - len(tokens)
    for _ in range(min(max_tokens, room)):
        logits_K = model(fed, caches)[0, -1].cpu()[known_K].double()
        if not logits_K.isfinite().all():
            raise CheckpointError(
                "the model's logits are not finite numbers: its weights have diverged. "
                "Take an earlier checkpoint."
            )
        token = int(known_K[_choose(logits_K, temperature, top_k, generator)])
        yield token
        if token == stop_token:
            return
        fed = torch.tensor([[token]], device=device)


def _choose(
    logits_K: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_K.argmax())
    if top_k is not None and top_k < len(logits_K):
        lowest = logits_K.topk(top_k).values[-1]
        logits_K = logits_K.masked_fill(logits_K < lowest, -torch.inf)
    # Relative to the largest, so that no temperature, however small, makes it infinite.
    probabilities = ((logits_K - logits_K.max()) / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
