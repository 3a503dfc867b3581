"""`vllm serve` on our folder through the Transformers backend, and on the `--as llama` folder natively."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.clients.material import CONVERSATIONS, NEW_TOKENS, PROMPTS, Material, answer, greedy
from tests.clients.rows import Row, count
from tests.clients.servers import Server, ServerError, free_port, serving

START_SECONDS = 420
# float32, so that the tokens can be transformers' own: rounding in bfloat16 differs between any two programs.
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
BACKEND = "Using Transformers modeling backend"


def check(material: Material, version: str) -> list[Row]:
    model = material.smollm2
    prompts = [model.tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = greedy(model.stock, prompts)
    said = [answer(model.stock, conversation, NEW_TOKENS) for conversation in CONVERSATIONS]
    rows = []
    for folder, native in ((model.ours, False), (model.stock, True)):
        name = f"vLLM, {'native Llama, --as llama' if native else 'Transformers backend, llama_repro'}"
        with _serve(material, folder) as server:
            through_backend = BACKEND in server.text()
            runs = "the Transformers backend" if through_backend else "vLLM's own Llama"
            rows.append(Row(name, version, "what of vLLM's runs it, by its log", runs, through_backend is not native))
            rows += [Row(name, version, *found) for found in _compare(server, folder, prompts, expected, said)]
    rows.append(Row("vLLM", version, "our folder without the plug-in (control)", *_without_plugin(material)))
    return rows


def _serve(material: Material, folder: Path, **environment: str) -> contextlib.AbstractContextManager[Server]:
    port = free_port()
    vllm = material.python(".venv-vllm").with_name("vllm")
    return serving(
        [vllm, "serve", folder, "--host", "127.0.0.1", "--port", str(port), *OPTIONS],
        port,
        material.scratch / f"vllm-{folder.name}.log",
        seconds=START_SECONDS,
        tries=1 if environment else 2,  # a start may stall
        environment={**ENVIRONMENT, "PATH": f"{vllm.parent}:/usr/bin:/bin", **environment},
    )


def _compare(
    server: Server, folder: Path, prompts: Sequence[Sequence[int]], expected: list[list[int]], said: list[str]
) -> list[tuple[str, str, bool]]:
    """(what was compared, the result, whether it is right)"""
    asked = {"model": str(folder), "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    requests = [{**asked, "prompt": prompt, "return_token_ids": True} for prompt in prompts]

    def ask(request) -> list[int]:
        return server.post("/v1/completions", request)["choices"][0]["token_ids"]

    one_by_one = [ask(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.monotonic()
        together = list(pool.map(ask, requests))
        speed = len(requests) * NEW_TOKENS / (time.monotonic() - start)
        streams = list(pool.map(lambda request: server.stream("/v1/completions", request), requests))
    streamed = [[token for _, event in stream for token in event["choices"][0]["token_ids"]] for stream in streams]
    # Streams that run side by side have all begun before the first of them ends.
    overlap = max(stream[0][0] for stream in streams) < min(stream[-1][0] for stream in streams)
    pieces = min(len(stream) for stream in streams)
    chats = [
        server.post(
            "/v1/chat/completions",
            {"model": str(folder), "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0},
        )["choices"][0]["message"]["content"]
        for messages in CONVERSATIONS
    ]
    against = f"{NEW_TOKENS} greedy tokens, float32, against transformers"
    stream_result, stream_right = count(streamed, expected, "prompts")
    together_result, together_right = count(together, expected, "prompts")
    return [
        (against, *count(one_by_one, expected, "prompts")),
        (f"8 requests at once: {against}", f"{together_result}, {speed:.0f} tokens/s", together_right),
        (
            f"8 streams at once: {against}",
            f"{stream_result}, in {pieces} events or more, {'side by side' if overlap else 'one after the other'}",
            stream_right and overlap and pieces > 1,
        ),
        ("chat completions, greedy, against transformers' generate", *count(chats, said, "answers")),
    ]


def _without_plugin(material: Material) -> tuple[str, bool]:
    """vLLM must refuse the folder where the entry point is not loaded: else the rows above prove nothing of it."""
    try:
        with _serve(material, material.smollm2.ours, VLLM_PLUGINS="none"):
            return "was served all the same", False
    except ServerError as error:
        log = (material.scratch / f"vllm-{material.smollm2.ours.name}.log").read_text(errors="replace")
        refused = "trust_remote_code" in log or "not supported" in log
        return "refused, as it must be" if refused else str(error), refused
