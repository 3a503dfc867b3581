"""llama.cpp in a process of its own environment, for `llama_cpp_check.py`: one GGUF file, JSON lines in and out.

PEERS_PYTHON tests/clients/llama_cpp_worker.py MODEL.gguf
"""

import json
import os
import sys

import llama_cpp
import numpy as np

CONTEXT = 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints goes to stderr
    # K and V in float32 as well: float16, the default, costs three digits of the logits.
    model = llama_cpp.Llama(
        sys.argv[1],
        n_ctx=CONTEXT,
        n_threads=1,  # more wait spinning for each other where anything else runs
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        model.reset()
        model.eval(prompt)
        said: list[int] = []
        while len(said) < new_tokens:
            said.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(said[-1:])
        return said

    def logits(prompt: list[int]) -> list[list[float]]:
        model.reset()
        model.eval(prompt)
        return model.scores[: len(prompt)].tolist()

    def tokenize(texts: list[str], special: bool) -> list[list[int]]:
        # BOS or not is the file's own setting, as in llama.cpp's programs.
        return [
            model.tokenize(text.encode("utf-8"), add_bos=model._model.add_bos_token(), special=special)
            for text in texts
        ]

    def chat(messages: list[dict[str, str]], new_tokens: int) -> str:
        answer = model.create_chat_completion(messages=messages, max_tokens=new_tokens, temperature=0.0)
        return answer["choices"][0]["message"]["content"]

    work = {"greedy": greedy, "logits": logits, "tokenize": tokenize, "chat": chat}
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(work[order.pop("work")](**order)), file=answers, flush=True)


if __name__ == "__main__":
    main()
