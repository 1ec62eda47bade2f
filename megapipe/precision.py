"""What `train.precision` means in dtypes."""

import torch

MODEL_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Weights and activations."""

MAIN_DTYPE = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Gradients, master weights and moments."""


def keep_sums_wide() -> None:
    """Have matrix products on a GPU add up in float32 throughout. At the start of each process: it
    is a setting of torch's, which by default lets cuBLAS add partial sums of bfloat16."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
