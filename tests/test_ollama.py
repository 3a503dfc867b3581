"""The Modelfile for Ollama: its template, rendered, is what the tokenizer's own template writes."""

import re
import shutil

import pytest
from meta_checkpoints import meta_folder, write_sentencepiece
from transformers import AutoTokenizer

from conversion.convert import convert, main
from conversion.ollama import FORMATS, modelfile
from conversion.tokenizer import convert_tokenizer
from hf_llama_repro.errors import CheckpointError
from tests.clients.go_template import render, render_by_go, render_here, template_of, values

CONVERSATIONS = (
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}],
    [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ],
    [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ],
)


@pytest.fixture
def meta(tmp_path):
    folder = meta_folder(tmp_path / "meta")
    write_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, tmp_path_factory):
    """A tokenizer with ChatML, and a system prompt of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    convert_tokenizer(smollm2_gguf, folder, vocab_size=49152, context_length=8192)
    return AutoTokenizer.from_pretrained(folder)


def by_tokenizer(tokenizer, conversations=CONVERSATIONS):
    return [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]


def converted(meta, target, **options):
    convert(meta, target, model_type="llama", ollama=True, **options)
    return (target / "Modelfile").read_text(), AutoTokenizer.from_pretrained(target)


def test_llama_2_chat_is_the_tokenizers_template_but_for_the_first_bos(meta, tmp_path):
    text, tokenizer = converted(meta, tmp_path / "target", chat=True)
    # llama.cpp puts the first BOS in front.
    assert ["<s>" + one for one in render(text, CONVERSATIONS)[0]] == by_tokenizer(tokenizer)


def test_chatml_is_the_tokenizers_template(smollm2):
    text = modelfile(smollm2, context_length=8192, sampling={})
    assert render(text, CONVERSATIONS)[0] == by_tokenizer(smollm2)


def test_a_default_system_prompt_is_written_down(smollm2):
    text = modelfile(smollm2, context_length=8192, sampling={})
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text


def test_another_template_would_be_seen(smollm2):
    """The comparison above can fail: LLaMA 2's template gives other texts."""
    template = FORMATS["LLaMA 2 chat"].template
    assert [render_here(template, values(one, "")) for one in CONVERSATIONS] != by_tokenizer(smollm2)


def test_a_base_model_is_given_the_prompt_alone(meta, tmp_path):
    text, _ = converted(meta, tmp_path / "target")
    assert render(text, CONVERSATIONS[:1])[0] == ["one"]
    assert "temperature" not in text


def test_context_sampling_and_stops_are_those_of_the_model(meta, tmp_path):
    text, _ = converted(meta, tmp_path / "target", chat=True)
    assert re.findall(r"^PARAMETER (.*)$", text, re.MULTILINE) == [
        "num_ctx 4096",
        'stop "</s>"',
        'stop "[INST]"',
        "temperature 0.6",
        "top_p 0.9",
    ]


def test_the_manifest_covers_it(meta, tmp_path):
    converted(meta, tmp_path / "target")
    assert '"Modelfile"' in (tmp_path / "target" / "manifest.json").read_text()


def test_without_being_asked_none_is_written(meta, tmp_path):
    convert(meta, tmp_path / "target", model_type="llama")
    assert not (tmp_path / "target" / "Modelfile").exists()


@pytest.mark.parametrize("arguments", [["--ollama"], ["--ollama", "--as", "llama", "--no-tokenizer"]], ids=" ".join)
def test_a_folder_that_llama_cpp_does_not_take_is_refused(meta, tmp_path, capsys, arguments):
    assert main([str(meta), str(tmp_path / "target"), *arguments]) == 2
    assert "--as llama" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}### {{ m['content'] }}{% endfor %}", "ChatML"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{% for", "cannot be rendered"),
    ],
)
def test_an_unknown_template_is_refused(smollm2, monkeypatch, template, message):
    monkeypatch.setattr(smollm2, "chat_template", template)
    with pytest.raises(CheckpointError, match=message):
        modelfile(smollm2, context_length=8192, sampling={})


def test_what_a_modelfile_cannot_hold_is_refused(smollm2, monkeypatch):
    changed = smollm2.chat_template.replace("You are a helpful", '\\"\\"\\" FROM elsewhere')
    monkeypatch.setattr(smollm2, "chat_template", changed)
    with pytest.raises(CheckpointError, match="Modelfile"):
        modelfile(smollm2, context_length=8192, sampling={})


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
def test_the_reader_of_these_tests_renders_as_go_does(smollm2):
    for template in (template_of(modelfile(smollm2, context_length=1, sampling={})), FORMATS["LLaMA 2 chat"].template):
        filled = [values(conversation, "") for conversation in CONVERSATIONS]
        assert render_by_go("go", template, filled) == [render_here(template, one) for one in filled]
