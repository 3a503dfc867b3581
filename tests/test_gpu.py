"""On a CUDA device: the same calls compute what stock Llama does, prepared and not, with every attention there is."""

import pytest
import torch
from random_models import ARCHITECTURES, random_model, random_tokens, relative_difference, stock_twin, tiny_config
from transformers import BitsAndBytesConfig

from hf_llama_repro import LlamaReproForCausalLM, optimize, restore
from hf_llama_repro.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}


def talker(fields=None, dtype=torch.float32):
    return random_model(tiny_config(eos_token_id=None, **(fields or {}))).to("cuda", dtype)


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_equal_stock_llamas(fields, attn_implementation):
    model = talker(fields)
    model.set_attn_implementation(attn_implementation)
    tokens = random_tokens(model.config).cuda()
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, stock_twin(model).cuda()(tokens).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_tokens_equal_the_ordinary_ones(dtype):
    model = talker(dtype=dtype)
    prompt = random_tokens(model.config, batch=2, seq=40).cuda()
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(optimize(model).generate(prompt, **GREEDY), expected)
    assert restore(model).generation_config.cache_implementation is None
    with pytest.raises(InputError, match="load_in_8bit"):
        optimize(model, int8=True)


def test_int8_of_bitsandbytes_generates(tmp_path):
    talker(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = LlamaReproForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cuda"
    )
    assert model.generate(random_tokens(model.config).cuda(), **GREEDY).shape[1] == 80 + 32
