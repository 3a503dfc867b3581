"""What the clients are given, and what transformers makes of the same: folders, prompts, greedy tokens."""

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama_repro  # noqa: F401 - registers the model type
from conversion.convert import convert
from examples.demo import bring_model
from hf_llama_repro.modeling_llama_repro import CACHE
from tests.meta_checkpoints import meta_params, meta_weights, write_meta

ROOT = Path(__file__).resolve().parents[2]
LLAMA_TOKENIZER = ROOT.parent / "shared" / "data" / "llama_tokenizer.model"
LLAMA_VOCAB = 32_000
NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Water freezes at zero degrees, and",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "In the year 1969, two astronauts",
    "To bake bread you need flour, water,",
    "The old lighthouse stood at the end of a narrow path of stones, and every evening the keeper climbed its one "
    "hundred and twelve steps with a lamp in one hand and a book in the other. On the third day of the storm, he",
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why does ice float on water?"},
        {"role": "assistant", "content": "It is lighter than water."},
        {"role": "user", "content": "And why does iron sink?"},
    ],
)


@dataclass(frozen=True)
class Model:
    """One model in both forms, float32."""

    name: str
    ours: Path
    stock: Path

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.stock)


class Material:
    """Folders below `scratch`, each made when first asked for."""

    def __init__(self, scratch: Path, environments: Path):
        self.scratch, self.environments = scratch, environments

    def python(self, environment: str) -> Path:
        return self.environments / environment / "bin" / "python"

    @functools.cached_property
    def smollm2(self) -> Model:
        """Real trained weights; a chat model."""
        return self._convert("SmolLM2-135M-Instruct", bring_model())

    @functools.cached_property
    def llama(self) -> Model:
        """Random weights and LLaMA's tokenizer; a base model."""
        return self._convert("random-LLaMA-2", self._meta)

    @functools.cached_property
    def llama_chat(self) -> Model:
        """The same with LLaMA 2's chat template."""
        return self._convert("random-LLaMA-2-chat", self._meta, chat=True)

    @functools.cached_property
    def _meta(self) -> Path:
        if not LLAMA_TOKENIZER.is_file():
            raise FileNotFoundError(f"LLaMA's tokenizer is not at {LLAMA_TOKENIZER}")
        params = meta_params(dim=512, n_heads=8, n_kv_heads=2, n_layers=4, multiple_of=128)
        weights = meta_weights(params, vocab=LLAMA_VOCAB)
        return write_meta(self.scratch / "meta", params, weights, frequencies="beside", tokenizer=LLAMA_TOKENIZER)

    def _convert(self, name: str, source: Path, *, chat: bool | None = None) -> Model:
        ours, stock = self.scratch / name, self.scratch / f"{name}-as-llama"
        convert(source, ours, chat=chat)
        convert(source, stock, chat=chat, model_type="llama", ollama=True)
        return Model(name, ours, stock)


@torch.no_grad()
def greedy(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What transformers' model of a folder says to each prompt, by the largest logit, going on after EOS."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    found = []
    for prompt in prompts:
        tokens, cache, said = torch.tensor([prompt]), None, []
        for _ in range(new_tokens):
            output = model(tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            tokens, cache = output.logits[:, -1].argmax(-1, keepdim=True), getattr(output, CACHE)
            said.append(int(tokens))
        found.append(said)
    del model
    gc.collect()
    return found


@torch.no_grad()
def logits(folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """(prompt, vocab)"""
    return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits[0]


@torch.no_grad()
def answer(folder: Path, conversation: list[dict[str, str]], new_tokens: int) -> str:
    """What `generate` says to a conversation, up to EOS, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
