"""Fixtures that several test files share: the real tokenizer and real trained weights."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from examples.demo import bring_model
from hf_llama_repro import modeling_llama_repro

pytest_plugins = ["sentencepiece_fixtures", "finetune_runs", "pretrain_runs", "chat_models"]

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="searches of 2,000 cases, and the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    is_long = config.getoption("--long")
    # Always the same cases: what fails once fails again.
    search = settings(max_examples=2000 if is_long else 200, deadline=None, derandomize=True, database=None)
    settings.register_profile("search", search)
    settings.register_profile("costly search", search, max_examples=300 if is_long else 40)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-long, or pytest --long"))


@pytest.fixture(scope="session")
def llama_tokenizer_model() -> Path:
    """The real LLaMA SentencePiece model; not part of the project."""
    path = SHARED_DATA / "llama_tokenizer.model"
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {path}")
        pytest.skip(f"the real LLaMA tokenizer is not at {path}")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: real trained weights of LLaMA's architecture, as the demo brings them."""
    return bring_model()


@pytest.fixture
def plain_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model file alone, as it lies beside a checkpoint: to the bit what stock Llama computes."""
    monkeypatch.setattr(modeling_llama_repro, "FAST_PATHS", {})
