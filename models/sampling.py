"""Continue a text token by token, with a key/value cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megapipe.models.pretrained import PretrainedGPT


def sample(
    model: PretrainedGPT,
    tokens: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue `tokens`, ending after `stop_token`.

    temperature 0 takes the likeliest token. The text, prompt included, never grows beyond the
    model's max_sequence_length. A pure function of its arguments.
    """
    assert tokens, "at least one token to continue"
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches()
    device = next(model.parameters()).device
    fed = torch.tensor([tokens], device=device)
    room = model.config.max_sequence_length - len(tokens)
    for _ in range(min(max_tokens, room)):
        logits_V = model(fed, caches)[0, -1].float().cpu()
        token = _choose(logits_V, temperature, top_k, generator)
        yield token
        if token == stop_token:
            return
        fed = torch.tensor([[token]], device=device)


def _choose(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        lowest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest, -torch.inf)
    probabilities = (logits_V / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
