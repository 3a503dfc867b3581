"""Tokenizers as people's folders have them: several files that add to one another, or contradict one another."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from adapters import adapter_folder
from meta_checkpoints import meta_params, meta_weights, write_meta
from random_models import random_model, stock_twin, tiny_config
from sentencepiece import SentencePieceProcessor
from sentencepiece_fixtures import DIALOGS, metas_ids
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from conversion import hugging_face_tokenizer
from conversion.awkward_texts import AWKWARD_TEXTS
from conversion.convert import main
from conversion.export import main as export_main
from conversion.merge import main as merge_main
from conversion.special_ids import decide_special_ids
from conversion.tokenizer import convert_tokenizer
from hf_llama_repro.errors import CheckpointError

VOCAB = 500
END, START = "<|im_end|>", "<|im_start|>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATES = {"default": TEMPLATE, "t": "T"}
CHAT_TEXT = f"{START}user\n  hello 2023{END}\n{START}assistant\n"
SPELLING = (CHAT_TEXT, f"a{END}b", f" {START} ", f"{END}{END} x", "<s>hello</s> hello</s>", f"x</s>{START}")
# What LLaMA's slow tokenizer makes of it: special tokens are those that a file names, and no others.
CHATML = {
    "added_tokens.json": {END: 500, START: 501},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>"},
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE, "padding_side": "left"},
}


def written(folder, model, files):
    """The folder with a SentencePiece model and other files of a tokenizer."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def opened(source, target, *, rows=502, chat=False):
    """What AutoTokenizer makes of the converted folder, and what was decided."""
    decided = []
    target.mkdir()
    convert_tokenizer(source, target, vocab_size=rows, context_length=64, chat=chat, decide=decided.append)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.decided = decided
    return tokenizer


def slow_ids(processor, text, tokens):
    """SentencePiece's ids of what is between added tokens, each of which is followed by a new leading space."""
    pattern = "(" + "|".join(map(re.escape, tokens)) + ")"
    parts = (part for part in re.split(pattern, text) if part)
    return [index for part in parts for index in ([tokens[part]] if part in tokens else processor.encode(part))]


@pytest.fixture(scope="module")
def processor(small_model):
    return SentencePieceProcessor(model_file=str(small_model))


@pytest.fixture
def chatml(small_model, tmp_path):
    """A tokenizer's folder of the years before tokenizer.json, with ChatML's tokens on LLaMA's."""
    return written(tmp_path / "chatml", small_model, CHATML)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A stock Llama with a row for each token, and without a tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    stock_twin(random_model(tiny_config(vocab_size=502))).save_pretrained(folder)
    return folder


def model_folder(folder, weights, tokenizer):
    """A checkpoint of those weights and that tokenizer."""
    shutil.copytree(weights, folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_field_chatml_folder_keeps_its_tokens_eos_and_template(chatml, weights, processor, tmp_path, capsys):
    source = model_folder(tmp_path / "model", weights, chatml)
    assert main([str(source), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    named = {"<unk>": 0, "<s>": 1, END: 500, START: 501}
    for text in (*AWKWARD_TEXTS, *SPELLING):
        assert tokenizer(text).input_ids == [1, *slow_ids(processor, text, named)], text
    assert len(tokenizer) == 502
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", END, 500)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.padding_side == "left"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ours" / name).read_text())["eos_token_id"] == 500
    assert "2 added tokens" in said
    assert re.search(r"decided +eos_token_id 500 \(<\|im_end\|>\), as the tokenizer says: config.json has 2", said)


def test_field_legacy_false_puts_a_space_before_the_text_and_no_stretch_after_a_token(chatml, processor, tmp_path):
    edit(chatml / "tokenizer_config.json", legacy=False)
    edit(chatml / "special_tokens_map.json", additional_special_tokens=[START])
    tokenizer = opened(chatml, tmp_path / "ours")
    for text in AWKWARD_TEXTS:
        if "<s>" not in text and "<unk>" not in text:
            assert tokenizer(text).input_ids == [1, *processor.encode(text)], text
    without_prefix = SentencePieceProcessor(model_proto=processor.serialized_model_proto() + b"\x1a\x02\x18\x00")
    assert tokenizer(f" a{END}hello").input_ids == [1, *processor.encode(" a"), 500, *without_prefix.encode("hello")]
    assert tokenizer(f"{START} a").input_ids == [1, 501, *processor.encode("a")]
    assert not tokenizer.decided


def test_field_flags_of_added_tokens_are_kept(small_model, tmp_path):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    decoder = {
        "500": {"content": END, "special": True, **flags, "rstrip": True},
        "501": {"content": START, "special": False, **flags, "lstrip": True},
    }
    source = written(tmp_path / "source", small_model, {"tokenizer_config.json": {"added_tokens_decoder": decoder}})
    tokenizer = opened(source, tmp_path / "ours")
    assert tokenizer(f"a{END}  \n hello").input_ids == [
        *tokenizer("a").input_ids,
        500,
        *tokenizer("hello").input_ids[1:],
    ]
    assert tokenizer(f"a  \n{START}").input_ids == [*tokenizer("a").input_ids, 501]
    assert tokenizer.decode([500, 501], skip_special_tokens=True) == START


def test_field_add_bos_add_eos_and_a_padding_token_without_an_id(small_model, processor, tmp_path):
    config = {"add_bos_token": False, "add_eos_token": True, "pad_token": "[PAD]"}
    source = written(tmp_path / "source", small_model, {"tokenizer_config.json": config})
    tokenizer = opened(source, tmp_path / "ours")
    assert tokenizer("hello").input_ids == [*processor.encode("hello"), 2]
    assert tokenizer.pad_token_id == 500
    assert tokenizer.decided == ["pad_token '[PAD]' has no id in the files: 500, the next that is free"]


def test_field_special_tokens_of_alpaca_and_of_the_first_conversions(small_model, processor, tmp_path):
    alpaca = {
        "added_tokens.json": {"[PAD]": 500},
        "special_tokens_map.json": {
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"),
            "pad_token": "[PAD]",
        },
    }
    tokenizer = opened(written(tmp_path / "alpaca", small_model, alpaca), tmp_path / "one")
    assert tokenizer("<s>").input_ids == [2, *processor.encode("<s>")]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 500)
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    first = written(tmp_path / "first", small_model, {"tokenizer_config.json": empty, "special_tokens_map.json": {}})
    tokenizer = opened(first, tmp_path / "two")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert "eos_token is empty in tokenizer_config.json, and taken as not given" in tokenizer.decided


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": [{"name": n, "template": t} for n, t in TEMPLATES.items()]}},
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/t.jinja": "T"},
        {"chat_template.json": {"chat_template": TEMPLATES}},
    ],
    ids=["list", "files", "older file"],
)
@pytest.mark.parametrize("with_json", [False, True])
def test_field_named_chat_templates_are_kept_wherever_they_lie(files, with_json, small_model, tmp_path):
    source = written(tmp_path / "source", small_model, files)
    if with_json:
        convert_tokenizer(small_model, source, vocab_size=VOCAB, context_length=64)
        for name, content in files.items():
            if name == "tokenizer_config.json":
                edit(source / name, **content)
    assert opened(source, tmp_path / "ours").chat_template == TEMPLATES


def test_field_keys_that_are_not_used_and_templates_that_contradict_are_reported(chatml, tmp_path):
    edit(
        chatml / "tokenizer_config.json", fill_token="<FILL>", auto_map={"AutoTokenizer": ["x.Y", None]}, use_fast=True
    )
    (chatml / "chat_template.jinja").write_text("other")
    tokenizer = opened(chatml, tmp_path / "ours")
    assert tokenizer.chat_template == "other"
    assert tokenizer.decided == [
        "chat template of chat_template.jinja; another one, in an older place, is not used",
        "tokenizer_config.json: auto_map, fill_token are not used",
    ]


def config(**fields):
    return {"tokenizer_config.json": fields}


def decoder(index, **fields):
    return config(added_tokens_decoder={index: {"content": END, **fields}})


REFUSED = {
    "two ids": ({"added_tokens.json": {END: 500}, **decoder("501")}, "contradict each other"),
    "a gap": ({"added_tokens.json": {END: 501}}, "has the id 501, and no token has the ids from 500"),
    "a piece's id": ({"added_tokens.json": {END: 400}}, "has the id 400, which is the piece"),
    "no row": ({"added_tokens.json": {END: 500, START: 501, "x": 502}}, "'x' has no row"),
    "no answer": (config(add_bos_token="yes"), "add_bos_token is 'yes', neither true nor false"),
    "single word": (decoder("500", single_word=True), "single_word"),
    "a template's name": (config(chat_template=[{"name": "../t", "template": "T"}]), "neither a text nor a list"),
    "prefix": (config(add_prefix_space=False), "add_prefix_space is false and legacy is not"),
    "no JSON": ({"added_tokens.json": "<html>"}, "not readable as JSON"),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_field_tokenizers_files_that_cannot_be_right_are_refused(files, message, small_model, tmp_path):
    source = written(tmp_path / "source", small_model, files)
    with pytest.raises(CheckpointError, match=message):
        opened(source, tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


def test_proof_fails_where_spaces_are_put_elsewhere(chatml, tmp_path, monkeypatch):
    """A planted fault: `legacy` false, but a space after every added token."""
    edit(chatml / "tokenizer_config.json", legacy=False)
    right = hugging_face_tokenizer.Spaces.pipeline
    wrong = hugging_face_tokenizer.Spaces(legacy=True)
    monkeypatch.setattr(
        hugging_face_tokenizer.Spaces, "pipeline", lambda self, table, scores, **kw: right(wrong, table, scores, **kw)
    )
    with pytest.raises(CheckpointError, match="should give"):
        opened(chatml, tmp_path / "ours")


def test_field_tokenizer_beside_an_adapter_may_be_a_sentencepiece_model(chatml, weights, tmp_path, capsys):
    base = shutil.copytree(weights, tmp_path / "base")
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj"])
    shutil.copytree(chatml, adapter, dirs_exist_ok=True)
    assert merge_main([str(adapter), str(tmp_path / "merged"), "--base", str(base)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer(CHAT_TEXT).input_ids.count(501) == 2
    assert tokenizer.eos_token_id == json.loads((tmp_path / "merged/config.json").read_text())["eos_token_id"] == 500
    assert "tokenizer of the adapter" in capsys.readouterr().out


# ---- tokenizer.json


@pytest.fixture
def json_folder(small_model, tmp_path):
    """tokenizer.json, tokenizer_config.json and tokenizer.model."""
    folder = tmp_path / "json"
    folder.mkdir()
    convert_tokenizer(small_model, folder, vocab_size=VOCAB, context_length=64)
    edit(folder / "tokenizer_config.json", split_special_tokens=False)
    return folder


def test_field_tokenizer_json_that_differs_from_its_model_is_put_right(json_folder, processor, tmp_path):
    """As transformers 5's LlamaTokenizer saves it: a space is missing where a text begins with one."""
    source = tmp_path / "saved"
    LlamaTokenizer.from_pretrained(json_folder).save_pretrained(source)
    shutil.copy(json_folder / "tokenizer.model", source)
    theirs = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert theirs.encode(" a", add_special_tokens=False).ids != processor.encode(" a")
    tokenizer = opened(source, tmp_path / "ours")
    for text in AWKWARD_TEXTS:
        if not re.search("</?s>|<unk>", text):
            assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), text
    assert re.search(
        r"text is cut as tokenizer.model does: .* on \d+ of \d+ texts, the first ' '", tokenizer.decided[0]
    )


def test_field_tokenizer_json_with_added_tokens_is_compared_on_texts_with_them(chatml, processor, tmp_path):
    source = tmp_path / "first"
    opened(chatml, source)
    content = json.loads((source / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["normalized"] = token["content"] == START  # then it is only found after a space
    (source / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = opened(source, tmp_path / "ours")
    assert tokenizer(f"a{START}").input_ids == [1, *processor.encode("a"), 501]
    assert any("text is cut as tokenizer.model does" in line for line in tokenizer.decided)


def test_field_tokens_that_only_lie_beside_a_tokenizer_json_are_added_to_it(json_folder, processor, tmp_path):
    (json_folder / "added_tokens.json").write_text(json.dumps(CHATML["added_tokens.json"]))
    tokenizer = opened(json_folder, tmp_path / "ours")
    assert tokenizer(f"a{START}").input_ids == [1, *processor.encode("a"), 501]
    assert "not among the added tokens of tokenizer.json" in tokenizer.decided[0]
    (json_folder / "added_tokens.json").write_text(json.dumps({"</s>": 1}))
    with pytest.raises(CheckpointError, match=r"has the id 1 beside tokenizer\.json and 2 in it"):
        opened(json_folder, tmp_path / "again")


def test_field_two_different_tokenizers_are_refused_unless_one_is_named(json_folder, small_model, tmp_path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁"], vocabulary["e"] = vocabulary["e"], vocabulary["▁"]
    (json_folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"are different tokenizers \(2 tokens differ\): .*--tokenizer"):
        opened(json_folder, tmp_path / "one")
    tokenizer = opened(json_folder / "tokenizer.json", tmp_path / "two")
    assert "is used, as asked for" in tokenizer.decided[0]
    assert not (tmp_path / "two/tokenizer.model").exists()


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CodeLlamaTokenizer", "NoSuchTokenizer"])
def test_field_class_with_other_ids_than_the_file_is_replaced(name, json_folder, tmp_path):
    edit(json_folder / "tokenizer_config.json", tokenizer_class=name)
    tokenizer = opened(json_folder, tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours/tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    raw = Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    for text in AWKWARD_TEXTS:
        assert tokenizer(text).input_ids == raw.encode(text).ids


@pytest.mark.parametrize(("name", "added"), [("LlamaTokenizer", True), ("PreTrainedTokenizerFast", False)])
def test_field_add_eos_token_counts_where_the_class_goes_by_it(name, added, json_folder, tmp_path):
    edit(json_folder / "tokenizer_config.json", tokenizer_class=name, add_eos_token=True)
    tokenizer = opened(json_folder, tmp_path / "ours")
    assert (tokenizer("a").input_ids[-1] == 2) is added
    assert (Tokenizer.from_file(str(tmp_path / "ours/tokenizer.json")).encode("a").ids[-1] == 2) is added
    assert json.loads((tmp_path / "ours/tokenizer_config.json").read_text())["add_eos_token"] is added
    assert re.match(f"EOS is {'' if added else 'not '}added to every text, as token", tokenizer.decided[0])


# ---- special ids


def ids_decided(config, *, generation=None, rows=100, **named):
    names = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "unk_token_id": 0} | named
    special = SimpleNamespace(special=True)
    tokenizer = SimpleNamespace(
        **names,
        added_tokens_decoder=dict.fromkeys([0, 1, 2, 90, 91], special),
        convert_ids_to_tokens=lambda index: f"t{index}",
    )
    fields = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None} | config
    source = SimpleNamespace(
        config=SimpleNamespace(vocab_size=rows, **fields),
        generation_config=generation or {},
        token_ids_from_tokenizer=False,
    )
    return decide_special_ids(source, tokenizer)


@pytest.mark.parametrize(
    ("given", "named", "expected"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1}, {}, {"bos_token_id": 1, "eos_token_id": 2}),  # the first conversions
        ({"eos_token_id": 100}, {}, {"eos_token_id": 2}),
        ({"eos_token_id": 57}, {}, {"eos_token_id": 2}),  # a piece
        ({"eos_token_id": None}, {}, {"eos_token_id": 2}),
        ({"eos_token_id": 2}, {"eos_token_id": 90}, {"eos_token_id": [90, 2]}),  # a fine-tuned model's
        ({"eos_token_id": [2, 90, 91]}, {"eos_token_id": 90}, {"eos_token_id": [2, 90, 91]}),  # a chat model's
        ({"eos_token_id": [2, 200]}, {}, {"eos_token_id": [2]}),
        ({"pad_token_id": 0}, {"pad_token_id": 91}, {"pad_token_id": 91}),
        ({"pad_token_id": 0}, {}, {"pad_token_id": 0}),
        ({"bos_token_id": None}, {}, {"bos_token_id": None}),
        ({"bos_token_id": 1}, {"bos_token_id": None}, {"bos_token_id": 1}),
        ({"bos_token_id": 100}, {"bos_token_id": None}, {"bos_token_id": None}),
    ],
)
def test_field_special_ids_are_the_tokenizers_where_they_contradict(given, named, expected):
    decided = ids_decided(given, **named)
    assert {name: decided.config[name] for name in expected} == expected
    assert len(decided.notes) == sum(given[name] != value for name, value in expected.items())
    if any(value is not None for value in given.values()):
        generation = ids_decided({}, generation=given | {"top_p": 0.5}, **named).generation
        assert {name: generation[name] for name in expected} == expected
        assert generation["top_p"] == 0.5


def test_field_generation_config_without_an_end_gets_one_and_impossible_ends_are_refused():
    decided = ids_decided({}, generation={"temperature": 0.5})
    assert decided.generation == {"temperature": 0.5, "eos_token_id": 2}
    for config, named in (
        ({"eos_token_id": 1}, {"eos_token_id": None}),
        ({"eos_token_id": 100}, {"eos_token_id": None}),
        ({"eos_token_id": [1, "2"]}, {}),
    ):
        with pytest.raises(CheckpointError, match=r"config.json: eos_token_id .*(set eos_token_id|correct it)"):
            ids_decided(config, **named)


def test_field_ids_0_and_1_of_the_first_conversions_are_corrected(weights, small_model, tmp_path, capsys):
    source = model_folder(tmp_path / "model", weights, written(tmp_path / "files", small_model, {}))
    edit(source / "config.json", bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    wrong = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(wrong))
    assert main([str(source), str(tmp_path / "ours")]) == 0
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "ours" / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)
    said = capsys.readouterr().out
    assert "decided    eos_token_id 2 (</s>), as the tokenizer says: config.json has 1 (<s>)" in said
    assert "decided    bos_token_id 1 (<s>), as the tokenizer says: generation_config.json has 0 (<unk>)" in said
    assert "decided    pad_token_id none: config.json has -1, which means none" in said
    edit(source / "config.json", pad_token_id=502)
    assert main([str(source), str(tmp_path / "again")]) == 0
    assert "decided    pad_token_id none: config.json has 502, and the vocabulary 502 rows" in capsys.readouterr().out


# ---- --chat, and Meta's layout


@pytest.fixture
def meta(tmp_path):
    params = meta_params(dim=4, n_heads=2, n_kv_heads=1, n_layers=1, multiple_of=2)
    return write_meta(tmp_path / "meta", params, meta_weights(params, vocab=502))


def test_field_chat_gives_a_tokenizer_json_of_llamas_kind_its_template(meta, json_folder, processor, tmp_path):
    (json_folder / "tokenizer.model").unlink()
    edit(json_folder / "tokenizer_config.json", split_special_tokens=True)
    assert main([str(meta), str(tmp_path / "ours"), "--chat", "--tokenizer", str(json_folder)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for messages in DIALOGS:
        assert tokenizer.apply_chat_template(messages, return_dict=False) == metas_ids(processor, messages)


def test_field_chat_is_refused_or_reported_where_llama_2s_template_does_not_belong(meta, json_folder, tmp_path, capsys):
    (json_folder / "tokenizer.model").unlink()
    (json_folder / "chat_template.jinja").write_text(TEMPLATE)
    arguments = [str(meta), str(tmp_path / "ours"), "--chat", "--tokenizer", str(json_folder)]
    assert main(arguments) == 0
    assert "decided    chat template: the tokenizer's own, not LLaMA 2's" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == TEMPLATE
    (json_folder / "chat_template.jinja").unlink()
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (json_folder / "tokenizer.json").write_text(json.dumps(content))
    assert main([*arguments, "--overwrite"]) == 2
    assert "a chat model's tokenizer without a chat template" in (error := capsys.readouterr().err)
    assert "--no-chat" in error


def test_field_export_keeps_added_tokens_and_template_beside_tokenizer_model(chatml, weights, tmp_path, capsys):
    source = model_folder(tmp_path / "model", weights, chatml)
    assert export_main([str(source), str(tmp_path / "meta")]) == 0
    said = capsys.readouterr().out
    assert f"cannot hold 2 added tokens ({END}, {START}), EOS {END}, the chat template" in said
    assert main([str(tmp_path / "meta"), str(tmp_path / "back"), "--context-length", "64"]) == 0
    tokenizer, expected = AutoTokenizer.from_pretrained(tmp_path / "back"), opened(chatml, tmp_path / "direct")
    for text in (*AWKWARD_TEXTS, *SPELLING):
        assert tokenizer(text).input_ids == expected(text).input_ids
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (500, TEMPLATE)


def test_field_export_of_a_base_model_writes_tokenizer_model_alone(json_folder, weights, tmp_path, capsys):
    source = model_folder(tmp_path / "model", weights, json_folder)
    assert export_main([str(source), str(tmp_path / "meta")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("tokenizer: tokenizer.model")
    assert not list((tmp_path / "meta").glob("tokenizer*.json"))
