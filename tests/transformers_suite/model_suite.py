"""transformers' common model tests, bound to stock Llama or to LlamaRepro, as the variable SUITE_MODEL says.

Collected by `run.py` only, in a process in which the package `tests` is the one of transformers.
"""

import importlib
import os
import unittest

import tests.test_fsdp_mixin as fsdp
import tests.test_pipeline_mixin as pipelines
import tests.test_tensor_parallel_mixin as tensor_parallel
import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama

if os.environ["SUITE_MODEL"] == "llama_repro":
    from hf_llama_repro import modeling_llama_repro as modeling

    PREFIX = "LlamaRepro"
else:
    modeling, PREFIX = modeling_llama, "Llama"


def model_class(suffix: str) -> type:
    return getattr(modeling, PREFIX + suffix)


def lift_lists_of_known_models():
    """Where the mixins decide by the name of a model or its type, makes both models equally known.

    Without this they skip tests of LlamaRepro silently, or run them without labels.
    """
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and "llama" in table:
            table.setdefault("llama_repro", table["llama"].replace("Llama", "LlamaRepro", 1))
    tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    fsdp._get_available_fsdp_workers = lambda: 4  # gloo runs more processes than there are cores


lift_lists_of_known_models()


class Tester:
    """The tiny model and its inputs, in the form in which the mixins ask for them."""

    config_class = model_class("Config")
    base_model_class = model_class("Model")
    causal_lm_class = model_class("ForCausalLM")
    sequence_classification_class = model_class("ForSequenceClassification")
    token_classification_class = model_class("ForTokenClassification")
    question_answering_class = model_class("ForQuestionAnswering")

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, intermediate_size = 99, 32, 37
    num_hidden_layers, num_attention_heads, num_key_value_heads = 2, 4, 2
    type_sequence_label_size, num_labels, num_choices = 2, 3, 4

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    @property
    def all_model_classes(self) -> list[type]:
        return [
            self.base_model_class,
            self.causal_lm_class,
            self.sequence_classification_class,
            self.token_classification_class,
            self.question_answering_class,
        ]

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            num_labels=self.num_labels,
            max_position_embeddings=512,
            hidden_act="gelu",
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}

    def prepare_config_and_inputs(self):
        config, inputs = self.prepare_config_and_inputs_for_common()
        sequence_labels = ids_tensor([self.batch_size], self.type_sequence_label_size)
        token_labels = ids_tensor([self.batch_size, self.seq_length], self.num_labels)
        choice_labels = ids_tensor([self.batch_size], self.num_choices)
        return config, inputs["input_ids"], None, inputs["attention_mask"], sequence_labels, token_labels, choice_labels

    def create_and_check_model(self, config, input_ids, _token_types, input_mask, *_labels):
        hidden_states = self.base_model_class(config).eval()(input_ids, attention_mask=input_mask).last_hidden_state
        assert hidden_states.shape == (self.batch_size, self.seq_length, self.hidden_size)


class CommonTest(ModelTesterMixin, GenerationTesterMixin, pipelines.PipelineTesterMixin):
    """What transformers has in tests/causal_lm_tester.py, for a folder that lacks this file."""

    all_model_classes = None

    def setUp(self):
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=Tester.config_class)
        self.all_model_classes = self.model_tester.all_model_classes

    def test_config(self):
        self.config_tester.run_common_tests()


if importlib.util.find_spec("tests.causal_lm_tester"):
    from tests.causal_lm_tester import CausalLMModelTest
else:
    CausalLMModelTest = CommonTest


PIPELINES = {
    "feature-extraction": Tester.base_model_class,
    "text-classification": Tester.sequence_classification_class,
    "text-generation": Tester.causal_lm_class,
    "token-classification": Tester.token_classification_class,
    "zero-shot": Tester.sequence_classification_class,
}


def missing(*mixins: type) -> list[type]:
    """Those of `mixins` which the version of transformers at hand does not put into CausalLMModelTest itself."""
    return [mixin for mixin in mixins if not issubclass(CausalLMModelTest, mixin)]


class ModelTest(
    CausalLMModelTest,
    *missing(TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin, fsdp.FSDPTesterMixin),
    unittest.TestCase,
):
    model_tester = None
    model_tester_class = Tester
    rotary_embedding_layer = model_class("RotaryEmbedding")
    model_split_percents = (0.5, 0.7, 0.8)  # as in transformers' own tests of Llama
    test_can_init_all_missing_weights_before_2023 = True  # else skipped for Llama, by its year
    _torch_compile_train_cls = Tester.causal_lm_class
    pipeline_model_mapping = PIPELINES if importlib.util.find_spec("tests.pipelines") else {}
