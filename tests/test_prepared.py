"""The prepared path: the ordinary one's logits and tokens at any batch, mask and cache; undone, saved, refused."""

import copy
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import ARCHITECTURES, BIASES, random_model, random_tokens, relative_difference, tiny_config
from transformers import BitsAndBytesConfig, DynamicCache

from hf_llama_repro import LlamaReproForCausalLM, cpu_kernel, optimize, restore
from hf_llama_repro.errors import InputError
from hf_llama_repro.fast_paths import most_tokens
from hf_llama_repro.modeling_llama_repro import CACHE
from hf_llama_repro.prepared import Prepared

architectures = pytest.mark.parametrize("fields", [*ARCHITECTURES.values(), BIASES], ids=[*ARCHITECTURES, "biases"])
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def threads():
    """As many as before, whatever a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def talker(fields=None, dtype=torch.float32):
    return random_model(tiny_config(eos_token_id=None, max_position_embeddings=1024, **(fields or {}))).to(dtype)


def counted(model):
    """Counts the passes that the compiled code does."""
    calls = []
    prepared = model.forward
    run = prepared._run

    def counting(*args):
        calls.append(args[0].shape)
        return run(*args)

    prepared._run = counting
    return calls


@torch.no_grad()
def stepwise(model, tokens, steps, **inputs):
    """Logits of tokens fed piece by piece into one cache."""
    cache, logits, past = DynamicCache(config=model.config), [], 0
    for piece in tokens.split(steps, dim=1):
        past += piece.shape[1]
        more = {name: value[:, :past] for name, value in inputs.items()}
        logits.append(model(input_ids=piece, use_cache=True, **more, **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1)


@architectures
@pytest.mark.parametrize("threads", [1, 2])
def test_prepared_logits_equal_the_ordinary_ones(fields, threads):
    torch.set_num_threads(threads)
    model = talker(fields)
    tokens = random_tokens(model.config, batch=2, seq=80)
    steps = [64, *[1] * 8, 4, 4]
    expected = stepwise(model, tokens, steps)
    calls = counted(optimize(model))
    assert relative_difference(stepwise(model, tokens, steps), expected) < 1e-5
    assert len(calls) == 10  # all but the prompt


@architectures
def test_prepared_bf16_is_no_further_from_fp32_than_the_ordinary_path(fields):
    exact = talker(fields)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    tokens, steps = random_tokens(exact.config, batch=2, seq=72), [64, *[1] * 8]
    reference, ordinary = stepwise(exact, tokens, steps), stepwise(model, tokens, steps)
    prepared = stepwise(optimize(model), tokens, steps)
    assert prepared.dtype == torch.bfloat16

    def distance(logits):
        return ((logits.float() - reference)[:, 64:].norm() / reference[:, 64:].norm()).item()

    assert distance(prepared) < distance(ordinary) + 1e-3


def test_prepared_tokens_equal_the_ordinary_ones_over_256():
    model = talker(ARCHITECTURES["9/3"])
    prompt = random_tokens(model.config, batch=1, seq=64)
    expected = model.generate(prompt, max_new_tokens=256, **GREEDY)
    calls = counted(optimize(model))
    assert torch.equal(model.generate(prompt, max_new_tokens=256, **GREEDY), expected)
    assert len(calls) == 255


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": True, "output_logits": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_prepared_generation_in_every_way(how):
    model = talker()
    model.set_attn_implementation("eager" if "output_attentions" in how else "sdpa")
    prompt = random_tokens(model.config, batch=1, seq=10)
    expected = model.generate(prompt, max_new_tokens=24, **GREEDY, **how)
    result = optimize(model).generate(prompt, max_new_tokens=24, **GREEDY, **how)
    if "return_dict_in_generate" in how:
        assert result.keys() == expected.keys()
        result, expected = result.sequences, expected.sequences
    assert torch.equal(result, expected)


def test_prepared_batch_with_padding_equals_each_alone():
    model = talker()
    optimize(model)
    long, short = random_tokens(model.config, batch=1, seq=70), random_tokens(model.config, batch=1, seq=21, seed=2)
    padded = torch.cat([torch.zeros(1, 49, dtype=torch.long), short], dim=1)
    mask = torch.cat([torch.ones(1, 70, dtype=torch.long), (torch.arange(70) >= 49).long()[None]])
    both = model.generate(torch.cat([long, padded]), attention_mask=mask, max_new_tokens=32, **GREEDY)
    for row, alone in zip(both, (long, short), strict=True):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=32, **GREEDY)
        assert torch.equal(row[-32:], expected[0, -32:])


def test_wrong_mask_would_be_seen():
    model = optimize(talker())
    tokens = random_tokens(model.config, batch=1, seq=12)
    seen, masked = torch.ones_like(tokens), torch.ones_like(tokens)
    masked[:, :5] = 0
    positions = torch.arange(12)[None]
    with torch.no_grad():
        one, other = (
            model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits for mask in (seen, masked)
        )
    assert relative_difference(one[:, 5:], other[:, 5:]) > 1e-2


def test_prepared_builds_nothing_while_context_batch_and_prompt_change(monkeypatch):
    model = optimize(talker())
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # of tests before
    monkeypatch.setattr(cpu_kernel, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    described = []
    inner = Prepared._pack
    monkeypatch.setattr(Prepared, "_pack", lambda self: described.append(1) or inner(self))
    for batch, seq, new in ((1, 5, 600), (1, 64, 8), (3, 33, 8), (8, 7, 4), (1, 300, 4)):
        prompt = random_tokens(model.config, batch=batch, seq=seq)
        model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **GREEDY)
    assert len(described) == 1
    assert torch._dynamo.utils.counters["stats"] == {}


def test_prepared_build_is_kept_on_disk(tmp_path):
    script = "from hf_llama_repro import cpu_kernel; cpu_kernel.load()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for compiles in (True, False):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ("compiling" in done.stderr) == compiles
        assert [file.suffix for file in (tmp_path / "hf_llama_repro").iterdir()] == [".so"]


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_prepared_on_processors_without_wide_vectors(processor, tmp_path, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("the processors named are of x86-64")
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in cpu_kernel.FLAGS]
    monkeypatch.setattr(cpu_kernel, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernel.load.cache_clear()
    try:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            model = talker(ARCHITECTURES["9/3"], dtype)
            tokens = random_tokens(model.config, batch=2, seq=7)
            expected = copy.deepcopy(model).float()(tokens).logits
            with torch.no_grad():
                assert relative_difference(optimize(model)(input_ids=tokens).logits, expected) < tolerance
    finally:
        monkeypatch.undo()
        cpu_kernel.load.cache_clear()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C\\+\\+ compiler was found"),
        ({"CXX": "false"}, "compiler failed"),
        ({"CXX": "false with arguments"}, "compiler failed"),
        ({"HF_LLAMA_REPRO_FAST": "off"}, "switched off"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_without_a_compiler_it_says_so_and_the_model_computes(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cpu_kernel.load.cache_clear()
    cpu_kernel.available.cache_clear()
    try:
        model = talker()
        with pytest.raises(InputError, match=message):
            optimize(model)
        prompt = random_tokens(model.config, batch=1, seq=8)
        assert model.generate(prompt, max_new_tokens=4, **GREEDY).shape == (1, 12)
    finally:
        monkeypatch.undo()
        cpu_kernel.load.cache_clear()
        cpu_kernel.available.cache_clear()


def test_a_damaged_build_is_named(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from hf_llama_repro import cpu_kernel; cpu_kernel.load()"]
    subprocess.run(command, env=environment, check=True)
    (built,) = (tmp_path / "hf_llama_repro").iterdir()
    built.write_bytes(b"\x7fELF")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert f"KernelError: {built} cannot be loaded" in done.stderr
    assert "remove it, and it is built again" in done.stderr


def test_prepared_on_cuda_uses_the_static_cache_until_restored(monkeypatch):
    """The device is a pretended one: what is set on the model is looked at, not what is computed."""
    for before in (None, "dynamic", "static"):
        model = talker()
        model.generation_config.cache_implementation = before
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert restore(model).generation_config.cache_implementation == before
        assert optimize(optimize(model)).generation_config.cache_implementation == "static"
        assert restore(model).generation_config.cache_implementation == before
        with pytest.raises(InputError, match="load_in_8bit"):
            optimize(model, int8=True)
        assert model.generation_config.cache_implementation == before
        monkeypatch.undo()


def test_prepared_is_undone(tmp_path):
    model = talker()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert restore(optimize(model)) is model
    assert "forward" not in vars(model)
    assert restore(model) is model
    optimize(optimize(model, int8=True))
    assert not model.forward.int8
    restore(model).train()(input_ids=random_tokens(model.config), labels=random_tokens(model.config)).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("int8", [False, True])
def test_prepared_saves_standard_weights(tmp_path, int8):
    model = talker()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize(model, int8=int8).generate(random_tokens(model.config), max_new_tokens=4, **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = LlamaReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_prepared_follows_weights_that_change():
    model = optimize(talker(), int8=True)
    tokens = random_tokens(model.config, batch=1, seq=8)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        model.lm_head.weight.mul_(2)
        assert relative_difference(model(input_ids=tokens).logits, 2 * before) < 1e-5
        model.to(torch.bfloat16)
        assert model(input_ids=tokens).logits.dtype == torch.bfloat16


def test_prepared_copy_is_independent():
    model = optimize(talker())
    twin = copy.deepcopy(model)
    tokens = random_tokens(model.config, batch=1, seq=8)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        model.model.norm.weight.zero_()
        assert torch.equal(twin(input_ids=tokens).logits, expected)
    assert twin.forward.model is twin


def test_prepared_refuses_training_and_adapters():
    model = talker()
    with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
        optimize(model.train())
    optimize(model.eval()).train()
    with pytest.raises(InputError, match="restore"):
        model(input_ids=random_tokens(model.config))
    restore(model).eval()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.eval()
    for unmerged in (adapted, adapted.base_model.model):
        with pytest.raises(InputError, match="merge the adapter first"):
            optimize(unmerged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), "float16"),
        (lambda model: model.model, "not a LlamaReproModel"),
        (lambda model: setattr(model.config, "hidden_act", "gelu") or model, "gelu"),
    ],
)
def test_prepared_refuses_what_it_does_not_know(change, message):
    with pytest.raises(InputError, match=message):
        optimize(change(talker()))


def test_prepared_model_of_two_dtypes_is_refused():
    model = talker(dtype=torch.bfloat16)
    optimize(model)
    model.model.norm.float()
    with pytest.raises(InputError, match=r"not of torch.bfloat16, torch.float32"):
        optimize(model)
    with pytest.raises(RuntimeError, match="dtype"):  # as without optimize
        model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=2, **GREEDY)


def test_prepared_leaves_other_dtypes_of_embeddings_and_autocast_to_the_ordinary_path():
    model = talker(dtype=torch.bfloat16)
    calls = counted(optimize(model))
    embeddings = model.model.embed_tokens(random_tokens(model.config, batch=1, seq=4)).detach()
    with torch.no_grad():
        assert model(inputs_embeds=embeddings).logits.dtype == torch.bfloat16
        assert len(calls) == 1
        with pytest.raises(RuntimeError, match="dtype"):  # as without optimize
            model(inputs_embeds=embeddings.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(inputs_embeds=embeddings.float()).logits.isfinite().all()
            assert model(inputs_embeds=embeddings).logits.isfinite().all()
    assert len(calls) == 1


def test_prepared_calls_the_hooks_of_users():
    model, seen = talker(), []
    tokens = random_tokens(model.config, batch=1, seq=4)
    with torch.no_grad():
        optimize(model)(input_ids=tokens, output_hidden_states=True)  # installs hooks of transformers
        calls = counted(model)
        model(input_ids=tokens)
        assert len(calls) == 1
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        model(input_ids=tokens)
        handle.remove()
        model(input_ids=tokens)
    assert (len(seen), len(calls)) == (1, 2)


def test_prepared_lora_merged_and_unmerged():
    """Unmerged, the ordinary path's fast parts apply; merged and prepared, the tokens are the same."""
    model = talker()
    prompt = random_tokens(model.config, batch=1, seq=40)
    plain = model.generate(prompt, max_new_tokens=48, **GREEDY)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    unmerged = adapted.generate(input_ids=prompt, max_new_tokens=48, **GREEDY)
    assert not torch.equal(unmerged, plain)
    merged = optimize(adapted.merge_and_unload())
    assert torch.equal(merged.generate(prompt, max_new_tokens=48, **GREEDY), unmerged)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 3), (2, 4), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_int8_is_the_model_with_rounded_weights(dtype, batch, seq):
    model = talker(ARCHITECTURES["9/3"], dtype)
    rounded = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.endswith(("_proj.weight", "lm_head.weight")):
                factor = parameter.abs().amax(dim=1, keepdim=True) / 127
                parameter.copy_((parameter / factor).round() * factor)
    tokens = random_tokens(model.config, batch=batch, seq=seq)
    with torch.no_grad():
        expected = rounded(tokens).logits
        logits = optimize(model, int8=True)(input_ids=tokens).logits
    # Activations are rounded too: to 15 bits of the largest of a token.
    assert relative_difference(logits, expected) < (5e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("seq", [1, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_prepared_int8_passes_on_what_is_not_finite(value, seq):
    model = optimize(talker(ARCHITECTURES["9/3"], torch.bfloat16), int8=True)
    embeddings = torch.randn(1, seq, model.config.hidden_size).bfloat16()
    embeddings[0, 0, 5] = value
    with torch.no_grad():
        assert model(inputs_embeds=embeddings).logits[0, 0].isnan().all()


def test_prepared_reads_the_8_bits_of_bitsandbytes(tmp_path):
    talker(dtype=torch.bfloat16).save_pretrained(tmp_path)
    quantized = LlamaReproForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16, device_map="cpu"
    ).eval()
    tokens = random_tokens(quantized.config, batch=1, seq=12)
    with torch.no_grad():
        expected = quantized(input_ids=tokens).logits
        calls = counted(optimize(quantized))
        logits = quantized(input_ids=tokens).logits
    assert len(calls) == 1
    assert relative_difference(logits, expected) < 5e-2


@pytest.mark.parametrize("tokens", [most_tokens(), most_tokens() + 1])
def test_prepared_is_for_few_tokens(tokens):
    model = talker()
    ids = random_tokens(model.config, batch=1, seq=tokens)
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=3).logits
        calls = counted(optimize(model))
        logits = model(input_ids=ids, logits_to_keep=3).logits
    assert relative_difference(logits, expected) < 1e-5
    assert len(calls) == (tokens <= most_tokens())
