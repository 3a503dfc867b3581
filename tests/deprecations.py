"""pytest plugin: lists, after the tests, everything that the libraries in use say is deprecated.

python -m pytest -p deprecations
"""

import logging
import warnings
from collections import Counter

import pytest

_CATEGORIES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
_found: Counter[str] = Counter()


class _AsWarning(logging.Handler):
    """transformers logs some deprecations; as warnings they reach pytest from its worker processes too."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message or "will be removed" in message:
            warnings.warn(message, FutureWarning, stacklevel=2)


@pytest.fixture(autouse=True, scope="session")
def deprecations_in_logs():
    import transformers  # noqa: F401 - puts its own handler on the logger

    handler = _AsWarning()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "peft", "trl", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    if issubclass(warning_message.category, _CATEGORIES):
        text = " ".join(str(warning_message.message).split())
        _found[f"{warning_message.category.__name__}: {text}"] += 1


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("deprecated in the versions installed")
    for text, count in sorted(_found.items()):
        terminalreporter.write_line(f"{count:4} x {text}")
    if not _found:
        terminalreporter.write_line("nothing")
