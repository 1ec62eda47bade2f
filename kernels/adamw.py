"""AdamW (Loshchilov & Hutter 2019) on a flat shard: everything that a step does to it, in one pass.

    g = scale * gradient                        the mean over tokens, clipped
    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    w = (1 - lr * decay) w - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + epsilon)

and the model's weights are w rounded to their dtype. An element costs 28 bytes of traffic with a
bf16 copy of 2 more: master weight, both moments read and written, gradient read.

A launch rounds its scalars to float32. So differences from 1 are taken before, in float64:
1 - float32(0.999) is off by 1e-5 of itself, and float32(1 - lr * decay) of lr * decay by as much as
3e-8 / (lr * decay).
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megapipe.kernels.backend import FP_FUSION, Backend, UnsupportedError, choose
from megapipe.kernels.compilation import Variant

BLOCK, WARPS = 1024, 4


def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_scale: float = 1.0,
    weights: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Update `master`, both moments and `weights` (if given), [N] each, in place.

    `step` counts updates from 1, this one included. torch leaves `gradient` scaled, Triton as it
    was. Zeros with zero gradients stay zeros. Raises UnsupportedError for master
    weights that are not float32 in Triton.
    """
    if choose(backend, master) == "torch":
        _reference(
            master,
            gradient if gradient_scale == 1 else gradient.mul_(gradient_scale),
            exp_avg,
            exp_avg_sq,
            step=step,
            learning_rate=learning_rate,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
        )
        if weights is not None:
            weights.copy_(master)
        return
    torch.ops.megapipe.adamw_(
        master,
        gradient,
        exp_avg,
        exp_avg_sq,
        weights,
        gradient_scale,
        learning_rate * weight_decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        epsilon,
        learning_rate / (1 - betas[0] ** step),
        1 / math.sqrt(1 - betas[1] ** step),
    )


def _reference(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> None:
    """torch's own, fused. As a function: the class torch.optim.AdamW imports torch's compiler in
    its first step, which costs each rank 2 s and 100 MB."""
    # Filled on the device: a copy of a host's number would wait for all that the device has to do.
    steps = torch.full((), float(step - 1), dtype=torch.float32, device=master.device)
    torch_adamw(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        max_exp_avg_sqs=[],
        state_steps=[steps],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=epsilon,
        maximize=False,
    )


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    master,
    gradient,
    exp_avg,
    exp_avg_sq,
    weights,
    length,
    scale,
    decay,
    new1,
    beta2,
    new2,
    epsilon,
    rate,
    root,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`decay` is lr * decay above, `new1` 1 - b1, `new2` 1 - b2, `rate` lr / (1 - b1^t),
    `root` (1 - b2^t)^(-1/2)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    g = tl.load(gradient + places, inside, other=0) * scale
    m = tl.load(exp_avg + places, inside, other=0)
    v = tl.load(exp_avg_sq + places, inside, other=0)
    w = tl.load(master + places, inside, other=0)
    w -= w * decay
    m += (g - m) * new1
    v = v * beta2 + g * g * new2
    w -= rate * (m / (tl.sqrt_rn(v) * root + epsilon))
    tl.store(exp_avg + places, m, inside)
    tl.store(exp_avg_sq + places, v, inside)
    tl.store(master + places, w, inside)
    if COPY:
        tl.store(weights + places, w.to(weights.dtype.element_ty), inside)


@torch.library.custom_op(
    "megapipe::adamw_", mutates_args=("master", "exp_avg", "exp_avg_sq", "weights")
)
def _launch(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    scale: float,
    decay: float,
    new1: float,
    beta2: float,
    new2: float,
    epsilon: float,
    rate: float,
    root: float,
) -> None:
    flat = (master, gradient, exp_avg, exp_avg_sq)
    for x in flat:
        if x.dtype != torch.float32:
            name = str(x.dtype).removeprefix("torch.")
            raise UnsupportedError("adamw_", f"{name} master weights, gradients or moments")
    for x in (*flat, *(() if weights is None else (weights,))):
        assert x.shape == master.shape
        assert x.is_contiguous()
    if master.numel():
        _adamw[(triton.cdiv(master.numel(), BLOCK),)](
            *flat,
            weights,
            master.numel(),
            scale,
            decay,
            new1,
            beta2,
            new2,
            epsilon,
            rate,
            root,
            COPY=weights is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )


@_launch.register_fake
def _(*args: object) -> None:
    return None


def variants() -> Iterator[Variant]:
    """With and without narrower weights, for shards of up to and above 2^31 elements."""
    scalars = ("scale", "decay", "new1", "beta2", "new2", "epsilon", "rate", "root")
    flat = dict.fromkeys(("master", "gradient", "exp_avg", "exp_avg_sq"), "*fp32")
    for copy in ("*bf16", None):
        for length in ("i32", "i64"):
            yield Variant(
                _adamw,
                f"{'bf16' if copy else 'no'} copy, length {length}",
                signature=flat
                | dict.fromkeys(scalars, "fp32")
                | {"length": length}
                | ({"weights": copy} if copy else {}),
                constants={"COPY": copy is not None, "BLOCK": BLOCK}
                | ({} if copy else {"weights": None}),
                num_warps=WARPS,
                divisible=("length",),
            )
