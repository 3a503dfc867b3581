"""pytest plugin: writes what became of each test, and of its subtests, as JSON to the file that SUITE_RECORD names."""

import json
import os
from pathlib import Path

RANK = ("passed", "skipped", "failed")  # the outcome of a test is the worst one of its parts
_mixin_of: dict[str, str] = {}
_records: dict[str, dict] = {}


def pytest_collection_modifyitems(items):
    for item in items:
        # The most basic class: transformers wraps the tests again in every subclass.
        owner = next(cls for cls in reversed(item.cls.__mro__) if item.originalname in vars(cls))
        _mixin_of[item.nodeid.rpartition("::")[2]] = owner.__name__


def pytest_runtest_logreport(report):
    name = report.nodeid.rpartition("::")[2]
    record = _records.setdefault(name, {"mixin": _mixin_of[name], "outcome": "passed", "passed": 0, "message": ""})
    record["passed"] += report.when == "call" and report.passed
    if RANK.index(report.outcome) > RANK.index(record["outcome"]):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        record.update(outcome=report.outcome, message=reason.strip().rpartition("\n")[2])


def pytest_sessionfinish():
    Path(os.environ["SUITE_RECORD"]).write_text(json.dumps(_records, indent=1))
