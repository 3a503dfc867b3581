"""A folder's tokenizer.json, compared with the files beside it."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import CheckpointError

from .awkward_texts import AWKWARD_TEXTS
from .hugging_face_tokenizer import (
    FAITHFUL_CLASS,
    JSON_FILE,
    MODEL_FILE,
    Spaces,
    check_opened,
    class_clause,
    expected_ids,
    first_differing,
    opened,
    raw_tokenizer,
    with_added,
)
from .slow_tokenizer import AddedToken, texts_with
from .tokenizer import (
    NO_TOKENIZER,
    Pipeline,
    TokenTable,
    build_post_processor,
    check_ids,
    describe_spare_rows,
    llama2_template,
    loaded,
    proof_texts,
    read_json,
    read_sentencepiece,
    write_json,
)
from .tokenizer_settings import (
    ADDED_FILE,
    CONFIG_FILE,
    OLD_TEMPLATE_FILE,
    SPECIAL_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TokenizerSettings,
    named_tokens,
    write_templates,
)

# Files of a folder that make up its tokenizer, besides tokenizer.json and tokenizer_config.json.
_COPIED_FILES = (SPECIAL_FILE, ADDED_FILE, TEMPLATE_FILE, OLD_TEMPLATE_FILE, MODEL_FILE, "vocab.json", "merges.txt")
# These open tokenizer.json as it is, whatever else the configuration says.
_FAITHFUL_CLASSES = (FAITHFUL_CLASS, "TokenizersBackend")


class JsonConversion:
    """A folder's tokenizer.json is copied, and changed only where another of its files proves it wrong."""

    def __init__(
        self,
        file: Path,
        target: Path,
        settings: TokenizerSettings,
        vocab_size: int,
        decide: Callable[[str], None],
        *,
        is_named: bool,
    ):
        self.file, self.target, self.settings, self.decide = file, target, settings, decide
        self.is_named = is_named  # by itself, and not found in its folder
        self.content = self.original = read_json(file)
        vocabulary = self._vocabulary()
        self.spare_rows = describe_spare_rows(vocabulary, vocab_size, file)
        # Some that load fail, or panic, at the first text.
        loaded(lambda: raw_tokenizer(self.original, file).encode_batch(list(AWKWARD_TEXTS)), file)
        self.tokens, self.ids = self._with_named_tokens(vocabulary)
        self.spare_rows = describe_spare_rows(self._vocabulary(), vocab_size, file)
        self.options = dict(settings.options)
        self.copies_model = (settings.folder / MODEL_FILE).is_file()

    def convert(self, *, chat: bool) -> str:
        compared = self._compare_with_model() if self.copies_model else ""
        self._match_flags()
        templates = dict(self.settings.templates)
        if chat:
            templates = self._with_llama2_chat(templates)
        self._write_files()
        texts = [*AWKWARD_TEXTS, *texts_with(self.tokens)]
        clause = self._write_class(texts)
        found = check_opened(self.target, texts, self.file)
        if templates and found.chat_template not in (templates.get("default"), templates):
            write_templates(templates, self.target)
        changed = "copied" if self.content is self.original else "changed"
        return (
            f"Hugging Face tokenizer, {max(self._vocabulary().values()) + 1:,} tokens, {changed}{clause}"
            f", {'chat template' if templates else 'no chat template'}{compared}{self.spare_rows}"
        )

    def _vocabulary(self) -> dict[str, int]:
        """Token -> id, with the added tokens."""
        try:
            vocabulary = self.content["model"]["vocab"]
            if not isinstance(vocabulary, dict):  # unigram: [piece, score]
                vocabulary = {piece: index for index, (piece, _score) in enumerate(vocabulary)}
            if not vocabulary:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.file}: not a Hugging Face tokenizer.json (no model.vocab). {NO_TOKENIZER}"
            ) from error
        try:
            added = {token["content"]: token["id"] for token in self.content.get("added_tokens") or []}
            if not all(type(index) is int for index in (*vocabulary.values(), *added.values())):
                raise TypeError
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.file}: not a tokenizer that can be loaded (a token without text or id). {NO_TOKENIZER}"
            ) from error
        return {**vocabulary, **added}

    def _with_named_tokens(self, vocabulary: dict[str, int]) -> tuple[list[AddedToken], dict[str, int | None]]:
        """Return the added tokens and the special ids, after adding those that only the other files name."""
        entries = self.content.get("added_tokens") or []
        tokens, ids = named_tokens(self.settings, vocabulary, self.decide)
        present = {entry["content"] for entry in entries}
        for token in tokens:
            if vocabulary.get(token.content, token.id) != token.id:
                raise CheckpointError(
                    f"{self.settings.folder}: the token {token.content!r} has the id {token.id} beside tokenizer.json "
                    f"and {vocabulary[token.content]} in it: remove the file that is not the model's. {NO_TOKENIZER}"
                )
        missing = [token for token in tokens if token.content not in present]
        if missing:
            vocabulary_now = self.content["model"]["vocab"]
            if isinstance(vocabulary_now, dict):
                new = {token.content: token.id for token in missing}
                model = {**self.content["model"], "vocab": {**vocabulary_now, **new}}
            else:
                model = self.content["model"]
            entries = sorted([*entries, *map(_entry, missing)], key=lambda entry: entry["id"])
            self.content = {**self.content, "added_tokens": entries, "model": model}
            self.decide(
                f"{', '.join(repr(token.content) for token in missing)}: not among the added tokens of tokenizer.json, "
                "added as the files beside it say"
            )
        flags = ("id", "content", "special", "lstrip", "rstrip")
        return [AddedToken(**{flag: entry[flag] for flag in flags}) for entry in entries], ids

    def _compare_with_model(self) -> str:
        """Return a clause on the comparison; take over SentencePiece's text processing where the ids differ."""
        model = self.settings.folder / MODEL_FILE
        try:
            pieces, scores, dummy_prefix = read_sentencepiece(model)
        except CheckpointError as error:
            self.copies_model = False
            self.decide(f"tokenizer.json alone is used; tokenizer.model is not compared and not copied: {error}")
            return ""
        vocabulary, added = self._vocabulary(), {token.id for token in self.tokens}
        own = len(set(vocabulary.values()) - added - set(range(len(pieces.tokens))))
        other = sum(vocabulary.get(piece) != index and index not in added for piece, index in pieces.ids.items())
        if own or other:
            which = f"tokenizer.json and tokenizer.model are different tokenizers ({own or other:,} tokens differ)"
            if self.is_named:
                self.copies_model = False
                self.decide(f"{which}: the first is used, as asked for, and the other one is not copied")
                return ""
            raise CheckpointError(
                f"{self.settings.folder}: {which}: name the model's own by --tokenizer, or remove the other one"
            )
        table = with_added(pieces, self.tokens, self.settings.folder)
        table = replace(table, splits_special_tokens=self.settings.option("split_special_tokens", False))
        found, best = self._raw_ids(table, scores), None
        for spaces in self._possible_spaces():
            texts, expected = expected_ids(model, table, scores, spaces)
            wrong = [text for text, one, other in zip(texts, found, expected, strict=True) if one != other]
            if best is None or len(wrong) < len(best[0]):
                best = wrong, texts, expected, spaces
            if not wrong:
                break
        assert best is not None
        wrong, texts, expected, spaces = best
        if wrong:
            self._take_over(spaces.pipeline(table, scores, dummy_prefix=dummy_prefix))
            tokenizer = raw_tokenizer(self.content, self.file)
            tokenizer.encode_special_tokens = table.splits_special_tokens
            check_ids(tokenizer, texts, expected, model)
            self.decide(
                f"text is cut as tokenizer.model does: tokenizer.json gives other ids on {len(wrong):,} of "
                f"{len(texts):,} texts, the first {wrong[0][:40]!r}"
            )
        return f"; ids equal SentencePiece's on {len(texts):,} texts"

    def _possible_spaces(self) -> list[Spaces]:
        """Where no file says which, the one that tokenizer.json is nearest to."""
        if not self.settings.option("add_prefix_space", True):
            return [Spaces(legacy=False, prefix=False)]
        said = self.settings.options.get("legacy")
        return [Spaces(legacy) for legacy in (True, False) if said in (None, legacy)]

    def _raw_ids(self, table: TokenTable, scores: list[float]) -> list[list[int]]:
        tokenizer = raw_tokenizer(self.content, self.file)
        tokenizer.encode_special_tokens = table.splits_special_tokens
        texts = [*proof_texts(table, scores), *texts_with(table.added or ())]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _take_over(self, pipeline: Pipeline) -> None:
        entries = self.content["added_tokens"]
        if strange := [entry["content"] for entry in entries if entry["single_word"]]:
            raise CheckpointError(
                f"{self.file}: other ids than tokenizer.model's, and the added token {strange[0]!r} is a single_word, "
                f"which cannot be compared. {NO_TOKENIZER}"
            )
        parts = {name: getattr(pipeline, name) for name in ("normalizer", "pre_tokenizer", "decoder", "model")}
        self.content = {
            **self.content,
            **parts,
            "added_tokens": [{**entry, "normalized": False} for entry in entries],
        }

    def _match_flags(self) -> None:
        """Make add_bos_token and add_eos_token say what tokenizer.json does, or the other way round.

        The classes that rebuild a tokenizer went by the flags in transformers 4; the others by tokenizer.json.
        """
        tokenizer = raw_tokenizer(self.content, self.file)
        bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((place for place in range(len(full)) if full[place : place + len(bare)] == bare), 0)
        does = {"bos": self.ids["bos"] in full[:start], "eos": self.ids["eos"] in full[start + len(bare) :]}
        says = {name: self.settings.option(f"add_{name}_token", does[name]) for name in does}
        if does == says:
            return
        goes_by_flags = self.options.get("tokenizer_class") not in (None, *_FAITHFUL_CLASSES)
        if goes_by_flags:
            names = {index: token for token, index in self._vocabulary().items()}
            bos, eos = ((says[name], self.ids[name]) for name in ("bos", "eos"))
            self.content = {**self.content, "post_processor": build_post_processor(names, bos, eos, self.file)}
        else:
            self.options |= {f"add_{name}_token": done for name, done in does.items()}
        for name in (name for name in does if does[name] != says[name]):
            winner, now = (CONFIG_FILE, says) if goes_by_flags else (JSON_FILE, does)
            self.decide(f"{name.upper()} is {'' if now[name] else 'not '}added to every text, as {winner} says")

    def _with_llama2_chat(self, templates: dict[str, str]) -> dict[str, str]:
        if templates:
            self.decide("chat template: the tokenizer's own, not LLaMA 2's")
            return templates
        names = {index: token for token, index in self._vocabulary().items()}
        control = [names[index] for name in ("bos", "eos", "unk") if (index := self.ids[name]) is not None]
        if not self.content["model"].get("byte_fallback") or self.ids["bos"] is None or self.ids["eos"] is None:
            raise CheckpointError(
                f"{self.file}: a chat model's tokenizer without a chat template, and LLaMA 2's template is for LLaMA's "
                "SentencePiece tokenizer with BOS and EOS, which this is not: name one that has a template by "
                "--tokenizer, or convert with --no-chat"
            )
        self.options["split_special_tokens"] = False  # the template writes BOS and EOS as text
        return {"default": llama2_template(control)}

    def _write_files(self) -> None:
        if self.content is self.original:
            shutil.copyfile(self.file, self.target / JSON_FILE)
        else:
            loaded(lambda: raw_tokenizer(self.content, self.file).save(str(self.target / JSON_FILE)), self.file)
        for name in _COPIED_FILES:
            if (self.settings.folder / name).is_file() and (name != MODEL_FILE or self.copies_model):
                shutil.copyfile(self.settings.folder / name, self.target / name)
        if (self.settings.folder / TEMPLATE_FOLDER).is_dir():
            shutil.copytree(self.settings.folder / TEMPLATE_FOLDER, self.target / TEMPLATE_FOLDER)

    def _write_class(self, texts: list[str]) -> str:
        """Write tokenizer_config.json with a class that opens tokenizer.json as it is; return a clause on it."""
        before = self.options.get("tokenizer_class")
        if before is not None:
            self._write_options()
            if before in _FAITHFUL_CLASSES or self._opens_as(before, texts):
                return ""
        self.options["tokenizer_class"] = FAITHFUL_CLASS
        if self.options.pop("auto_map", None):
            self.decide(f"auto_map of {CONFIG_FILE} is left out: a tokenizer's own code is not run")
        self._write_options()
        return class_clause(before or "unnamed", FAITHFUL_CLASS)

    def _opens_as(self, name: str, texts: list[str]) -> bool:
        """Whether AutoTokenizer has the class, without a folder's own code, and it gives the ids of tokenizer.json."""
        try:
            found = opened(self.target, self.file)
        except CheckpointError:
            return False
        return type(found).__name__ == str(name).removesuffix("Fast") and (
            first_differing(found, self.target, texts) is None
        )

    def _write_options(self) -> None:
        file = self.settings.folder / CONFIG_FILE
        if self.options == self.settings.options and file.is_file():
            shutil.copyfile(file, self.target / CONFIG_FILE)
        else:
            write_json(self.target / CONFIG_FILE, self.options)


def _entry(token: AddedToken) -> dict[str, Any]:
    return {**asdict(token), "single_word": False, "normalized": False}
