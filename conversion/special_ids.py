"""BOS, EOS and padding: what config.json and generation_config.json say, held against the tokenizer.

Many published folders contradict themselves: the first public conversions of LLaMA begin with id 0 and end with id 1,
which are `<unk>` and `<s>`, so that generation stops at BOS and never at EOS; fine-tuned models keep the EOS of their
base; a padding id of -1 means none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llama_repro.errors import CheckpointError

if TYPE_CHECKING:
    from .source import Source

BOS, EOS, PAD = NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """What is written."""

    config: dict[str, Any]
    """Name -> id, list of ids (EOS), or None."""
    generation: dict[str, Any]
    """generation_config.json with its ids corrected; empty where the source has none."""
    notes: tuple[str, ...]


def decide_special_ids(source: "Source", tokenizer: Any | None) -> SpecialIds:
    """Return the special ids of a checkpoint, given transformers' `tokenizer` of it, or None.

    The tokenizer's count where it names them. An end that it does not name is kept beside its own if it is a special
    token of another meaning, as chat models have several. Raise CheckpointError where EOS is impossible and the
    tokenizer names none.
    """
    notes: list[str] = []
    given = {name: getattr(source.config, name) for name in NAMES}
    own = {name: getattr(tokenizer, name, None) for name in NAMES}
    if tokenizer is not None and source.token_ids_from_tokenizer:
        config = own
    else:
        config = _Decision(CONFIG_FILE, own, tokenizer, source.config.vocab_size, notes.append).of(given)
    generation = dict(source.generation_config)
    if generation:
        decision = _Decision(GENERATION_FILE, own, tokenizer, source.config.vocab_size, notes.append)
        generation |= decision.of({name: generation[name] for name in NAMES if name in generation})
        if generation.get(EOS) is None and config[EOS] is not None:
            generation[EOS] = config[EOS]
            notes.append(f"{GENERATION_FILE}: {EOS} {config[EOS]}, for it names none and generation would not end")
    return SpecialIds(config=config, generation=generation, notes=tuple(notes))


def without_foreign_padding(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return config.json's fields without a padding id that no row belongs to, and a note on it."""
    pad, rows = fields.get(PAD), fields.get("vocab_size")
    if type(pad) is not int or type(rows) is not int or 0 <= pad < rows:
        return dict(fields), ()
    meaning = "which means none" if pad == -1 else f"and the vocabulary {rows:,} rows"
    return {**fields, PAD: None}, (f"{PAD} none: {CONFIG_FILE} has {pad}, {meaning}",)


@dataclass(frozen=True)
class _Decision:
    file: str
    own: Mapping[str, int | None]
    tokenizer: Any | None
    rows: int
    decide: Callable[[str], None]

    def of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        ids = {name: self._checked(name, value) for name, value in given.items()}
        return {name: self._end(value) if name == EOS else self._other(name, value) for name, value in ids.items()}

    def _checked(self, name: str, value: Any) -> Any:
        listed = value if isinstance(value, list) and name == EOS else [value]
        if not all(index is None or type(index) is int for index in listed):
            raise CheckpointError(f"{self.file}: {name} is {value!r}, which is no token id: correct it")
        return value

    def _other(self, name: str, value: int | None) -> int | None:
        """BOS or padding."""
        own = self.own[name]
        if value is None or value == own or (own is None and 0 <= value < self.rows):
            return value
        if value == -1 and name == PAD:
            own = None  # transformers 4 let it stand for no padding token
        self.decide(f"{name} {self._named(own)}, {self._reason(own)}: {self.file} has {self._named(value)}")
        return own

    def _end(self, value: int | list[int] | None) -> int | list[int] | None:
        own, listed = self.own[EOS], value if isinstance(value, list) else [] if value is None else [value]
        possible = [index for index in listed if self._can_end(index)]
        if own is None:
            if possible == listed:
                return value
            if not possible:
                raise CheckpointError(
                    f"{self.file}: {EOS} {self._named(value)} ends no text, and the tokenizer names no EOS: set "
                    f"{EOS} there, or eos_token in tokenizer_config.json"
                )
        elif own in listed and all(0 <= index < self.rows for index in listed):
            return value
        ends = [own, *possible] if own is not None and own not in listed else possible
        ends = list(dict.fromkeys(ends))
        decided = ends if len(ends) > 1 or isinstance(value, list) else ends[0]
        self.decide(f"{EOS} {self._named(decided)}, {self._reason(own)}: {self.file} has {self._named(value)}")
        return decided

    def _can_end(self, index: int) -> bool:
        """Whether a text can end with it: a special token that does not already mean something else."""
        if not 0 <= index < self.rows:
            return False
        if self.tokenizer is None or index == self.own[EOS]:
            return True
        if index in (self.own[BOS], self.tokenizer.unk_token_id):
            return False
        token = self.tokenizer.added_tokens_decoder.get(index)
        return self.own[EOS] is None or (token is not None and token.special and index != self.own[PAD])

    def _reason(self, own: int | None) -> str:
        return "as no other id is in the vocabulary" if own is None else "as the tokenizer says"

    def _named(self, value: int | list[int] | None) -> str:
        if not isinstance(value, int):
            return "none" if value is None else " and ".join(map(self._named, value))
        if not 0 <= value < self.rows:
            return f"{value} (no token: {self.rows:,} rows)"
        token = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(value)
        return str(value) if token is None else f"{value} ({token})"
