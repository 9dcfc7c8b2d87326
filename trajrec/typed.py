"""JSON from a file as the values that a dataclass declares: every field has its type, or it is said which has not.

JSON has no tuples, so lists become tuples where a tuple is declared. What is declared as Any is taken as it is. Nothing
is converted beyond that: a number in quotes is a text, and a truth is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
_LARGEST = 2**63  # of a whole number in a file
_WORDS = {int: "a whole number of 64 bits", float: "a number", str: "a text", bool: "true or false"}


def typed(kind: type[_T], values: Any, where: str = "") -> _T:
    """The dataclass of these values; those that it does not know (of a newer version) are ignored.

    Raises:
        ValueError: a field is missing, or of another type.
    """
    if not isinstance(values, Mapping):
        raise _wrong(where or kind.__name__, "an object", values)
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = f"{where}.{field.name}" if where else field.name
        if field.name in values:
            found[field.name] = _of(hints[field.name], values[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    return kind(**found)


def _of(kind: Any, value: Any, where: str) -> Any:
    inner = get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _of(inner[0], value, where)
    if get_origin(kind) is tuple:
        return _tuple(inner, value, where)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _of(inner[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if is_dataclass(kind):
        return value if isinstance(value, kind) else typed(kind, value, where)  # type: ignore[arg-type]
    if kind is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    if type(value) is not kind or (kind is int and not -_LARGEST <= value < _LARGEST):
        raise _wrong(where, _WORDS[kind], value)
    return value


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise _wrong(where, f"a list of {len(kinds)}", value)
    return tuple([_of(kind, item, f"{where}[{k}]") for k, (kind, item) in enumerate(zip(kinds, value, strict=True))])


@lru_cache(16)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _wrong(where: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"{where} should be {expected}, found {found!a:.60}")
