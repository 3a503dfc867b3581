"""What Ollama makes of a Modelfile's template: by Go's text/template where `go` is installed, else by a small reader.

The reader knows what our templates use: text, range over .Messages, if / else if / else, eq, and, not, variables.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Conversation = Sequence[Mapping[str, str]]

# As Ollama fills it in (template/template.go): the system prompts joined, and all messages.
GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var order struct {
		Template      string
		Conversations []struct {
			System   string
			Messages []*Message
			Prompt   string
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&order); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(order.Template))
	texts := []string{}
	for _, c := range order.Conversations {
		var text strings.Builder
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Prompt": c.Prompt, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def template_of(modelfile: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.MULTILINE | re.DOTALL)
    assert found, modelfile
    return found[1]


def render(modelfile: str, conversations: Sequence[Conversation]) -> tuple[list[str], str]:
    """The text of each conversation, and by what it was rendered."""
    template = template_of(modelfile)
    system = re.search(r'^SYSTEM """(.*?)"""$', modelfile, re.MULTILINE | re.DOTALL)
    filled = [values(conversation, system[1] if system else "") for conversation in conversations]
    if go := shutil.which("go"):
        return render_by_go(go, template, filled), "Go's text/template"
    return [render_here(template, one) for one in filled], "a reader of Go templates"


def values(conversation: Conversation, default_system: str) -> dict[str, Any]:
    """What Ollama gives the template: a Modelfile's SYSTEM stands in front where a conversation has none."""
    messages = [dict(message) for message in conversation]
    if default_system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": default_system})
    return {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Messages": [{"Role": message["role"], "Content": message["content"]} for message in messages],
        "Prompt": messages[-1]["content"],
    }


def render_by_go(go: str, template: str, filled: Sequence[Mapping[str, Any]]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "main.go")
        program.write_text(GO_PROGRAM)
        order = json.dumps({"Template": template, "Conversations": filled})
        finished = subprocess.run([go, "run", program], input=order, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"go could not render the template: {finished.stderr[-600:]}")
    return json.loads(finished.stdout)


def render_here(template: str, filled: Mapping[str, Any]) -> str:
    nodes = _nodes(iter(_pieces(template)))[0]
    return "".join(_run(nodes, {"$": filled}, filled))


def _pieces(template: str) -> list[tuple[str, str]]:
    """("text", …) and ("action", …) in order, the white space beside a dash taken away."""
    template = re.sub(r"\s*\{\{- ", "{{", template)
    template = re.sub(r" -\}\}\s*", "}}", template)
    parts = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    return [
        ("action" if number % 2 else "text", part.strip() if number % 2 else part) for number, part in enumerate(parts)
    ]


def _nodes(pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
    """What stands before the next `else` or `end`, and that action. A node is text, or an action with its branches."""
    nodes: list[Any] = []
    for kind, part in pieces:
        if kind == "text":
            nodes.append(part)
        elif part == "end" or part.startswith("else"):
            return nodes, part
        elif part.startswith(("if ", "range ")):
            branches, ending = [], part
            while ending != "end":
                condition = ending.removeprefix("else").strip()
                content, ending = _nodes(pieces)
                branches.append((condition, content))
            nodes.append(branches)
        else:
            nodes.append((part,))
    return nodes, ""


def _run(nodes: list[Any], variables: dict[str, Any], dot: Any) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, tuple):
            name, assigned, expression = re.fullmatch(r"(?:(\$\w+) :?(=) )?(.*)", node[0], re.DOTALL).groups()
            result = _value(expression, variables, dot)
            if assigned:
                variables[name] = result
            else:
                yield str(result)
        elif node[0][0].startswith("range "):
            for item in _value(node[0][0].removeprefix("range "), variables, dot):
                yield from _run(node[0][1], variables, item)
        else:
            for condition, content in node:
                if not condition or _value(condition.removeprefix("if "), variables, dot):
                    yield from _run(content, variables, dot)
                    break


def _value(expression: str, variables: Mapping[str, Any], dot: Any) -> Any:
    first, *rest = re.findall(r'"[^"]*"|\S+', expression)
    if rest:
        operands = [_value(part, variables, dot) for part in rest]
        return {
            "eq": lambda: operands[0] == operands[1],
            "and": lambda: all(operands),
            "not": lambda: not operands[0],
        }[first]()
    if first.startswith('"'):
        return first[1:-1]
    if first in ("true", "false"):
        return first == "true"
    name, _, attribute = first.partition(".")
    found = dot if not name else variables[name]
    return found[attribute] if attribute else found
