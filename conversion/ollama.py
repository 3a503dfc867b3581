"""The Modelfile by which Ollama serves a GGUF file of a converted folder, with the template of the folder's tokenizer.

Ollama writes its templates in Go's language and does not translate Jinja's. Which of the known formats a tokenizer has
is found out by what its own template gives for conversations, not by how it is written.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_llama_repro.errors import CheckpointError

GGUF_NAME = "model.gguf"
Conversation = Sequence[Mapping[str, str]]

# Conversations that tell the formats apart; the last message is always the user's.
_ASKED = [{"role": "user", "content": "q1"}]
_LATER = [*_ASKED, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
PROBES: tuple[Conversation, ...] = (
    [{"role": "system", "content": "rules"}, *_ASKED],
    [{"role": "system", "content": "rules"}, *_LATER],
)


def _llama2(messages: Conversation, bos: str, eos: str) -> str:
    text, system = "", ""
    for message in messages:
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text += f"{bos}[INST] {system}{message['content']} [/INST]"
            system = ""
        else:
            text += f" {message['content']} {eos}"
    return text


def _chatml(messages: Conversation, bos: str, eos: str) -> str:
    turns = (f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class ChatFormat:
    """A way to write a conversation, as Python renders it and as Ollama does."""

    render: Callable[[Conversation, str, str], str]
    """Of a conversation, BOS and EOS."""
    template: str
    """In Go's language, without the BOS at the very front, which llama.cpp adds; BOS and EOS stand for the tokens."""
    stops: list[str] = field(default_factory=list)


FORMATS = {
    # The first user turn takes the system prompt; each turn after it has a BOS of its own, as Meta's code has it.
    "LLaMA 2 chat": ChatFormat(
        _llama2,
        """\
{{- $first := true }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if not $first }}BOS{{ end }}[INST] {{ if and $first $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}{{ .Content }} [/INST]
{{- $first = false }}
{{- else if eq .Role "assistant" }} {{ .Content }} EOS
{{- end }}
{{- end }}""",
        ["EOS", "[INST]"],
    ),
    "ChatML": ChatFormat(
        _chatml,
        """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
""",
        ["<|im_end|>"],
    ),
}
PLAIN = ChatFormat(lambda messages, bos, eos: messages[-1]["content"], "{{ .Prompt }}")
"""Of a base model: what is asked, and nothing else."""


def modelfile(tokenizer: Any, *, context_length: int, sampling: Mapping[str, Any]) -> str:
    """The text of the Modelfile. `sampling`: of a generation_config.json. Raises where the chat template is unknown."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    chat_format = PLAIN if tokenizer.chat_template is None else FORMATS[known_format(tokenizer)]
    template = chat_format.template.replace("BOS", bos).replace("EOS", eos)
    parameters: list[tuple[str, Any]] = [("num_ctx", context_length)]
    parameters += [("stop", f'"{stop}"'.replace("EOS", eos)) for stop in chat_format.stops]
    if sampling.get("do_sample"):
        settings = ((name, sampling.get(name)) for name in ("temperature", "top_p", "top_k"))
        parameters += [(name, value) for name, value in settings if isinstance(value, int | float)]
    system = default_system(tokenizer) if tokenizer.chat_template else ""
    if re.search(r'["\n]|\{\{', bos + eos) or '"""' in system:
        raise CheckpointError(
            f"BOS {bos!r}, EOS {eos!r} or the system prompt {system[:80]!r} cannot stand in a Modelfile: "
            "convert without --ollama"
        )
    lines = [
        "# ollama create NAME -f Modelfile",
        f"# {GGUF_NAME} is made by llama.cpp: python convert_hf_to_gguf.py FOLDER --outfile FOLDER/{GGUF_NAME}",
        f"FROM ./{GGUF_NAME}",
        f'TEMPLATE """{template}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def known_format(tokenizer: Any) -> str:
    """The name of the format that the tokenizer's template writes."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    rendered = [_rendered(tokenizer, probe) for probe in PROBES]
    for name, chat_format in FORMATS.items():
        if rendered == [chat_format.render(probe, bos, eos) for probe in PROBES]:
            return name
    raise CheckpointError(
        f"the chat template of this tokenizer is none that a Modelfile is known for ({', '.join(FORMATS)}): convert "
        "without --ollama, and write the Modelfile by hand"
    )


def default_system(tokenizer: Any) -> str:
    """The system prompt that the template puts in where a conversation has none."""
    marked = _rendered(tokenizer, PROBES[0])
    before, _, after = marked.partition("rules")
    found = _rendered(tokenizer, _ASKED)
    if found.startswith(before) and found.endswith(after) and len(found) > len(before) + len(after):
        return found.removeprefix(before).removesuffix(after)
    return ""


def _rendered(tokenizer: Any, messages: Conversation) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's errors, and whatever a template raises of its own
        raise CheckpointError(f"the chat template cannot be rendered ({error}): convert without --ollama") from error
