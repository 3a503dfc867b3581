"""A tokenizer by itself, as a model that is yet to be trained needs it."""

from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from conversion.tokenizer_folder import main


def test_the_folder_has_sentencepieces_ids(small_model, tmp_path, capsys):
    target = tmp_path / "new" / "tokenizer"
    assert main([str(small_model), str(target), "--context-length", "77"]) == 0
    assert capsys.readouterr().out.startswith("SentencePiece BPE, 500 tokens, BOS <s>, no EOS")
    tokenizer = AutoTokenizer.from_pretrained(target)
    processor = SentencePieceProcessor(model_file=str(small_model))
    text = "  hello 2023\n\tété 😀"
    assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)]
    assert tokenizer.model_max_length == 77
    assert (target / "tokenizer.model").read_bytes() == small_model.read_bytes()


@pytest.mark.parametrize("wrong", ["nothing there", "not a model", "target exists"])
def test_bad_input_is_one_message_and_leaves_nothing(wrong, small_model, tmp_path, capsys):
    source, target = small_model, tmp_path / "target"
    if wrong == "nothing there":
        source = tmp_path / "missing.model"
    elif wrong == "not a model":
        source = tmp_path / "text.model"
        source.write_text("some text")
    else:
        target.mkdir()
    before = sorted(Path(tmp_path).rglob("*"))
    assert main([str(source), str(target), "--context-length", "64"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(Path(tmp_path).rglob("*")) == before
