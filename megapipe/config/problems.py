"""Sentences for what pydantic finds in a section: key, value, what is allowed, what was meant."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from megapipe.config.source import ConfigSource, KeyPath, dotted
from megapipe.files import shown

_EXPECTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, as in [1, 2]",
    "model_type": "must be a table of keys",
    "model_attributes_type": "must be a table of keys",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be of letters, digits, dots, dashes and underscores, and "
    "begin with a letter or a digit",
}


def show(value: Any) -> str:
    """A value as TOML writes it, on one line, shortened when long."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "none"
    elif isinstance(value, str):
        text = f'"{shown(value)}"'
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(entry) for entry in value) + "]"
    elif isinstance(value, dict):
        text = (
            "{" + ", ".join(f"{shown(key)} = {show(entry)}" for key, entry in value.items()) + "}"
        )
    elif isinstance(value, BaseModel):
        text = show({key: entry for key, entry in value if entry is not None})
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_of(values: Sequence[Any]) -> str:
    """`"a", "b" or "c"`."""
    words = [show(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant, whatever the case of its letters."""
    cases = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), cases, n=1, cutoff=0.6)
    return cases[close[0]] if close else None


def section_problem(
    error: ErrorDetails,
    path: KeyPath,
    source: ConfigSource,
    sections: dict[str, type[BaseModel]],
    owners: Mapping[str, str],
) -> str | None:
    """One sentence for one finding at `path`; None for one that only follows from another.

    `owners` has the name of a model family for each key of [model], whatever its family.
    """
    kind, value = error["type"], error["input"]
    key = dotted(path)
    if kind == "default_factory_not_called":
        return None
    if kind == "extra_forbidden" and path[:-1] == ("model",) and path[-1] in owners:
        owner = owners[str(path[-1])]
        text = f'{key} belongs to model.family = "{owner}"; remove it, or set that'
    elif kind == "extra_forbidden":
        text = f"{key} is not a key that exists; {_meant(path, sections)}"
    elif kind == "missing" and isinstance(path[-1], int):
        text = f"{dotted(path[:-1])} = {show(value)} has too few entries"
    elif kind == "missing":
        text = f"{key} is missing; {_describe(path, sections)}"
    else:
        text = f"{key} = {show(value)} {_wrong_value(error, key)}"
    return sentence(source.where(path), text)


def sentence(where: str, text: str) -> str:
    """`where: text.`"""
    return f"{where}: {text}" + ("" if text.endswith("?") else ".")


def _wrong_value(error: ErrorDetails, key: str) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "literal_error":
        # The names are in the message only: 'a', 'b' or 'c'.
        allowed = list(context["expected"].split("'")[1::2])
        close = nearest(value, allowed) if isinstance(value, str) else None
        return f"must be {one_of(allowed)}" + (f'; did you mean "{close}"?' if close else "")
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return f"{_EXPECTED[kind]}, without quotes"
    if kind == "string_type":
        return f'{_EXPECTED[kind]}, in quotes: "{value}"'
    if kind == "tuple_type" and isinstance(value, dict):
        return f"must be a list of tables: write [[{key}]] above each"
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "path":
        return str(error["msg"])
    bounds = {
        "greater_than": ("gt", "must be more than {}"),
        "greater_than_equal": ("ge", "must be {} or more"),
        "less_than": ("lt", "must be less than {}"),
        "less_than_equal": ("le", "must be {} or less"),
    }
    if kind in bounds:
        name, bound = bounds[kind]
        return bound.format(show(context[name]))
    if kind == "too_short":
        return f"must have at least {context['min_length']}, and has {context['actual_length']}"
    if kind == "too_long":
        return f"must have at most {context['max_length']}, and has {context['actual_length']}"
    return f"can't be used: {error['msg']}"


def _keys_at(path: KeyPath, sections: dict[str, type[BaseModel]]) -> type[BaseModel] | None:
    """The model whose keys `path` leads into."""
    model: type[BaseModel] | None = sections.get(str(path[0])) if path else None
    for part in path[1:]:
        if isinstance(part, int) or model is None:
            continue
        model = _inner_model(model, part)
    return model


def _inner_model(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    pending: list[Any] = [field.annotation] if field else []
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        pending += list(getattr(kind, "__args__", ()))
    return None


def _meant(path: KeyPath, sections: dict[str, type[BaseModel]]) -> str:
    name = str(path[-1])
    model = _keys_at(path[:-1], sections)
    names = list(model.model_fields) if model else []
    elsewhere = [
        f"{section}.{name}" for section, kind in sections.items() if name in kind.model_fields
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    close = nearest(name, names)
    if close:
        return f"did you mean {dotted((*path[:-1], close))}?"
    return f"the keys of {dotted(path[:-1])} are {', '.join(names)}"


def _describe(path: KeyPath, sections: dict[str, type[BaseModel]]) -> str:
    model = _keys_at(path[:-1], sections)
    field = model.model_fields.get(str(path[-1])) if model else None
    about = (field.description if field else None) or "it has no default"
    return f"it has no default ({about.rstrip('.')})"
