"""The batches of a training run: which records, in which order, how much padding, and that padding changes nothing."""

import pytest
import torch
from finetune_runs import CPU, changed, loaded
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.encoding import IGNORED
from finetune.training import BatchesOfOneLength, collate, held_out_loss


def test_a_step_sees_the_records_that_it_would_see_unsorted():
    lengths = [7 * index % 31 for index in range(100)]
    sampler = BatchesOfOneLength(lengths, 32, seed=5)
    order, plain = list(sampler), sampler.shuffled()
    assert order != plain
    for start in range(0, 100, 32):
        step = order[start : start + 32]
        assert sorted(step) == sorted(plain[start : start + 32])
        assert [lengths[index] for index in step] == sorted((lengths[index] for index in step), reverse=True)


def test_every_epoch_has_an_order_of_its_own_that_can_be_had_again():
    sampler, again = (BatchesOfOneLength(list(range(50)), 8, seed=5) for _ in range(2))
    first = list(sampler)
    sampler.epoch = again.epoch = 1
    assert list(sampler) == list(again) != first


def test_padding_changes_neither_loss_nor_gradients(recipe):
    """Against each record by itself, on stock Llama."""
    model, data = loaded(changed(recipe, method="full"))
    config = LlamaConfig(
        **{k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    )
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict(model.state_dict())
    model.eval()
    examples = data.train[:6]
    counted = sum(label != IGNORED for example in examples for label in example.labels)
    loss = model(**collate(examples), skip_logits=True, num_items_in_batch=counted).loss
    loss.backward()
    total = 0.0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        part = stock(input_ids=ids, labels=labels, num_items_in_batch=counted).loss
        part.backward()
        total += part.item()
    assert len({len(example.input_ids) for example in examples}) > 1
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for (name, own), (_, reference) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batch(recipe):
    model, data = loaded(recipe)
    values = [held_out_loss(model, data.train, rows, CPU) for rows in (1, 3, 8)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
