"""Strict decoding of plain TOML values into the frozen dataclasses, by their type hints.

Every mistake is collected with its dotted path ("stages.0.topk"), so that one run shows all of them. No value is
converted, with one exception that loses nothing: a whole number where a float is wanted.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moba_train.config.presets import preset_model, preset_names
from moba_train.config.schema import ModelConfig, RunConfig
from moba_train.errors import ConfigError

_NAMES: types.MappingProxyType[type, str] = types.MappingProxyType(
    {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a table", list: "an array"}
)


def decode_run(tree: Mapping[str, Any]) -> tuple[RunConfig | None, list[ConfigError]]:
    """Decode the tree of a TOML file.

    Returns:
        The configuration and no errors, or None and every error found.
    """
    errors: list[ConfigError] = []
    config = _dataclass(tree, RunConfig, "", errors)
    return (None, errors) if errors else (config, [])


def closest(word: str, candidates: Sequence[str]) -> str:
    """The candidate that `word` was probably meant to be, or ""; of equally close ones the one with the same start."""

    def likeness(candidate: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(None, candidate, word).ratio()
        return ratio, next((i for i, (a, b) in enumerate(zip(candidate, word, strict=False)) if a != b), len(word))

    found = difflib.get_close_matches(word, list(candidates), n=5, cutoff=0.6)
    return max(found, key=likeness, default="")


def join(path: str, key: str | int) -> str:
    """Dotted path of `key` under `path`."""
    return f"{path}.{key}" if path else str(key)


def allowed_at(config: RunConfig, path: str) -> str:
    """What may stand at a dotted path ("an integer"), "" for a path that does not lead to a value."""
    hint: Any = RunConfig
    for key in path.split("."):
        if is_dataclass(hint) and isinstance(hint, type):
            hint = get_type_hints(hint).get(key)
        elif get_origin(hint) in (dict, tuple):
            hint = get_args(hint)[1 if get_origin(hint) is dict else 0]
        else:
            return ""
    if get_origin(hint) is tuple and get_args(hint)[0] in _NAMES:
        return f"{_NAMES[get_args(hint)[0]]}, once or several times"
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(get_origin(option) is not Literal and option not in _NAMES for option in options):
        return ""
    return " or ".join(_allowed(option) for option in options)


def _dataclass(value: object, kind: type, path: str, errors: list[ConfigError]) -> Any:
    if not isinstance(value, Mapping):
        errors.append(_wrong_type(path, value, "a table"))
        return None
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    for key in value:
        if key not in names:
            errors.append(_unknown_key(path, key, names))
    start = _preset(value, path, errors) if kind is ModelConfig else {}
    given = {name: _value(value[name], hints[name], join(path, name), errors) for name in names if name in value}
    return None if errors else kind(**{**start, **given})


def _preset(value: Mapping[str, Any], path: str, errors: list[ConfigError]) -> dict[str, Any]:
    """Fields that the preset fills in; the file's own fields come on top."""
    name = value.get("preset", ModelConfig().preset)
    if not isinstance(name, str):
        return {}  # reported as a wrong type by the caller
    if name not in preset_names():
        meant = closest(name.lower(), preset_names())
        errors.append(
            ConfigError(
                "unknown model preset",
                where=join(path, "preset"),
                got=f'"{name}"',
                allowed=", ".join(preset_names()),
                fix=f'did you mean "{meant}"?' if meant else "name one of the presets, or leave the key out",
            )
        )
        return {}
    model = preset_model(name)
    return {field.name: getattr(model, field.name) for field in fields(model)}


def _value(value: object, hint: Any, path: str, errors: list[ConfigError]) -> Any:
    """`value` as `hint` wants it; on a mistake an error is appended and the result is not used."""
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(value, hint, path, errors)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict:
        if isinstance(value, Mapping):
            return {key: _value(item, arguments[1], join(path, key), errors) for key, item in value.items()}
        errors.append(_wrong_type(path, value, "a table"))
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_value(item, arguments[0], join(path, i), errors) for i, item in enumerate(value))
        errors.append(_wrong_type(path, value, "an array"))
    else:
        return _scalar(value, hint, path, errors)
    return None


def _scalar(value: object, hint: Any, path: str, errors: list[ConfigError]) -> Any:
    """A number, string, boolean, literal, or a union of those."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            # 0 == False in Python, so the type has to agree as well.
            if any(type(value) is type(choice) and value == choice for choice in get_args(option)):
                return value
        elif option is float and type(value) in (int, float):
            return float(value)  # type: ignore[arg-type]
        elif type(value) is option:
            return value
    errors.append(_wrong_type(path, value, " or ".join(_allowed(option) for option in options)))
    return None


def _allowed(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(_show(choice) for choice in get_args(option))
    return _NAMES[option]


def _show(value: object) -> str:
    """As TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _wrong_type(path: str, value: object, allowed: str) -> ConfigError:
    kind = _NAMES.get(type(value), type(value).__name__)
    if isinstance(value, str) and '"' in allowed:
        choices = [choice.strip('"') for choice in allowed.split(", ")]
        meant = closest(value.lower(), choices)
        fix = f'did you mean "{meant}"?' if meant else "choose one of the allowed values"
        return ConfigError("this value is not allowed", where=path, got=_show(value), allowed=allowed, fix=fix)
    if type(value) is float and value.is_integer() and allowed.startswith("an integer"):
        fix = f"write {int(value)}"
    else:
        fix = f"write one of {allowed}" if ", " in allowed else f"write {allowed}"
    return ConfigError("wrong type", where=path, got=f"{_show(value)} ({kind})", allowed=allowed, fix=fix)


def _unknown_key(path: str, key: str, names: Sequence[str]) -> ConfigError:
    meant = closest(key, names)
    return ConfigError(
        "unknown key",
        where=join(path, key),
        got=key,
        allowed=", ".join(names),
        fix=f"did you mean {join(path, meant)}?" if meant else "remove the key",
    )
