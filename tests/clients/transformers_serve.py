"""`transformers serve` and `transformers chat`, our folder by `hf-llama-run`, the `--as llama` folder by themselves."""

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.clients.material import CONVERSATIONS, Material, answer
from tests.clients.rows import Row, count
from tests.clients.servers import Server, ServerError, free_port, serving

START_SECONDS = 180
CHAT_SECONDS = 180
NEW_TOKENS = 32
QUESTION = CONVERSATIONS[0][0]["content"]


def check(material: Material, version: str) -> list[Row]:
    model = material.smollm2
    expected = [answer(model.stock, conversation, NEW_TOKENS) for conversation in CONVERSATIONS]
    rows = []
    for name, launcher, folder, options in (
        ("transformers serve, by hf-llama-run", ["hf-llama-run", "transformers"], model.ours, ()),
        ("the same, --continuous-batching", ["hf-llama-run", "transformers"], model.ours, ("--continuous-batching",)),
        ("transformers serve, --as llama", ["transformers"], model.stock, ()),
    ):
        with _serve(material, launcher, folder, options) as server:
            rows += [Row(name, version, *found) for found in _compare(server, folder, expected)]
            if folder is model.ours and not options:
                rows.append(Row("transformers chat", version, "a question in a terminal", *_chat(material, server)))
    rows.append(
        Row(
            "transformers serve",
            version,
            "our folder without hf-llama-run, --trust-remote-code (control)",
            *_bare(material),
        )
    )
    return rows


def _serve(
    material: Material, launcher: Sequence[str], folder: Path, options: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Server]:
    port, bin_folder = free_port(), material.python(".venv-eval").parent
    command = [bin_folder / launcher[0], *launcher[1:], "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = material.scratch / f"serve-{launcher[0]}-{folder.name}{'-'.join(options)}.log"
    return serving([*command, "--device", "cpu", *options], port, log, seconds=START_SECONDS)


def _compare(server: Server, folder: Path, expected: list[str]) -> list[tuple[str, str, bool]]:
    """(what was compared, the result, whether it is right)"""
    requests = [
        {"model": str(folder), "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        for messages in CONVERSATIONS
    ]

    def ask(request) -> str:
        return server.post("/v1/chat/completions", request)["choices"][0]["message"]["content"]

    streams = [server.stream("/v1/chat/completions", request) for request in requests]
    streamed = ["".join(event["choices"][0]["delta"].get("content") or "" for _, event in stream) for stream in streams]
    pieces = min(len(stream) for stream in streams)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, requests * 2))
    result, right = count(streamed, expected, "answers")
    return [
        ("chat, greedy, 4 requests at once, against transformers' generate", *count(together, expected * 2, "answers")),
        ("the same, streamed", f"{result}, in {pieces} events or more", right and pieces > 2),
    ]


def _chat(material: Material, server: Server) -> tuple[str, bool]:
    """Types a question into `transformers chat` in a terminal of its own, and reads the screen."""
    terminal, end = pty.openpty()
    command = [material.python(".venv-eval").with_name("transformers"), "chat", str(material.smollm2.ours)]
    process = subprocess.Popen(
        [*map(str, command), f"http://127.0.0.1:{server.port}/v1", "max_new_tokens=32", "do_sample=False"],
        stdin=end,
        stdout=end,
        stderr=end,
        # Offline, it would not ask a server on this machine either.
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200", "HF_HUB_OFFLINE": "0"},
        start_new_session=True,
    )
    os.close(end)
    try:
        screen = _read_until(terminal, r"is warm|already loaded")
        os.write(terminal, f"{QUESTION}\n".encode())
        screen += _read_until(terminal, r"tok/s|Paris\.")
        os.write(terminal, b"!exit\n")
        code = process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(terminal)
    said = "Paris" in screen.rpartition(QUESTION)[2]
    return ("answered Paris, and ended by !exit" if said and not code else screen[-300:], said and not code)


def _read_until(terminal: int, pattern: str) -> str:
    """What the terminal shows until the pattern is on it, or the time is over."""
    shown, end = "", time.monotonic() + CHAT_SECONDS
    while not re.search(pattern, shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return shown


def _bare(material: Material) -> tuple[str, bool]:
    """transformers must fail on the folder by itself: else the launcher would not be needed."""
    try:
        with _serve(material, ["transformers"], material.smollm2.ours, ("--trust-remote-code",)):
            return "was served all the same: the launcher is not needed", False
    except ServerError as error:
        refused = "has no attribute LlamaRepro" in str(error)
        return "refused, as expected" if refused else str(error), refused
