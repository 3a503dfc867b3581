"""Compares the tokenizer of a converted folder with its source's own, and with one that is made of the source again.

Text that spells control tokens is compared twice: taken as text, which is what SentencePiece always does, and as the
folder itself takes it. The tokenizer made again comes first: what the converter refuses is not read here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .awkward_texts import AWKWARD_TEXTS, control_texts
from .checks import Check, compared
from .tokenizer_reference import Ids, Reference, references

_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
)


def compare_tokenizer(source: Path, found: Any, again: Any) -> Check:
    """Of `found`, the folder's tokenizer: vocabulary, ids and settings. `again` was made of the source once more."""
    outcomes = [(reference, _differences(reference, found, again)) for reference in references(source)]
    reference, differences = next((pair for pair in outcomes if not pair[1]), outcomes[0])
    texts = len(_texts(reference, found, parsed=False)) + (0 if reference.encode else len(reference.tokens))
    right = (
        f"{len(found):,} tokens, and the ids of {texts:,} texts, are those of {reference.name}"
        if reference.encode
        else f"{len(found):,} tokens are the source's; ids of {texts:,} texts are those of its tokenizer made again"
    )
    return compared("tokenizer", differences, right, {"texts": texts, "differing": differences})


def _texts(reference: Reference, found: Any, *, parsed: bool) -> list[str]:
    """Those of which the reference knows the ids: without tokens that only the folder takes out of text.

    `parsed`: control tokens are taken out of text as well.
    """
    texts = [*AWKWARD_TEXTS, *reference.texts]
    taken = {str(token) for token in found.added_tokens_decoder.values() if parsed or not token.special}
    unknown = taken - reference.matched - {""}
    return [text for text in texts if not any(token in text for token in unknown)] if unknown else texts


def _differences(reference: Reference, found: Any, again: Any) -> list[str]:
    return [
        *_other_tokens(reference, found, again),
        *_other_ids(reference, found, again),
        *(
            f"{name} is {getattr(found, name)}, not {getattr(again, name)}"
            for name in _SETTINGS
            if getattr(found, name, None) != getattr(again, name, None)
        ),
    ]


def _other_tokens(reference: Reference, found: Any, again: Any) -> Iterator[str]:
    # Not convert_ids_to_tokens, which gives what an added token is normalized to.
    vocabulary, expected_vocabulary = found.get_vocab(), again.get_vocab()
    tokens = {index: token for token, index in vocabulary.items()}
    differing = [
        (index, tokens.get(index), expected)
        for index, expected in enumerate(reference.tokens)
        if expected is not None and tokens.get(index) != expected
    ]
    if differing:
        index, token, expected = differing[0]
        yield f"{len(differing)} tokens differ, the first is {index}: {token!r}, not {expected!r}"
    for token, index in reference.added.items():
        if vocabulary.get(token) != index:
            yield f"the added token {token!r} is {vocabulary.get(token)}, not {index}"
    if vocabulary != expected_vocabulary:
        yield f"{len(set(vocabulary.items()) ^ set(expected_vocabulary.items()))} entries of the vocabulary differ"
    ours, theirs = found.added_tokens_decoder, again.added_tokens_decoder
    for index in sorted(ours.keys() | theirs.keys()):
        if repr(ours.get(index)) != repr(theirs.get(index)):
            yield f"the added token {index} is {ours.get(index)!r}, not {theirs.get(index)!r}"


def _other_ids(reference: Reference, found: Any, again: Any) -> Iterator[str]:
    pieces = [] if reference.encode else again.batch_decode([[index] for index in range(len(reference.tokens))])
    for split in (True, False):
        texts = [*_texts(reference, found, parsed=not split), *pieces]
        ids = _encode(found, texts, split=split, framed=False)
        if reference.encode is None:
            yield from _parting(texts, ids, _encode(again, texts, split=split, framed=False))
        elif split or reference.knows_control:
            yield from _parting(texts, ids, reference.encode(texts, split))
    (bare,), (full,) = (_encode(found, ["a"], framed=framed) for framed in (False, True))
    if full not in [[*front, *bare, *end] for front, end in reference.frames]:
        yield f"the ids of 'a' with what is put around every text are {full}, and without {bare}"
    added = [str(token) for token in found.added_tokens_decoder.values()]
    spelling = [*AWKWARD_TEXTS, *control_texts(added)]
    ids = _encode(found, spelling)
    yield from _parting(spelling, ids, _encode(again, spelling))
    if found.batch_decode(ids) != again.batch_decode(ids):
        yield "ids are decoded to other texts"


def _encode(tokenizer: Any, texts: list[str], *, split: bool | None = None, framed: bool = True) -> Ids:
    """`split` None: as the folder takes control tokens that are spelt. `framed`: with BOS and EOS, if it puts any."""
    return tokenizer(texts, split_special_tokens=split, add_special_tokens=framed, verbose=False).input_ids


def _parting(texts: list[str], found: Ids, expected: Ids) -> Iterator[str]:
    differing = [
        number for number, (ids, right) in enumerate(zip(found, expected, strict=True)) if list(ids) != list(right)
    ]
    if differing:
        first = differing[0]
        yield (
            f"{len(differing)} of {len(texts)} texts have other ids, the first {texts[first][:60]!r}: "
            f"{found[first][:10]}, not {expected[first][:10]}"
        )


def compare_template(said: dict[str, str], found: Any, again: Any, *, chat: bool) -> Check:
    """`said`: the source's; `again`: what would be written. `chat`: a source without one is given LLaMA 2's."""
    differences = []
    if found != again:
        differences = [f"{_length(found)}, not {_length(again)}"]
    elif _by_name(found) != said and (said or not chat):
        differences = [f"{_length(found)}, but the source has {_length(said or None)}"]
    own = "the source's" if said else "LLaMA 2's, as for a chat model"
    return compared("chat template", differences, "none, as in the source" if found is None else own)


def _by_name(template: Any) -> dict[str, str]:
    return {"default": template} if isinstance(template, str) else dict(template or {})


def _length(template: Any) -> str:
    if template is None:
        return "none"
    lengths = [f"{name} of {len(text)} characters ({text[:30]!r} ...)" for name, text in _by_name(template).items()]
    return f"templates: {', '.join(lengths)}"
