"""The GPT family: decoder-only transformers (GPT-2 and 3, Llama, Mistral, Qwen)."""

from megapipe.models.gpt.family import FAMILY

__all__ = ["FAMILY"]
