"""Asks a chat model by its tokenizer's chat template."""

import json
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_llama_repro.errors import CheckpointError, InputError

from .decoding import byte_tokens
from .template import Turn


class ChatPrompts:
    """Conversations as the tokenizer's chat template writes them, encoded as `apply_chat_template` does."""

    takes_system = True
    takes_turns = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path):
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {folder} has no chat template: ask by --mode instruction, or name a --template"
            )
        self._tokenizer: Any = tokenizer
        # A copy: tokenizers change theirs while they encode, and several threads ask.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.byte_tokens = byte_tokens(self._backend)
        self.ends = end_tokens(tokenizer, folder)

    def ids(self, turns: tuple[Turn, ...], system: str) -> list[int]:
        """A control token that a text spells is refused: it could pretend to be somebody else's turn."""
        messages = self._messages(turns, system)
        for message in messages:
            for token in self._control:
                if token in message["content"]:
                    raise InputError(f"a message spells the control token {token}: leave it out")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template refuses the conversation: {str(error).strip()[:300]}") from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """Decoded after the prompt: by itself an answer would lose its leading space, which no chat begins with."""

        def decode(ids: list[int]) -> str:
            return self._backend.decode(ids, skip_special_tokens=True)

        return decode(prompt + tokens)[len(decode(prompt)) :].lstrip(" ")

    def _messages(self, turns: tuple[Turn, ...], system: str) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        for number, turn in enumerate(turns):
            asked = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
            messages.append({"role": "user", "content": asked})
            if number < len(turns) - 1:
                messages.append({"role": "assistant", "content": turn.response})
        return messages


def end_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """EOS of the tokenizer, and what the folder's generation_config.json names: chat models may end in several ways."""
    path = folder / "generation_config.json"
    named: Any = []
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", [])
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None
    named = named if isinstance(named, list) else [named]
    ends = {token for token in (*named, tokenizer.eos_token_id) if isinstance(token, int)}
    if not ends:
        raise CheckpointError(f"neither the tokenizer of {folder} nor {path} names an EOS: no answer would end")
    return frozenset(ends)
