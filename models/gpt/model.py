"""The GPT family: one decoder-only transformer whose settings give GPT-2/3, Llama, Mistral, Qwen.

    tokens -> embedding (+ learned positions) -> num_layers blocks -> norm -> output -> loss

A pipeline stage is a run of blocks; the first stage adds the embedding in front, the last the norm,
output and loss behind. Notable: query, key and value are one matmul, gate and up another; rotary
positions; grouped-query attention; every layer names its collectives (megapipe/tensor_parallel);
dropout draws from (seed, sample, position, feature), so it is the same in every layout.

Shapes: S sequence, B sequences in a microbatch, H hidden, N query heads and K key/value heads on
this tensor rank, D head dim, V vocabulary rows on this rank. S_local is S, or S / tensor ranks
under sequence parallelism. Activations between layers are [S_local, B, H].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapipe import kernels
from megapipe.microbatch import MicroBatch
from megapipe.models.gpt.attention import Attention, KeyValueCache, RotaryTable
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.context import Context
from megapipe.stage import StageBuild
from megapipe.tensor_parallel.collectives import own_sequence_slice


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32 inside."""

    def __init__(self, name: str, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.weight = build.parameters.get(f"{name}.weight")
        self.bias = build.parameters.optional(f"{name}.bias")
        self.epsilon = model.norm_epsilon
        self.backend = build.kernels.kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.epsilon, backend=self.backend)
        return kernels.layer_norm(x, self.weight, self.bias, self.epsilon, backend=self.backend)

    def after_add(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + branch, residual + branch)."""
        if self.bias is None:
            return kernels.add_rms_norm(
                branch, residual, self.weight, self.epsilon, backend=self.backend
            )
        return kernels.add_layer_norm(
            branch, residual, self.weight, self.bias, self.epsilon, backend=self.backend
        )


class FeedForward(nn.Module):
    """down(act(up(x))), or down(silu(gate(x)) * up(x)) with SwiGLU; cut along its inner width."""

    def __init__(self, name: str, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        matrices = ("gate", "up") if model.activation == "swiglu" else ("up",)
        self.up = build.column_linear(*(f"{name}.{which}" for which in matrices))
        self.down = build.row_linear(f"{name}.down")
        self.activation = model.activation
        self.backend = build.kernels.kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down(kernels.swiglu(self.up(x), backend=self.backend))
        gelu: dict[str, Any] = {
            "approximate": self.activation == "gelu_tanh",
            "backend": self.backend,
        }
        if self.up.bias is None or self.backend == "torch":
            return self.down(kernels.gelu(self.up(x), **gelu))
        # The kernel also sums the bias's gradient, for which the product's would be read again.
        return self.down(kernels.bias_gelu(self.up(x, add_bias=False), self.up.bias, **gelu))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), each branch with dropout."""

    def __init__(self, layer: int, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        name = f"layers.{layer}"
        self.attention_norm = Norm(f"{name}.attention_norm", model, build)
        self.attention = Attention(f"{name}.attention", model, build)
        self.mlp_norm = Norm(f"{name}.mlp_norm", model, build)
        self.mlp = FeedForward(f"{name}.mlp", model, build)
        self.attention_residual = Dropout(f"{name}.attention_dropout", model, build)
        self.mlp_residual = Dropout(f"{name}.mlp_dropout", model, build)

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        branch = self.attention(self.attention_norm(x), context, cache)
        if self.attention_residual.active:
            x = self.attention_residual(branch, x, context.samples_B)
            normed = self.mlp_norm(x)
        else:  # the sum and its norm are one kernel
            normed, x = self.mlp_norm.after_add(branch, x)
        return self.mlp_residual(self.mlp(normed), x, context.samples_B)


class Dropout(nn.Module):
    """branch -> residual + dropout(branch), with bits drawn from global indices."""

    def __init__(self, name: str, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.probability = model.dropout
        self.seed = kernels.fold(build.seed, name)
        self.backend = build.kernels.kernels
        self.rank = build.tensor.rank if build.sequence_parallel else 0

    @property
    def active(self) -> bool:
        return self.probability > 0 and self.training

    def forward(self, branch: Tensor, residual: Tensor | None, samples_B: Tensor) -> Tensor:
        if not self.active:
            return branch if residual is None else residual + branch
        first = self.rank * branch.shape[0]  # global position of the local part's first row
        if residual is None:
            return kernels.dropout(
                branch, self.probability, self.seed, samples_B, first, backend=self.backend
            )
        return kernels.dropout_add(
            branch, residual, self.probability, self.seed, samples_B, first, backend=self.backend
        )


class Embedding(nn.Module):
    """tokens [B, S] -> [S_local, B, H]: token rows, learned positions if any, dropout."""

    def __init__(self, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.tokens = build.embedding("embedding")
        self.positions = build.parameters.optional("position_embedding.weight")
        self.dropout = Dropout("embedding.dropout", model, build)
        self.build = build

    def forward(self, batch: MicroBatch, offset: int = 0) -> Tensor:
        assert batch.tokens_BS is not None
        x = self.tokens(batch.tokens_BS)
        if self.positions is not None:
            positions_SB = _positions(batch.tokens_BS, batch.documents_BS).t() + offset
            if self.build.sequence_parallel:
                positions_SB = own_sequence_slice(positions_SB, self.build.tensor)
            x = x + F.embedding(positions_SB, self.positions)
        return self.dropout(x, None, batch.samples_B)


class Head(nn.Module):
    """The last norm, the output projection and the loss.

    The projection is the embedding's weight where they are tied.
    """

    def __init__(self, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.norm = Norm("final_norm", model, build)
        self.output = build.output("embedding" if model.tie_embeddings else "output")

    def logits(self, x: Tensor) -> Tensor:
        """[S_local, B, H] -> [S, B, V]: this rank's columns, padding included."""
        return self.output.logits(self.norm(x))

    def forward(self, x: Tensor, batch: MicroBatch) -> Tensor:
        """The sum of the losses of all targets that are not ignored."""
        loss: Tensor = self.output(self.norm(x), batch)
        return loss


class GPTStage(nn.Module):
    """A run of blocks, with the embedding in front on the first stage and the head on the last.

    `stage(inputs, batch)`: inputs are [S_local, B, H] from the stage before (None on the first);
    returns the same shape, or on the last stage the sum of the microbatch's token losses.
    """

    def __init__(self, model: GPTConfig, build: StageBuild) -> None:
        super().__init__()
        self.embedding = Embedding(model, build) if build.first else None
        self.layers = nn.ModuleList(TransformerBlock(layer, model, build) for layer in build.layers)
        self.head = Head(model, build) if build.last else None
        self.weight_grads = build.store
        self.rotary = None
        if model.position == "rope":
            fused = build.kernels.kernels == "triton"  # which widens what it loads anyway
            dtype = torch.float32 if fused else build.dtype
            self.rotary = RotaryTable(model, dtype, build.device)
        self.model = model
        self.build = build

    def forward(self, inputs: Tensor | None, batch: MicroBatch) -> Tensor:
        x = self.hidden(inputs, batch)
        return x if self.head is None else self.head(x, batch)

    def hidden(
        self,
        inputs: Tensor | None,
        batch: MicroBatch,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """The residual stream after this stage's blocks: [S_local, B, H]."""
        offset = caches[0].length if caches else 0
        x = inputs
        if self.embedding is not None:
            x = self.embedding(batch, offset)
        assert x is not None
        length = x.shape[0] * (self.build.tensor.size if self.build.sequence_parallel else 1)
        context = self._context(batch, offset, length)
        for index, block in enumerate(self.layers):
            if self.build.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context, caches[index] if caches else None)
        assert x is not None
        return x

    def logits(self, tokens_BS: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Next-token logits [S, B, vocab_size] of a model that is one stage on one rank."""
        assert self.head is not None
        assert self.build.tensor.size == 1
        samples = torch.zeros(tokens_BS.shape[0], dtype=torch.long, device=tokens_BS.device)
        batch = MicroBatch(tokens_BS, None, None, samples)
        return self.head.logits(self.hidden(None, batch, caches))[..., : self.model.vocab_size]

    def _context(self, batch: MicroBatch, offset: int, length: int) -> Context:
        cos = sin = None
        if self.rotary is not None:
            cos, sin = self.rotary.rows(offset, length)
        bounds = mask = None
        if batch.documents_BS is not None:
            bounds = kernels.document_bounds(batch.documents_BS)
        if self.build.kernels.attention == "torch":
            window, device = self.model.sliding_window, self.build.device
            mask = kernels.attention_mask(length, offset + length, window, bounds, device)
        return Context(batch.samples_B, bounds, mask, cos, sin)


def _positions(tokens_BS: Tensor, documents_BS: Tensor | None) -> Tensor:
    """[B, S]: positions count from each document's first token where documents are kept apart."""
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    if documents_BS is None:
        return positions
    begins = F.pad(documents_BS[:, 1:] != documents_BS[:, :-1], (1, 0), value=True)
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values
