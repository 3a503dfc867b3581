"""Generation: every cache and every way of decoding gives the tokens of plain greedy decoding, and of stock Llama."""

import pytest
import torch
from random_models import (
    ARCHITECTURES,
    TOLERANCE,
    random_model,
    random_tokens,
    relative_difference,
    stock_twin,
    tiny_config,
    tiny_tokenizer,
)
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils, pipeline, set_seed
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from hf_llama_repro import cpu_kernel, fast_paths
from hf_llama_repro.modeling_llama_repro import CACHE

GREEDY = {"max_new_tokens": 24, "do_sample": False}

# Offloading moves the cache from the accelerator to the CPU, through torch.cuda, wherever the model is.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a CUDA device"),
]
CACHES = [
    pytest.param(lambda config: DynamicCache(config=config), "cpu", id="dynamic"),
    pytest.param(lambda config: StaticCache(config=config, max_cache_len=100), "cpu", id="static"),
    pytest.param(lambda config: DynamicCache(config=config, offloading=True), "cuda", id="offloaded", marks=on_gpu),
    pytest.param(
        lambda config: StaticCache(config=config, max_cache_len=100, offloading=True),
        "cuda",
        id="offloaded static",
        marks=on_gpu,
    ),
]
architectures = pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)


def talker(fields=None, **how):
    """A random model that never stops by itself."""
    return random_model(tiny_config(eos_token_id=None, **(fields or {})), **how)


@torch.no_grad()
def cached_logits(model, tokens, cache, *, steps):
    """The logits of tokens fed piece by piece: `steps` are the lengths of the pieces."""
    pieces = tokens.split(steps, dim=1)
    return torch.cat([model(piece, use_cache=True, **{CACHE: cache}).logits for piece in pieces], dim=1)


@pytest.mark.parametrize(("new_cache", "device"), CACHES)
def test_cached_decoding_equals_uncached_logits(new_cache, device):
    model = talker().to(device)
    tokens = random_tokens(model.config, seq=80).to(device)
    with torch.no_grad():
        uncached = model(tokens, use_cache=False).logits
    # A prompt, single tokens, a piece of several after a filled cache, single tokens.
    cached = cached_logits(model, tokens, new_cache(model.config), steps=[40, *[1] * 10, 20, *[1] * 10])
    assert relative_difference(cached, uncached) < TOLERANCE


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@architectures
def test_cached_decoding_equals_uncached_logits_in_every_architecture(fields, attn_implementation):
    model = talker(fields, attn_implementation=attn_implementation)
    tokens = random_tokens(model.config, seq=72)
    with torch.no_grad():
        uncached = model(tokens, use_cache=False).logits
    cached = cached_logits(model, tokens, DynamicCache(config=model.config), steps=[64, *[1] * 8])
    assert relative_difference(cached, uncached) < TOLERANCE


def test_wrong_positions_in_cached_decoding_are_noticed():
    model = talker()
    tokens = random_tokens(model.config, seq=72)
    with torch.no_grad():
        uncached = model(tokens).logits[:, 64:]
        cache = getattr(model(tokens[:, :64], use_cache=True), CACHE)
        late = model(tokens[:, 64:], position_ids=torch.arange(65, 73)[None], **{CACHE: cache}).logits
    assert relative_difference(late, uncached) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("implementation", "device"),
    [
        ("dynamic", "cpu"),
        ("static", "cpu"),
        pytest.param("offloaded", "cuda", marks=on_gpu),
        pytest.param(
            "offloaded_static",
            "cuda",
            marks=[*on_gpu, pytest.mark.skip(reason="stock Llama's process ends too: torch 2.11, transformers 5.17")],
        ),
    ],
)
def test_every_cache_implementation_generates_the_same(implementation, device):
    model = talker().to(device)
    tokens = random_tokens(model.config).to(device)
    without = model.generate(tokens, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(tokens, cache_implementation=implementation, **GREEDY), without)


@pytest.mark.parametrize(
    ("backend", "available", "bits"),
    [
        ("quanto", is_optimum_quanto_available(), 4),
        ("hqq", is_hqq_available(), 4),
        ("fp8", hasattr(cache_utils, "Fp8QuantizedLayer"), None),
    ],
)
def test_quantized_cache_is_as_near_to_the_exact_one_as_stock_llamas(backend, available, bits):
    if not available:
        pytest.skip(f"what transformers needs for {backend} caches is not installed")
    model = talker()
    tokens, steps = random_tokens(model.config, seq=80), [64, *[1] * 16]
    exact = cached_logits(model, tokens, DynamicCache(config=model.config), steps=steps)
    errors = [
        relative_difference(
            cached_logits(each, tokens, QuantizedCache(backend, each.config, nbits=bits), steps=steps), exact
        )
        for each in (model, stock_twin(model))
    ]
    assert 0 < errors[0] < 1.25 * errors[1]


def test_left_padded_batch_generates_what_its_rows_generate_alone():
    model = talker()
    tokens = random_tokens(model.config, batch=3, seq=64)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 11, 40)):
        mask[row, :padding] = 0
    together = model.generate(tokens * mask, attention_mask=mask, pad_token_id=0, **GREEDY)
    for row, padding in enumerate((0, 11, 40)):
        alone = model.generate(tokens[row : row + 1, padding:], **GREEDY)
        assert torch.equal(together[row, padding:], alone[0])


WAYS = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3},
    "sampling": {**GREEDY, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "beam sampling": {**GREEDY, "do_sample": True, "num_beams": 2, "temperature": 1.5},
    "several samples": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.3},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "stops at the end token": {"max_new_tokens": 200, "do_sample": True, "eos_token_id": 7, "pad_token_id": 0},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_generates_what_stock_llama_generates(how):
    model = talker()
    tokens = random_tokens(model.config, seq=64)
    generated = []
    for each in (model, stock_twin(model)):
        set_seed(7)
        generated.append(each.generate(tokens, **how))
    assert torch.equal(*generated)


def test_sampling_with_another_seed_differs():
    model = talker()
    tokens = random_tokens(model.config, seq=64)
    set_seed(7)
    first = model.generate(tokens, **WAYS["sampling"])
    assert not torch.equal(model.generate(tokens, **WAYS["sampling"]), first)


@pytest.mark.parametrize("assistant_seed", [0, 1], ids=["assistant agrees", "assistant is wrong"])
def test_assisted_decoding_equals_greedy(assistant_seed):
    model, assistant = talker(), talker(seed=assistant_seed)
    tokens = random_tokens(model.config, batch=1, seq=64)
    assisted = model.generate(tokens, assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted, model.generate(tokens, **GREEDY))


def test_prompt_lookup_equals_greedy():
    model = talker()
    tokens = random_tokens(model.config, batch=1, seq=16).repeat(1, 4)
    looked_up = model.generate(tokens, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(looked_up, model.generate(tokens, **GREEDY))


@pytest.mark.parametrize("chunk", [1, 10, 63, 64, 100])
def test_chunked_prefill_equals_greedy(chunk):
    model = talker()
    tokens = random_tokens(model.config, seq=64)
    chunked = model.generate(tokens, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(chunked, model.generate(tokens, **GREEDY))


def test_generation_continues_from_a_filled_cache():
    model = talker()
    tokens = random_tokens(model.config, seq=64)
    whole = model.generate(tokens, **GREEDY)
    cache = DynamicCache(config=model.config)
    model.generate(tokens[:, :50], max_new_tokens=1, do_sample=False, **{CACHE: cache})
    assert torch.equal(model.generate(tokens, **GREEDY, **{CACHE: cache}), whole)


def test_generation_from_inputs_embeds_equals_that_from_tokens():
    model = talker()
    tokens = random_tokens(model.config, seq=64)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **GREEDY)
    assert torch.equal(embedded, model.generate(tokens, **GREEDY)[:, 64:])


KEPT = {
    "all": (0, list(range(80))),
    "last": (1, [79]),
    "last three": (3, [77, 78, 79]),
    "these": (torch.tensor([0, 5, 79]), [0, 5, 79]),
    "one, as a tensor": (torch.tensor([40]), [40]),
}


@pytest.mark.parametrize(("logits_to_keep", "positions"), KEPT.values(), ids=KEPT)
def test_logits_to_keep_computes_only_those_positions(logits_to_keep, positions):
    model = talker()
    tokens = random_tokens(model.config, seq=80)
    with torch.no_grad():
        kept = model(tokens, logits_to_keep=logits_to_keep).logits
        assert relative_difference(kept, model(tokens).logits[:, positions]) < TOLERANCE


@pytest.mark.parametrize("attn_implementation", ["paged|eager", "paged|sdpa"])
def test_continuous_batching_generates_the_same(attn_implementation, monkeypatch):
    packed = []
    monkeypatch.setattr(
        fast_paths, "_each_request", lambda *args, real=fast_paths._each_request: packed.append(1) or real(*args)
    )
    model = talker()
    prompts = [random_tokens(model.config, batch=1, seq=seq, seed=seq)[0] for seq in (64, 20, 33)]
    expected = [model.generate(prompt[None], **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    model.set_attn_implementation(attn_implementation)
    results = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, **GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=48),
    )
    assert [result.generated_tokens for result in results.values()] == expected
    # Older versions of transformers have a function of their own for this, which is asked by another name.
    assert bool(packed) == (model.config._attn_implementation == "sdpa" and cpu_kernel.available())


def test_text_generation_pipeline_writes_what_generate_writes(tmp_path):
    model = talker()
    tokenizer = tiny_tokenizer(model.config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = "w5 w9 w77"
    writer = pipeline("text-generation", str(tmp_path), device="cpu")
    text = writer(prompt, return_full_text=False, **GREEDY)[0]["generated_text"]
    tokens = model.generate(torch.tensor([[5, 9, 77]]), **GREEDY)[0, 3:]
    assert text == " ".join(f"w{token}" for token in tokens.tolist())
