"""Records as token ids, with exactly the responses and their EOS supervised.

The prompt is encoded as it will be at inference, by itself, and the response as what follows it. Neither of the usual
ways gives that: encoding both together merges the prompt's last colon with a response's first quotation mark, so that
a mask by the prompt's number of tokens is off; encoding the response as a text of its own puts a space before it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_llama_repro.errors import CheckpointError, InputError

from .records import Record, Watch
from .template import Segment, Template
from .word_ids import WordIds, encodes_by_words, puts_space_first

IGNORED = -100
# An input is shortened down to this, in tokens, before the response is.
SHORTEST_INPUT = 32


class Example(NamedTuple):
    """A record as the model sees it; the label of a token that is not supervised is -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Cuts:
    """What the limit on the length took."""

    records: int = 0
    tokens: int = 0
    inputs: int = 0
    """Records whose input was shortened."""
    eos: int = 0
    """Records whose last response is cut, and is trained without EOS."""
    left_out: list[str] = field(default_factory=list)
    """Where the records stand of which nothing supervised was left."""
    prompts: list[str] = field(default_factory=list)
    """Where the records stand whose prompt alone is as long as the limit, or longer; its tokens."""

    def lines(self, limit: int) -> list[str]:
        if not self.records:
            return [f"limit of {limit} tokens: nothing was cut"]
        first = f" (the first: {self.left_out[0]})" if self.left_out else ""
        lines = [
            f"limit of {limit} tokens: {self.records} records cut by {self.tokens} tokens; {self.inputs} inputs "
            f"shortened, {self.eos} responses cut (they lose EOS), {len(self.left_out)} records left out{first}"
        ]
        if self.prompts:
            lines.append(
                f"prompt alone of {limit} tokens or more: {len(self.prompts)} records, of whose response nothing is "
                f"left (the first: {self.prompts[0]})"
            )
        return lines


class Encoder:
    """Encodes conversations for one tokenizer and template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CheckpointError("the base's tokenizer has no tokenizer.json: convert the base with hf-llama-convert")
        if tokenizer.eos_token_id is None:
            raise CheckpointError("the base's tokenizer names no EOS: a model trained with it would never stop")
        self.tokenizer: Any = tokenizer
        self.template, self.eos = template, tokenizer.eos_token_id
        backend: Tokenizer = tokenizer.backend_tokenizer
        started, continued = json.loads(backend.to_str()), _without_prefix(json.loads(backend.to_str()))
        self._start, self._continued = _plain(started), _plain(continued)
        self._words = WordIds(self._continued) if encodes_by_words(continued) else None
        self._puts_space = puts_space_first(started)
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []

    def ids(self, segment: Segment) -> list[int]:
        """Special tokens that a text spells are text; EOS comes after a response, and nowhere else."""
        text = segment.text
        if self._words is not None and (not segment.is_start or (self._puts_space and text)):
            ids = self._words.encode(" " + text if segment.is_start else text)
        else:
            ids = (self._start if segment.is_start else self._continued).encode(text, add_special_tokens=False).ids
        return self._bos * segment.is_start + ids + [self.eos] * segment.is_response

    def encode(self, record: Record, *, train_on_prompt: bool = False) -> Example:
        """The whole record. Raises `InputError` where the template cannot express it."""
        input_ids: list[int] = []
        labels: list[int] = []
        turn = 0
        for segment in self.template.segments(record.turns, record.system):
            ids = self.ids(segment)
            input_ids += ids
            is_learned = turn not in record.unsupervised if segment.is_response else train_on_prompt
            labels += ids if is_learned else [IGNORED] * len(ids)
            turn += segment.is_response
        return Example(input_ids, labels)

    def prompt(self, record: Record) -> list[int]:
        """The open prompt that asks for the last turn's response."""
        last = record.turns[-1]._replace(response="")
        return self.encode(replace(record, turns=(*record.turns[:-1], last))).input_ids

    def encode_all(
        self,
        records: Iterable[Record],
        *,
        max_length: int,
        truncation: str,
        train_on_prompt: bool = False,
        watch: Watch = lambda records: records,
    ) -> tuple[list[Example], Cuts]:
        """All records, none longer than `max_length` tokens, and what that took of them.

        `watch` is handed the records and gives them back, to show how far it is. Raises `InputError` naming the record
        that the template cannot express, or where no record is left.
        """
        examples, cuts = [], Cuts()
        for record in watch(records):
            try:
                whole = self.encode(record, train_on_prompt=train_on_prompt)
            except InputError as error:
                raise InputError(f"{record.where}: {error}; choose another template, or fix the record") from None
            example = whole
            if len(whole.input_ids) > max_length:
                example = self._shorten(record, whole, max_length, truncation, train_on_prompt, cuts)
                cuts.records += 1
                cuts.tokens += len(whole.input_ids) - len(example.input_ids)
            if example.labels.count(IGNORED) == len(example.labels):
                cuts.left_out.append(record.where)
            else:
                examples.append(example)
        if not examples:
            prompts = f"; the prompt alone of {cuts.prompts[0]}" if cuts.prompts else ""
            raise InputError(
                f"no record is left within max_length={max_length}: allow more, or shorten the records{prompts}"
            )
        return examples, cuts

    def _shorten(
        self, record: Record, whole: Example, max_length: int, truncation: str, train_on_prompt: bool, cuts: Cuts
    ) -> Example:
        if truncation == "drop":
            self._note_prompt(record, max_length, cuts)
            return Example([], [])
        example = whole
        if truncation == "input" and len(record.turns) == 1:
            record = self._with_shorter_input(record, len(whole.input_ids), max_length)
            example = self.encode(record, train_on_prompt=train_on_prompt)
        self._note_prompt(record, max_length, cuts)
        is_shorter = len(example.input_ids) < len(whole.input_ids)
        input_ids, labels = example.input_ids[:max_length], example.labels[:max_length]
        # A prompt whose response is cut away entirely teaches nothing.
        while labels and labels[-1] == IGNORED:
            input_ids.pop()
            labels.pop()
        if labels:
            cuts.inputs += is_shorter
            cuts.eos += labels[-1] != self.eos
        return Example(input_ids, labels)

    def _note_prompt(self, record: Record, max_length: int, cuts: Cuts) -> None:
        opened = record.turns[0]._replace(response="")
        length = len(self.encode(replace(record, turns=(opened,))).input_ids)
        if length >= max_length:
            cuts.prompts.append(f"{record.where}, {length} tokens")

    def _with_shorter_input(self, record: Record, length: int, max_length: int) -> Record:
        """The record of that length with its input's end cut off until it fits, or SHORTEST_INPUT tokens are left."""
        turn = record.turns[0]
        encoding = self._continued.encode(turn.input, add_special_tokens=False)
        kept = len(encoding.ids)
        # Once is not always enough: around the cut the text may be encoded otherwise, or a template strip it anyway.
        while length > max_length and kept > SHORTEST_INPUT:
            kept = max(kept - (length - max_length), SHORTEST_INPUT)
            shorter = turn.input[: encoding.offsets[kept][0]].rstrip()
            record = replace(record, turns=(turn._replace(input=shorter),))
            length = len(self.encode(record).input_ids)
        return record

    def continuation(self, prompt: list[int], answer: list[int]) -> str:
        """The text of an answer, decoded after its prompt: by itself it would lose its leading space."""

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        return decode(prompt + answer)[len(decode(prompt)) :]

    def marked(self, example: Example) -> str:
        """The example as text, with what is supervised between ⟦ and ⟧."""
        supervised = [label != IGNORED for label in example.labels]
        ends = [i for i in range(1, len(supervised) + 1) if supervised[i : i + 1] != supervised[i - 1 : i]]
        text, done = "", ""
        for end in ends:
            # Decoded from the beginning: by itself a piece would lose its leading space.
            whole = self.tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
            piece, done = whole[len(done) :], whole
            text += f"⟦{piece}⟧" if supervised[end - 1] else piece
        return text


def _plain(backend: dict[str, Any]) -> Tokenizer:
    """The tokenizer that takes the names of special tokens in a text as text."""
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_prefix(backend: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer in the middle of a text: it puts no space before what it is given."""

    def steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
        return [] if part is None else part[key] if part["type"] == "Sequence" else [part]

    for part, key in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        kept = [step for step in steps(backend[part], key) if step["type"] != "Prepend"]
        for step in kept:
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
        backend[part] = {"type": "Sequence", key: kept} if kept else None
    return backend


def padding_share(lengths: list[int], rows: int) -> float:
    """Share of padding among the tokens computed when batches of `rows` are taken in this order."""
    computed = sum(max(lengths[at : at + rows]) * len(lengths[at : at + rows]) for at in range(0, len(lengths), rows))
    return 1 - sum(lengths) / computed
