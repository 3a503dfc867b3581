"""The data of pre-training: sources, tokens on the disk, their order, and what is measured on what was kept."""

import gzip
import json
import math
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from pretrain_runs import CONTEXT, invented, sources, tiny_pretraining

from hf_llama_repro.errors import InputError
from pretrain.held_out import IGNORED, windows, xz_bits_per_byte
from pretrain.mixture import Mixture, Shuffle, Stream
from pretrain.prepared import Prepared, Tokens, open_prepared, prepare
from pretrain.python_library import documentation_documents, source_documents
from pretrain.recipe import Recipe, Source, load_recipe
from pretrain.sources import documents, is_held_out
from pretrain.tokenizer import load_processor

BOS, EOS = 1, 2


@pytest.fixture
def prepared(pretrain_recipe: Recipe) -> Prepared:
    return open_prepared(pretrain_recipe)


def texts_of(tokens: Tokens, recipe: Recipe) -> list[str]:
    processor = load_processor(recipe)
    return [processor.decode(tokens.ids[tokens.start(n) : tokens.ends[n]].tolist()) for n in range(len(tokens))]


def as_documents(ids: list[int]) -> list[tuple[int, ...]]:
    """The whole documents among tokens that begin with a BOS."""
    found, current = [], []
    for token in ids:
        current.append(token)
        if token == EOS:
            found.append(tuple(current))
            current = []
    return found


TEXTS = ["", "one\n", "  two\r\n\tthree", "四 5 😀", '"quoted"\\n', "x" * 5000]


@pytest.mark.parametrize("format", ["text", "jsonl", "jsonl.gz", "parquet", "dataset"])
def test_a_source_gives_the_texts_that_were_written(format, tmp_path):
    import datasets

    key, where = "content", tmp_path / "data"
    where.mkdir()
    if format == "text":
        for number, text in enumerate(TEXTS):
            (where / f"{number}.txt").write_bytes(text.encode())
        files = (str(where / "*.txt"),)
    elif format.startswith("jsonl"):
        lines = "".join(json.dumps({"id": 1, key: text}) + "\n" for text in TEXTS).encode()
        path = where / f"file.{format}"
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
        files = (str(path),)
    else:
        datasets.Dataset.from_dict({key: TEXTS, "id": list(range(len(TEXTS)))}).to_parquet(where / "part.parquet")
        files = (str(where / "part.parquet"),) if format == "parquet" else (str(where),)
    source = Source(name="s", format=format.removesuffix(".gz"), files=files, text_key=key, share=1.0)
    assert list(documents(source)) == TEXTS


def test_the_held_out_documents_are_not_trained_on_and_nothing_else_is_missing(pretrain_recipe, prepared):
    for source in pretrain_recipe.sources:
        everything = list(documents(source))
        train, kept = (texts_of(tokens[source.name], pretrain_recipe) for tokens in (prepared.train, prepared.held_out))
        assert kept
        assert not set(train) & set(kept)
        assert sorted(train + kept) == sorted(everything)
        assert int(prepared.held_out[source.name].num_bytes.sum()) == sum(len(text.encode()) for text in kept)


def test_a_documents_content_alone_decides_whether_it_is_held_out():
    texts = invented(4000, seed=3)
    share = sum(is_held_out(text, 0.2) for text in texts) / len(texts)
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / len(texts))
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.2))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 10_000])
def test_the_order_of_an_epoch_is_a_permutation(size):
    shuffle = Shuffle(size, "key")
    assert sorted(map(shuffle, range(size))) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(map(Shuffle(1000, key), range(1000))) for key in ("1 a 0", "1 a 1", "2 a 0", "1 b 0")]
    assert len(set(orders)) == 4
    # Of a random permutation one element, on average, stays in its place.
    assert all(sum(place == index for place, index in enumerate(order)) < 10 for order in orders)
    assert Shuffle(10**12, "key")(5) == Shuffle(10**12, "key")(5) < 10**12


def documents_of_rows(tokens: Tokens, lanes: int, epochs: int) -> Counter[tuple[int, ...]]:
    """Every document of the rows of a source's first epochs, from the rows' targets alone."""
    stream, targets = Stream("more", tokens, seed=7, lanes=lanes), [[BOS] for _ in range(lanes)]
    of_lane = [len(range(lane, len(tokens), lanes)) for lane in range(lanes)]
    lane = 0
    while any(len(as_documents(ids)) < epochs * count for ids, count in zip(targets, of_lane, strict=True)):
        targets[lane] += stream.take(CONTEXT, read=True)[1:].tolist()
        lane = (lane + 1) % lanes
    return Counter(
        document
        for ids, count in zip(targets, of_lane, strict=True)
        for document in as_documents(ids)[: epochs * count]
    )


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("lanes", [1, 4])
def test_no_document_is_lost_or_doubled(epochs, lanes, prepared):
    tokens = prepared.train["more"]
    expected = {tuple(tokens.ids[tokens.start(n) : tokens.ends[n]].tolist()): epochs for n in range(len(tokens))}
    assert documents_of_rows(tokens, lanes, epochs) == Counter(expected)


def test_the_count_sees_a_document_that_is_cut_out(prepared):
    tokens = prepared.train["more"]
    keep = np.arange(len(tokens.ids)) >= tokens.ends[0]
    fewer = Tokens(tokens.ids[keep], tokens.ends[1:] - tokens.ends[0], tokens.num_bytes[1:])
    assert sum(documents_of_rows(tokens, 4, 1).values()) == sum(documents_of_rows(fewer, 4, 1).values()) + 1


def test_each_row_begins_with_the_token_that_its_lanes_row_before_ended_with(prepared):
    stream = Stream("words", prepared.train["words"], seed=0, lanes=3)
    rows = [stream.take(CONTEXT, read=True) for _ in range(60)]
    assert all(before[-1] == after[0] for before, after in zip(rows, rows[3:], strict=False))
    assert all(len(row) == CONTEXT + 1 for row in rows)


def test_the_rows_of_a_step_are_of_different_documents(pretrain_recipe, prepared):
    rows = Mixture(pretrain_recipe, prepared.train).next_rows(8, range(8))
    assert (rows[:, 0] == BOS).all()
    assert len({tuple(row) for row in rows.tolist()}) == 8


def test_every_source_has_its_share_after_every_row(pretrain_recipe, prepared):
    mixture = Mixture(pretrain_recipe, prepared.train)
    for rows in range(1, 600):
        mixture.next_rows(1, {0})
        for source in pretrain_recipe.sources:
            assert abs(mixture.streams[source.name].rows - source.share * rows) < 1
    stream, seen = mixture.streams["more"], mixture.epochs()["more"]
    assert seen == pytest.approx(stream.rows * CONTEXT / len(prepared.train["more"].ids))
    assert int(seen) > 1
    assert {abs(place.epoch - int(seen)) for place in stream.places} <= {0, 1}


@pytest.mark.parametrize("step", [0, 1, 2, 7, 40])
def test_the_order_goes_on_from_any_step(step, pretrain_recipe, prepared):
    mixture = Mixture(pretrain_recipe, prepared.train)
    for _ in range(step):
        mixture.next_rows(8, range(8))
    state = json.loads(json.dumps(mixture.state_dict()))
    resumed = Mixture(pretrain_recipe, prepared.train)
    resumed.load_state_dict(state)
    for _ in range(30):  # across the ends of epochs
        assert (mixture.next_rows(8, range(8)) == resumed.next_rows(8, range(8))).all()


def test_processes_together_have_the_rows_of_one(pretrain_recipe, prepared):
    alone = Mixture(pretrain_recipe, prepared.train)
    two = [Mixture(pretrain_recipe, prepared.train) for _ in range(2)]
    for _ in range(20):
        whole = alone.next_rows(8, range(8))
        halves = [mixture.next_rows(8, range(rank, 8, 2)) for rank, mixture in enumerate(two)]
        assert (whole[0::2] == halves[0]).all()
        assert (whole[1::2] == halves[1]).all()


def test_prepared_tokens_are_kept_until_files_or_settings_change(text_folder, pretrain_data, tmp_path):
    shutil.copytree(text_folder, tmp_path / "texts")
    shutil.copytree(pretrain_data, tmp_path / "data")
    recipe = tiny_pretraining(tmp_path / "texts", tmp_path / "run", data_dir=str(tmp_path / "data"))
    assert len(prepare(recipe)) == 2  # other paths
    assert prepare(recipe) == []
    (tmp_path / "texts" / "words" / "new.txt").write_text("one document more")
    assert prepare(recipe) == ["prepare     words: its files or settings changed"]
    assert "one document more" in [
        text
        for tokens in (open_prepared(recipe).train["words"], open_prepared(recipe).held_out["words"])
        for text in texts_of(tokens, recipe)
    ]


def test_windows_predict_every_token_once_from_at_least_half_a_context():
    for count in (2, 9, 10, 11, 95, 200):
        ids = np.arange(1000, 1000 + count)
        seen = []
        for inputs, targets in windows(ids, 10):
            places = np.flatnonzero(targets != IGNORED)
            assert (targets[places] == inputs[places] + 1).all()
            assert not seen or places[0] >= 5
            seen += targets[places].tolist()
        assert seen == ids[1:].tolist()


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_a_token(pretrain_recipe, prepared):
    from accelerate import Accelerator

    from hf_llama_repro import LlamaReproForCausalLM
    from pretrain.held_out import bits
    from pretrain.plan import model_config

    model = LlamaReproForCausalLM(model_config(pretrain_recipe, 400))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = prepared.held_out["more"].ids
    found = bits(model, Accelerator(cpu=True), ids, pretrain_recipe)
    assert found == pytest.approx((len(ids) - 1) * math.log2(400), rel=1e-6)


@pytest.mark.skipif(shutil.which("xz") is None, reason="the command xz is not installed")
def test_xz_is_what_the_command_gives(pretrain_recipe, tmp_path):
    kept, train = b"", b""
    for source in pretrain_recipe.sources:
        for text in documents(source):
            if is_held_out(text, pretrain_recipe.held_out):
                kept += text.encode()
            else:
                train += text.encode()

    def size(content: bytes) -> int:
        return len(subprocess.run(["xz", "-9", "-T1", "-c"], input=content, capture_output=True, check=True).stdout)

    alone, after = xz_bits_per_byte(pretrain_recipe, lambda _: None)["all"]
    assert alone == 8 * size(kept) / len(kept)
    assert after == 8 * (size(train + kept) - size(train)) / len(kept)
    assert after < alone


def test_the_tokenizer_is_llamas_kind(pretrain_recipe):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrain_recipe.data_path / "tokenizer")
    processor = load_processor(pretrain_recipe)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert len(tokenizer) == 400
    text = "  1234 über\n\n\tx = '😀'   "
    ids = processor.encode(text)
    assert tokenizer(text)["input_ids"] == [BOS, *ids]
    assert processor.decode(ids) == text
    pieces = processor.encode(text, out_type=str)
    assert not [piece for piece in pieces if "<" not in piece and sum(map(str.isdigit, piece)) > 1]
    assert "<0xF0>" in pieces  # of the emoji's bytes


def test_docstrings_are_documentation_and_not_in_the_sources():
    import json.decoder

    code, text = "".join(source_documents()), "".join(documentation_documents())
    docstring = (json.decoder.JSONDecoder.__doc__ or "").strip().splitlines()[0]
    assert docstring in text
    assert docstring not in code
    assert "class JSONDecoder:" in code or "class JSONDecoder(object):" in code
    assert "json.decoder.JSONDecoder" in text
    recipe = load_recipe("tiny")
    held_out = sum(
        len(document.encode("utf-8", "surrogatepass"))
        for source in recipe.sources
        for document in documents(source)
        if is_held_out(document, recipe.held_out)
    )
    assert held_out >= 2_000_000


def test_a_context_longer_than_any_document_is_refused(pretrain_recipe, text_folder, pretrain_data, tmp_path):
    recipe = tiny_pretraining(
        text_folder, tmp_path, data_dir=str(pretrain_data), context_length=4096, batch_tokens=4 * 4096, tokens=10**6
    )
    with pytest.raises(InputError, match=r"=4096 is longer than any document: the longest has \d+ tokens"):
        open_prepared(recipe)


def test_a_mixture_may_be_two_thirds_and_a_third(text_folder, tmp_path):
    assert tiny_pretraining(text_folder, tmp_path, sources=sources(text_folder, (2 / 3, 0.3333333)))
