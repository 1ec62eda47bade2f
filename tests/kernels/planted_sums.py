"""Errors for test_planted_errors.py: in losses, the optimizer and the sums of gradients."""

import torch

from tests.kernels.planted import OwnTest, Planted

LOSS = OwnTest(
    "test_cross_entropy",
    "test_as_accurate_as_torch",
    {"rows": 5, "columns": 70, "dtype": torch.float32, "z": 1e-2},
)
LOSS_BLOCKS = OwnTest("test_cross_entropy", "test_many_blocks_in_any_order")
PART = OwnTest("test_cross_entropy", "test_a_part_of_the_vocabulary", {"backend": "triton"})
PARTS_GRADIENT = OwnTest(
    "test_cross_entropy", "test_gradient_of_parts_with_padding", {"backend": "triton", "block": 8}
)
PROJECTION = OwnTest(
    "test_cross_entropy",
    "test_with_the_projection",
    {"rows": 12, "columns": 40, "dtype": torch.float32, "z": 1e-2},
)

LOSSES = [
    Planted(
        "classes beyond the edge count in the sum",
        "cross_entropy",
        {
            'columns < valid, other=-float("inf")).to(tl.float32)\n'
            "        larger": "columns < valid, other=0).to(tl.float32)\n        larger"
        },
        LOSS,
    ),
    Planted(
        "no mask at the last class",
        "cross_entropy",
        {
            'columns, columns < valid, other=-float("inf")).to(tl.float32)\n'
            "        larger": "columns).to(tl.float32)\n        larger"
        },
        LOSS,
    ),
    Planted(
        "the sum so far is not rescaled when the maximum grows",
        "cross_entropy",
        {"total = total * tl.exp(largest - shift) +": "total = total +"},
        LOSS_BLOCKS,
    ),
    Planted(
        "a NaN passed over as if minus infinity",
        "cross_entropy",
        {
            "larger = tl.maximum(largest": 'x = tl.where(x == x, x, -float("inf"))\n'
            "        larger = tl.maximum(largest"
        },
        OwnTest("test_cross_entropy", "test_not_finite_as_torch", {"value": torch.nan}),
    ),
    Planted(
        "a rank's vocabulary offset ignored where the target's logit is read",
        "cross_entropy",
        {"column = tl.load(targets + row) - first": "column = tl.load(targets + row)"},
        PART,
    ),
    Planted(
        "a rank's vocabulary offset ignored in the gradient",
        "cross_entropy",
        {"columns == target - first": "columns == target"},
        PARTS_GRADIENT,
    ),
    Planted(
        "wrong sign at the target",
        "cross_entropy",
        {"dx -= tl.where(columns": "dx += tl.where(columns"},
        LOSS,
    ),
    Planted(
        "the z-loss' term dropped in the gradient",
        "cross_entropy",
        {" * (1 + 2 * z_loss * tl.load(lse + row))": ""},
        LOSS,
    ),
    Planted(
        "padding keeps its logits",
        "cross_entropy",
        {"element_ty), columns < width)": "element_ty), columns < valid)"},
        PARTS_GRADIENT,
    ),
    Planted(
        "off by one where the gradient is stored",
        "cross_entropy",
        {"element_ty), columns < width)": "element_ty), columns <= width)"},
        LOSS,
    ),
    Planted(
        "ignored targets have a gradient",
        "cross_entropy",
        {
            "tl.where(target < 0, 0.0, tl.load(grad).to(tl.float32))": "tl.load(grad)",
            "(target >= 0) & (columns < valid)": "columns < valid",
        },
        LOSS,
    ),
    Planted(
        "targets of the first rows for all parts",
        "linear_cross_entropy",
        {"targets = targets_N[rows]": "targets = targets_N[: rows.stop - rows.start]"},
        PROJECTION,
    ),
    Planted(
        "the loss of the last rows alone",
        "linear_cross_entropy",
        {"loss += each": "loss = each"},
        PROJECTION,
    ),
    Planted(
        "losses of all parts in the place of the first rows",
        "linear_cross_entropy",
        {"losses_N[rows] = each": "losses_N[: rows.stop - rows.start] = each"},
        OwnTest(
            "test_cross_entropy",
            "test_the_loss_of_each_target",
            {"backend": "triton", "fused": True},
        ),
    ),
    Planted(
        "the gradient of the loss dropped in that of the weight",
        "linear_cross_entropy",
        {"(ctx.weight_grad * grad)": "ctx.weight_grad"},
        PROJECTION,
    ),
    Planted(
        "the weight's gradient in the weight's narrow dtype",
        "linear_cross_entropy",
        {
            "add_weight_grad(weight_grad, logits_grad, hidden, backend=backend)": (
                "weight_grad.copy_((weight_grad + logits_grad.t() @ hidden).to(hidden.dtype))"
            )
        },
        OwnTest("test_cross_entropy", "test_weight_gradient_is_a_wide_sum", {"backend": "triton"}),
    ),
]

ADAMW = OwnTest(
    "test_adamw",
    "test_as_accurate_as_torch",
    {"length": 1500, "step": 3, "scale": 0.3, "decay": 0.1},
)
ADAMW_DIGITS = OwnTest("test_adamw", "test_differences_from_1_keep_their_digits")
ADAMW_FINITE = OwnTest("test_adamw", "test_any_order_padding_and_what_is_not_finite")
NORM = OwnTest("test_grad_norm", "test_norm", {"length": 9000, "scale": 1.0})
NORM_FINITE = OwnTest("test_grad_norm", "test_not_finite", {"backend": "triton"})
WEIGHT = {"tokens": 40, "shape": (40, 70)}
WEIGHT_GRAD = OwnTest(
    "test_weight_grad", "test_as_accurate_as_torch", WEIGHT | {"dtype": torch.float32}
)
WEIGHT_GRAD_NARROW = OwnTest(
    "test_weight_grad", "test_as_accurate_as_torch", WEIGHT | {"dtype": torch.float16}
)

SUMS = [
    Planted(
        "wrong sign of the step",
        "adamw",
        {"w -= rate * (m / ": "w += rate * (m / "},
        ADAMW,
    ),
    Planted("the gradient is not scaled", "adamw", {"other=0) * scale": "other=0)"}, ADAMW),
    Planted(
        "no correction of the second moment",
        "adamw",
        {"tl.sqrt_rn(v) * root + epsilon": "tl.sqrt_rn(v) + epsilon"},
        ADAMW,
    ),
    Planted(
        "epsilon within the root",
        "adamw",
        {"tl.sqrt_rn(v) * root + epsilon": "tl.sqrt_rn(v + epsilon) * root"},
        ADAMW,
    ),
    Planted(
        "weight decay goes through the moments",
        "adamw",
        {"w -= w * decay": "g += w * decay"},
        ADAMW,
    ),
    Planted(
        "1 - b2 from float32's b2",
        "adamw",
        {"g * g * new2": "g * g * (1 - beta2)"},
        ADAMW_DIGITS,
    ),
    Planted(
        "no mask at the end of the shard",
        "adamw",
        {"inside = places < length": "inside = places >= 0"},
        ADAMW,
    ),
    Planted(
        "infinite gradients swallowed",
        "adamw",
        {"m += (g - m) * new1": ("g = tl.where(tl.abs(g) < 1e38, g, 0)\n    m += (g - m) * new1")},
        ADAMW_FINITE,
    ),
    Planted(
        "the model's weights are those before the step",
        "adamw",
        {
            "w -= w * decay": "old = w\n    w -= w * decay",
            "weights + places, w.to": "weights + places, old.to",
        },
        OwnTest("test_adamw", "test_narrow_weights_are_the_masters", {"backend": "triton"}),
    ),
    Planted(
        "NaN does not count as not finite",
        "grad_norm",
        {"finite = tl.abs(values) <= LARGEST": "finite = (tl.abs(values) > LARGEST) == 0"},
        NORM_FINITE,
    ),
    Planted(
        "what is not finite does not count in the norm",
        "grad_norm",
        {
            "total += values * values": (
                "total += tl.where(tl.abs(values) <= LARGEST, values * values, 0)"
            )
        },
        NORM_FINITE,
    ),
    Planted(
        "the last block left out",
        "grad_norm",
        {"range(program, tl.cdiv(length, BLOCK)": "range(program, length // BLOCK"},
        NORM,
    ),
    Planted(
        "no mask at the end of the buffer",
        "grad_norm",
        {"tl.load(x + places, places < length, other=0)": "tl.load(x + places)"},
        NORM,
    ),
    Planted(
        "race: programs add to one sum",
        "grad_norm",
        {
            "squares = torch.empty(programs": "squares = torch.zeros(programs",
            "tl.store(squares + program, tl.sum": "tl.atomic_add(squares, tl.sum",
        },
        OwnTest("test_grad_norm", "test_more_blocks_than_programs_in_any_order"),
    ),
    Planted(
        "the main gradient is overwritten",
        "weight_grad",
        {"tl.load(places, inside, other=0) + total": "total"},
        WEIGHT_GRAD,
    ),
    Planted(
        "sums in the factors' narrow dtype",
        "weight_grad",
        {
            "total = tl.dot(g, x, total, input_precision=PRECISION)": (
                "total = (total + tl.dot(g, x)).to(g.dtype).to(tl.float32)"
            )
        },
        WEIGHT_GRAD_NARROW,
    ),
    Planted(
        "no mask at the last token",
        "weight_grad",
        {
            "there = first + token < tokens": "there = first + token >= 0",
        },
        WEIGHT_GRAD,
    ),
    Planted(
        "the last band of tiles as high as the others",
        "weight_grad",
        {"height = min(down - band * GROUP, GROUP)": "height = GROUP"},
        WEIGHT_GRAD,
    ),
    Planted(
        "two programs add to the tiles of one row, none to those of another",
        "weight_grad",
        {"row = (band * GROUP + within % height)": "row = (band * GROUP + within % height // 2)"},
        WEIGHT_GRAD,
    ),
    Planted(
        "no mask where the sum is stored",
        "weight_grad",
        {"other=0) + total, inside)": "other=0) + total, (row < rows)[:, None])"},
        OwnTest("test_weight_grad", "test_nothing_is_written_beyond_the_main_gradient"),
    ),
]
