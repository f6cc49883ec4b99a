"""Plain values from a YAML or JSON file, read into frozen dataclasses; every mistake is named by its dotted key."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from fae_torchrec.core.errors import ConfigError

_T = TypeVar("_T")
_SAID: dict[Any, str] = {Any: "a value", bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A dataclass field whose number (or each of a list or mapping) must be at least (`above`: more than) `low` and at most `high`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file if its name ends in .json.

    Raises:
        ConfigError: no such file, not readable, not a mapping, or a key given twice.
    """
    if not path.is_file():
        raise ConfigError("no such file; give the path of a YAML or JSON file")
    kind, parse = ("JSON", _parse_json) if path.suffix == ".json" else ("YAML", _parse_yaml)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not readable as {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"received {type(values).__name__}; the file must hold a mapping of keys to values")
    return values


def read_override(text: str) -> dict[str, Any]:
    """One "dotted.key=value" (a YAML value) as a nested mapping.

    Raises:
        ConfigError: no key, no equals sign, or not a YAML value.
    """
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {text!r}: give it as dotted.key=value, such as train.epochs=2")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: {value!r} is not a YAML value; quote it") from None
    for name in reversed(names):
        nested = {name: nested}
    return cast(dict[str, Any], nested)


def merge(values: dict[str, Any], overrides: dict[str, Any], key: str = "") -> dict[str, Any]:
    """The values with the overrides in their places.

    Args:
        values: a nested mapping; not changed.
        overrides: a nested mapping; a missing or null section is created.
        key: the dotted key of `values`, with its final dot; for messages.

    Raises:
        ConfigError: an override goes below a value that has no keys.
    """
    merged = dict(values)
    for name, value in overrides.items():
        dotted, old = f"{key}{name}", merged.get(name)
        if isinstance(value, dict) and old is not None:
            if not isinstance(old, dict):
                raise ConfigError(f"override of {dotted}: it holds {old!r}, which has no keys below it")
            merged[name] = merge(old, value, f"{dotted}.")
        else:
            merged[name] = value
    return merged


def read_section(section: type[_T], values: Any, key: str = "") -> _T:
    """Reads one mapping into its dataclass.

    Args:
        section: a dataclass whose fields are int, float, str, bool, Literal, Enum, a dataclass, `tuple[x, ...]`, `Mapping[str, x]` (with
            Any: what the file has), `x | Mapping[str, x]` or any of these `| None`. A field's metadata may hold a range (`within`) or
            `read`, which turns the given value into plain values.
        values: the mapping.
        key: its dotted key, for messages.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value outside its range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key or 'the run'}: received {values!r}; give a mapping with the keys {_names(section)}")
    for name in values:
        if name not in _names(section):
            near = difflib.get_close_matches(str(name), _names(section), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown key {_join(key, name)!r}; {hint}Allowed {f'in {key!r}' if key else 'here'}: {_names(section)}")
    hints, arguments = get_type_hints(section), {}
    for item in fields(cast(Any, section)):
        if item.name in values:
            dotted = _join(key, item.name)
            value = item.metadata.get("read", _unchanged)(values[item.name])
            arguments[item.name] = _value(hints[item.name], value, dotted)
            _check_range(arguments[item.name], item.metadata, dotted)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"missing key {_join(key, item.name)!r}; it has no default")
    return section(**arguments)


def _unchanged(value: Any) -> Any:
    return value


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_UniqueKeyLoader)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, for which a repeated key is a mistake instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value if key.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int")])
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"the keys {repeated} are given more than once in one mapping; keep one of each")
    return dict(pairs)


def _names(section: type) -> list[str]:
    return [f.name for f in fields(section)]


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _value(hint: Any, value: Any, key: str) -> Any:
    """Reads one value as the type that the dataclass declares."""
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [option for option in args if option is not type(None)]
        if len(options) > 1 and any(map(_is_mapping, options)):  # one value for all, or one each by name
            return _value(next(option for option in options if _is_mapping(option) is isinstance(value, Mapping)), value, key)
        if len(options) > 1:  # int | str, the one true union: parsed by its own section
            if isinstance(value, bool) or not isinstance(value, tuple(options)):
                raise _wrong(key, value, " or ".join(option.__name__ for option in options))
            return value
        return _value(options[0], value, key)
    if is_dataclass(hint):
        return read_section(cast(type, hint), value, key)
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        allowed = list(args) if origin is Literal else [member.value for member in hint]
        if isinstance(value, bool) or value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            raise ConfigError(f"{key}: received {value!r}; allowed: {allowed}{f'; did you mean {near[0]!r}?' if near else ''}")
        return value if origin is Literal else hint(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(key, value, f"a list, such as [{value}]")
        return tuple(_value(args[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if _is_mapping(hint):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, f"a mapping of names, each to {_SAID.get(args[1], 'a mapping')}")
        return {str(name): _value(args[1], item, _join(key, name)) for name, item in value.items()}
    if hint is float and not isinstance(value, bool):
        number = _number(value)
        if number is None:
            raise _wrong(key, value, _SAID[float])
        return number
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise _wrong(key, value, _SAID[hint])
    return value


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _number(value: Any) -> float | None:
    """The finite number in a value; YAML 1.1 reads 1e-3 (without a dot) as text, so text counts."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{key}: received {value!r} ({type(value).__name__}); give {expected}")


def _check_range(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    if isinstance(value, Mapping) and "low" in metadata:
        for name, item in value.items():
            _check_range(item, metadata, _join(key, name))
        return
    for number in value if isinstance(value, tuple) else (value,):
        if number is None or "low" not in metadata:
            continue
        low, high, above = metadata["low"], metadata["high"], metadata["above"]
        if number < low or number > high or (above and number == low):
            least = f"{'more than' if above else 'at least'} {low}"
            raise ConfigError(f"{key}: received {number}; it must be {least}{f' and at most {high}' if high < math.inf else ''}")
