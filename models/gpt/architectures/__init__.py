"""What other stacks call models of the GPT family, and how they store them: a file for each kind.

Of several that can hold a model, the first is the one that it is exported as.
"""

from collections.abc import Sequence

from megapipe.layout.architecture import Architecture
from megapipe.models.gpt.architectures.gpt2 import GPT2
from megapipe.models.gpt.architectures.llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from megapipe.models.gpt.architectures.megatron import MEGATRON
from megapipe.models.gpt.architectures.starcoder2 import STARCODER2

ARCHITECTURES: Sequence[Architecture] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GPT2,
    STARCODER2,
    PHI3,
    MEGATRON,
)
