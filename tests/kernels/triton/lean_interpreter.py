"""Triton's interpreter (3.6) without what costs more than half of its time and changes nothing of what it computes."""

from __future__ import annotations

import dataclasses
from types import FunctionType

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_numpy_dtype = interpreter._get_np_dtype
_dtypes: dict[str, np.dtype] = {}


class _Unchanged:
    def restore(self) -> None:
        pass


def _patch_language_once(fn: FunctionType):
    """Each call of a device function replaces all builtins of the language, though that of its kernel has done so."""
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    replaced = languages and not any(tl.core.is_builtin(language.load) for language in languages)
    return _Unchanged() if replaced else _patch_language(fn)


def _remembered_numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """A table of all types is made for each look into it; blocks are stored as their elements are."""
    name = dtype.scalar.name
    if name not in _dtypes:
        _dtypes[name] = _numpy_dtype(dtype)
    return _dtypes[name]


def install() -> None:
    interpreter._patch_lang = _patch_language_once
    interpreter._get_np_dtype = _remembered_numpy_dtype
    # Integers are computed a second time in 64 bits for an assertion that is dropped: it needs the option `debug`.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
