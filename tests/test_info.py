"""What hf-llama-info says for a report, and --version of every command."""

import importlib
import json

import pytest
from test_packaging import SCRIPTS, checkout_name

from hf_llama_repro import __version__, info


def test_a_report_names_versions_devices_and_integrations(capsys):
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hf-llama-repro"]["version"] == __version__
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "sentencepiece", "safetensors"):
        assert report["needed"][name][0].isdigit()
    assert "threads" in report["devices"]["cpu"]
    assert report["integrations"]["transformers"].startswith("yes")
    assert report["integrations"]["peft"].startswith("yes")
    assert report["folders"]["accelerate"].endswith("finetune/accelerate")


def test_the_same_is_printed_for_people(capsys):
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "hf-llama-repro"
    assert any(line.split()[:1] == ["transformers"] for line in lines)
    assert max(map(len, lines)) < 300


def test_what_is_missing_or_too_old_is_named_with_the_remedy(monkeypatch):
    versions = {"transformers": "5.2.0", "matplotlib": None}
    known = info.installed_version
    monkeypatch.setattr(info, "installed_version", lambda name: versions.get(name, known(name)))
    needed, optional = info.packages()
    assert needed["transformers"] == "5.2.0: outside of <5.25,>=5.16; pip install 'transformers<5.25,>=5.16'"
    assert optional["matplotlib"] == "not installed: pip install 'hf-llama-repro[finetune]'"
    assert needed["peft"] == known("peft")


def test_a_part_that_does_not_load_does_not_end_the_report(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(info, "devices", broken)
    report = info.gather()
    assert report["devices"] == {"unknown": "ImportError: libcudart.so.13: cannot open shared object file"}
    assert report["integrations"]["peft"].startswith("yes")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_says_its_version(script, capsys):
    parser = importlib.import_module(checkout_name(SCRIPTS[script].partition(":")[0])).build_parser()
    with pytest.raises(SystemExit) as exit_of:
        parser.parse_args(["--version"])
    assert exit_of.value.code == 0
    assert capsys.readouterr().out == f"{script} {__version__}\n"
