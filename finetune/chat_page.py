"""The page in the browser, made with gradio: nothing on it comes from anywhere but this machine."""

import argparse
import errno
import html
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from hf_llama_repro.errors import InputError

from .assistant import Assistant, make_assistant
from .decoding import Answer, Sampling
from .template import Turn

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr

    from .page_guard import guards, is_local  # of starlette, which gradio brings
except ImportError as error:
    raise InputError(
        f"the page needs gradio ({error}): pip install 'hf-llama-repro[chat]'; or talk in the terminal: --terminal"
    ) from None

PAUSE = 0.05
"""Seconds between two updates of an answer: more of them would only be traffic."""
MOST_OPEN = 32
"""Answers that are made or waited for; each keeps a thread of the page waiting."""
CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
.message-markdown-disabled { white-space: pre-wrap !important; }
#message { min-height: 1.6em; }
#message .error { color: #b91c1c; font-weight: 600; }
#message .note { opacity: 0.7; }
"""

Updates = dict[Any, Any]
"""Component -> its value (a text box that nobody wrote into has None), or what is to be changed of it."""


class Page:
    """The components, and what happens when they are used."""

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self.running: dict[str, set[Answer]] = defaultdict(set)
        """Of each session (a tab of a browser)."""
        self.sides: list[Any] = []
        self.turns: list[Any] = []
        """Of each side of a conversation."""
        self.num_sides = 2 if assistant.model.has_adapter else 1
        with gr.Blocks(title=f"{assistant.name} - hf-llama-chat", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# {assistant.name}\n{self._described()}")
            (self._conversation if assistant.is_chat else self._instruction)()
            self.blocks.unload(self.leave)

    # What is on the page.

    def _described(self) -> str:
        adapter = self.assistant.adapter
        of = f"with the adapter **{adapter}**, " if adapter else ""
        how = "a conversation" if self.assistant.is_chat else "every instruction by itself"
        return f"{of}{how}, at most {self.assistant.context:,} tokens with the answer"

    def _instruction(self) -> None:
        with gr.Row():
            with gr.Column(scale=2):
                self.question = gr.Textbox(label="Instruction", lines=3, elem_id="question", autofocus=True)
                self.input = gr.Textbox(label="Input", lines=3, elem_id="input", placeholder="what it is about, if any")
                self._buttons()
                self._settings()
            with gr.Column(scale=3):
                labels = ["Answer"] if self.num_sides == 1 else ["Answer with the adapter", "Answer of the base alone"]
                self.sides = [
                    gr.Textbox(
                        label=label, lines=10, max_lines=24, interactive=False, buttons=["copy"],
                        elem_id=f"side{number}", visible=number == 0,
                    )
                    for number, label in enumerate(labels)
                ]  # fmt: skip
                self.message = gr.HTML(elem_id="message")
        self._connect(self.answer, [self.question, self.input])
        self.clear.click(lambda: ["", "", *[""] * self.num_sides, ""], None,
                         [self.question, self.input, *self.sides, self.message], queue=False)  # fmt: skip

    def _conversation(self) -> None:
        labels = ["Conversation"] if self.num_sides == 1 else ["With the adapter", "The base alone"]
        with gr.Row():
            self.sides = [
                gr.Chatbot(
                    label=label, height=420, render_markdown=False, buttons=["copy"], elem_id=f"side{number}",
                    visible=number == 0, feedback_options=None,
                )
                for number, label in enumerate(labels)
            ]  # fmt: skip
        self.turns = [gr.State(()) for _ in labels]
        self.message = gr.HTML(elem_id="message")
        self.question = gr.Textbox(
            label="Message", lines=1, max_lines=12, elem_id="question", autofocus=True, placeholder="Enter sends it"
        )
        self._buttons()
        self._settings()
        self._connect(self.say, [self.question, *self.turns])
        self.clear.click(lambda: ["", *[()] * self.num_sides, *[[]] * self.num_sides, ""], None,
                         [self.question, *self.turns, *self.sides, self.message], queue=False)  # fmt: skip

    def _buttons(self) -> None:
        with gr.Row():
            self.send = gr.Button("Ask", variant="primary", elem_id="send")
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False)
            self.clear = gr.Button("Clear", elem_id="clear")
        self.compare = gr.Checkbox(
            label="Compare with the base", elem_id="compare", visible=self.assistant.model.has_adapter
        )

    def _settings(self) -> None:
        default = self.assistant.sampling
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.system = gr.Textbox(
                label="System prompt", lines=2, elem_id="system", visible=self.assistant.prompts.takes_system
            )
            self.sampling = [
                gr.Number(default.max_new_tokens, label="Most tokens of an answer", precision=0, minimum=1),
                gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature",
                          info="0: always the likeliest token"),
                gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top p",
                          info="among the likeliest that make up this share"),
                gr.Number(default.top_k, label="Top k", precision=0, minimum=0, info="0: among all tokens"),
                gr.Slider(0.8, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"),
                gr.Number(default.seed, label="Seed", precision=0, info="empty: another for each answer"),
            ]  # fmt: skip

    def _connect(self, work: Any, inputs: list[Any]) -> None:
        """Asking, stopping, and the second side."""
        controls = [self.send, self.stop_button, self.clear]
        asked = gr.on(
            [self.send.click, self.question.submit],
            work,
            {*inputs, self.compare, self.system, *self.sampling},
            [*controls, self.question, *self.sides, self.message, *self.turns],
            show_progress="hidden",
            concurrency_limit=None,
        )
        # Also after an error that nobody foresaw.
        asked.then(lambda: self._controls(busy=False), None, controls, queue=False, show_progress="hidden")
        self.stop_button.click(self.stop, None, None, queue=False, show_progress="hidden")
        if self.num_sides == 2:
            self.compare.change(
                self.show_base, [self.compare, *self.turns[:1]], [self.sides[1], *self.turns[1:]], queue=False
            )

    def _controls(self, *, busy: bool) -> list[Any]:
        return [gr.update(interactive=not busy), gr.update(interactive=busy), gr.update(interactive=not busy)]

    # What happens.

    def answer(self, given: Updates, request: gr.Request) -> Iterator[Updates]:
        """To an instruction."""
        turn = Turn(given[self.question] or "", given[self.input] or "", "")

        def shown(texts: list[str]) -> Updates:
            return dict(zip(self.sides, texts, strict=False))

        yield from self._run(given, [(turn,), (turn,)], request, shown)

    def say(self, given: Updates, request: gr.Request) -> Iterator[Updates]:
        """The next turn of a conversation; with two sides each goes on by itself."""
        turn = Turn(given[self.question] or "", "", "")
        histories = [given[state] for state in self.turns]

        def shown(texts: list[str]) -> Updates:
            pairs = zip(histories, texts, strict=False)
            lines = [messages((*history, turn._replace(response=text))) for history, text in pairs]
            return dict(zip(self.sides, lines, strict=False))

        def kept(texts: list[str]) -> Updates:
            pairs = zip(histories, texts, strict=False)
            turns = [(*history, turn._replace(response=text)) for history, text in pairs]
            return dict(zip(self.turns, turns, strict=False))

        conversations = [(*history, turn) for history in histories]
        yield from self._run(given, conversations, request, shown, kept, taken={self.question: ""})

    def _run(
        self,
        given: Updates,
        conversations: list[tuple[Turn, ...]],
        request: gr.Request,
        shown: Callable[[list[str]], Updates],
        kept: Callable[[list[str]], Updates] = lambda _: {},
        taken: Updates | None = None,
    ) -> Iterator[Updates]:
        """Asks, and shows what comes. `kept`: what stays of complete answers; `taken`: what a good question changes."""
        start, session = time.monotonic(), str(request.session_hash)
        controls = [self.send, self.stop_button, self.clear]
        try:
            answers = self._begun(given, conversations)
            line = self.assistant.model.num_open
            note = f"{line} other answers are being made ..." if line else "reading the question ..."
            busy = dict(zip(controls, self._controls(busy=True), strict=True))
            yield {**busy, **(taken or {}), **shown([""] * len(answers)), self.message: _note(note)}
            for _ in self._made(answers, session):
                yield {**shown([answer.text for answer in answers]), self.message: _note("")}
        except InputError as error:
            yield {self.message: f"<span class='error' role='alert'>{html.escape(str(error))}</span>"}
            return
        texts = [answer.text for answer in answers]
        took = time.monotonic() - start
        yield {**shown(texts), **kept(texts), self.message: _note(f"{'; '.join(map(_end, answers))} ({took:.1f} s)")}

    def _begun(self, given: Updates, conversations: list[tuple[Turn, ...]]) -> list[Answer]:
        """An answer of each side that is shown. Raises `InputError` saying what is wrong with the question."""
        if self.assistant.model.num_open >= MOST_OPEN:
            raise InputError(f"{MOST_OPEN} answers are being made or waited for: ask again in a while")
        sampling = Sampling(*(given[component] for component in self.sampling))
        sides = 2 if given[self.compare] and self.num_sides == 2 else 1
        return [
            self.assistant.ask(turns, system=given[self.system] or "", sampling=sampling, with_adapter=number == 0)
            for number, turns in enumerate(conversations[:sides])
        ]

    def _made(self, answers: list[Answer], session: str) -> Iterator[None]:
        """Makes them, until the session's stop button is pressed or its tab is closed."""
        running = self.running[session]
        running.update(answers)
        try:
            yield from self.assistant.stream(*answers, pause=PAUSE)
        finally:
            running.difference_update(answers)

    def stop(self, request: gr.Request) -> None:
        """Ends the session's answers where they are."""
        for answer in tuple(self.running[str(request.session_hash)]):
            self.assistant.model.stop(answer)

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.stop(request)
        self.running.pop(str(request.session_hash), None)

    def show_base(self, compare: bool, turns: tuple[Turn, ...] = ()) -> Any:
        """Shows or hides the second side; in a conversation it begins with what was said so far."""
        if not self.turns:
            return gr.update(visible=compare, value="")
        return gr.update(visible=compare, value=messages(turns)), turns


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    """A conversation as gradio shows it."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.instruction), ("assistant", turn.response))
    ]


def _note(text: str) -> str:
    return f"<span class='note'>{html.escape(text)}</span>"


def _end(answer: Answer) -> str:
    """How an answer ended."""
    ends = {"complete": "complete", "stopped": "stopped", "length": "cut off at the limit"}
    whose = "" if answer.with_adapter else "base: "
    return f"{whose}{len(answer.tokens)} tokens, {ends[str(answer.end)]}"


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises `InputError` where the page cannot be there."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use: name another by --port, or 0 for any that is free"
            ) from None
        if error.errno == errno.EACCES:
            raise InputError(f"port {port} is not for everybody to use: name one above 1023 by --port") from None
        raise InputError(f"--host {host} is no address of this machine ({error.strerror or error})") from None


def launch(assistant: Assistant, *, host: str, port: int) -> Page:
    """Starts the page, and returns when it is there."""
    page = Page(assistant)
    page.blocks.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        app_kwargs={"middleware": guards(host, assistant.most_letters)},
        max_threads=2 * MOST_OPEN,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
    )
    return page


def serve(arguments: argparse.Namespace) -> None:
    """Runs the page until Ctrl-C."""
    port = free_port(arguments.host, arguments.port)
    assistant = make_assistant(arguments)
    page = launch(assistant, host=arguments.host, port=port)
    try:
        shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"{assistant.name} answers at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        if not is_local(arguments.host):
            print("whoever reaches this machine can ask: there is no password", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended", flush=True)
    finally:
        assistant.close()
        page.blocks.close(verbose=False)
