"""Every key of a config as help text: what it takes, what it means, what it is by default."""

import shutil
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megapipe.config import Config, Families, ModelConfig, section_types
from megapipe.config.model import DEFAULT_FAMILY
from megapipe.config.problems import show

_WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false"}


def field_help(families: Families) -> str:
    """All sections, one entry a key, in the width of the terminal: [model] of the default family,
    then the keys that others have besides or in another way."""
    width = min(shutil.get_terminal_size().columns, 120)
    model = families[DEFAULT_FAMILY].config
    sections = section_types(model)
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        lines += ["", f"[{name}]  {field.description}"]
        lines += _section(name, sections[name], width)
        if name == "model":
            lines += _other_families(families, width)
    return "\n".join(lines).strip("\n")


def _other_families(families: Families, width: int) -> Iterator[str]:
    for name, family in families.items():
        if name != DEFAULT_FAMILY:
            yield from (
                "",
                f'[model] with family = "{name}" has besides the common keys:',
            )
            yield from _section("model", family.config, width, without=ModelConfig)


def _section(
    prefix: str, model: type[BaseModel], width: int, without: type[BaseModel] = BaseModel
) -> Iterator[str]:
    for key, field in model.model_fields.items():
        if key in without.model_fields:
            continue
        name = f"{prefix}.{key}"
        table = table_of(field.annotation)
        words = value_words(field.annotation)
        if any(isinstance(entry, BeforeValidator) for entry in field.metadata):
            words += "|none"
        yield f"  --{name} {words}"
        about = f"{field.description} {_default(field)}".strip()
        yield from textwrap.wrap(about, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        if table is not None:
            many = get_origin(_bare(field.annotation)) is tuple
            yield from _section(f"{name}.0" if many else name, table, width)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return ""  # the description says what it follows from
    if field.default is PydanticUndefined:
        return "(required)"
    if field.default is None or field.default == ():
        return "" if "Default:" in (field.description or "") else "[none]"
    return f"[{show(field.default)}]"


def _bare(kind: Any) -> Any:
    """The type without Annotated and without `| None`."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return _bare(inner[0]) if len(inner) == 1 else kind
    return kind


def table_of(kind: Any) -> type[BaseModel] | None:
    """The model of a table, or of the entries of a list of tables."""
    kind = _bare(kind)
    if get_origin(kind) is tuple:
        return table_of(get_args(kind)[0])
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def value_words(kind: Any) -> str:
    """What to type for a value: `INTEGER`, `gpipe|1f1b`, `[INTEGER, ...]`, `{NAME = NUMBER}`."""
    kind = _bare(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(value_words(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        inner = [value_words(part) if part is not ... else "..." for part in get_args(kind)]
        return f"[{', '.join(inner)}]"
    if get_origin(kind) is dict:
        return f"{{NAME = {value_words(get_args(kind)[1])}, ...}}"
    return "TABLE" if table_of(kind) is not None else _WORDS[kind]
