"""Every known way in which fine-tuning fails silently is made to happen here, and must be caught."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from bitsandbytes.nn.modules import has_avx512bf16
from finetune_runs import CPU, adapter, changed, loaded, losses, metrics, records, run_command
from transformers import DataCollatorForLanguageModeling, TrainerCallback

import finetune.alpaca as command
from finetune.alpaca import finetune, main, prepare_data
from finetune.encoding import IGNORED
from finetune.guards import (
    EQUAL_LOSSES,
    GradientWatch,
    TrainingStoppedError,
    Watch,
    adapter_size,
    check_eos,
    check_labels,
    check_trained,
    preflight,
)
from finetune.model import choose_compute
from finetune.recipe import as_yaml
from finetune.training import LENGTH_MULTIPLE, FinetuneTrainer, collate
from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import InputError
from hf_llama_repro.versions import checkpoint_activations


class AtStep(TrainerCallback):
    """Does something to the model before an optimizer step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.change(model)


def with_fault(monkeypatch, step, change):
    original = FinetuneTrainer.__init__

    def init(self, **kwargs):
        original(self, **{**kwargs, "callbacks": [*kwargs["callbacks"], AtStep(step, change)]})

    monkeypatch.setattr(FinetuneTrainer, "__init__", init)


@torch.no_grad()
def spoil_adapter(model):
    next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(math.nan)


# --- before the first step


def test_preflight_leaves_parameters_gradients_and_random_state(recipe):
    model, data = loaded(recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    result = preflight(model, collate(data.train[:4]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert result.num_gradients == 8
    assert math.isfinite(result.loss)


def test_a_base_with_nan_is_refused_before_the_first_step(recipe):
    model, data = loaded(recipe)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    with pytest.raises(TrainingStoppedError, match="gives the loss nan: set dtype to bfloat16 or float32"):
        preflight(model, collate(data.train[:4]))


def test_a_gradient_that_is_not_finite_is_named(recipe):
    model, data = loaded(recipe)
    lora = model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    lora.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingStoppedError, match=r"of 8 trained tensors 1 get no gradient.*layers.0.*v_proj.lora_B"):
        preflight(model, collate(data.train[:4]))


def test_gradient_checkpointing_over_a_frozen_base_without_input_gradients_is_refused(recipe):
    """What happens when `enable_input_require_grads` is forgotten."""
    model, data = loaded(recipe)
    checkpoint_activations(model, use_reentrant=True)
    model.disable_input_require_grads() if hasattr(model, "_require_grads_hook") else None
    with pytest.raises((TrainingStoppedError, RuntimeError), match=r"get no gradient|does not require grad"):
        preflight(model, collate(data.train[:4]))


def test_nothing_to_train_is_refused(recipe):
    model, data = loaded(recipe)
    model.requires_grad_(False)
    with pytest.raises(TrainingStoppedError, match="nothing is trained"):
        preflight(model, collate(data.train[:4]))


needs_packing = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs 4-bit weights on AVX-512-BF16 only")


@needs_packing
def test_four_bit_weights_that_learn_nothing_after_an_evaluation_are_refused(recipe):
    """bitsandbytes' CPU path, once it has packed the weights for inference."""
    model, data = loaded(changed(recipe, quantization="nf4"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with pytest.raises(TrainingStoppedError, match="a pass after an evaluation: "):
        preflight(model, collate(data.train[:4]))


def test_four_bit_training_learns_also_after_evaluations(recipe):
    run = changed(recipe, quantization="nf4", dtype="bfloat16", eval_steps=3, lora_dropout=0.0)
    finetune(run)
    norms = [norm for _, norm in losses(run).values()]
    assert len(norms) == 12
    assert min(norms) > 0


def test_float16_without_gradient_scaling_is_refused(recipe):
    with pytest.raises(InputError, match=r"no gradient scaling on a cpu.*set dtype to auto"):
        finetune(changed(recipe, dtype="float16"))


def test_eos_masked_as_padding_is_refused(recipe, monkeypatch):
    """The usual collator masks what has the pad token's id: with pad == EOS the model never learns to stop."""
    data = prepare_data(recipe)
    tokenizer = data.encoder.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=LENGTH_MULTIPLE)
    batch = usual([{"input_ids": example.input_ids} for example in data.train[:4]])
    with pytest.raises(InputError, match="pad token is EOS, EOS is masked as well"):
        check_labels(data.train[:4], batch["labels"].masked_fill(collate(data.train[:4])["labels"] == IGNORED, IGNORED))
    check_labels(data.train[:4], collate(data.train[:4])["labels"])
    monkeypatch.setattr("finetune.training.collate", lambda examples: {**collate(examples), "labels": batch["labels"]})
    with pytest.raises(InputError, match="tokens of a batch are supervised and not"):
        finetune(recipe)


@pytest.mark.parametrize("fault", ["beyond the model", "never trained"])
def test_an_eos_that_the_model_cannot_say_is_refused(recipe, fault):
    model, data = loaded(recipe)
    eos = data.encoder.eos
    check_eos(model, eos)
    if fault == "beyond the model":
        with pytest.raises(InputError, match="EOS has id 512, and the model has 512 tokens"):
            check_eos(model, 512)
        return
    with torch.no_grad():
        model.get_output_embeddings().weight[eos] = 0
    with pytest.raises(InputError, match="holds only zeros for EOS"):
        check_eos(model, eos)


@pytest.mark.parametrize(
    ("size", "rank", "targets", "published"),
    [
        ("llama-7b", 8, ("q_proj", "v_proj"), 4_194_304),
        ("llama-13b", 8, ("q_proj", "v_proj"), 6_553_600),
        ("llama-7b", 16, ("q_proj", "k_proj", "v_proj", "o_proj"), 16_777_216),
    ],
)
def test_adapters_have_the_published_sizes(recipe, size, rank, targets, published):
    config = LlamaReproConfig.from_paper(size)
    assert adapter_size(config, changed(recipe, lora_r=rank, lora_targets=targets)) == published


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj", "lm_head"), ("up_proj",)])
def test_what_is_trained_is_counted(recipe, targets):
    recipe = changed(recipe, lora_targets=targets)
    model, _ = loaded(recipe)
    assert check_trained(model, recipe) == adapter_size(model.config, recipe)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(TrainingStoppedError, match="parameters are trained, and the recipe asks for"):
        check_trained(model, recipe)


def test_a_run_that_was_stopped_before_its_first_checkpoint_may_be_begun_anew(recipe, monkeypatch):
    with monkeypatch.context() as patch:
        with_fault(patch, 1, spoil_adapter)
        with pytest.raises(TrainingStoppedError):
            finetune(recipe)
    finetune(changed(recipe, learning_rate=1e-3))
    assert [line["step"] for line in metrics(recipe) if "eval_loss" in line] == [0, 12]


# --- while it goes on


@pytest.mark.parametrize("step", [1, 6])
def test_a_loss_of_nan_stops_the_run_and_names_the_last_good_checkpoint(recipe, monkeypatch, step):
    with_fault(monkeypatch, step, spoil_adapter)
    good = (
        f"the last good checkpoint is {recipe.output_dir}/checkpoint-4" if step > 4 else "no checkpoint was saved yet"
    )
    with pytest.raises(TrainingStoppedError, match=f"the loss is nan at step {step + 1}: .*{good}"):
        finetune(recipe)
    assert not (Path(recipe.output_dir) / "adapter").exists()
    if step > 4:
        assert all(tensor.isfinite().all() for tensor in adapter(f"{recipe.output_dir}/checkpoint-4").values())


def test_gradients_of_zero_stop_the_run(recipe, monkeypatch):
    def detach(model):
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].register_forward_hook(
                    lambda m, i, output: output.detach() + 0 * m.weight.sum()
                )

    with_fault(monkeypatch, 5, detach)
    with pytest.raises(TrainingStoppedError, match="every gradient is exactly 0 at step 6"):
        finetune(recipe)


def test_gradients_that_are_not_finite_stop_the_run(recipe, monkeypatch):
    def blow_up(model):
        next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(lambda grad: grad * math.inf)

    with_fault(monkeypatch, 5, blow_up)
    with pytest.raises(TrainingStoppedError, match="gradients are not finite at step 6"):
        finetune(recipe)


def test_a_loss_that_is_exactly_constant_stops_the_run(recipe, tmp_path):
    """A learning rate that moves nothing, over one batch: whatever the reason, nothing is learnt."""
    data = tmp_path / "one.json"
    data.write_text(json.dumps(records(4)))
    stuck = changed(recipe, data=str(data), held_out=0, batch_size=4, lora_dropout=0.0, learning_rate=1e-30)
    with pytest.raises(TrainingStoppedError, match=f"over {EQUAL_LOSSES} steps, exactly"):
        finetune(stuck)
    moving = changed(stuck, output_dir=str(tmp_path / "moving"), learning_rate=1e-3)
    finetune(moving)


def test_equal_losses_of_fewer_steps_are_in_order():
    """The first learning rate of a warm-up is 0."""
    watch = Watch()
    for step, loss in enumerate([2.0, 2.0, 1.9, 1.8, 1.8, 1.7]):
        watch.loss(torch.tensor(loss), step, None)


def test_the_watches_are_part_of_every_run(recipe):
    model, data = loaded(recipe)
    compute = choose_compute(recipe, CPU)
    trainer = command._trainer(recipe, data, model, PartialState(), compute, begins=True)
    assert any(isinstance(callback, GradientWatch) for callback in trainer.callback_handler.callbacks)


# --- what is saved


def emptied(save):
    """What alpaca-lora's patched state_dict did to the adapter: a file without a tensor."""

    def patched(self, directory, **kwargs):
        save(self, directory, **kwargs)
        from safetensors.torch import save_file

        save_file({}, Path(directory) / "adapter_model.safetensors")

    return patched


def spoilt(save):
    def patched(self, directory, **kwargs):
        save(self, directory, **kwargs)
        from safetensors.torch import load_file, save_file

        tensors = load_file(Path(directory) / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, name: tensors[name] + 1e-3}, Path(directory) / "adapter_model.safetensors")

    return patched


def rescaled(save):
    """The right tensors under a wrong configuration: other logits."""

    def patched(self, directory, **kwargs):
        save(self, directory, **kwargs)
        path = Path(directory) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 999}))

    return patched


def truncated(save):
    def patched(self, directory, **kwargs):
        save(self, directory, **kwargs)
        path = Path(directory) / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:443])

    return patched


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (emptied, "is not the one that was trained: .* holds 0 tensors, 8 of the 8"),
        (spoilt, "holds 8 tensors, 1 of the 8 in memory are missing or differ"),
        (rescaled, "gives other logits"),
        (truncated, "cannot be read back"),
    ],
)
def test_an_adapter_that_is_not_saved_as_it_is_stops_the_run_at_the_first_save(recipe, monkeypatch, fault, message):
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "save_pretrained", fault(PeftModel.save_pretrained))
    with pytest.raises(TrainingStoppedError, match=message):
        finetune(recipe)
    assert max(losses(recipe)) == 4
    assert not list(Path(recipe.output_dir).glob("checkpoint-*"))


def test_the_last_save_is_checked_as_well(recipe, monkeypatch):
    from peft import PeftModel

    save, count = PeftModel.save_pretrained, []

    def last_is_empty(self, directory, **kwargs):
        count.append(directory)
        (emptied(save) if Path(directory).name == "adapter" else save)(self, directory, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", last_is_empty)
    with pytest.raises(TrainingStoppedError, match="holds 0 tensors"):
        finetune(recipe)
    assert len(count) == 4
    assert not (Path(recipe.output_dir) / "adapter").exists()
    assert (Path(recipe.output_dir) / "checkpoint-12").is_dir()


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_intact(recipe, monkeypatch, when):
    import finetune.training as training

    publish, count = training.publish, []

    def full(partial, target):
        count.append(target)
        if len(count) == (1 if when == "first" else 2):
            raise OSError(28, "No space left on device")
        publish(partial, target)

    monkeypatch.setattr(training, "publish", full)
    with pytest.raises(TrainingStoppedError, match=r"no space left on the disk.*--resume"):
        finetune(recipe)
    output = Path(recipe.output_dir)
    assert not (output / ".partial").exists()
    assert [path.name for path in output.glob("checkpoint-*")] == ([] if when == "first" else ["checkpoint-4"])


def test_a_checkpoint_that_the_system_cannot_write_is_one_message(recipe):
    """A limit on the size of files, as a full disk, hits in the middle of a file."""
    limited = "import resource,sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000)); "
    script = limited + "from finetune.alpaca import main; sys.exit(main(sys.argv[1:]))"
    import subprocess
    import sys

    from finetune_runs import ROOT

    path = Path(recipe.output_dir).with_suffix(".yaml")
    path.write_text(as_yaml(changed(recipe, lora_r=64)))
    result = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert "Traceback" not in result.stderr


# --- bad input, by the command


def spoil(tmp_path, tiny_base, name):
    """The recipe's fields that are wrong."""
    data = tmp_path / "data.json"
    base = tmp_path / "base"
    if name == "missing data":
        return {"data": str(tmp_path / "nowhere.json")}
    if name == "malformed data":
        data.write_text('[{"instruction": "a", "output": "b"},\n {"instruction": }]')
    elif name == "empty data":
        data.write_text("[]")
    elif name == "nothing left":
        data.write_text('[{"instruction": "a", "input": "", "output": ""}]')
    elif name == "template without a response slot":
        (tmp_path / "t.json").write_text('{"prompt": "{instruction}", "response": "no slot"}')
        return {"template": str(tmp_path / "t.json")}
    elif name == "base without a tokenizer":
        shutil.copytree(tiny_base, base)
        (base / "tokenizer.json").unlink()
        return {"base_model": str(base)}
    elif name == "base without weights":
        shutil.copytree(tiny_base, base)
        (base / "model.safetensors").unlink()
        return {"base_model": str(base)}
    elif name == "no base":
        return {"base_model": str(tmp_path / "nowhere")}
    elif name == "output that cannot be written":
        (tmp_path / "file").write_text("")
        return {"output_dir": str(tmp_path / "file" / "run")}
    elif name == "layers that do not exist":
        return {"lora_targets": ("query_key_value",)}
    elif name == "a limit beyond the context":
        return {"max_length": 4096}
    elif name == "too many held out":
        return {"held_out": 40}
    elif name == "unknown reporting":
        return {"report_to": ("no_such_thing",)}
    elif name == "strict":
        data.write_text(json.dumps([*records(20), {"instruction": "a", "input": "", "output": ""}]))
        return {"data": str(data), "strict": True}
    return {"data": str(data)}


BAD = {
    "missing data": "cannot be read",
    "malformed data": "data.json:2 is not JSON",
    "empty data": "holds 0 records",
    "nothing left": "none can be trained on",
    "template without a response slot": "response must hold {response} once",
    "base without a tokenizer": "has no tokenizer.json",
    "base without weights": "no weights that can be read",
    "no base": "is no model that can be trained",
    "output that cannot be written": "cannot be written",
    "layers that do not exist": "lora_targets names query_key_value; this model has",
    "a limit beyond the context": "more than the base's context of 512 tokens",
    "too many held out": "leaves nothing of 40 records",
    "unknown reporting": "report_to names no_such_thing",
    "strict": "strict=true, and the linter finds",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_exit_code_2(recipe, tiny_base, tmp_path, capsys, name):
    bad = changed(recipe, **spoil(tmp_path, tiny_base, name))
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(bad))
    assert main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert BAD[name] in printed
    assert "\nerror: " in "\n" + printed.replace("\r", "\n")


def test_a_stopped_run_ends_without_a_traceback(recipe, tiny_base, tmp_path):
    """As a process: NaN in the base's weights."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = run_command(changed(recipe, base_model=str(base)))
    assert result.returncode == 2
    assert result.stderr.startswith("error: the first forward and backward pass gives the loss nan")
    assert "Traceback" not in result.stderr
