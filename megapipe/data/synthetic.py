"""Random tokens in the shape of a run's batches, for checks and measurements."""

from collections.abc import Callable, Sequence

import torch

from megapipe.config import Config
from megapipe.distributed.mesh import Mesh
from megapipe.microbatch import MicroBatch


def synthetic_tokens(config: Config) -> Callable[[int, Mesh], list[MicroBatch]]:
    """Random tokens that are a pure function of (seed, sample index), with document boundaries
    where attention is kept within documents, and with a source for each target. Every rank gets
    tokens, targets, documents and sources."""

    def source(step: int, mesh: Mesh) -> list[MicroBatch]:
        train = config.train
        first = step * train.global_batch_size
        own = range(first + mesh.batch.rank, first + train.global_batch_size, mesh.batch.size)
        samples = list(own)
        groups = [
            samples[i : i + train.micro_batch_size]
            for i in range(0, len(samples), train.micro_batch_size)
        ]
        return [synthetic_microbatch(config, group, mesh.device) for group in groups]

    return source


def synthetic_microbatch(
    config: Config, samples: Sequence[int], device: torch.device
) -> MicroBatch:
    """Random tokens of these samples, of the config's shape, as `synthetic_tokens` says."""
    length = config.train.sequence_length
    rows, documents, sources = [], [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + sample)
        rows.append(torch.randint(0, config.model.vocab_size, (length + 1,), generator=generator))
        begins = torch.rand(length, generator=generator) < 4 / length
        documents.append(begins.cumsum(0).to(torch.int32))
        drawn = torch.randint(0, len(config.data.sources), (length,), generator=generator)
        sources.append(drawn.to(torch.int32))
    tokens = torch.stack(rows).to(device)
    return MicroBatch(
        tokens_BS=tokens[:, :-1],
        targets_BS=tokens[:, 1:],
        documents_BS=torch.stack(documents).to(device) if config.data.mask_documents else None,
        samples_B=torch.tensor(samples, device=device),
        sources_BS=torch.stack(sources).to(device),
    )
