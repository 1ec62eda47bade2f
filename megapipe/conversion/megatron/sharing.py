"""How tensor-parallel ranks share the tensors of Megatron's models, by their names."""

import re

from megapipe.errors import CheckpointError

BY_ROWS = re.compile(r"(.*\.)?(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)")
BY_COLUMNS = re.compile(r"(.*\.)?(linear_proj|linear_fc2)\.weight")
ON_ALL = re.compile(
    r".*norm[._](weight|bias)|(.*\.)?position_embeddings\.weight|(.*\.)?(linear_proj|linear_fc2)\.bias"
)
FIRST = re.compile(r"(.*\.)?linear_fc1\.(weight|bias)")
SECOND = "linear_fc2.weight"
LAYER = re.compile(r"(.*\blayers\.)(\d{1,6})(\..+)")
"""What comes before the number of a layer, the number, and the rest."""
OWN_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
"""Part of the name of a norm in megatron-core's own layers, and in Transformer Engine's."""
TIED_OUTPUT = "output_layer.weight"
"""Where the last stage keeps its copy of the embedding, if the output has no weights of its own."""


def shared_dim(name: str) -> int | None:
    """The dimension that ranks share: 0 or 1, or None where each holds the whole tensor.

    Raises CheckpointError for a tensor that is none of a GPT or Llama model.
    """
    if BY_ROWS.fullmatch(name):
        return 0
    if BY_COLUMNS.fullmatch(name):
        return 1
    if ON_ALL.fullmatch(name):
        return None
    raise CheckpointError("it isn't known how tensor-parallel ranks share it")


def second_of_mlp(name: str) -> str | None:
    """The weight of an MLP's second linear layer, where `name` is of the first."""
    match = FIRST.fullmatch(name)
    return None if match is None else f"{match[1] or ''}{SECOND}"


def is_gated(first_rows: int, second_columns: int) -> bool:
    """Whether an MLP has a gate: its first layer then has two rows for each column of the second,
    and each rank holds [its rows of the gate; its rows of the other half]."""
    if first_rows == second_columns:
        return False
    if first_rows == 2 * second_columns:
        return True
    raise CheckpointError(f"{first_rows} rows don't fit {second_columns} columns of {SECOND}")
