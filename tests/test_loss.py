"""The loss of the causal LM against transformers' own, which holds all logits in fp32 at once."""

import pytest
import torch
from random_models import TOLERANCE, relative_difference
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_llama_repro.modeling_llama_repro import SummedCrossEntropy, causal_lm_loss

VOCAB = 4099
BATCH, SEQ = 3, 120  # more rows than a block holds with this vocabulary


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that want a gradient, and labels of which every fifth and a whole sequence do not count."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(BATCH, SEQ, VOCAB, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    labels[:, ::5] = -100
    labels[1] = -100
    return logits, labels


def loss_and_gradient(function, logits: torch.Tensor, labels: torch.Tensor, **options):
    logits.grad = None
    loss = function(logits=logits, labels=labels, vocab_size=VOCAB, **options)
    (2.5 * loss).backward()
    return loss.detach(), logits.grad


def test_the_batch_takes_several_blocks():
    logits, labels = batch()
    assert len(list(SummedCrossEntropy._blocks(logits.flatten(0, 1), labels.flatten()))) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 1000},
        {"num_items_in_batch": torch.tensor(77)},
        {"ignore_index": 7},
        {"shifted": True},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_transformers(options):
    options = dict(options)
    logits, labels = batch()
    if options.pop("shifted", False):
        options["shift_labels"] = labels
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, 7)
    ours = loss_and_gradient(causal_lm_loss, logits, labels, **options)
    theirs = loss_and_gradient(ForCausalLMLoss, logits, labels, **options)
    assert relative_difference(ours[0], theirs[0]) < TOLERANCE
    assert relative_difference(ours[1], theirs[1]) < TOLERANCE


def test_labels_shifted_twice_would_give_another_loss():
    logits, labels = batch()
    once = causal_lm_loss(logits, labels, VOCAB)
    twice = causal_lm_loss(logits, labels.roll(-1, dims=1), VOCAB)
    assert relative_difference(twice, once) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_16_bit_logits_is_rounded_once(dtype):
    logits, labels = batch(dtype)
    ours = loss_and_gradient(causal_lm_loss, logits, labels)
    theirs = loss_and_gradient(ForCausalLMLoss, logits, labels)
    assert relative_difference(ours[0], theirs[0]) < TOLERANCE
    assert ours[1].dtype == dtype
    assert relative_difference(ours[1].float(), theirs[1].float()) < 2 * torch.finfo(dtype).eps


def test_without_a_label_that_counts_the_loss_is_nan_as_in_transformers():
    logits, labels = batch()
    assert causal_lm_loss(logits, torch.full_like(labels, -100), VOCAB).isnan()
    assert ForCausalLMLoss(logits, torch.full_like(labels, -100), VOCAB).isnan()


def test_nan_logits_of_positions_without_a_label_do_no_harm():
    logits, labels = batch()
    with torch.no_grad():
        logits[1] = float("nan")  # the sequence without labels
    loss, gradient = loss_and_gradient(causal_lm_loss, logits, labels)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_compiled_the_loss_is_the_same():
    logits, labels = batch()
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (loss_and_gradient(function, logits, labels) for function in (compiled, causal_lm_loss))
    assert relative_difference(ours[0], theirs[0]) < TOLERANCE
    assert relative_difference(ours[1], theirs[1]) < TOLERANCE
