"""Several answers on one model at the same time: one thread computes, a step of each answer in turn.

A model is one set of weights and one set of processors: two answers computed at the same moment would be slower, and
an adapter is on or off for all of it.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from hf_llama_repro.errors import InputError

from .answering import is_out_of_memory
from .decoding import Answer


class SharedModel:
    """A model, with or without an adapter, that answers whoever asks. `close` ends its thread."""

    def __init__(self, model: Any, *, at_once: int = 4):
        self.model, self.at_once = model, at_once
        self.has_adapter = hasattr(model, "peft_config")
        self._adapter_is_on = True
        self._active: deque[Answer] = deque()
        self._waiting: deque[Answer] = deque()
        """For a place among the active: each of these has a cache of its own, which takes memory."""
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Answers that are being made or waited for."""
        with self._changed:
            return sum(answer.end is None for answer in (*self._active, *self._waiting))

    def stream(self, *answers: Answer, pause: float = 0.0) -> Iterator[None]:
        """Makes the answers, and yields when any of them has become longer, at most every `pause` seconds.

        Closing the iterator stops them. Raises what went wrong in one of them.
        """

        def state() -> tuple[tuple[int, str | None], ...]:
            return tuple((len(answer.tokens), answer.end) for answer in answers)

        def has_changed() -> bool:
            return state() != seen

        with self._changed:
            if self._is_closed:
                raise InputError("the model is closed")
            seen = state()
            self._waiting.extend(answers)
            self._changed.notify_all()
        try:
            while any(end is None for _, end in seen):
                with self._changed:
                    self._changed.wait_for(has_changed)
                    seen = state()
                yield
                time.sleep(pause)
        finally:
            for answer in answers:
                self.stop(answer)
        for answer in answers:
            if answer.error is not None:
                raise answer.error

    def stop(self, answer: Answer) -> None:
        """Ends an answer where it is; one that is complete stays so."""
        with self._changed:
            answer.stop()
            self._changed.notify_all()

    def close(self) -> None:
        """Stops all answers and the thread."""
        with self._changed:
            self._is_closed = True
            for answer in (*self._active, *self._waiting):
                answer.stop()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._waiting or self._is_closed)
                if self._is_closed:
                    return
                while self._waiting and len(self._active) < self.at_once:
                    self._active.append(self._waiting.popleft())
                answer = self._active[0]
            try:
                self._turn_adapter(on=answer.with_adapter)
                answer.step(self.model)
            except Exception as error:  # raised where the answer is waited for
                answer.fail(_said(error))
            with self._changed:
                self._active.rotate(-1)
                if answer.end is not None:
                    self._active.remove(answer)
                self._changed.notify_all()

    def _turn_adapter(self, *, on: bool) -> None:
        if not self.has_adapter or on == self._adapter_is_on:
            return
        layers = self.model.base_model
        (layers.enable_adapter_layers if on else layers.disable_adapter_layers)()
        self._adapter_is_on = on


def _said(error: Exception) -> Exception:
    """An error that the user can do something about says what."""
    if is_out_of_memory(error):
        return InputError("there is not enough memory for this answer: ask for fewer tokens, or with a shorter text")
    return error
