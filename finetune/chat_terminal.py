"""A conversation in the terminal, with what the page has."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_llama_repro.errors import InputError

from .assistant import Assistant, make_assistant
from .decoding import Answer
from .template import Turn

HELP = """a line is a question; one that ends in \\ goes on in the next
/input TEXT       what the next instruction is about
/system TEXT      system prompt; without a text: none
/compare          the base's answer as well, or no more
/set              the settings
/set NAME VALUE   changes one: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed
/clear            begins anew
/quit             ends; so does Ctrl-D. Ctrl-C ends an answer"""


class Terminal:
    """What was said, and what was set."""

    def __init__(self, assistant: Assistant):
        self.assistant, self.sampling = assistant, assistant.sampling
        self.turns: list[tuple[Turn, ...]] = [(), ()]
        """With the adapter, and of the base alone."""
        self.input = self.system = ""
        self.compares = False
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP),
            "input": self.set_input,
            "system": self.set_system,
            "compare": self.switch_compare,
            "set": self.set,
            "clear": self.clear,
        }

    def do(self, line: str) -> None:
        """A command, or a question. Raises `InputError` saying what is wrong with it."""
        if not line.startswith("/"):
            return self.ask(line)
        name, _, text = line[1:].partition(" ")
        if name not in self.commands:
            raise InputError(f"there is no command /{name}: /help shows them")
        self.commands[name](text.strip())

    def ask(self, text: str) -> None:
        """Prints the answer as it comes, and the base's after it where both are wanted."""
        turn = Turn(text, self.input, "")
        for number in range(2 if self.compares else 1):
            history = self.turns[number] if self.assistant.is_chat else ()
            answer = self.assistant.ask(
                (*history, turn), system=self.system, sampling=self.sampling, with_adapter=number == 0
            )
            if self.compares:
                print(("with the adapter:", "the base alone:")[number], flush=True)
            self.show(answer)
            self.turns[number] = (*history, turn._replace(response=answer.text))
        self.input = ""

    def show(self, answer: Answer) -> None:
        shown = ""
        try:
            for _ in self.assistant.stream(answer):
                text = answer.text
                print(text[len(shown) :], end="", flush=True)
                shown = text
        except KeyboardInterrupt:
            # A second one, at the prompt, ends the program.
            print(" [stopped]", end="")
        print("" if answer.end != "length" else " [cut off at max_new_tokens or at the end of the context]", flush=True)

    def set_input(self, text: str) -> None:
        self.input = text

    def set_system(self, text: str) -> None:
        if text and not self.assistant.prompts.takes_system:
            raise InputError("the template has no place for a system prompt")
        self.system = text

    def switch_compare(self, _: str) -> None:
        if not self.assistant.model.has_adapter:
            raise InputError("there is no adapter to compare with the base: --adapter names one")
        self.compares = not self.compares
        self.turns[1] = self.turns[0]
        print(f"the base's answer as well: {'yes' if self.compares else 'no'}")

    def set(self, text: str) -> None:
        if text:
            name, _, value = text.partition(" ")
            if name not in vars(self.sampling):
                raise InputError(f"there is no setting {name}: one of {', '.join(vars(self.sampling))}")
            self.sampling = replace(self.sampling, **{name: _number(name, value.strip())})
        for name, value in vars(self.sampling).items():
            print(f"{name:<20}{value if value is not None else 'another for each answer'}")

    def clear(self, _: str) -> None:
        self.turns, self.input = [(), ()], ""


def _number(name: str, text: str) -> Any:
    if name == "seed" and text in ("", "none"):
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise InputError(f"{name} must be a number, got {text!r}") from None


def read(prompt: str) -> str:
    """A question of one or more lines. Raises `EOFError` at the end."""
    line = input(prompt)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("." * len(prompt.strip()) + " " if prompt else "")
    return line.strip()


def talk(arguments: argparse.Namespace) -> None:
    """Asks and answers until the input ends. From a file or a pipe, what cannot be answered ends it."""
    is_interactive = sys.stdin.isatty()
    assistant = make_assistant(arguments)
    terminal = Terminal(assistant)
    if is_interactive:
        import readline  # noqa: F401 - gives `input` its history and editing

        print(f"{assistant.name}: /help shows what can be done here", flush=True)
    try:
        while (line := read("> " if is_interactive else "")) != "/quit":
            try:
                terminal.do(line)
            except InputError as error:
                if not is_interactive:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)
    except EOFError:
        print(end="\n" if is_interactive else "")
    finally:
        assistant.close()
