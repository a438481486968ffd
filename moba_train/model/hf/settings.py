"""Taking a config.json apart without guessing: every setting is read by name and type, and none may be left over."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moba_train.errors import CheckpointError

MISSING = object()
_LARGEST = 1 << 40
_MOST_BYTES = 1 << 24


class Settings:
    """Settings of one JSON object, taken out one after another; mistakes are collected.

    Args:
        tree: the decoded object.
        prefix: goes in front of names in messages ("rope_scaling.").
        refused: the list that mistakes go to, as (what stands there, what is allowed).
    """

    def __init__(self, tree: Mapping[str, Any], prefix: str = "", refused: list[tuple[str, str]] | None = None) -> None:
        self._left = dict(tree)
        self._prefix = prefix
        self.refused: list[tuple[str, str]] = [] if refused is None else refused

    def holds(self, name: str) -> bool:
        """Is the setting given, if only as null, and not taken yet?"""
        return name in self._left

    def take(self, name: str, default: object = None) -> Any:
        """A setting as it stands; `default` for one that is missing or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def whole(self, name: str, default: object = MISSING) -> int:
        """A whole number >= 1."""
        value = self.take(name, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            self.refuse(name, value, "a whole number >= 1")
            return 1
        return value

    def number(self, name: str, default: object = MISSING, *, above: int = 0) -> float:
        """A finite number > `above`."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not above < value <= sys.float_info.max:
            self.refuse(name, value, f"a number > {above}")
            return above + 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default)
        if type(value) is not bool:
            self.refuse(name, value, "true or false")
            return default
        return value

    def demand(self, name: str, *allowed: object) -> None:
        """A setting that must have one of these values, if it is given at all."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(choice) and value == choice for choice in allowed):
            self.refuse(name, value, " or ".join(json.dumps(choice) for choice in allowed) or "null")

    def refuse(self, name: str, value: object, allowed: str) -> None:
        """Note a setting that cannot be represented."""
        shown = "missing" if value is MISSING else _short(json.dumps(value, default=str))
        self.refused.append((f"{self._prefix}{name} = {shown}", f"{self._prefix}{name}: {allowed}"))

    def refuse_rest(self, without_effect: frozenset[str] = frozenset()) -> None:
        """Refuse every setting that nobody took; null and `without_effect` say nothing about the function."""
        for name, value in self._left.items():
            if value is not None and name not in without_effect:
                self.refuse(name, value, "not known here, so not there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is no such file, it is larger than 16 MiB, or it holds no JSON object.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"a JSON {type(tree).__name__}")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the folder has no {path.name}",
            where=str(path.parent),
            allowed="a folder with config.json and *.safetensors files",
            fix="Give the folder of a Hugging Face checkpoint.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            allowed="a JSON object of at most 16 MiB",
        ) from error
    return tree


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
