"""Errors for test_planted_errors.py: in the kernels that work on rows and elements."""

import torch

from tests.kernels.planted import OwnTest, Planted

ROWS_OF_33 = {"rows": 6, "hidden": 33, "dtype": torch.float32}

RMS_NORM = OwnTest("test_rms_norm", "test_as_accurate_as_torch", ROWS_OF_33)
RMS_NORM_PROGRAMS = OwnTest("test_rms_norm", "test_more_rows_than_programs_and_any_order")
RMS_NORM_PARTS = OwnTest("test_rms_norm", "test_a_row_shared_by_four_programs")
LAYER_NORM = OwnTest("test_layer_norm", "test_as_accurate_as_torch", ROWS_OF_33)
LAYER_NORM_PROGRAMS = OwnTest("test_layer_norm", "test_more_rows_than_programs_and_any_order")
LAYER_NORM_FAR = OwnTest("test_layer_norm", "test_rows_far_from_zero")
ROW_SUMS = OwnTest("test_row_sums", "test_as_accurate_as_torch", {"rows": 40, "columns": 70})

NORMS = [
    Planted(
        "wrong sign in the backward pass",
        "rms_norm",
        {"(wide - normed * mean[:, None])": "(wide + normed * mean[:, None])"},
        RMS_NORM,
    ),
    Planted(
        "no mask where the weight is loaded",
        "rms_norm",
        {
            "w = tl.load(weight + column, column < hidden, other=0).to(tl.float32)\n"
            "    tl.store(": "w = tl.load(weight + column).to(tl.float32)\n    tl.store("
        },
        RMS_NORM,
    ),
    Planted("epsilon dropped", "rms_norm", {"/ hidden + epsilon)": "/ hidden)"}, RMS_NORM),
    Planted(
        "the gradient that flows back into the residual dropped",
        "rms_norm",
        {"grad += tl.load(grad_total + places, inside, other=0).to(tl.float32)": "pass"},
        RMS_NORM,
    ),
    Planted(
        "the mean over a row that programs share is that of one's part",
        "rms_norm",
        {"range(1, PARTS)": "range(1, 1)"},
        RMS_NORM_PARTS,
    ),
    Planted(
        "race: programs add to one sum of the weight's gradient",
        "rms_norm",
        {
            "s.new_empty((grid[1], hidden)": "s.new_zeros((1, hidden)",
            "start = partial + group.to(tl.int64) * hidden": "start = partial",
            "tl.store(start + column, tl": "tl.atomic_add(start + column, tl",
        },
        RMS_NORM_PROGRAMS,
    ),
    Planted(
        "the residual is not added",
        "row_tiles",
        {"s += tl.load(residual + places, inside, other=0).to(tl.float32)": "pass"},
        RMS_NORM,
    ),
    Planted(
        "columns beyond the edge count in the variance",
        "layer_norm",
        {"s = tl.where(inside, s - mean[:, None], 0)": "s = s - mean[:, None]"},
        LAYER_NORM,
    ),
    Planted(
        "variance as a difference that cancels",
        "layer_norm",
        {
            "s = tl.where(inside": "square = tl.sum(s * s, 1)\n    s = tl.where(inside",
            "tl.rsqrt(tl.sum(s * s, 1) / hidden": "tl.rsqrt(square / hidden - mean * mean",
        },
        LAYER_NORM_FAR,
    ),
    Planted(
        "wrong sign in the backward pass",
        "layer_norm",
        {"- normed * (dot * share)": "+ normed * (dot * share)"},
        LAYER_NORM,
    ),
    Planted(
        "a mean dropped in the backward pass",
        "layer_norm",
        {"wide - (total * share)[:, None] -": "wide -"},
        LAYER_NORM,
    ),
    Planted(
        "the gradient that flows back into the residual dropped",
        "layer_norm",
        {"grad += tl.load(grad_total + places, inside, other=0).to(tl.float32)": "pass"},
        LAYER_NORM,
    ),
    Planted(
        "race: programs add to one sum of the bias' gradient",
        "layer_norm",
        {
            "s.new_empty((2, grid[1], hidden)": "s.new_zeros((2, grid[1], hidden)",
            "tl.store(partial_b + start, tl": "tl.atomic_add(partial_b + column, tl",
        },
        LAYER_NORM_PROGRAMS,
    ),
    Planted(
        "rows beyond the first block left out",
        "row_sums",
        {"range(0, rows, BLOCK_ROWS)": "range(0, BLOCK_ROWS, BLOCK_ROWS)"},
        ROW_SUMS,
    ),
    Planted(
        "no mask at the last row",
        "row_sums",
        {"(row < rows)[:, None] & inside[None, :]": "inside[None, :]"},
        ROW_SUMS,
    ),
    Planted(
        "no mask where the sums are stored",
        "row_sums",
        {"tl.sum(total, 0), inside)": "tl.sum(total, 0))"},
        ROW_SUMS,
    ),
]

SWIGLU = OwnTest(
    "test_swiglu", "test_as_accurate_as_torch", {"rows": 5, "width": 33, "dtype": torch.float32}
)
GELU = {"rows": 5, "columns": 33, "dtype": torch.float32}
GELU_TANH = OwnTest("test_gelu", "test_as_accurate_as_torch", GELU | {"approximate": True})
GELU_EXACT = OwnTest("test_gelu", "test_as_accurate_as_torch", GELU | {"approximate": False})
DROPOUT = OwnTest("test_dropout", "test_as_accurate_as_torch", {"dtype": torch.float32})
TILE_INSIDE = "(row < rows)[:, None] & (column < columns)[None, :]"
FLAT_INSIDE = "row[:, None] * columns + column[None, :] < rows * columns"

ELEMENTWISE = [
    Planted(
        "wrong sign in the backward pass",
        "swiglu",
        {"(1 + gate * (1 - sigmoid))": "(1 - gate * (1 - sigmoid))"},
        SWIGLU,
    ),
    Planted(
        "the second half begins after the block rather than the width",
        "swiglu",
        {"tl.load(gates + width, inside": "tl.load(gates + BLOCK, inside"},
        SWIGLU,
    ),
    Planted(
        "no mask where the gradient is loaded",
        "swiglu",
        {"grad_y + start + column[None, :], inside, other=0)": "grad_y + start + column[None, :])"},
        SWIGLU,
    ),
    Planted(
        "the gate's gradient is stored in both halves' place",
        "swiglu",
        {"tl.store(grad_x + places + width, grad_up": "tl.store(grad_x + places, grad_up"},
        SWIGLU,
    ),
    Planted(
        "race: tiles end where the matrix does, not where the row does",
        "row_tiles",
        {TILE_INSIDE: FLAT_INSIDE},
        OwnTest("test_dropout", "test_rows_of_several_blocks_in_any_order"),
    ),
    Planted(
        "wrong sign in the exact form's slope",
        "gelu",
        {"slope = h * 0.3989422804014327": "slope = -h * 0.3989422804014327"},
        GELU_EXACT,
    ),
    Planted(
        "factor 3 of the cube's derivative dropped",
        "gelu",
        {"(1 + 3 * 0.044715 * square)": "(1 + 0.044715 * square)"},
        GELU_TANH,
    ),
    Planted(
        "the smaller probability as a difference, which cancels",
        "gelu",
        {
            "p = tl.where(twice_t < 0, small, 1 - small)": "p = 1 - tl.where(twice_t < 0, "
            "1 - small, small)"
        },
        OwnTest("test_gelu", "test_tail_keeps_its_digits"),
    ),
    Planted(
        "no bias in the backward pass",
        "gelu",
        {
            "h += tl.load(bias + column, column < columns, other=0).to(tl.float32)[None, :]\n"
            "        p, slope": "h += 0\n        p, slope"
        },
        GELU_TANH,
    ),
    Planted(
        "no mask where the bias is loaded",
        "gelu",
        {
            "bias + column, column < columns, other=0).to(tl.float32)[None, :]\n"
            "    p, _": "bias + column).to(tl.float32)[None, :]\n    p, _"
        },
        GELU_TANH,
    ),
    Planted(
        "race: programs add to one sum of the bias' gradient",
        "gelu",
        {
            "x.new_empty((grid[0], columns) if biased": "x.new_zeros((grid[0], columns) if biased",
            "start = partial + group.to(tl.int64) * columns": "start = partial",
            "tl.store(start + column, tl": "tl.atomic_add(start + column, tl",
        },
        OwnTest("test_gelu", "test_more_rows_than_groups_and_any_order"),
    ),
    Planted(
        "1 / (1 - p) dropped", "dropout", {".to(tl.float32) * scale": ".to(tl.float32)"}, DROPOUT
    ),
    Planted(
        "off by one in what is kept",
        "dropout",
        {"column[None, :]) <= last_kept": "column[None, :]) < last_kept"},
        OwnTest("test_dropout", "test_the_last_element_kept"),
    ),
    Planted(
        "the residual is not added",
        "dropout",
        {"out += tl.load(residual + places, inside, other=0).to(tl.float32)": "pass"},
        DROPOUT,
    ),
    Planted(
        "no mask where the residual is loaded",
        "dropout",
        {"tl.load(residual + places, inside, other=0)": "tl.load(residual + places)"},
        DROPOUT,
    ),
    Planted(
        "the residual's gradient dropped",
        "dropout",
        {"grad_SBH if ctx.added else None": "torch.zeros_like(grad_SBH) if ctx.added else None"},
        DROPOUT,
    ),
    Planted(
        "the backward pass drops as if at the first position",
        "dropout",
        {"ctx.key, samples_B, ctx.first_position)\n": "ctx.key, samples_B, 0)\n"},
        DROPOUT,
    ),
    Planted(
        "a rank's first position ignored",
        "dropout",
        {"tl.cast(first_position, tl.uint64) + (row": "(row"},
        OwnTest("test_dropout", "test_a_part_has_its_part_of_the_mask"),
    ),
]
