"""The GPT family: model, presets, parameter table and FLOPs.

`load_pretrained` comes with torch, so it is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapipe.models.gpt.pretrained import load_pretrained

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "load_pretrained":
        from megapipe.models.gpt.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
