"""What runs the real clients: a failure is a row and a status, and a client that cannot be run is one line."""

import sys
from pathlib import Path

import pytest

from tests.clients import processes
from tests.clients import run as clients
from tests.clients.rows import Row, table

VERSION = ">=1"


def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check, environment: str = ".venv", versions: str = VERSION):
    """Makes `check` the only client, and `tmp_path` the folder of environments, with this Python as `.venv`."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    client = clients.Client(check, environment, "torch", versions)
    monkeypatch.setattr(clients, "CLIENTS", {"one": client})
    monkeypatch.setattr(clients, "ROOT", tmp_path)
    return ["--environments", str(tmp_path)]


def passing(material, version):
    return [Row("one", version, "ids | tokens", "equal", True)]


def failing(material, version):
    return [Row("one", version, "ids", "3 of 8 equal", False)]


def raising(material, version):
    raise RuntimeError("the server ended")


def test_a_client_that_passes_ends_with_0_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    assert clients.main(use(monkeypatch, tmp_path, passing)) == 0
    assert "| one | " in (printed := capsys.readouterr().out)
    assert r"| ids \| tokens | equal |" in printed
    assert not list((tmp_path / ".cache").iterdir())


@pytest.mark.parametrize(
    ("check", "told"), [(failing, "**FAILED**: 3 of 8 equal"), (raising, "**FAILED**: RuntimeError: the server ended")]
)
def test_a_failure_is_a_row_and_status_1(monkeypatch, tmp_path, capsys, check, told):
    assert clients.main(use(monkeypatch, tmp_path, check)) == 1
    captured = capsys.readouterr()
    assert told in captured.out
    [scratch] = (tmp_path / ".cache").iterdir()
    assert str(scratch) in captured.err


@pytest.mark.parametrize(
    ("environment", "versions", "told"),
    [
        (".venv-none", VERSION, "there is no .venv-none here: make .venv-none/.installed"),
        (".venv", "<1", "is outside of <1, for which the check is written: rm -r .venv"),
    ],
)
def test_a_client_that_cannot_be_run_is_one_line_and_status_2(
    monkeypatch, tmp_path, capsys, environment, versions, told
):
    assert clients.main(use(monkeypatch, tmp_path, passing, environment, versions)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("not run: one: ")
    assert told in line


def test_an_unknown_client_is_refused_with_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        clients.main(["vlm"])
    assert "there is no client vlm: choose of vllm, llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("........\n8 passed, 3 deselected in 2.01s", 0, ("8 tests passed", True)),
        ("1 failed, 7 passed in 2.01s", 1, ("7 tests passed, 1 tests failed", False)),
        ("2 passed, 1 error in 2.01s", 1, ("2 tests passed, 1 tests error", False)),
        ("2 skipped in 0.01s", 0, ("2 tests skipped", False)),  # of what did not run nothing is known
        ("11 deselected in 0.01s", 5, ("pytest ended with 5", False)),
        ("", 139, ("pytest ended with 139", False)),
    ],
)
def test_tests_count_as_passed_where_some_ran_and_all_passed(printed, status, expected):
    assert processes.outcome(printed, status) == expected


def test_rows_of_tests_come_from_pytest_and_its_log_is_kept(tmp_path):
    class Here:
        scratch = tmp_path

        def python(self, environment: str) -> str:
            return sys.executable

    def row(choice: str) -> Row:
        check = processes.tests_of("processes", "what", "tests/test_clients.py", "-k", choice)
        return check(Here(), "1.0")[0]

    good, none = row("unknown_client"), row("no_such_test")
    assert (good.result, good.passed) == ("1 tests passed", True)
    assert not none.passed
    assert "deselected" in (tmp_path / "test_clients.py.log").read_text()
    assert "**FAILED**" in table([none])
