"""Fixtures that several test files share: the real tokenizer and real trained weights."""

import os
from pathlib import Path

import pytest

from examples.demo import bring_model

pytest_plugins = ["sentencepiece_fixtures", "finetune_runs"]

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


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
