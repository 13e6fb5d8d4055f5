"""A program's log has the kind and the place of what others say of the data that they were given, and none of it."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

import pydicom
import pytest
from pydicom.valuerep import validate_value

from consilium_shared.process import logs

NAME = "MEIER^JOHN"


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((warnings, "showwarning"), (sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(logs, "_SAID", set())
    logs.configure()


def test_a_warning_that_quotes_a_tag_is_logged_once_by_its_place(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        for number in range(3):  # each with a text of its own
            validate_value("UI", f"{NAME}{number}", pydicom.config.WARN)
    said = [record.getMessage() for record in caplog.records if record.name == logs.log.name]
    assert len(said) == 1 and said[0].startswith("UserWarning at ") and NAME not in said[0]
    assert NAME not in "".join(capsys.readouterr())


def test_an_exception_that_nobody_catches_is_logged_by_its_place(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise ValueError(NAME)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    try:
        work()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    lines = [record.getMessage() for record in caplog.records if record.name == logs.log.name]
    assert len(lines) == 2 and all(line.startswith(f"ValueError at {__file__}:") for line in lines)
    assert NAME not in caplog.text + "".join(capsys.readouterr())
