"""TOML file -> command-line overrides -> validation -> frozen `RunConfig`, and back to TOML.

    config = load_config(Path("configs/smoke.toml"), ["--parallel.cp", "2", "--stages.0.tokens", "4096"])
    to_toml(config)     # every value resolved; decode_toml(to_toml(config)) == config

Precedence: command line > file > preset > defaults of the schema.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from moba_train.config.decode import allowed_at, closest, decode_run, join
from moba_train.config.schema import RunConfig
from moba_train.config.validate import find_errors, raise_all, validate
from moba_train.errors import ConfigError

_ALIASES = (("--run-dir", "--run.dir"), ("--stop-after", "--run.stop-after"))
_PRESET_FLAG = "--model.preset"
_BOX = "│╭╮╰╯─┌┐└┘"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a configuration file.

    Args:
        path: TOML file.
        overrides: command-line words such as `["--parallel.cp", "2", "--run-dir", "runs/a"]`.

    Raises:
        ConfigError: the file cannot be read, or (all of them at once, as ConfigErrors) keys, types, or rules are wrong.
    """
    words = _expand_aliases(overrides)
    preset, words = _take_preset(words)
    config = decode_toml(read_text(path), source=str(path), preset=preset)
    config = apply_overrides(config, words)
    validate(config)
    return config


def read_text(path: Path) -> str:
    """Text of a configuration file; ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = "give the path of a TOML file first, then options and overrides"
        raise ConfigError("the configuration file does not exist", where=str(path), fix=fix) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        fix = "give a readable UTF-8 TOML file"
        raise ConfigError("the configuration file cannot be read", where=repr(str(path)), got=error, fix=fix) from error


def decode_toml(text: str, *, source: str = "", preset: str = "") -> RunConfig:
    """Decode TOML text without validating it across fields.

    Args:
        text: the TOML document.
        source: file name, for messages.
        preset: takes the place of `model.preset` (the command line's choice); "" = as the text says.

    Raises:
        ConfigError: not TOML, unknown keys, wrong types: all of them at once.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        fix = "mend the line named above; strings need quotes, tables are written [section]"
        raise ConfigError("the file is not valid TOML", where=source, got=error, fix=fix) from error
    if preset and isinstance(tree.get("model", {}), dict):
        tree["model"] = {**tree.get("model", {}), "preset": preset}
    config, errors = decode_run(tree)
    if errors:
        errors += _values_out_of_range(tree, errors)
    raise_all(errors, source=source)
    assert config is not None
    return config


def _values_out_of_range(tree: dict[str, Any], errors: Sequence[ConfigError]) -> list[ConfigError]:
    """Rules that the sound part of a file breaks: those about one value that the file itself gives.

    Other rules wait until the file decodes: beside a key that is misspelt they would blame the default in its place.
    """
    sound = copy.deepcopy(tree)
    for error in errors:
        parent, key = _lookup(sound, error.where)
        if isinstance(parent, dict):
            parent.pop(key, None)
    config, left = decode_run(sound)
    if config is None or left:
        return []
    broken = [error for error in find_errors(config) if error.allowed.startswith(">")]
    return [error for error in broken if _is_given(_lookup(sound, error.where))]


def _is_given(place: tuple[Any, str]) -> bool:
    """Does the key of `_lookup` stand in its table or array?"""
    parent, key = place
    return key in parent if isinstance(parent, dict) else isinstance(parent, list) and key.isdecimal()


def _lookup(tree: Any, path: str) -> tuple[Any, str]:
    """The table or array that holds the last key of a dotted path, and that key; (None, key) where there is none."""
    *parents, key = path.split(".")
    for name in parents:
        if isinstance(tree, dict):
            tree = tree.get(name)
        elif isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None, key
    return tree, key


def apply_overrides(config: RunConfig, words: Sequence[str], *, prog: str = "moba-train") -> RunConfig:
    """Replace values by command-line words (`--stages.0.tokens 4096`); `--help` prints every key and exits.

    Raises:
        ConfigError: an unknown key (with the one that was probably meant) or a value that does not fit.
    """
    words = _expand_aliases(words)
    if not words:
        return config
    result, errors = _override(config, words, prog)
    if errors:  # the parser stops at the first mistake: look at every option by itself
        errors = [error for option in _options(words) for error in _override(config, option, prog)[1]] or errors
    raise_all(errors)
    return result


def _override(config: RunConfig, words: Sequence[str], prog: str) -> tuple[RunConfig, list[ConfigError]]:
    """The configuration with `words` applied, and what is wrong with them; SystemExit(0) for --help."""
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            result, unknown = tyro.cli(RunConfig, args=words, default=config, prog=prog, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        return config, [_bad_override(words, captured.getvalue(), config)]
    return result, [_unknown_override(word, config) for word in _unknown_options(unknown)]


def _options(words: Sequence[str]) -> list[list[str]]:
    """Command-line words, each option with the values that follow it."""
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not options:
            options.append([])
        options[-1].append(word)
    return options


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML, every field written out; decoding it gives `config` again."""
    return tomli_w.dumps(plain(config))


def plain(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain TOML values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def keys(config: RunConfig) -> tuple[str, ...]:
    """Dotted paths of every value that an override can name."""

    def walk(tree: Any, path: str) -> Iterator[str]:
        if isinstance(tree, dict):
            for key, item in tree.items():
                yield from walk(item, join(path, key))
        elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
            for i, item in enumerate(tree):
                yield from walk(item, join(path, i))
        else:
            yield path

    return tuple(walk(plain(config), ""))


def _expand_aliases(words: Sequence[str]) -> list[str]:
    expanded = list(words)
    for i, word in enumerate(expanded):
        for alias, flag in _ALIASES:
            if word == alias or word.startswith(alias + "="):
                expanded[i] = flag + word[len(alias) :]
    return expanded


def _take_preset(words: Sequence[str]) -> tuple[str, list[str]]:
    """The preset that the command line names, and the other words: it has to be known before the file is decoded."""
    rest: list[str] = []
    preset = ""
    waiting = False
    for word in words:
        if waiting:
            preset, waiting = word, False
        elif word == _PRESET_FLAG:
            waiting = True
        elif word.startswith(_PRESET_FLAG + "="):
            preset = word.split("=", 1)[1]
        else:
            rest.append(word)
    if waiting:
        raise ConfigError("the option needs a value", where="command line", got=_PRESET_FLAG, fix="name a preset")
    return preset, rest


def _unknown_options(unknown: Sequence[str]) -> list[str]:
    """Options that no key answers to; without any, the stray words themselves."""
    return [word for word in unknown if word.startswith("-")] or list(unknown)


def _unknown_override(word: str, config: RunConfig) -> ConfigError:
    if not word.startswith("-"):
        fix = "write overrides as --section.key VALUE"
        return ConfigError("unexpected word", where="command line", got=word, fix=fix)
    name = word.split("=", 1)[0].lstrip("-").replace("-", "_")
    meant = closest(name, keys(config))
    fix = f"did you mean --{meant.replace('_', '-')}?" if meant else "`moba-train train --help-config` lists every key"
    return ConfigError("unknown option", where="command line", got=word, fix=fix)


def _bad_override(words: Sequence[str], said: str, config: RunConfig) -> ConfigError:
    """tyro's framed complaint about one option as an error of ours, in the words of the schema."""
    option, _, value = words[0].partition("=")
    values = ([value] if value else []) + list(words[1:])
    allowed = allowed_at(config, option.lstrip("-").replace("-", "_"))
    if not allowed:
        lines = [line.strip(_BOX + " ") for line in said.splitlines()]
        fix = "`moba-train train --help-config` lists every key with its type"
        got = " ".join(line for line in lines if line)
        return ConfigError("a command-line override does not fit", where="command line", got=got, fix=fix)
    meant = closest(values[0], re.findall(r'"(.*?)"', allowed)) if values else ""
    return ConfigError(
        "the option's value does not fit" if values else "the option needs a value",
        where=f"command line: {option}",
        got=" ".join(values) or "no value",
        allowed=allowed,
        fix=f"did you mean {meant}?" if meant else f"write {option} and then {allowed.split(', ')[0]}",
    )
