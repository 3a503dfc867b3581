"""The proof on every kind of folder that a conversion makes: right ones pass, and a fault planted in each is named."""

import functools
import hashlib
import json
import shutil

import pytest
import torch
from conftest import ROOT
from gguf import GGUFWriter
from meta_checkpoints import meta_params, meta_weights, write_meta, write_sentencepiece
from random_models import random_model, stock_twin, tiny_config
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from test_convert_gguf import gguf_tensors
from transformers import AutoTokenizer

from conversion import convert as convert_command
from conversion import export as export_command
from conversion import merge as merge_command
from conversion import tokenizer_folder
from conversion import verify as verify_command
from conversion.convert import convert
from conversion.tokenizer import convert_tokenizer
from conversion.verify import verify
from finetune import alpaca as finetune_command
from finetune import plan as finetune_plan
from hf_llama_repro.command import ANSWER_IS_NO, BAD_INPUT, DONE, INTERRUPTED, OUR_FAULT, PARTIAL, run
from hf_llama_repro.errors import CheckpointError, InputError, NotItsSourceError
from hf_llama_repro.evaluation import command as evaluation_command
from hf_llama_repro.outputs import check_output_file, check_output_folder
from hf_llama_repro.paper import report as paper_report
from pretrain import train as pretrain_command

VOCAB = 288
CHATML = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def meta(folder, name="meta", *, tied=False, dtype=torch.bfloat16, **fields):
    params = meta_params(**fields)
    tokenizer = write_sentencepiece(folder / "tokenizer.model")
    return write_meta(folder / name, params, meta_weights(params, tied=tied, dtype=dtype), tokenizer=tokenizer)


def stock(folder, *, vocab=VOCAB):
    """A folder of stock Llama, without a tokenizer."""
    stock_twin(random_model(tiny_config(vocab_size=vocab))).save_pretrained(folder)
    return folder


def with_sentencepiece(folder):
    write_sentencepiece(stock(folder / "stock") / "tokenizer.model")
    return folder / "stock"


def with_tokenizer_json(folder):
    source = stock(folder / "stock")
    convert_tokenizer(
        write_sentencepiece(folder / "tokenizer.model"), source, vocab_size=VOCAB, context_length=256, chat=True
    )
    (source / "tokenizer.model").unlink()
    return source


def with_added_tokens(folder):
    """Two rows and two tokens more, ChatML's, one of which is EOS, and a word that is no control token."""
    source = stock(folder / "stock", vocab=VOCAB + 3)
    convert_tokenizer(write_sentencepiece(folder / "tokenizer.model"), source, vocab_size=VOCAB, context_length=256)
    (source / "tokenizer.model").unlink()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["quick"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(source)
    for name in ("config.json", "generation_config.json"):
        change(source / name, eos_token_id=VOCAB)
    return source


def with_tokens_beside_sentencepiece(folder, **settings):
    """A `tokenizer.model` alone, and ChatML's tokens and template in the files of slow tokenizers beside it."""
    source = stock(folder / "stock", vocab=VOCAB + 2)
    write_sentencepiece(source / "tokenizer.model")
    (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": VOCAB, "<|im_start|>": VOCAB + 1}))
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    change(source / "tokenizer_config.json", **fields, chat_template=CHATML, **settings)
    for name in ("config.json", "generation_config.json"):
        change(source / name, eos_token_id=VOCAB)
    return source


def gguf(folder, *, byte_level=False):
    model = random_model(tiny_config(vocab_size=10 if byte_level else VOCAB))
    config, path = model.config, folder / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    for name, value in gguf_tokenizer(folder, byte_level=byte_level).items():
        getattr(writer, f"add_{name}")(value)
    for name, data in gguf_tensors(model).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tokenizer(folder, *, byte_level):
    if byte_level:
        return {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": "gpt-2",
            "token_list": ["a", "b", "ab", "Ġ", "Ġab", "<|end|>", "<tool>", "1", "2", "12"],
            "token_types": [1, 1, 1, 1, 1, 3, 4, 1, 1, 1],
            "token_merges": ["a b", "Ġ ab", "1 2"],
            "bos_token_id": 5,
            "eos_token_id": 5,
        }
    processor = SentencePieceProcessor(model_file=str(write_sentencepiece(folder / "tokenizer.model")))
    pieces = range(len(processor))
    return {
        "tokenizer_model": "llama",
        "token_list": [processor.id_to_piece(index) for index in pieces],
        "token_scores": [processor.get_score(index) for index in pieces],
        "token_types": [2, 3, 3, *[6] * 256, *[1] * (len(processor) - 259)],
    }


def change(path, **fields):
    content = {**json.loads(path.read_text()), **fields} if path.is_file() else fields
    path.write_text(json.dumps(content))


# Kind of folder -> how its source is made, and how it is converted.
KINDS = {
    "base": (meta, {}),
    "chat": (functools.partial(meta, name="tiny-chat"), {}),
    "base by a flag": (functools.partial(meta, name="tiny-chat"), {"chat": False}),
    "tied": (functools.partial(meta, tied=True), {}),
    "as llama": (functools.partial(meta, name="tiny-chat"), {"model_type": "llama"}),
    "another context": (meta, {"context_length": 1000}),
    "a context that the files do not tell": (
        functools.partial(meta, norm_eps=1e-4, dtype=torch.float32, n_kv_heads=None),
        {"context_length": 2048},
    ),
    "cast": (meta, {"dtype": "float32"}),
    "without a tokenizer": (meta, {"with_tokenizer": False}),
    "tokenizer.model": (with_sentencepiece, {}),
    "tokenizer.json": (with_tokenizer_json, {}),
    "added tokens": (with_added_tokens, {"model_type": "llama"}),
    "added tokens beside tokenizer.model": (with_tokens_beside_sentencepiece, {}),
    "tokenizer.model without its leading space": (
        functools.partial(with_tokens_beside_sentencepiece, legacy=False, add_prefix_space=False),
        {},
    ),
    "GGUF": (gguf, {}),
    "GGUF, byte-level": (functools.partial(gguf, byte_level=True), {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source and converted folder of a kind, converted with a proof; made once."""

    @functools.cache
    def make(kind):
        source_of, options = KINDS[kind]
        folder = tmp_path_factory.mktemp("kind")
        source = source_of(folder)
        return source, convert(source, folder / "ours", verify=True, **options)

    return make


def outcomes(source, target, **options):
    return {check.name: check for check in verify(source, target, num_tokens=16, **options)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_is_proved_completely(made, kind, capsys):
    source, conversion = made(kind)
    assert {check.outcome for check in conversion.checks} == {"ok"}
    assert conversion.exit_code == 0
    capsys.readouterr()
    assert verify_command.main([str(source), str(conversion.target), "--tokens", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("proved: the folder is its source\n")
    assert "FAILED" not in printed
    assert "not compared" not in printed


# Faults, each done to the files of a folder.


def swapped_ids(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


def flipped_bit(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def another_context(folder):
    change(folder / "config.json", max_position_embeddings=512)


def another_eos_in_the_configuration(folder):
    change(folder / "config.json", eos_token_id=0)


def another_eos_of_generation(folder):
    change(folder / "generation_config.json", eos_token_id=[0, 1])


def another_eos_of_the_tokenizer(folder):
    change(folder / "tokenizer_config.json", eos_token="<unk>")


def another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


def another_activation(folder):
    change(folder / "config.json", hidden_act="gelu")


def another_dtype(folder):
    change(folder / "config.json", dtype="float16")


def scaled_positions(folder):
    change(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})


def another_dropout(folder):
    change(folder / "config.json", attention_dropout=0.5)


def control_tokens_taken_as_text(folder):
    change(folder / "tokenizer_config.json", split_special_tokens=True)


def control_tokens_taken_out_of_text(folder):
    change(folder / "tokenizer_config.json", split_special_tokens=False)


def no_bos(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    change(folder / "tokenizer_config.json", add_bos_token=False)


def another_temperature(folder):
    change(folder / "generation_config.json", temperature=1.5)


def no_control_token(folder):
    """The added token's text is in the vocabulary still, but is split."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    path.write_text(json.dumps(content))


def edited_code(folder):
    path = folder / "modeling_llama_repro.py"
    path.write_text(path.read_text().replace("F.silu", "F.gelu") + "\n")


FAULTS = [
    ("base", swapped_ids, "tokenizer"),
    ("base", another_eos_in_the_configuration, "special ids"),
    ("base", another_eos_of_generation, "special ids"),
    ("base", another_eos_of_the_tokenizer, "special ids"),
    ("base", another_context, "context"),
    ("base", another_template, "chat template"),
    ("base", another_activation, "configuration"),
    ("base", another_dtype, "configuration"),
    ("base", control_tokens_taken_out_of_text, "tokenizer"),
    ("base", no_bos, "tokenizer"),
    ("base", edited_code, "code"),
    ("chat", another_template, "chat template"),
    ("chat", no_template, "chat template"),
    ("chat", another_temperature, "generation"),
    ("chat", control_tokens_taken_as_text, "tokenizer"),
    ("base by a flag", another_temperature, "generation"),
    ("tied", flipped_bit, "weights"),
    ("as llama", swapped_ids, "tokenizer"),
    ("as llama", scaled_positions, "configuration"),
    ("another context", another_context, "context"),
    ("a context that the files do not tell", another_context, "context"),
    ("cast", flipped_bit, "weights"),
    ("without a tokenizer", another_eos_in_the_configuration, "special ids"),
    ("tokenizer.model", swapped_ids, "tokenizer"),
    ("tokenizer.model", another_context, "context"),
    ("tokenizer.json", swapped_ids, "tokenizer"),
    ("tokenizer.json", another_dropout, "configuration"),
    ("tokenizer.json", another_template, "chat template"),
    ("added tokens", no_control_token, "tokenizer"),
    ("added tokens", another_eos_of_the_tokenizer, "special ids"),
    ("added tokens", scaled_positions, "configuration"),
    ("added tokens beside tokenizer.model", no_control_token, "tokenizer"),
    ("added tokens beside tokenizer.model", swapped_ids, "tokenizer"),
    ("added tokens beside tokenizer.model", no_template, "chat template"),
    ("tokenizer.model without its leading space", swapped_ids, "tokenizer"),
    ("GGUF", swapped_ids, "tokenizer"),
    ("GGUF", another_activation, "configuration"),
    ("GGUF, byte-level", swapped_ids, "tokenizer"),
    ("GGUF, byte-level", another_eos_of_generation, "special ids"),
]


@pytest.mark.parametrize(("kind", "fault", "named"), FAULTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_planted_in_each_kind_fails_its_proof(made, tmp_path, kind, fault, named):
    source, conversion = made(kind)
    shutil.copytree(conversion.target, tmp_path / "ours")
    fault(tmp_path / "ours")
    assert outcomes(source, tmp_path / "ours")[named].outcome == "FAILED"


def test_the_kinds_of_which_a_fault_is_planted_are_all_of_them():
    assert {kind for kind, _, _ in FAULTS} == KINDS.keys()


def without_record(folder):
    """As folders were before a manifest recorded how they were converted."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["options"]
    (folder / "manifest.json").write_text(json.dumps(content))


def copy_of(conversion, folder):
    return shutil.copytree(conversion.target, folder / "ours")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("a context that the files do not tell", {"context"}),
        ("without a tokenizer", {"tokenizer"}),
        ("base by a flag", {"generation", "chat template"}),
    ],
)
def test_what_nothing_tells_is_not_compared_and_the_proof_partial(made, tmp_path, capsys, kind, names):
    source, conversion = made(kind)
    without_record(copy_of(conversion, tmp_path))
    assert verify_command.main([str(source), str(tmp_path / "ours"), "--tokens", "16"]) == 3
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line[13:27].strip() for line in lines if line.startswith("not compared ")} == names
    assert "partial: " in last
    assert not any(line.startswith("FAILED") for line in lines)


def test_code_of_another_version_is_not_compared_by_the_proof(made, tmp_path):
    source, conversion = made("tied")
    code = copy_of(conversion, tmp_path) / "modeling_llama_repro.py"
    code.write_text(code.read_text() + "# as of last year\n")
    manifest = json.loads((tmp_path / "ours/manifest.json").read_text())
    manifest["files"][code.name]["sha256"] = hashlib.sha256(code.read_bytes()).hexdigest()
    (tmp_path / "ours/manifest.json").write_text(json.dumps(manifest))
    check = outcomes(source, tmp_path / "ours")["code"]
    assert check.outcome == "not compared"
    assert "--refresh-code" in check.found
    assert convert_command.main(["--refresh-code", str(tmp_path / "ours")]) == 0
    assert outcomes(source, tmp_path / "ours")["code"].outcome == "ok"


@pytest.mark.parametrize("kind", ["chat", "base", "tied", "tokenizer.model", "GGUF"])
def test_folders_without_a_record_are_proved_where_the_files_tell(made, tmp_path, kind):
    source, conversion = made(kind)
    without_record(copy_of(conversion, tmp_path))
    assert {check.outcome for check in outcomes(source, tmp_path / "ours").values()} == {"ok"}


def test_a_context_without_a_record_is_proved_by_saying_it_again(made, tmp_path):
    source, conversion = made("another context")
    without_record(copy_of(conversion, tmp_path))
    check = outcomes(source, tmp_path / "ours")["context"]
    assert (check.outcome, "say --context-length 1000" in check.found) == ("FAILED", True)
    assert outcomes(source, tmp_path / "ours", context_length=1000)["context"].outcome == "ok"
    assert outcomes(source, tmp_path / "ours", context_length=999)["context"].outcome == "FAILED"


def test_a_tokenizer_that_the_source_lacks_is_not_compared_until_it_is_named(tmp_path):
    source = stock(tmp_path / "stock")
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    conversion = convert(source, tmp_path / "ours", tokenizer=tokenizer, verify=True)
    assert conversion.exit_code == 0
    checks = outcomes(source, tmp_path / "ours")
    assert {name for name, check in checks.items() if check.outcome == "not compared"} == {
        *("special ids", "tokenizer", "chat template")
    }
    assert "--tokenizer" in checks["tokenizer"].found
    assert outcomes(source, tmp_path / "ours", tokenizer=tokenizer)["tokenizer"].outcome == "ok"


def test_a_renamed_chat_folder_is_proved_by_the_record(made, tmp_path):
    source, conversion = made("chat")
    shutil.copytree(source, tmp_path / "renamed")
    shutil.copy(source.parent / "tokenizer.model", tmp_path / "renamed")
    assert {check.outcome for check in outcomes(tmp_path / "renamed", conversion.target).values()} == {"ok"}


def test_a_conversion_whose_proof_is_partial_is_written_and_says_so(tmp_path, monkeypatch, capsys):
    from conversion.checks import Check

    checks = [Check("weights", "ok", "equal"), Check("tokenizer", "not compared", "unknown")]
    monkeypatch.setattr(verify_command, "verify", lambda *_, **__: checks)
    source = meta(tmp_path)
    assert convert_command.main([str(source), str(tmp_path / "ours"), "--verify"]) == 3
    printed = capsys.readouterr().out
    assert "verified   weights: equal" in printed
    assert "not proved tokenizer: unknown" in printed
    assert "tokenizer, not compared: unknown" in (tmp_path / "ours/README.md").read_text()


def test_a_conversion_that_fails_its_proof_ends_with_the_code_of_another_source(tmp_path, monkeypatch, capsys):
    from conversion import meta as meta_files

    monkeypatch.setattr(meta_files, "to_half_split", lambda rows, heads: rows)
    source = meta(tmp_path)
    assert convert_command.main([str(source), str(tmp_path / "ours"), "--verify"]) == 1
    assert "FAILED       weights" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_tokens_that_were_added_beside_a_tokenizer_model_belong_to_the_proof(tmp_path):
    source = stock(tmp_path / "stock", vocab=VOCAB + 2)
    write_sentencepiece(source / "tokenizer.model")
    change(source / "added_tokens.json", **{"<|im_end|>": VOCAB, "<|im_start|>": VOCAB + 1})
    change(source / "tokenizer_config.json", eos_token="<|im_end|>", chat_template=CHATML)
    convert(source, tmp_path / "ours")
    # As by a converter that takes tokenizer.model alone.
    for path in tmp_path.glob("ours/*token*"):
        path.unlink()
    convert_tokenizer(source / "tokenizer.model", tmp_path / "ours", vocab_size=VOCAB, context_length=256)
    (tmp_path / "ours/chat_template.jinja").unlink(missing_ok=True)
    checks = outcomes(source, tmp_path / "ours")
    assert "the added token '<|im_start|>' is None, not 289" in checks["tokenizer"].found
    assert {checks[name].outcome for name in ("tokenizer", "chat template")} == {"FAILED"}


def test_the_proof_does_not_rest_on_the_converters_own_code_alone(tmp_path, monkeypatch):
    """A converter that drops what the source says is found out, though it would drop it again."""
    from conversion import convert as command

    source = with_added_tokens(tmp_path)
    change(source / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    written = command._write_configuration

    def dropping(folder, config, model_type):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        config.eos_token_id = 7
        written(folder, config, model_type)

    convert(source, tmp_path / "right", verify=True)
    monkeypatch.setattr(command, "_write_configuration", dropping)
    convert(source, tmp_path / "ours")
    checks = outcomes(source, tmp_path / "ours")
    assert "rope_parameters" in checks["configuration"].found
    assert "eos of config.json is 7, which no file of the source says" in checks["special ids"].found


# Outputs and exit codes.


@pytest.fixture
def places(tmp_path):
    """Names under which nothing can be written, of files and of folders."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    return {
        "missing folder": tmp_path / "missing/figures.json",
        "a folder": tmp_path / "folder",
        "below a file": tmp_path / "file/figures",
        "a name that is too long": tmp_path / ("x" * 300),
    }


def plan(path):
    return finetune_plan.main, ["llama-7b", "--json", path]


def tables(path):
    return paper_report.main, ["--json", path]


def proof(path):
    return verify_command.main, ["source", "target", "--json", path]


def page(path):
    return paper_report.main, ["--page", path]


def evaluation(path):
    return evaluation_command.main, ["model", "--output-dir", path]


def conversion(path):
    return convert_command.main, ["source", path / "ours"]


def export(path):
    return export_command.main, ["source", path / "meta"]


def merge(path):
    return merge_command.main, ["adapter", path / "merged"]


def tokenizer(path):
    return tokenizer_folder.main, ["tokenizer.model", path / "ours", "--context-length", "64"]


def finetuning(path):
    return finetune_command.main, ["alpaca_lora", "--output-dir", path]


def pretraining(path):
    return pretrain_command.main, ["tiny", "--output-dir", path]


FILES = [plan, tables, proof]
FOLDERS = [page, evaluation, conversion, export, merge, tokenizer, finetuning, pretraining]


@pytest.mark.parametrize("command", FILES, ids=lambda command: command.__name__)
@pytest.mark.parametrize("place", ["missing folder", "a folder", "below a file", "a name that is too long"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work_of_a_proof(places, place, command, capsys):
    main, arguments = command(places[place])
    assert main(list(map(str, arguments))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: --json {places[place]}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("command", FOLDERS, ids=lambda command: command.__name__)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(places, command, capsys):
    main, arguments = command(places["below a file"])
    assert main(list(map(str, arguments))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "file is not a folder" in output.err
    assert output.err.count("\n") == 1


def test_the_figures_of_a_proof_replace_the_file_that_is_there(made, tmp_path):
    source, result = made("base")
    (tmp_path / "figures.json").write_text("old")
    arguments = [str(source), str(result.target), "--tokens", "16", "--json", str(tmp_path / "figures.json")]
    assert verify_command.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {check["outcome"] for check in figures} == {"ok"}


def test_a_file_is_only_looked_at_before_the_proof(tmp_path):
    (tmp_path / "kept.json").write_text("old")
    check_output_file("--json", tmp_path / "kept.json")
    check_output_file("--json", tmp_path / "new.json")
    check_output_folder("--page", tmp_path / "a/b/c")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert (tmp_path / "kept.json").read_text() == "old"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (InputError("bad"), BAD_INPUT),
        (CheckpointError("bad"), BAD_INPUT),
        (NotItsSourceError("other"), ANSWER_IS_NO),
        (PermissionError("forbidden"), BAD_INPUT),
        (KeyboardInterrupt(), INTERRUPTED),
        (RuntimeError("surprise"), OUR_FAULT),
    ],
)
def test_each_exit_code_has_one_meaning_beside_that_of_a_proof(raised, code, capsys):
    def work():
        raise raised

    assert run(work) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == OUR_FAULT)


def test_the_exit_codes_of_a_proof_are_in_the_documentation():
    table = (ROOT / "docs/README.md").read_text().partition("## Exit codes")[2]
    for code in (DONE, ANSWER_IS_NO, BAD_INPUT, PARTIAL, OUR_FAULT, INTERRUPTED):
        assert f"\n| {code} | " in table
