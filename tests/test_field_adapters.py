"""Adapters as people have them: older files, larger vocabularies, renamed tensors, fields without effect, token ids."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapters import adapter_folder, base_folder, edit, edit_tensors, logits, unmerged, weights
from finetune_runs import changed, tiny_recipe
from peft import LoraConfig, get_peft_model
from random_models import relative_difference, tiny_config, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conversion import adapter as adapter_reader
from conversion import merge as merge_command
from conversion.merge import main as merge_main
from conversion.merge import merge
from finetune.alpaca import finetune
from finetune.answering import open_tokenizer
from finetune.chat import main as chat
from finetune.generate import main as generate
from hf_llama_repro.adapter_folder import attach
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.run_folder import INPUTS_FILE
from hf_llama_repro.token_ids import FILE_NAME

TOLERANCE = 2e-5
ROWS, MORE = 131, 140
PLAIN = {"target_modules": ["q_proj", "v_proj"]}
IDS = torch.arange(MORE).reshape(2, -1)  # every token, those besides the base's too


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def any_base(request, tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("bases") / "base", tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def made_once(base, tmp_path_factory):
    return adapter_folder(tmp_path_factory.mktemp("adapters") / "adapter", base, **PLAIN)


@pytest.fixture
def adapter(made_once, tmp_path):
    return shutil.copytree(made_once, tmp_path / "adapter")


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def as_bin(adapter, content=None):
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path) if content is None else content, adapter / "adapter_model.bin")
    path.unlink()
    return adapter


@torch.no_grad()
def enlarged(folder, base, *, enlarged_base=None, **fields):
    """An adapter of a base with more rows, and the logits of the two for every token."""
    model = loaded(base)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    generator = torch.Generator().manual_seed(3)
    for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        matrix[ROWS:] = 0.1 * torch.randn(MORE - ROWS, matrix.shape[1], generator=generator)
    if enlarged_base is not None:
        model.save_pretrained(enlarged_base)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **fields))
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder, model.eval()(IDS).logits


# Files


def test_generate_reads_the_older_file_with_the_same_answer(instructed, tmp_path, capsys):
    adapter = adapter_folder(tmp_path / "adapter", instructed)
    asked = [str(instructed), "--adapter", str(adapter), "--instruction", "hello", "--max-new-tokens", "9"]
    assert generate(asked) == 0
    answer = capsys.readouterr().out
    as_bin(adapter)
    assert generate(asked) == 0
    assert capsys.readouterr().out == answer


def test_attaching_the_older_file_gives_the_same_logits(base, adapter):
    expected = logits(unmerged(base, adapter))
    assert torch.equal(logits(attach(LlamaForCausalLM.from_pretrained(base), as_bin(adapter))), expected)


class Code:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": Code()}, "holds code that loading would execute"),
        ([1], "holds no dictionary of tensors"),
        ({}, "holds no tensors"),
    ],
)
def test_older_file_that_is_no_adapter_is_one_message(base, adapter, content, said):
    with pytest.raises(CheckpointError, match=said):
        attach(loaded(base), as_bin(adapter, content))


def test_of_two_files_the_one_that_counts_is_named(base, adapter, tmp_path, capsys):
    (adapter / "adapter_model.bin").write_bytes(b"")
    attach(loaded(base), adapter)
    note = "adapter_model.bin of the adapter is not read: adapter_model.safetensors lies beside it"
    assert note in capsys.readouterr().err
    assert f"decided    {note}" in merge(adapter, tmp_path / "merged").lines()


def test_value_that_is_not_finite_is_refused_at_once(base, adapter):
    edit_tensors(adapter, lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="NaN or infinite values"):
        attach(loaded(base), adapter)


# A larger vocabulary

ENLARGED = {
    "both ends saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one end saved": {"modules_to_save": ["lm_head"]},
    "both ends frozen": {},
    "rows trained": {"trainable_token_indices": [5, ROWS, MORE - 1]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("fields", ENLARGED.values(), ids=ENLARGED)
def test_larger_vocabulary_merges_onto_base_and_enlarged_base(any_base, tmp_path, fields):
    adapter, expected = enlarged(
        tmp_path / "adapter", any_base, enlarged_base=tmp_path / "enlarged", target_modules=["q_proj"], **fields
    )
    lines = merge(adapter, tmp_path / "merged").lines()
    assert (
        f"decided    vocabulary of {MORE} tokens: the base has {ROWS}, the rows of the others are the adapter's"
        in lines
    )
    merge(adapter, tmp_path / "onto_enlarged", base=tmp_path / "enlarged")
    attached = attach(loaded(any_base), adapter)
    for model in (loaded(tmp_path / "merged"), loaded(tmp_path / "onto_enlarged"), attached):
        assert relative_difference(model.eval()(IDS).logits, expected) < TOLERANCE
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == MORE


def test_names_are_those_of_peft_beside_a_larger_vocabulary(base, tmp_path):
    """The matrices are written three times each."""
    adapter, _ = enlarged(tmp_path / "adapter", base, target_modules=["q_proj"], **ENLARGED["both ends saved"])
    names = set(load_file(adapter / "adapter_model.safetensors"))
    for part in ("", "modules_to_save.", "original_module."):
        assert f"base_model.model.lm_head.{part}weight" in names


def test_tied_ends_changed_alike_stay_tied(tmp_path):
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    for name, fields in (
        ("saved", {**PLAIN, "modules_to_save": ["embed_tokens"]}),
        ("targeted", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("rows", {**PLAIN, "trainable_token_indices": [7]}),
    ):
        adapter = adapter_folder(tmp_path / name, base, ensure_weight_tying=True, **fields)
        merge(adapter, tmp_path / f"merged {name}")
        assert relative_difference(logits(tmp_path / f"merged {name}"), logits(unmerged(base, adapter))) < TOLERANCE
        assert json.loads((tmp_path / f"merged {name}/config.json").read_text())["tie_word_embeddings"] is True
        assert "lm_head.weight" not in weights(tmp_path / f"merged {name}")


@pytest.mark.parametrize("fields", [{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": {"lm_head": [4]}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_rows_stand_in_place_of_the_bases(any_base, tmp_path, fields, dtype):
    adapter = adapter_folder(tmp_path / "adapter", any_base, **PLAIN, **fields, dtype=dtype)
    lines = "\n".join(merge(adapter, tmp_path / "merged").lines())
    assert "rows of " in lines
    assert relative_difference(logits(tmp_path / "merged"), logits(unmerged(any_base, adapter))) < TOLERANCE


def test_saved_matrices_with_fewer_rows_than_the_base_take_their_place(any_base, tmp_path, capsys):
    """As beside a base that was padded after the training."""
    ends = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = adapter_folder(tmp_path / "adapter", any_base, **PLAIN, **ends)
    enlarged(tmp_path / "other", any_base, enlarged_base=tmp_path / "enlarged", **PLAIN)
    note = f"lm_head of the adapter has {ROWS} rows, the base {MORE}: the others are the base's"
    assert f"decided    {note}" in merge(adapter, tmp_path / "merged", base=tmp_path / "enlarged").lines()
    capsys.readouterr()
    attached = attach(loaded(tmp_path / "enlarged"), adapter)
    assert note in capsys.readouterr().err
    expected = logits(unmerged(any_base, adapter))
    for model in (attached, loaded(tmp_path / "merged")):
        assert relative_difference(logits(model)[..., :ROWS], expected) < TOLERANCE
    # The further rows are the padded base's.
    before, after = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("enlarged", "merged"))
    assert torch.equal(before[ROWS:], after[ROWS:])


def test_matrix_that_the_base_lacks_and_the_adapter_does_not_hold_is_named(base, tmp_path):
    adapter, _ = enlarged(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens"])
    said = f"was trained with {MORE} tokens, and the base has {ROWS}: it does not hold the further rows of lm_head"
    with pytest.raises(CheckpointError, match=said):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=said):
        attach(loaded(base), adapter)


def test_rows_that_base_and_adapter_share_must_be_equal(base, tmp_path):
    adapter, _ = enlarged(tmp_path / "adapter", base, target_modules=["q_proj"])
    edit_tensors(
        adapter, lambda tensors: {name: tensor * (1 + ("lm_head" in name)) for name, tensor in tensors.items()}
    )
    for opened in (lambda: merge(adapter, tmp_path / "merged"), lambda: attach(loaded(base), adapter)):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight.*modules_to_save does not name it"):
            opened()


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (merge_command, "_with_rows", lambda stored, rows: stored.read()),
        (adapter_reader, "_continued", lambda stored, longer: longer.read() * 1.01),
    ],
    ids=["rows", "extension"],
)
def test_wrong_rows_are_caught_by_the_merges_own_proof(base, tmp_path, monkeypatch, module, name, wrong):
    adapter, _ = enlarged(tmp_path / "adapter", base, target_modules=["q_proj"], **ENLARGED["rows trained"])
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(CheckpointError, match=r"the merged model is not base and adapter|differs from the base's"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# Fields

NO_EFFECT = {
    "merge_weights": True,
    "enable_lora": None,
    "ensure_weight_tying": True,
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "kpm"},
    "runtime_config": {"ephemeral_gpu_offload": False},
}
# adapter_config.json of tloen/alpaca-lora-7b, but for its base.
OF_2023 = {
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 10,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("only", [None, OF_2023], ids=["fields of several versions", "fields of 2023"])
def test_fields_without_effect_do_not_refuse(base, adapter, tmp_path, only):
    expected = logits(unmerged(base, adapter))
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text())
    if only is None:
        fields |= NO_EFFECT
    else:
        fields = {**only, "base_model_name_or_path": fields["base_model_name_or_path"]}
    path.write_text(json.dumps(fields))
    merge(adapter, tmp_path / "merged")
    assert relative_difference(logits(tmp_path / "merged"), expected) < TOLERANCE
    assert torch.equal(logits(attach(LlamaForCausalLM.from_pretrained(base), adapter)), expected)


def test_field_that_peft_would_ignore_is_refused_by_name(base, adapter, tmp_path):
    for fields in ({"use_xora": 1}, {"enable_lora": [True, False, True]}):
        (name,) = fields
        edit(adapter, **fields)
        with pytest.raises(CheckpointError, match=f"{name} = .* means nothing to PEFT"):
            attach(loaded(base), adapter)
        with pytest.raises(CheckpointError, match=f"{name} = .* cannot be merged"):
            merge(adapter, tmp_path / "merged")
        edit(adapter, **{name: None})


# Names

RENAMED = {
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".my-adapter.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "no prefix at all": lambda name: name.removeprefix("base_model.model.model."),
    "DDP": lambda name: f"module.{name}",
    "FSDP and checkpointing": lambda name: name.replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "compiled": lambda name: f"_orig_mod.{name}",
    "all at once": lambda name: f"module.model.{name.removeprefix('base_model.model.')}".replace(
        ".weight", ".a.weight"
    ),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_renamed_tensors_are_read_with_a_note(base, adapter, tmp_path, capsys, rename):
    expected = logits(unmerged(base, adapter))
    edit_tensors(adapter, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    lines = "\n".join(merge(adapter, tmp_path / "merged").lines())
    note = "8 tensors of the adapter under names that PEFT does not write: "
    assert f"decided    {note}" in lines
    assert relative_difference(logits(tmp_path / "merged"), expected) < TOLERANCE
    capsys.readouterr()
    assert torch.equal(logits(attach(LlamaForCausalLM.from_pretrained(base), adapter)), expected)
    assert f"note: {note}" in capsys.readouterr().err


def test_saved_modules_with_the_adapters_name_are_read(base, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", base, **PLAIN, modules_to_save=["lm_head", "mlp"])
    expected = logits(unmerged(base, adapter))

    def rename(name):
        for module in ("lm_head", "mlp"):
            name = name.replace(f"{module}.", f"{module}.modules_to_save.default.")
        return name

    edit_tensors(adapter, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    merge(adapter, tmp_path / "merged")
    assert relative_difference(logits(tmp_path / "merged"), expected) < TOLERANCE
    assert torch.equal(logits(attach(LlamaForCausalLM.from_pretrained(base), adapter)), expected)


AMBIGUOUS = {
    "two adapters": (
        lambda tensors: {
            name.replace(".weight", f".{adapter}.weight"): tensor.clone()
            for name, tensor in tensors.items()
            for adapter in ("one", "two")
        },
        r"holds several adapters \(one, two\)",
    ),
    "two values": (
        lambda tensors: {**tensors, **{f"module.{name}": tensor + 1 for name, tensor in tensors.items()}},
        "are one tensor with two values",
    ),
}


@pytest.mark.parametrize(("change", "said"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_names_are_refused(base, adapter, tmp_path, change, said):
    edit_tensors(adapter, change)
    with pytest.raises(CheckpointError, match=said):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=said):
        attach(loaded(base), adapter)


# Token ids


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_data, tmp_path_factory):
    """A run with two checkpoints, stopped after the first, and the adapter that it would give."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(
        tiny_base, tiny_data, folder / "run", max_steps=2, batch_size=4, save_steps=1, held_out=0, max_length=64
    )
    return recipe, finetune(recipe)


@pytest.fixture
def swapped(tiny_base, tmp_path):
    """The base, with two of its tokens under each other's id."""
    folder = shutil.copytree(tiny_base, tmp_path / "swapped")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    (one, first), (other, second) = [item for item in vocab.items() if item[1] > 300][:2]
    vocab |= {one: second, other: first}
    path.write_text(json.dumps(content))
    return folder


def test_fine_tuning_leaves_a_fingerprint_of_the_token_ids(trained):
    recipe, adapter = trained
    found = [
        json.loads((folder / FILE_NAME).read_text()) for folder in (adapter, Path(recipe.output_dir, "checkpoint-1"))
    ]
    assert found[0] == found[1]
    assert found[0]["num_tokens"] == 500
    assert (found[0]["bos_token_id"], found[0]["eos_token_id"]) == (1, 2)


def test_base_with_other_token_ids_is_refused_by_each_command(trained, swapped, tmp_path, capsys):
    recipe, adapter = trained
    commands = {
        "generate": lambda base: generate([str(base), "--adapter", str(adapter), "--instruction", "a"]),
        "chat": lambda base: chat([str(base), "--adapter", str(adapter), "--terminal"]),
        "merge": lambda base: merge_main([str(adapter), str(tmp_path / "merged"), "--base", str(base)]),
    }
    for command in commands.values():
        assert command(swapped) == 2
        error = capsys.readouterr().err
        assert "was trained with other token ids than" in error
        assert "other tokens under the same ids" in error
    assert not (tmp_path / "merged").exists()
    # The base that it was trained on is accepted.
    assert commands["merge"](recipe.base_model) == 0


def test_evaluation_refuses_a_base_with_other_token_ids(trained, swapped):
    from hf_llama_repro.evaluation.model import load

    with pytest.raises(CheckpointError, match="was trained with other token ids"):
        load(swapped, trained[1], dtype="float32")


def test_resuming_refuses_a_base_with_other_token_ids(trained, swapped, tmp_path):
    recipe, _ = trained
    run = shutil.copytree(recipe.output_dir, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-2")
    (run / INPUTS_FILE).unlink()  # as runs begun earlier, whose inputs are not compared
    replaced = Path(recipe.base_model, "tokenizer.json")
    before = replaced.read_text()
    try:
        replaced.write_text((swapped / "tokenizer.json").read_text())  # the path is the same
        with pytest.raises(CheckpointError, match="checkpoint-1 was trained with other token ids"):
            finetune(changed(recipe, output_dir=str(run)), resume=True)
    finally:
        replaced.write_text(before)


def test_damaged_fingerprint_is_one_message(trained, tmp_path, capsys):
    recipe, adapter = trained
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    for content in ("{", "[]", '{"num_tokens": 3}'):
        (adapter / FILE_NAME).write_text(content)
        assert generate([recipe.base_model, "--adapter", str(adapter), "--instruction", "a"]) == 2
        assert "holds no fingerprint of token ids" in capsys.readouterr().err


def test_tokens_that_the_base_has_besides_are_no_difference(trained, tmp_path):
    recipe, adapter = trained
    folder = shutil.copytree(recipe.base_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert len(open_tokenizer(folder, adapter)) == 501


def test_adapter_of_another_program_is_asked_with_its_own_tokenizer(base, tmp_path, capsys):
    adapter, _ = enlarged(tmp_path / "adapter", base, target_modules=["q_proj"])
    capsys.readouterr()
    assert open_tokenizer(base, adapter).get_vocab() == tiny_tokenizer(tiny_config()).get_vocab()
    assert capsys.readouterr().err == ""
    tokenizer = tiny_tokenizer(tiny_config())
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(adapter)
    assert open_tokenizer(base, adapter).eos_token_id == ROWS
    assert "note: tokenizer of the adapter, which the base's departs from: 131 tokens in place of 132" in (
        capsys.readouterr().err
    )
    merge(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == ROWS
    # Of more tokens than the model has rows, none can be asked with.
    plain = adapter_folder(tmp_path / "plain", base, **PLAIN)
    tokenizer.save_pretrained(plain)
    assert open_tokenizer(base, plain).eos_token_id == 2
    assert "tokenizer of the base: the adapter's has 132 tokens, the model 131" in capsys.readouterr().err
