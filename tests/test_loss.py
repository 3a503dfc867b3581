"""The loss of the causal LM against transformers' own, which holds all logits in fp32 at once."""

import pytest
import torch
from random_models import TOLERANCE, random_model, relative_difference, tiny_config
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


HIDDEN = 48


def head_and_batch(dtype: torch.dtype = torch.float32):
    """An output matrix, hidden states before it, and labels as above; the logits take several blocks of rows."""
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(HIDDEN, VOCAB, bias=False).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator) / 2)
    hidden = torch.randn(BATCH * 16, SEQ, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = batch()[1].repeat(16, 1)
    return head, hidden, labels


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(2.5 * loss, tensors))


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 1000}, {"num_items_in_batch": torch.tensor(77)}], ids=str
)
def test_without_logits_loss_and_gradients_are_those_of_transformers(options):
    head, hidden, labels = head_and_batch()
    ours = causal_lm_loss(hidden, labels, VOCAB, lm_head=head, **options)
    theirs = ForCausalLMLoss(head(hidden), labels, VOCAB, **options)
    assert relative_difference(ours.detach(), theirs.detach()) < TOLERANCE
    for own, stock in zip(gradients(ours, hidden, head.weight), gradients(theirs, hidden, head.weight), strict=True):
        assert relative_difference(own, stock) < TOLERANCE


def test_without_logits_a_frozen_head_gets_no_gradient_and_an_adapter_on_it_does():
    head, hidden, labels = head_and_batch()
    head.requires_grad_(False)
    head.register_parameter("lora_B", torch.nn.Parameter(torch.randn(VOCAB, 2) / 9))
    head.forward = lambda x: torch.nn.functional.linear(x, head.weight) + x[..., :2] @ head.lora_B.T
    ours, theirs = causal_lm_loss(hidden, labels, VOCAB, lm_head=head), ForCausalLMLoss(head(hidden), labels, VOCAB)
    ours.backward()
    assert head.weight.grad is None
    assert relative_difference(head.lora_B.grad, torch.autograd.grad(theirs, head.lora_B)[0]) < TOLERANCE


def test_without_logits_only_blocks_of_them_are_ever_in_memory():
    head, hidden, labels = head_and_batch()
    shapes = []
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    causal_lm_loss(hidden, labels, VOCAB, lm_head=head).backward()
    assert len(shapes) > 1
    counted = int((labels[:, 1:] != -100).sum())
    # Up to 31 rows that do not count make the last block one of few shapes.
    assert counted <= sum(shape[0] for shape in shapes) < counted + 32 < labels.numel()


def test_without_logits_and_without_gradients_the_loss_is_the_same():
    head, hidden, labels = head_and_batch()
    expected = causal_lm_loss(hidden, labels, VOCAB, lm_head=head).detach()
    with torch.no_grad():
        assert torch.equal(causal_lm_loss(hidden, labels, VOCAB, lm_head=head), expected)


def test_without_logits_in_bf16_the_gradient_is_that_of_the_logits_rounded_once_more():
    head, hidden, labels = head_and_batch(torch.bfloat16)
    ours = gradients(causal_lm_loss(hidden, labels, VOCAB, lm_head=head), hidden, head.weight)
    theirs = gradients(ForCausalLMLoss(head(hidden), labels, VOCAB), hidden, head.weight)
    for own, stock in zip(ours, theirs, strict=True):
        assert own.dtype == torch.bfloat16
        assert relative_difference(own.float(), stock.float()) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_a_model_that_skips_its_logits_gives_the_same_loss_and_gradients(train):
    model = random_model(tiny_config(tie_word_embeddings=True)).train(train)
    tokens = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(64) < 20, -100)
    full, skipped = model(tokens, labels=labels), model(tokens, labels=labels, skip_logits=True)
    assert skipped.logits is None
    assert relative_difference(skipped.loss.detach(), full.loss.detach()) < TOLERANCE
    parameters = list(model.parameters())
    for own, other in zip(gradients(skipped.loss, *parameters), gradients(full.loss, *parameters), strict=True):
        assert relative_difference(own, other) < TOLERANCE
