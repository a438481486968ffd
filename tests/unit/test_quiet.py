from __future__ import annotations

import gc
import logging
import warnings
from contextlib import nullcontext

import pytest
import torch

from moba_train.quiet import ignore_known_advice, quiet_imports

TOOLKIT = "torch.utils.cpp_extension"
MODEL = "megatron.core.models.gpt.gpt_model"


def test_an_import_is_quiet_but_for_errors_and_only_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("megatron.core.some.module", TOOLKIT):
        logger = logging.getLogger(name)
        with quiet_imports():
            logger.warning("advice")
            logger.error("error")
        logger.warning("after")
    assert caplog.messages == ["error", "after"] * 2


def test_a_logger_has_its_level_back_when_an_import_fails() -> None:
    level = logging.getLogger(TOOLKIT).level
    with pytest.raises(ImportError), quiet_imports():
        raise ImportError
    assert logging.getLogger(TOOLKIT).level == level


def test_while_megatron_is_imported_nothing_is_compiled_or_collected_and_then_all_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function() -> None: ...

    compile_function = torch.compile
    for fails in (False, True):
        with pytest.raises(ImportError) if fails else nullcontext(), quiet_imports():
            assert torch.compile(function) is function
            assert torch.compile(dynamic=True)(function) is function
            assert not gc.isenabled()
            if fails:
                raise ImportError
        assert torch.compile is compile_function and gc.isenabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with quiet_imports():
        assert torch.compile is compile_function


def test_collection_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with quiet_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_of_a_logger_that_gives_known_advice_only_the_advice_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    ignore_known_advice()
    ignore_known_advice()
    logger = logging.getLogger(MODEL)
    assert len(logger.filters) == 1
    logger.warning("GPTModel IS DEPRECATED. Please read the guide")
    logger.warning("the embedding is %s", "odd")
    assert caplog.messages == ["the embedding is odd"]


def test_known_warnings_are_dropped_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        ignore_known_advice()
        warnings.warn("MimoModelConfig is experimental and still under active development", stacklevel=1)
        warnings.warn("news", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["news"]
