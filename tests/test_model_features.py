"""What a transformers model can do besides logits: outputs, heads, training, compiling, exporting, parallel plans."""

import re

import pytest
import torch
import torch.nn.functional as F
from random_models import (
    TOLERANCE,
    random_model,
    random_tokens,
    relative_difference,
    stock_twin,
    tiny_config,
)
from transformers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    StaticCache,
)
from transformers.integrations.executorch import convert_and_export_with_cache

from hf_llama_repro import (
    LlamaReproForCausalLM,
    LlamaReproForQuestionAnswering,
    LlamaReproForSequenceClassification,
    LlamaReproForTokenClassification,
    LlamaReproModel,
)
from hf_llama_repro.modeling_llama_repro import CACHE
from hf_llama_repro.versions import checkpoint_activations


@torch.no_grad()
def logits_of(model, tokens, **inputs):
    return model(tokens, **inputs).logits


# Outputs.


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_attention_implementation_gives_the_logits_of_eager(attn_implementation):
    eager, other = random_model(attn_implementation="eager"), random_model(attn_implementation=attn_implementation)
    tokens = random_tokens(eager.config)
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    difference = relative_difference(
        logits_of(other, tokens, attention_mask=mask)[mask.bool()],
        logits_of(eager, tokens, attention_mask=mask)[mask.bool()],
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("output", ["hidden_states", "attentions"])
@pytest.mark.parametrize("model_class", [LlamaReproForCausalLM, LlamaReproModel])
def test_output_asked_for_in_the_configuration_is_that_asked_for_by_argument(model_class, output):
    model = random_model(tiny_config(), model_class, attn_implementation="eager")
    tokens = random_tokens(model.config)
    by_argument = model(tokens, **{f"output_{output}": True})[output]
    setattr(model.config, f"output_{output}", True)
    by_config = model(tokens)[output]
    assert len(by_argument) == {"hidden_states": 3, "attentions": 2}[output]
    assert all(torch.equal(*pair) for pair in zip(by_argument, by_config, strict=True))


def test_output_not_asked_for_is_not_there():
    model = random_model(attn_implementation="eager")
    assert set(model(random_tokens(model.config))) == {"logits", CACHE}


@pytest.mark.parametrize("model_class", [LlamaReproForCausalLM, LlamaReproModel])
def test_return_dict_false_gives_the_same_as_a_tuple(model_class):
    model = random_model(tiny_config(), model_class)
    tokens = random_tokens(model.config)
    by_argument = model(tokens, return_dict=False)
    model.config.return_dict = False
    for outputs in (by_argument, model(tokens)):
        assert isinstance(outputs, tuple)
        assert torch.equal(outputs[0], model(tokens, return_dict=True)[0])


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 64)}])
def test_neither_or_both_kinds_of_input_are_refused(inputs):
    with pytest.raises(ValueError, match="exactly one"):
        random_model()(**inputs)


HEADS = {
    "sequence": (
        LlamaReproForSequenceClassification,
        LlamaForSequenceClassification,
        {"labels": torch.tensor([0, 2])},
    ),
    "tokens": (
        LlamaReproForTokenClassification,
        LlamaForTokenClassification,
        {"labels": torch.arange(160).view(2, 80) % 3},
    ),
    "question answering": (
        LlamaReproForQuestionAnswering,
        LlamaForQuestionAnswering,
        {"start_positions": torch.tensor([3, 40]), "end_positions": torch.tensor([9, 79])},
    ),
}


@pytest.mark.parametrize(("model_class", "stock_class", "targets"), HEADS.values(), ids=HEADS)
def test_head_gives_the_outputs_and_the_loss_of_stock_llamas(model_class, stock_class, targets):
    model = random_model(tiny_config(num_labels=2 if "start_positions" in targets else 3, pad_token_id=0), model_class)
    tokens = random_tokens(model.config)
    tokens[1, 60:] = 0
    ours, theirs = (each(tokens, **targets) for each in (model, stock_twin(model, stock_class)))
    assert set(ours) == set(theirs)
    for name in set(ours) - {CACHE}:
        assert relative_difference(ours[name], theirs[name]) < TOLERANCE, name


# Training.


def test_num_items_in_batch_divides_the_summed_loss():
    model = random_model()
    tokens = random_tokens(model.config)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / 1000
    assert relative_difference(model(tokens, labels=tokens, num_items_in_batch=1000).loss, expected) < TOLERANCE


def test_shift_labels_are_not_shifted_again():
    model = random_model()
    tokens = random_tokens(model.config)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = model(tokens, labels=tokens, shift_labels=shifted).loss
    assert relative_difference(loss, model(tokens, labels=tokens).loss) < TOLERANCE


def test_attention_dropout_is_that_of_stock_llama():
    model = random_model(tiny_config(attention_dropout=0.5), attn_implementation="eager").train()
    tokens, losses = random_tokens(model.config), []
    for each in (model, stock_twin(model)):
        torch.manual_seed(0)
        losses.append(each(tokens, labels=tokens).loss)
    assert relative_difference(*losses) < TOLERANCE
    assert relative_difference(model.eval()(tokens, labels=tokens).loss, losses[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = random_model().train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=use_reentrant)
            model.enable_input_require_grads()
        tokens = random_tokens(model.config)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert max(relative_difference(*pair) for pair in zip(*gradients, strict=True)) < TOLERANCE


def test_gradient_checkpointing_computes_layers_again():
    model = random_model().train()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(random_tokens(model.config)).logits.sum().backward()
    assert len(calls) == 2


# Compiling and exporting.


def test_compiled_as_one_graph_equals_eager():
    model = random_model(tiny_config(num_hidden_layers=1))
    tokens = random_tokens(model.config)
    compiled = torch.compile(model, fullgraph=True)
    assert relative_difference(logits_of(compiled, tokens), logits_of(model, tokens)) < TOLERANCE


def test_compiled_decoding_does_not_recompile_while_the_static_cache_fills():
    model = random_model()
    tokens = random_tokens(model.config, seq=80)
    cache = StaticCache(config=model.config, max_cache_len=128)
    logits = [logits_of(model, tokens[:, :64], **{CACHE: cache})]
    torch.compiler.reset()
    decode = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits.append(decode(tokens[:, 64:65], **{CACHE: cache}).logits)
        with torch._dynamo.config.patch(error_on_recompile=True):
            logits += [decode(token, **{CACHE: cache}).logits for token in tokens[:, 65:].split(1, dim=1)]
    assert relative_difference(torch.cat(logits, dim=1), logits_of(model, tokens)) < TOLERANCE


def test_exported_program_takes_other_batches_and_lengths():
    model = random_model()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": random_tokens(model.config), "use_cache": False}
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={"input_ids": sizes, "use_cache": None}, strict=False
    )
    other = random_tokens(model.config, batch=3, seq=50)
    exported = program.module()(input_ids=other, use_cache=False).logits
    assert relative_difference(exported, logits_of(model, other)) < TOLERANCE


def test_program_exported_for_executorch_decodes_like_the_model():
    model = random_model()
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 100}
    tokens = random_tokens(model.config, batch=1, seq=70)
    with torch.no_grad():
        program = convert_and_export_with_cache(
            model, example_input_ids=tokens[:, :1], example_cache_position=torch.tensor([0])
        ).module()
        steps = [
            program(input_ids=tokens[:, position : position + 1], cache_position=torch.tensor([position]))
            for position in range(70)
        ]
    assert relative_difference(torch.cat(steps, dim=1), logits_of(model, tokens)) < TOLERANCE


# Parallelism.


@pytest.mark.parametrize("plan", ["tp", "pp", "fsdp"])
def test_parallel_plan_names_modules_that_exist(plan):
    model = random_model()
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    of_base = getattr(model.config, f"base_model_{plan}_plan", None) or {}
    named = {f"model.{name}" for name in of_base} | set(getattr(model, f"_{plan}_plan") or {})
    assert named - modules - {"model.layers"} == set()
    assert "lm_head" in named
