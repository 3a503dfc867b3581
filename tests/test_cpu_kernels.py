"""Attention and dropout of training on a CPU, beside PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from random_models import random_model, tiny_config
from torch import nn

from finetune import cpu_kernels
from finetune.cpu_kernels import ATTENTION, BITS, LONGEST, BitsDropout, ShortCausalAttention, use_cpu_kernels

HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 4), (8, 1), (4, 4)])


def query_key_value(heads: int, kv_heads: int, seq: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As attention gets them: transposed, so not in the order of their dimensions in memory."""
    torch.manual_seed(heads)
    return [
        torch.randn(2, seq, num, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        for num in (heads, kv_heads, kv_heads)
    ]


def output_and_gradients(attention, tensors: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    output = attention(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


def reference(query, key, value, scaling=0.3):
    """Written by positions: each query's own softmax over the keys up to it."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    rows = []
    for position in range(query.shape[2]):
        scores = query[:, :, position : position + 1] @ key[:, :, : position + 1].transpose(-1, -2) * scaling
        rows.append(scores.softmax(dim=-1) @ value[:, :, : position + 1])
    return torch.cat(rows, dim=2)


@HEADS
@pytest.mark.parametrize("seq", [64, 77])
def test_attention_and_its_gradients(heads, kv_heads, seq):
    tensors = query_key_value(heads, kv_heads, seq, torch.float64)
    upstream = torch.randn_like(tensors[0])
    ours = output_and_gradients(lambda *qkv: ShortCausalAttention.apply(*qkv, 0.3), tensors, upstream)
    for own, expected in zip(ours, output_and_gradients(reference, tensors, upstream), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", ["not scaled", "not causal", "heads interleaved"])
def test_the_comparison_would_notice(wrong):
    tensors = query_key_value(8, 2, 64, torch.float64)
    query, key, value = tensors
    output = {
        "not scaled": lambda: ShortCausalAttention.apply(query, key, value, 1.0),
        "not causal": lambda: F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True),
        "heads interleaved": lambda: reference(query, key.repeat(1, 4, 1, 1), value.repeat(1, 4, 1, 1)),
    }[wrong]()
    assert (output - reference(*tensors)).abs().max() > 0.01


@HEADS
def test_in_bf16_as_near_to_the_exact_result_as_sdpa_nearly(heads, kv_heads):
    exact = query_key_value(heads, kv_heads, 128, torch.float64)
    upstream = torch.randn_like(exact[0])
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected = output_and_gradients(reference, exact, upstream)

    def errors(attention) -> list[float]:
        found = output_and_gradients(attention, rounded, upstream.bfloat16())
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    ours = errors(lambda *qkv: ShortCausalAttention.apply(*qkv, 0.3))
    sdpa = errors(lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=0.3, is_causal=True, enable_gqa=True))
    for own, theirs in zip(ours, sdpa, strict=True):
        assert own < min(2 * theirs + 1e-3, 0.02), (ours, sdpa)


def lora_model(dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0):
    model = random_model(tiny_config()).to(dtype)
    return get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Lengths of the sequences that took the short way."""
    lengths: list[int] = []

    class Counted:
        @staticmethod
        def apply(query, key, value, scaling):
            lengths.append(query.shape[2])
            return ShortCausalAttention.apply(query, key, value, scaling)

    monkeypatch.setattr(cpu_kernels, "ShortCausalAttention", Counted)
    return lengths


@pytest.mark.parametrize(("dtype", "seq", "taken"), [("bfloat16", 64, 1), ("float32", 64, 0), ("bfloat16", 528, 0)])
def test_a_training_step_takes_it_where_it_is_faster(calls, dtype, seq, taken):
    model = lora_model(getattr(torch, dtype))
    ids = torch.randint(3, 100, (2, seq))
    before = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert not calls
    use_cpu_kernels(model)
    after = model(input_ids=ids, labels=ids, use_cache=False).loss
    after.backward()
    assert calls == [seq] * taken * model.config.num_hidden_layers
    assert LONGEST < 528
    torch.testing.assert_close(after, before, rtol=5e-3, atol=0)


def test_masks_and_caches_take_sdpa(calls, plain_paths):
    model = lora_model(torch.float32).eval()
    ids, mask = torch.randint(3, 100, (2, 64)), torch.ones(2, 64, dtype=torch.long)
    mask[0, :9] = 0

    def results():
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return logits, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)

    with torch.no_grad():
        before = results()
        use_cpu_kernels(model)
        after = results()
    assert model.get_base_model().config._attn_implementation == ATTENTION
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.bfloat16()
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert not calls


def test_dropout_drops_its_share_and_scales_the_rest():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    output = BitsDropout(0.05)(x)
    dropped = output == 0
    # 1,001,000 draws: one standard deviation of the share is 0.0002.
    assert abs(dropped.float().mean() - 0.05) < 0.001
    for axis in (0, 1):  # no row, no column is favoured
        shares = dropped.float().mean(dim=axis)
        assert shares.std() < 1.2 * (0.05 * 0.95 / 1000) ** 0.5
    assert torch.allclose(output[~dropped], torch.tensor(1 / 0.95), rtol=1e-4)
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())


def test_neighbours_are_dropped_independently():
    torch.manual_seed(1)
    dropped = (BitsDropout(0.3)(torch.ones(1 << 20)) == 0).float() - 0.3
    for distance in (1, 2, 3, 4, 8):
        assert abs((dropped[distance:] * dropped[:-distance]).mean()) < 5 * 0.21 / (1 << 10)


def test_dropout_repeats_by_the_seed_and_differs_between_calls():
    drop, x = BitsDropout(0.5), torch.ones(4096)
    torch.manual_seed(2)
    first, second = drop(x), drop(x)
    torch.manual_seed(2)
    assert torch.equal(first, drop(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1 / BITS / 4])
def test_dropout_of_nothing(p):
    x = torch.randn(7)
    assert BitsDropout(p)(x) is x
    assert BitsDropout(0.5).eval()(x) is x


def test_every_dropout_of_an_adapter_is_replaced():
    model = lora_model(dropout=0.1)
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Dropout)]
    assert set(kinds) == {nn.Dropout}
    use_cpu_kernels(model)
    replaced = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert {type(module) for module in replaced} == {BitsDropout}
    assert len(replaced) == len(kinds)
    assert {module.p for module in replaced} == {0.1}
