"""[train]: how long, how much at a time, in which arithmetic."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megapipe.config.paths import PathText
from megapipe.section import Section, or_none_word


class TrainConfig(Section):
    """The training run."""

    run_dir: PathText = Field(
        min_length=1,
        description="Where config, metrics and checkpoints of the run are written; made if it "
        "does not exist. A relative path starts at the current directory.",
    )
    steps: PositiveInt = Field(description="Optimizer steps in the whole run, restarts included.")
    seed: NonNegativeInt = Field(
        default=1234,
        lt=2**63,
        description="Fixes initial weights, data order and dropout, in every layout alike.",
    )
    global_batch_size: PositiveInt = Field(description="Sequences in one optimizer step.")
    micro_batch_size: PositiveInt = Field(
        default=1, description="Sequences that go through the model at once on one replica."
    )
    sequence_length: PositiveInt = Field(description="Tokens in a sequence.")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        default="bf16",
        description="Arithmetic of the model. bf16 keeps float32 master weights and gradients; "
        "fp64 is for equivalence checks; on a CPU use fp32 (bf16 is slow there).",
    )
    recompute: Literal["none", "full"] = Field(
        default="none",
        description="full: keep only each layer's input and compute the rest again in the "
        "backward pass (less memory, about a third more arithmetic).",
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="What computes norms, activations, rotary positions, dropout, the loss and the "
        "optimizer: fused Triton kernels, or torch operations. auto takes triton "
        "on a GPU and torch on a CPU or for fp64.",
    )
    weight_gradients: Literal["auto", "matmul", "triton"] = Field(
        default="auto",
        description="What computes the weight gradients of linear layers and adds them to the "
        "float32 main gradients: torch.addmm with out_dtype (cuBLAS), or a Triton kernel. auto "
        "takes matmul on a GPU where a test at the start finds that it adds without rounding, else "
        "what train.kernels says.",
    )
    attention: Literal["auto", "sdpa", "triton"] = Field(
        default="auto",
        description="sdpa is torch's scaled_dot_product_attention. auto takes it for plain causal "
        "attention, and what train.kernels says where there are separate documents, a sliding "
        "window or attention dropout.",
    )
    linear_cross_entropy: bool = Field(
        default=False,
        description="Compute output projection and loss together, a part of the tokens at a time: "
        "no tensor of tokens x vocabulary is ever there. The head's gradients are then computed in "
        "the forward pass.",
    )
    z_loss: NonNegativeFloat = Field(
        default=0.0,
        description="Adds this times log(sum of exponentials)^2 to each token's loss (PaLM: 1e-4), "
        "which keeps logits from drifting; 0 for none.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto takes a GPU where there is one. cuda also means AMD's ROCm.",
    )
    stop_timeout_seconds: Annotated[PositiveFloat | None, or_none_word(float)] = Field(
        default=None,
        description="Seconds that a rank waits for a step to end after a signal that asks to stop; "
        "then it leaves without saving (another rank may be gone). Saves are never cut short. "
        "Default: ten times the last step, at least 60.",
    )
    collective_timeout_seconds: float = Field(
        default=600.0,
        ge=1.0,
        le=1e7,
        description="How long ranks wait for one of them in a step, for example for its text, "
        "before the run fails; the first step and saves have at least 30 minutes.",
    )
    validation_every: NonNegativeInt = Field(
        default=0, description="Steps between validation losses; 0 for never."
    )
    validation_batches: PositiveInt = Field(
        default=8, description="Global batches averaged into one validation loss."
    )
