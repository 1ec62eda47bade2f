"""Causal grouped-query attention, and what queries may see and how positions turn them.

Shapes: S sequence, B sequences in a microbatch, N query heads and K key/value heads on this tensor
rank, D head dim.
"""

import torch
from torch import Tensor, nn

from megapipe import kernels
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.context import Context
from megapipe.stage import StageBuild


class KeyValueCache:
    """Keys and values of the tokens so far, for one layer: [max_length, B, K, D] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys])
            values = torch.cat([self.values, values])
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Causal grouped-query attention: heads are cut over tensor ranks."""

    def __init__(self, name: str, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.qkv = build.column_linear(f"{name}.q", f"{name}.k", f"{name}.v")
        queries, keys, _ = self.qkv.weight.shards
        self.heads, self.kv_heads = queries.rows // self.head_dim, keys.rows // self.head_dim
        self.first_head = queries.start[0] // self.head_dim
        self.output = build.row_linear(f"{name}.output")
        self.q_norm = build.parameters.optional(f"{name}.q_norm.weight")
        self.k_norm = build.parameters.optional(f"{name}.k_norm.weight")
        self.norm_epsilon = model.norm_epsilon
        self.window = model.sliding_window
        self.choice = build.kernels
        self.dropout = model.attention_dropout
        self.dropout_seed = kernels.fold(build.seed, f"{name}.dropout")

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [S, B, N + 2K, D]
        q, k, v = self._queries_keys_values(qkv, context)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [B, heads, S, D]
        out = kernels.attention(
            q,
            k,
            v,
            window=self.window,
            bounds_2BS=context.bounds_2BS,
            mask=context.mask,
            dropout=self.dropout if self.training else 0.0,
            dropout_key=self.dropout_seed,
            samples_B=context.samples_B,
            first_head=self.first_head,
            backend=self.choice.attention,
        )
        return self.output(out.permute(2, 0, 1, 3).flatten(2))

    def _queries_keys_values(self, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The heads, with QK-norm and rotary positions where the model has them."""
        backend = self.choice.kernels
        cos, sin = context.cos, context.sin
        if self.q_norm is None and cos is not None and sin is not None:
            return kernels.rope_qkv_(qkv, self.heads, self.kv_heads, cos, sin, backend=backend)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        if cos is None or sin is None:
            q = kernels.rms_norm(q, self.q_norm, self.norm_epsilon, backend=backend)
            return q, kernels.rms_norm(k, self.k_norm, self.norm_epsilon, backend=backend), v
        norms = self.q_norm, self.k_norm
        return *kernels.norm_rope(q, k, *norms, cos, sin, self.norm_epsilon, backend=backend), v


class RotaryTable:
    """cos and sin of position x frequency, kept on the device for all microbatches.

    A forward pass only takes rows of it. To compute frequencies on the host in each would be a copy
    to the device for which the host waits, so that it could never run ahead of the GPU.
    """

    def __init__(self, model: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        frequencies = kernels.rope_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
        self._frequencies = frequencies.to(device)
        self._dtype = dtype
        self._cos, self._sin = self._compute(0)

    def rows(self, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Those of positions `first` and later, [length, D / 2] each.

        The first call sets the table's length; one that needs more at least doubles it.
        """
        end = first + length
        if end > len(self._cos):
            self._cos, self._sin = self._compute(max(end, 2 * len(self._cos)))
        return self._cos[first:end], self._sin[first:end]

    def _compute(self, length: int) -> tuple[Tensor, Tensor]:
        """Angles are float64, so that position 100,000 keeps its low bits."""
        positions = torch.arange(length, dtype=torch.float64, device=self._frequencies.device)
        angles = positions[:, None] * self._frequencies
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)
