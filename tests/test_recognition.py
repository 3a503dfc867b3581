"""Which LLaMA a Meta folder holds: told from its files, or asked for where they do not tell."""

import hashlib
import json

import pytest
import torch
from meta_checkpoints import METAS, meta_folder, meta_params, meta_weights, write_meta, write_sentencepiece

from conversion.convert import convert, main
from conversion.source import open_source
from hf_llama_repro import PAPER_SIZES
from hf_llama_repro.errors import CheckpointError

MHA = {"n_kv_heads": None}
# Shards that Meta ships, and the exact number of parameters.
PAPERS = {
    "llama-7b": (1, 6_738_415_616),
    "llama-13b": (2, 13_015_864_320),
    "llama-33b": (4, 32_528_943_616),
    "llama-65b": (8, 65_285_660_672),
    "llama-2-7b": (1, 6_738_415_616),
    "llama-2-13b": (2, 13_015_864_320),
    "llama-2-70b": (8, 68_976_648_192),
}


def write_real_size(folder, name, shards):
    """A paper's checkpoint in its true shapes; every tensor repeats one stored value, so that it takes no space."""
    params, paper = METAS[name], PAPER_SIZES[name]
    dtype = getattr(torch, paper["dtype"])
    dim, ffn, heads = paper["hidden_size"], paper["intermediate_size"], paper["num_attention_heads"]
    kv = dim // heads * paper.get("num_key_value_heads", heads)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(shards):

        def matrix(rows, columns, value=rank + 1.0):
            return torch.full((1, 1), value, dtype=dtype).expand(rows, columns)

        norm = torch.ones(1, dtype=dtype).expand(dim)
        shard = {"tok_embeddings.weight": matrix(32000, dim // shards), "norm.weight": norm}
        for layer in range(params["n_layers"]):
            tensors = {
                "attention.wq": matrix(dim // shards, dim),
                "attention.wk": matrix(kv // shards, dim),
                "attention.wv": matrix(kv // shards, dim),
                "attention.wo": matrix(dim, dim // shards),
                "feed_forward.w1": matrix(ffn // shards, dim),
                "feed_forward.w2": matrix(dim, ffn // shards),
                "feed_forward.w3": matrix(ffn // shards, dim),
                "attention_norm": norm,
                "ffn_norm": norm,
            }
            shard |= {f"layers.{layer}.{kind}.weight": tensor for kind, tensor in tensors.items()}
            if "-2-" not in name:
                shard[f"layers.{layer}.attention.inner_attention.rope.freqs"] = torch.ones(dim // heads // 2)
        if "-2-" in name:
            shard["rope.freqs"] = torch.ones(dim // heads // 2)
        shard["output.weight"] = matrix(32000 // shards, dim, -1.0)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")


@pytest.mark.parametrize(("name", "shards", "parameters"), [(name, *facts) for name, facts in PAPERS.items()])
def test_papers_checkpoints_are_recognised(tmp_path, name, shards, parameters):
    write_real_size(tmp_path / "meta", name, shards)
    source = open_source(tmp_path / "meta")
    expected = {**PAPER_SIZES[name], "vocab_size": 32000, "rms_norm_eps": METAS[name]["norm_eps"]}
    expected["dtype"] = getattr(torch, expected["dtype"])
    assert {field: getattr(source.config, field) for field in expected} == expected
    assert sum(torch.Size(tensor.shape).numel() for tensor in source.tensors.values()) == parameters


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
VERSIONS = {
    "LLaMA 1 as shipped": ({**MHA, "norm_eps": 1e-6}, FP16, "per layer", 2048),
    "LLaMA 1 65B, whose eps is LLaMA 2's": ({**MHA, "norm_eps": 1e-5}, FP16, "per layer", 2048),
    "LLaMA 1 without frequencies": ({**MHA, "norm_eps": 1e-6}, FP16, None, 2048),
    "LLaMA 1 in float32": ({**MHA, "norm_eps": 1e-6}, FP32, None, 2048),
    "LLaMA 2 as shipped": ({**MHA, "norm_eps": 1e-5}, BF16, "beside", 4096),
    "LLaMA 2 70B": ({"norm_eps": 1e-5, "ffn_dim_multiplier": 1.3}, BF16, "beside", 4096),
    "LLaMA 2 cast to float16": ({**MHA, "norm_eps": 1e-5}, FP16, "beside", 4096),
    "LLaMA 2 without frequencies": ({**MHA, "norm_eps": 1e-5}, BF16, None, 4096),
    "grouped K/V heads alone": ({"n_kv_heads": 2, "norm_eps": 1e-6}, FP32, None, 4096),
    "params.json says it": ({**MHA, "max_seq_len": 512, "norm_eps": 1e-6}, FP16, "per layer", 512),
}


@pytest.mark.parametrize(("fields", "dtype", "frequencies", "context"), VERSIONS.values(), ids=VERSIONS)
def test_version_is_recognised_by_its_context(tmp_path, fields, dtype, frequencies, context):
    params = meta_params(**fields)
    write_meta(tmp_path / "meta", params, meta_weights(params, dtype=dtype), frequencies=frequencies)
    assert open_source(tmp_path / "meta").config.max_position_embeddings == context


@pytest.mark.parametrize(
    ("eps", "dtype", "said"),
    [(1e-6, BF16, "speaks for"), (1e-5, FP16, "speaks for"), (3e-5, FP32, "norm_eps 3e-05 is not LLaMA 1's or 2's")],
)
def test_where_the_files_do_not_tell_the_context_is_asked_for(tmp_path, capsys, eps, dtype, said):
    source = meta_folder(tmp_path / "meta", dtype=dtype, norm_eps=eps, **MHA)
    with pytest.raises(CheckpointError, match=f"{said}.*--context-length .*2048"):
        convert(source, tmp_path / "ours", with_tokenizer=False)
    arguments = [str(source), str(tmp_path / "ours"), "--no-tokenizer"]
    assert main(arguments) == 2
    assert main([*arguments, "--context-length", "2048"]) == 0
    assert "context of 2048 tokens: as asked for" in capsys.readouterr().out


@pytest.mark.parametrize(("folder", "tokenizer"), [("LLaMA/7B", "LLaMA"), ("llama-2-7b", "llama-2-7b"), ("7B", ".")])
def test_both_layouts_of_metas_downloads_are_known(tmp_path, folder, tokenizer):
    source = meta_folder(tmp_path / folder)
    model = write_sentencepiece(tmp_path / tokenizer / "tokenizer.model")
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours/tokenizer.model").read_bytes() == model.read_bytes()


def test_checklist_that_agrees_is_mentioned(tmp_path):
    source = meta_folder(tmp_path / "meta", shards=2)
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(source.iterdir())]
    (source / "checklist.chk").write_text("".join(lines))
    assert "md5 of 3 files as in checklist.chk" in open_source(source).notes


@pytest.mark.parametrize(("steps", "fits"), [(1, True), (3, False)])
def test_norms_of_two_shards_may_differ_in_the_last_bit_only(tmp_path, steps, fits):
    source = meta_folder(tmp_path / "meta", shards=2)
    path = source / "consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    for _ in range(steps):
        shard["norm.weight"] = torch.nextafter(shard["norm.weight"], torch.tensor(torch.inf))
    torch.save(shard, path)
    if fits:
        assert "1 norms differ in their last bit" in " ".join(open_source(source, context_length=2048).notes)
    else:
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: norm\.weight differs"):
            open_source(source, context_length=2048)
