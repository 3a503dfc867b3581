"""A folder converted from Meta's: what its files say, and who can open it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_checkpoints import fingerprint, meta_folder, meta_params, meta_weights, write_meta, write_sentencepiece
from random_models import TOLERANCE, relative_difference
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, pipeline

from conversion.convert import convert, main
from hf_llama_repro import LlamaReproForCausalLM, LlamaReproModel

ROOT = Path(__file__).parent.parent
forms = pytest.mark.parametrize("model_type", ["llama_repro", "llama"])


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    tokenizer = write_sentencepiece(folder / "tokenizer.model")
    return write_meta(folder / "llama-2-x", meta_params(), meta_weights(meta_params()), shards=2, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["llama_repro", "llama"])
def folder(request, meta, tmp_path_factory):
    """The same checkpoint as ours and as stock Llama."""
    target = tmp_path_factory.mktemp("converted") / request.param
    convert(meta, target, model_type=request.param)
    return target


def read(path):
    return json.loads(path.read_text())


def test_rope_theta_stands_where_old_and_new_readers_look(folder):
    config = read(folder / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


@forms
def test_rope_theta_is_the_sources_in_both_places(tmp_path, model_type):
    source = meta_folder(tmp_path / "meta", rope_theta=1e6)
    convert(source, tmp_path / "ours", model_type=model_type, with_tokenizer=False, context_length=16384)
    config = read(tmp_path / "ours/config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6


def test_configuration_names_its_classes(folder):
    config = read(folder / "config.json")
    expected = {"llama_repro": "LlamaReproForCausalLM", "llama": "LlamaForCausalLM"}[folder.name]
    assert (config["architectures"], config["model_type"]) == ([expected], folder.name)
    assert ("auto_map" in config) == (folder.name == "llama_repro")


def test_stock_llama_opens_the_folder_without_missing_or_unexpected_keys(folder):
    opened, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(opened, LlamaForCausalLM)
    assert not any(info.values()), info


def test_auto_classes_open_the_folder(folder):
    ours = folder.name == "llama_repro"
    causal, body = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoModel))
    assert isinstance(causal, LlamaReproForCausalLM if ours else LlamaForCausalLM)
    assert isinstance(body, LlamaReproModel) == ours


def test_pipeline_runs_the_folder(folder):
    generate = pipeline("text-generation", model=str(folder))
    text = generate("the quick", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = AutoTokenizer.from_pretrained(folder)("the quick", return_tensors="pt")
    longer = AutoModelForCausalLM.from_pretrained(folder).generate(**ids, max_new_tokens=5, do_sample=False)
    assert text == AutoTokenizer.from_pretrained(folder).decode(longer[0], skip_special_tokens=True)


def test_code_beside_the_weights_runs_without_our_package(meta, tmp_path):
    convert(meta, tmp_path / "ours")
    tokens = torch.arange(3, 83)[None]
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(3, 83)[None]).logits.detach(), sys.argv[2])
assert "hf_llama_repro" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / "ours"), str(tmp_path / "logits")],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        check=True,
    )
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(tokens).logits
    assert relative_difference(torch.load(tmp_path / "logits"), expected) < TOLERANCE


CHAT = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("name", "asked", "is_chat"),
    [
        ("llama-2-7b-chat", None, True),
        ("Llama-2-7b-Chat", None, True),
        ("llama-2-7b", None, False),
        ("chatty", None, False),
        ("llama-2-7b-chat", False, False),
        ("llama-2-7b", True, True),
    ],
)
def test_only_chat_models_get_chat_template_and_sampling(tmp_path, meta, name, asked, is_chat):
    shutil.copytree(meta, tmp_path / name)
    convert(tmp_path / name, tmp_path / "ours", chat=asked)
    generation = read(tmp_path / "ours/generation_config.json")
    assert {field: generation[field] for field in CHAT if field in generation} == (CHAT if is_chat else {})
    assert (AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template is not None) == is_chat


def test_generation_configuration_has_the_tokenizers_special_ids(folder):
    generation, tokenizer = GenerationConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(generation, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize(
    "said", ["from `llama-2-x`", "Meta folder, 2 shards", "4096 tokens: LLaMA 2", "all 21 tensors", "bit for bit"]
)
def test_readme_says_source_decisions_and_checks(folder, said):
    assert said in (folder / "README.md").read_text()


@pytest.mark.parametrize("size", ["100KB", "200 kb", "0.3MB", "1B"])
def test_max_shard_size_gives_several_files_and_their_index(meta, folder, tmp_path, size):
    convert(meta, tmp_path / "ours", model_type=folder.name, max_shard_size=size)
    index, whole = read(tmp_path / "ours/model.safetensors.index.json"), load_file(folder / "model.safetensors")
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_no_file_is_larger_than_asked_unless_one_tensor_is(meta, tmp_path):
    convert(meta, tmp_path / "ours", max_shard_size="200KB")
    for path in (tmp_path / "ours").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(sizes) <= 200_000 or len(sizes) == 1


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--as", "llama"], {"model_type": "llama"}),
        (["--dtype", "float16"], {"dtype": "float16"}),
        (["--max-shard-size", "200KB"], {"max_shard_size": "200KB"}),
        (["--context-length", "77"], {"context_length": 77}),
        (["--chat"], {"chat": True}),
        (["--no-chat"], {"chat": False}),
        (["--no-tokenizer"], {"with_tokenizer": False}),
    ],
    ids=str,
)
def test_command_writes_what_the_function_writes(meta, tmp_path, arguments, options):
    convert(meta, tmp_path / "1/ours", **options)
    assert main([str(meta), str(tmp_path / "2/ours"), *arguments]) == 0
    by_function, by_command = (sorted(fingerprint(tmp_path / way).values()) for way in "12")
    assert by_function == by_command


@pytest.mark.parametrize("module", ["convert", "export"])
def test_help_loads_neither_torch_nor_transformers(module):
    script = f"""
import sys
from conversion.{module} import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "transformers", "safetensors", "sentencepiece"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(meta, tmp_path, umask):
    before = os.umask(umask)
    try:
        convert(meta, tmp_path / "ours", max_shard_size="200KB")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").iterdir()} == {0o666 & ~umask}
