"""Folders of `--as llama` through llama.cpp's own converter, and what llama-cpp-python makes of the file."""

import contextlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from conversion.awkward_texts import AWKWARD_TEXTS
from conversion.ollama import GGUF_NAME
from tests.clients.go_template import render
from tests.clients.material import CONVERSATIONS, NEW_TOKENS, PROMPTS, ROOT, Material, Model, answer, greedy, logits
from tests.clients.rows import Row, count

CONVERTER_OF = "llama-cpp-python==0.3.36"
LARGEST_DIFFERENCE = 1e-3
"""Of a logit, float32: the products are summed in another order, over 30 layers."""


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py, out of the source package of llama-cpp-python on the registry."""
    target = ROOT / ".cache" / CONVERTER_OF
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
            ]
            subprocess.run([*command, "--dest", scratch, CONVERTER_OF], check=True)
            (package,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(package) as archive:
                archive.extractall(scratch, filter="data")
            (llama_cpp,) = Path(scratch).glob("*/vendor/llama.cpp")
            llama_cpp.rename(target)
    return target / "convert_hf_to_gguf.py"


def to_gguf(folder: Path) -> Path:
    """The GGUF file of a folder, in it, in F32."""
    target = folder / GGUF_NAME
    command = [sys.executable, converter(), folder, "--outtype", "f32", "--outfile", target]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py ended with {finished.returncode}: {finished.stderr.strip()[-600:]}")
    return target


class Worker:
    """llama.cpp with one file."""

    def __init__(self, python: Path, file: Path, log: Path):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, Path(__file__).with_name("llama_cpp_worker.py"), file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, work: str, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: its log says why
            self.process.stdin.write(json.dumps({"work": work, **order}) + "\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"llama.cpp's process ended: {self.log.read_text(errors='replace')[-600:]}")
        return json.loads(line)


@contextlib.contextmanager
def worker(material: Material, model: Model) -> Iterator[Worker]:
    running = Worker(material.python(".venv-peers"), to_gguf(model.stock), material.scratch / f"{model.name}.log")
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def check(material: Material, version: str) -> list[Row]:
    rows = []
    for model, chat in ((material.smollm2, True), (material.llama, False), (material.llama_chat, True)):
        with worker(material, model) as running:
            found = [_ids(running, model, special=chat)]
            if model is not material.llama_chat:  # whose weights are those of the base model
                found += [*_numbers(running, model)]
            if chat:
                found.append(_template(running, model))
            if model is material.smollm2:
                found.append(_chat(running, model))
                found.append(_control(running, model))
            rows += [Row(f"llama.cpp, {model.name}", version, *one) for one in found]
    return rows


def _ids(running: Worker, model: Model, *, special: bool) -> tuple[str, str, bool]:
    """Token ids with BOS as the file says; `special`: whether control tokens are read out of a text, as in a chat."""
    texts = [*AWKWARD_TEXTS, *PROMPTS]
    expected = [model.tokenizer(text).input_ids for text in texts]
    found = running.ask("tokenize", texts=texts, special=special)
    result, right = count(found, expected, "texts")
    if wrong := [text for text, ids, other in zip(texts, found, expected, strict=True) if ids != other]:
        result += f"; not {', '.join(ascii(text[:30]) for text in wrong[:4])}"
    return "token ids of awkward texts, against transformers", result, right


def _numbers(running: Worker, model: Model) -> Iterator[tuple[str, str, bool]]:
    prompts = [model.tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = greedy(model.stock, prompts)
    found = [running.ask("greedy", prompt=prompt, new_tokens=NEW_TOKENS) for prompt in prompts]
    yield f"{NEW_TOKENS} greedy tokens, F32, against transformers", *count(found, expected, "prompts")
    yield (
        f"{NEW_TOKENS} greedy tokens, F32, against LlamaRepro",
        *count(found, greedy(model.ours, prompts), "prompts"),
    )
    difference = (
        (torch.tensor(running.ask("logits", prompt=prompts[-1])) - logits(model.stock, prompts[-1])).abs().max()
    )
    yield (
        f"logits of {len(prompts[-1])} tokens, F32, against transformers",
        f"largest difference {difference:.1e}",
        bool(difference < LARGEST_DIFFERENCE),
    )


def _template(running: Worker, model: Model) -> tuple[str, str, bool]:
    """The Modelfile's template, rendered, gives the ids that the tokenizer's own template gives."""
    tokenizer = model.tokenizer
    expected = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in CONVERSATIONS
    ]
    texts, renderer = render((model.stock / "Modelfile").read_text(), CONVERSATIONS)
    found = running.ask("tokenize", texts=texts, special=True)
    result, right = count(found, expected, "conversations")
    return f"ids of conversations by the Modelfile's template ({renderer})", result, right


def _chat(running: Worker, model: Model) -> tuple[str, str, bool]:
    found = [running.ask("chat", messages=messages, new_tokens=NEW_TOKENS) for messages in CONVERSATIONS]
    expected = [answer(model.stock, messages, NEW_TOKENS) for messages in CONVERSATIONS]
    return "chat by the file's own template, against transformers' generate", *count(found, expected, "answers")


def _control(running: Worker, model: Model) -> tuple[str, str, bool]:
    """Another prompt must give other tokens, or the comparison of tokens could not fail."""
    prompt, other = (model.tokenizer(text).input_ids for text in PROMPTS[:2])
    same = running.ask("greedy", prompt=prompt, new_tokens=8) == greedy(model.stock, [other], 8)[0]
    return (
        "another prompt (control: the comparison can fail)",
        "is the same" if same else "differs, as it must",
        not same,
    )
