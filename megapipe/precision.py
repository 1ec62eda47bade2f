"""What `train.precision` means: the dtypes of a run, and their bytes.

Plans need no torch, which comes in where one of its dtypes is asked for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Of one element, by the names of torch's dtypes."""


@dataclass(frozen=True)
class Precision:
    """Dtypes by torch's names: `model` of weights and activations, `main` of gradients, master
    weights and moments."""

    model: str
    main: str

    @property
    def model_dtype(self) -> "torch.dtype":
        return torch_dtype(self.model)

    @property
    def main_dtype(self) -> "torch.dtype":
        return torch_dtype(self.main)

    @property
    def model_bytes(self) -> int:
        """Of one element."""
        return BYTES[self.model]

    @property
    def main_bytes(self) -> int:
        """Of one element."""
        return BYTES[self.main]

    @property
    def has_master(self) -> bool:
        """Master weights lie beside the model's, which are rounded from them."""
        return self.model != self.main


PRECISIONS = {
    "fp32": Precision(model="float32", main="float32"),
    "bf16": Precision(model="bfloat16", main="float32"),
    "fp64": Precision(model="float64", main="float64"),
}
"""By the values of train.precision."""


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of one of the names in `BYTES`."""
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[name]


def keep_sums_wide() -> None:
    """Have matrix products on a GPU add up in float32 throughout. At the start of each process: it
    is a setting of torch's, which by default lets cuBLAS add partial sums of bfloat16."""
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
