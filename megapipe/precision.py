"""What `train.precision` means in dtypes."""

import torch

MODEL_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Weights and activations."""

MAIN_DTYPE = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Gradients, master weights and moments."""
